"""onnxruntime on the CPU: inputs and output bound to the loop's own arrays, so that a step copies nothing."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from sr3rt.backends import Floats, Request
from sr3rt.bundle import HALF, NETWORK, WEIGHTS, WEIGHTS_BEFORE, Bundle
from sr3rt.errors import BackendError, MissingExtra

if TYPE_CHECKING:
    import onnxruntime


def why_not() -> str | None:
    """Why this backend cannot run here, or None when it can."""
    return None if find_spec("onnxruntime") else str(MissingExtra("the onnxruntime backend", "onnxruntime", "cpu"))


def refusal(bundle: Bundle, request: Request) -> str | None:
    """Why this backend cannot do what is asked with that bundle, or None when it can."""
    if request.precision not in ("auto", "fp32", "fp16"):
        return f"the onnxruntime backend has fp32 and fp16, precision {request.precision!r} was asked for: use auto or fp32"
    if _graph(request)[0] not in bundle.manifest.files:
        return f"{bundle.path} has no network in {_graph(request)[1]}: make it with  python export/to_trt.py {bundle.path}"
    if request.device not in ("auto", "cpu"):
        return f"the onnxruntime backend runs on the cpu, device {request.device!r} was asked for: use auto or cpu"
    return None


def _graph(request: Request) -> tuple[str, str]:
    """The file to run and its precision."""
    return (HALF, "fp16") if request.precision == "fp16" else (NETWORK, "fp32")


def load(bundle: Bundle, request: Request) -> OrtNetwork:
    """Raises MissingExtra, BackendError (precision or device that it does not have) or BundleCorrupt."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        if error.name != "onnxruntime":
            raise
        raise MissingExtra("the onnxruntime backend", "onnxruntime", "cpu") from None
    reason = refusal(bundle, request)
    if reason:
        raise BackendError(reason)
    name, precision = _graph(request)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = request.thread_count
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between calls its threads would take the loop's processors
    beside = {WEIGHTS, WEIGHTS_BEFORE}.intersection(bundle.manifest.files if name == NETWORK else ())
    weights = {file: bundle.read(file) for file in beside}
    options.add_external_initializers_from_files_in_memory([*weights], [*weights.values()], [*map(len, weights.values())])
    model = bundle.read(name)
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions have no common base
        raise BackendError(f"onnxruntime {onnxruntime.__version__} cannot load {bundle.path / name}: {error}") from error
    return OrtNetwork(session, precision)


class OrtNetwork:
    """A `Network` over one session. Sessions are thread-safe; each binding is its own.

    fp16 is what a GPU computes, slowly: few CPUs have its arithmetic, and onnxruntime widens what they lack.
    """

    backend, device = "onnxruntime", "cpu"

    def __init__(self, session: onnxruntime.InferenceSession, precision: str = "fp32") -> None:
        self._session, self.precision = session, precision

    def bind(self, x: Floats, y: Floats, level: Floats, out: Floats) -> Callable[[], None]:
        """As `Network.bind`. The arrays' memory is bound, not copied. A call raises BackendError, above all when memory runs out."""
        binding = self._session.io_binding()
        for name, array in (("x", x), ("y", y), ("level", level)):
            binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        binding.bind_output("out", "cpu", 0, np.float32, out.shape, out.ctypes.data)
        arrays = (x, y, level, out)  # the binding holds only addresses

        def run() -> None:
            assert arrays
            try:
                self._session.run_with_iobinding(binding)
            except Exception as error:  # onnxruntime's own exceptions have no common base
                raise BackendError(
                    f"onnxruntime failed on {'×'.join(map(str, x.shape))} (batch, channels, height, width): {error}"
                ) from error

        return run
