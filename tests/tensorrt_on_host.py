"""TensorRT's runtime on the host (its own crashes without a GPU): engines whose network is run by another backend. For test_tensorrt.py.

Every name that is used is one of the real package's.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from cuda_on_host import Cuda

from sr3rt.backends import Network

INPUTS = {"x": (-1, 3, -1, -1), "y": (-1, 3, -1, -1), "level": (-1, 1)}


def package(real: Any, made: Cuda, network: Callable[[bytes], Network | None]) -> Any:
    """Stands for `real`, the package. network(plan): what an engine computes, None for one that cannot be loaded."""

    class Context:
        def __init__(self, inner: Network) -> None:
            self._inner = inner
            self._addresses: dict[str, int] = {}
            self._shapes: dict[str, tuple[int, ...]] = {}

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            self._shapes[name] = tuple(shape)
            return len(shape) == len(INPUTS[name])

        def set_tensor_address(self, name: str, address: int) -> bool:
            self._addresses[name] = address
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            addresses, shapes = dict(self._addresses), {**self._shapes, "out": self._shapes["x"]}

            def work() -> None:
                arrays = {name: made.array(addresses[name], shapes[name]) for name in shapes}
                inputs = [np.ascontiguousarray(arrays[name]) for name in INPUTS]
                out = np.empty_like(arrays["out"])
                self._inner.bind(*inputs, out)()
                arrays["out"][:] = out

            made.enqueue(stream_handle, work)
            return True

    class Engine:
        num_io_tensors = 4

        def __init__(self, inner: Network) -> None:
            self._inner = inner

        def get_tensor_name(self, index: int) -> str:
            return [*INPUTS, "out"][index]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return INPUTS.get(name, INPUTS["x"])

        def create_execution_context(self) -> Context:
            return Context(self._inner)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            assert isinstance(logger, real.ILogger)

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            inner = network(plan)
            return None if inner is None else Engine(inner)

    for ours, theirs in ((Context, real.IExecutionContext), (Engine, real.ICudaEngine), (Runtime, real.Runtime)):
        assert all(hasattr(theirs, name) for name in vars(ours) if not name.startswith("_"))
    return SimpleNamespace(__version__=real.__version__, Runtime=Runtime)
