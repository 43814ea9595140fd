"""TensorRT's runtime on the host (its own crashes without a GPU): engines whose graph is run by another library. For test_tensorrt.py.

Every name that is used is one of the real package's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Protocol

from cuda_on_host import Cuda

from sr3rt.backends import Floats


class Plan(Protocol):
    """What an engine computes. shapes: of its inputs and outputs, by name."""

    shapes: Mapping[str, tuple[int, ...]]
    outputs: tuple[str, ...]

    def __call__(self, arrays: Mapping[str, Floats]) -> Mapping[str, Floats]: ...


CACHE = b"what was compiled"


def package(real: Any, made: Cuda, loaded: Callable[[bytes], Plan | None], compiled: list[Plan]) -> Any:
    """Stands for `real`, the package. loaded(plan): None for an engine that cannot be. compiled: gets what no cache held."""

    class Context:
        def __init__(self, plan: Plan) -> None:
            self._plan = plan
            self._addresses: dict[str, int] = {}

        def set_tensor_address(self, name: str, address: int) -> bool:
            self._addresses[name] = address
            return name in self._plan.shapes

        def execute_async_v3(self, stream_handle: int) -> bool:
            addresses = dict(self._addresses)

            def work() -> None:
                arrays = {name: made.array(addresses[name], shape) for name, shape in self._plan.shapes.items()}
                outputs = {name: arrays.pop(name) for name in self._plan.outputs}
                for name, value in self._plan({name: array.copy() for name, array in arrays.items()}).items():
                    outputs[name][:] = value

            made.enqueue(stream_handle, work)
            return True

    class Engine:
        def __init__(self, plan: Plan) -> None:
            self._plan, self.num_io_tensors = plan, len(plan.shapes)

        def get_tensor_name(self, index: int) -> str:
            return [*self._plan.shapes][index]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return self._plan.shapes[name]

        def create_runtime_config(self) -> RuntimeConfig:
            return RuntimeConfig()

        def create_execution_context(self, runtime_config: RuntimeConfig | None = None) -> Context:
            if runtime_config and runtime_config.cache:
                runtime_config.cache.compile(self._plan)
            return Context(self._plan)

    class RuntimeCache:
        def __init__(self) -> None:
            self._content = b""

        def compile(self, plan: Plan) -> None:
            if not self._content:
                compiled.append(plan)
                self._content = CACHE

        def deserialize(self, blob: bytes) -> bool:
            if blob != CACHE:
                return False
            self._content = blob
            return True

        def serialize(self) -> memoryview:
            return memoryview(self._content)

    class RuntimeConfig:
        cache: RuntimeCache | None = None

        def create_runtime_cache(self) -> RuntimeCache:
            return RuntimeCache()

        def set_runtime_cache(self, cache: RuntimeCache) -> bool:
            self.cache = cache
            return True

    class Runtime:
        def __init__(self, logger: Any) -> None:
            assert isinstance(logger, real.ILogger)

        def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
            plan = loaded(data)
            return None if plan is None else Engine(plan)

    pairs = [(Context, real.IExecutionContext), (Engine, real.ICudaEngine), (Runtime, real.Runtime)]
    pairs += [(RuntimeCache, real.IRuntimeCache), (RuntimeConfig, real.IRuntimeConfig)]
    for ours, theirs in pairs:
        assert all(hasattr(theirs, name) for name in vars(ours) if not name.startswith("_") and name not in ("cache", "compile"))
    assert hasattr(real.ICudaEngine, "num_io_tensors")
    return SimpleNamespace(__version__=real.__version__, Runtime=Runtime)
