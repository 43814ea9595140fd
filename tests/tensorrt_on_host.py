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


def package(real: Any, made: Cuda, loaded: Callable[[bytes], Plan | None]) -> Any:
    """Stands for `real`, the package. loaded(plan): None for an engine that cannot be."""

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

        def create_execution_context(self) -> Context:
            return Context(self._plan)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            assert isinstance(logger, real.ILogger)

        def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
            plan = loaded(data)
            return None if plan is None else Engine(plan)

    for ours, theirs in ((Context, real.IExecutionContext), (Engine, real.ICudaEngine), (Runtime, real.Runtime)):
        assert all(hasattr(theirs, name) for name in vars(ours) if not name.startswith("_"))
    assert hasattr(real.ICudaEngine, "num_io_tensors")
    return SimpleNamespace(__version__=real.__version__, Runtime=Runtime)
