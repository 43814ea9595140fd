"""PyTorch on a GPU: a bundle's program in the loop of backends/device.py, captured with the step. It needs no engines, and is what a GPU
without TensorRT has. On the host PyTorch is no backend: it is the reference that bundles are compared with.

This is what can be asked without importing torch; the rest is torch.py, the only file of the package proper that does.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from sr3rt.backends import Request, cuda
from sr3rt.backends.on_device import no_gpu
from sr3rt.bundle import PROGRAM, Bundle
from sr3rt.errors import BackendError, MissingExtra

if TYPE_CHECKING:
    from sr3rt.backends.torch import TorchOnGpu

PRECISIONS = ("fp32", "fp16", "bf16")


def why_not() -> str | None:
    """Why this backend cannot run here, or None when it can."""
    if not find_spec("torch"):
        return str(MissingExtra("the torch backend", "torch", "export"))
    return cuda.why_not()


def refusal(bundle: Bundle, request: Request) -> str | None:
    """Why this backend cannot do what is asked with that bundle, or None when it can."""
    if request.precision not in ("auto", *PRECISIONS):
        return f"the torch backend has fp32, fp16 and bf16, precision {request.precision!r} was asked for: use auto (fp32) or one of them"
    if reason := no_gpu("torch", request.device):
        return reason
    if PROGRAM not in bundle.manifest.files:
        return f"{bundle.path} has no {PROGRAM}, which the torch backend runs: export it again"
    return None


def load(bundle: Bundle, request: Request) -> TorchOnGpu:
    """Raises BackendError (`why_not`, `refusal`, a PyTorch without CUDA, too little memory) or BundleCorrupt."""
    if reason := no_gpu("torch", request.device) or why_not() or refusal(bundle, request):
        raise BackendError(reason)
    from sr3rt.backends.torch import on_gpu

    return on_gpu(bundle, request)
