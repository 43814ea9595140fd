"""PyTorch on a GPU: a bundle's program (program.py) in the loop of backends/device.py, captured with the step. It needs no engines,
and is what a GPU without TensorRT has. On the host PyTorch is no backend: it is the reference that bundles are compared with.

This folder is the only place of the package proper that imports torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sr3rt.backends import Floats, Request, cuda, device
from sr3rt.backends.cuda import Gpu, Stream
from sr3rt.backends.device import BATCHES, Enqueue, OnDevice
from sr3rt.bundle import PROGRAM, Bundle
from sr3rt.errors import BackendError, MissingExtra
from sr3rt.program import opened

if TYPE_CHECKING:
    import torch

PRECISIONS = ("fp32", "fp16", "bf16")
_FLAGS = threading.Lock()  # PyTorch's flags are the process's

Module = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""`module(x, y, level)` is the prediction, float32 all: a `TorchProgram`, a network of export/nets, or either compiled."""


def why_not() -> str | None:
    """Why this backend cannot run here, or None when it can."""
    if not find_spec("torch"):
        return str(MissingExtra("the torch backend", "torch", "export"))
    return cuda.why_not()


def refusal(bundle: Bundle, request: Request) -> str | None:
    """Why this backend cannot do what is asked with that bundle, or None when it can."""
    if request.precision not in ("auto", *PRECISIONS):
        return f"the torch backend has fp32, fp16 and bf16, precision {request.precision!r} was asked for: use auto (fp32) or one of them"
    if reason := device.no_gpu("torch", request.device):
        return reason
    if PROGRAM not in bundle.manifest.files:
        return f"{bundle.path} has no {PROGRAM}, which the torch backend runs: export it again"
    return None


def load(bundle: Bundle, request: Request) -> TorchOnGpu:
    """Raises BackendError (`why_not`, `refusal`, a PyTorch without CUDA, too little memory) or BundleCorrupt."""
    if reason := why_not() or refusal(bundle, request):
        raise BackendError(reason)
    import torch

    from sr3rt.backends.torch.program import TorchProgram

    if not torch.cuda.is_available():
        raise BackendError(
            f"PyTorch {torch.__version__} does not find the GPU that CUDA finds: install one that was built for CUDA "
            f"{cuda.runtime_version()}, see https://pytorch.org/get-started"
        )
    gpu = Gpu(device.gpu_index(request.device))
    precision = "fp32" if request.precision == "auto" else request.precision
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    with opened(bundle) as (program, tensors):
        try:
            module = TorchProgram(program, tensors, dtype=kind, device=f"cuda:{gpu.index}")
            torch.cuda.synchronize(gpu.index)  # the loop's stream does not wait for the one that the weights went by
        except torch.OutOfMemoryError as error:
            raise BackendError(f"the weights of {bundle.path} do not fit {gpu.name}: {error}") from error
    return TorchOnGpu(module, gpu, channels=bundle.manifest.channels, precision=precision)


class TorchOnGpu(OnDevice):
    """A `Network` over a module on a GPU. Safe to use from several threads. precision: what is reported as the module's."""

    backend = "torch"

    def __init__(self, module: Module, gpu: Gpu, *, channels: int, precision: str = "fp32") -> None:
        super().__init__(gpu)
        self._module, self._channels, self.precision = module, channels, precision

    def compiled(self) -> TorchOnGpu:
        """The same by `torch.compile`, whose first call of every batch and size takes a minute. Its kernels are captured like others."""
        import torch

        module = torch.compile(self._module, mode="max-autotune-no-cudagraphs", dynamic=False)
        return TorchOnGpu(module, self.gpu, channels=self._channels, precision=self.precision)

    def batches(self, height: int, width: int) -> tuple[int, ...]:
        """As `DeviceNetwork.batches`: a module takes any, and a few make few graphs."""
        return BATCHES

    def enqueuer(self, batch: int, height: int, width: int, stream: Stream) -> Enqueue:
        """As `DeviceNetwork.enqueuer`. What a call needs besides comes from a pool of its own, which a captured graph goes on using."""
        import torch

        picture, tensors = (batch, self._channels, height, width), dict[int, torch.Tensor]()
        run = _enqueuer(self.gpu, stream)

        def enqueue(x: int, y: int, level: int, out: int) -> None:
            for address, shape in ((x, picture), (y, picture), (level, (batch, 1)), (out, picture)):
                if address not in tensors:
                    tensors[address] = _tensor(address, shape, self.gpu)
            try:
                run(lambda: tensors[out].copy_(self._module(tensors[x], tensors[y], tensors[level])))
            except torch.OutOfMemoryError as error:
                raise BackendError(f"the torch backend has not the memory for {'×'.join(map(str, picture))}: {error}") from error

        return enqueue


class TorchNetwork:
    """A `Network` over a module on the CPU in float32: the eager reference."""

    backend, device, precision = "torch", "cpu", "fp32"

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module.eval()

    def bind(self, x: Floats, y: Floats, level: Floats, out: Floats) -> Callable[[], None]:
        """As `Network.bind`; the tensors share the arrays' memory."""
        import torch

        inputs = [torch.from_numpy(array) for array in (x, y, level)]
        target = torch.from_numpy(out)

        def run() -> None:
            with torch.inference_mode():
                target.copy_(self._module(*inputs))

        return run


def _enqueuer(gpu: Gpu, stream: Stream) -> Callable[[Callable[[], Any]], None]:
    """A function that makes PyTorch's calls in another go to that stream, with memory from one pool."""
    import torch

    with torch.cuda.device(gpu.index):
        pool = torch.cuda.MemPool()
    external = torch.cuda.ExternalStream(stream.handle, device=gpu.index)  # type: ignore[no-untyped-call]

    @contextmanager
    def there() -> Iterator[None]:
        with torch.inference_mode(), torch.cuda.device(gpu.index), torch.cuda.stream(external), torch.cuda.use_mem_pool(pool):
            yield

    def run(calls: Callable[[], Any]) -> None:
        with there(), _FLAGS, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # which is on by default, and is not float32
            calls()

    return run


def _tensor(address: int, shape: tuple[int, ...], gpu: Gpu) -> torch.Tensor:
    """Float32 memory on the GPU as a tensor, which does not own it."""
    import torch

    interface = {"data": (address, False), "shape": shape, "typestr": "<f4", "version": 3}
    return torch.as_tensor(type("Memory", (), {"__cuda_array_interface__": interface})(), device=f"cuda:{gpu.index}")
