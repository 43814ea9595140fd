"""PyTorch's networks for the loops: a bundle's program (torch_program.py) on a GPU, and any module on the CPU.

With torch_program.py the only file of the package proper that imports torch; the backend that others see is pytorch.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sr3rt.backends import Floats, Request, cuda
from sr3rt.backends.cuda import Gpu, Stream
from sr3rt.backends.device import Enqueue
from sr3rt.backends.on_device import AnySize, Shapes, gpu_index
from sr3rt.backends.torch_program import TorchProgram
from sr3rt.bundle import Bundle
from sr3rt.errors import BackendError
from sr3rt.program import Register, opened, registers

_FLAGS = threading.Lock()  # PyTorch's flags are the process's

Module = Callable[..., Tensor]
"""`module(x, y, level)` is the prediction, float32 all: a `TorchProgram`, a network of export/nets, or either compiled. It may take more,
which is computed of x alone.
"""


def on_gpu(bundle: Bundle, request: Request) -> TorchOnGpu:
    """The bundle's program on the GPU asked for. Raises BackendError (a PyTorch without CUDA, too little memory) or BundleCorrupt."""
    if not torch.cuda.is_available():
        raise BackendError(
            f"PyTorch {torch.__version__} does not find the GPU that CUDA finds: install one that was built for CUDA "
            f"{cuda.runtime_version()}, see https://pytorch.org/get-started"
        )
    gpu = Gpu(gpu_index(request.device))
    precision = "fp32" if request.precision == "auto" else request.precision
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    with opened(bundle) as (program, tensors):
        try:
            module = TorchProgram(program, tensors, dtype=kind, device=f"cuda:{gpu.index}")
            found = registers(program["operations"], tensors, bundle.manifest.channels)
            torch.cuda.current_stream(gpu.index).synchronize()  # by which the weights went, and for which the loop's does not wait
        except torch.OutOfMemoryError as error:
            raise BackendError(f"the weights of {bundle.path} do not fit {gpu.name}: {error}") from error
    given = {name: found[name] for name in module.given}
    return TorchOnGpu(module, gpu, channels=bundle.manifest.channels, precision=precision, once=module.once, given=given)


class TorchOnGpu(AnySize):
    """A `Network` over a module on a GPU. Safe to use from several threads. precision: what is reported as the module's.

    once: of x alone, what the module takes after x, y and level; given: what that is, in this order.
    """

    backend = "torch"

    def __init__(
        self,
        module: Module,
        gpu: Gpu,
        *,
        channels: int,
        precision: str = "fp32",
        once: Callable[[Tensor], Sequence[Tensor]] = lambda x: (),
        given: Mapping[str, Register] | None = None,
    ) -> None:
        super().__init__(gpu, channels=channels, given=given or {})
        self._module, self.precision, self._once = module, precision, once

    def compiled(self) -> TorchOnGpu:
        """The same by `torch.compile`, whose first call of every batch and size takes a minute. Its kernels are captured like others."""
        module = torch.compile(self._module, mode="max-autotune-no-cudagraphs", dynamic=False)
        return TorchOnGpu(module, self.gpu, channels=self._channels, precision=self.precision, once=self._once, given=self._given)

    def _enqueuer(self, part: str, inputs: Shapes, outputs: Shapes, batch: int, stream: Stream) -> Enqueue:
        """As `AnySize`'s. What a call needs besides comes from a pool of its own, which a captured graph goes on using."""
        run, tensors, shapes = _enqueuer(self.gpu, stream), dict[int, Tensor](), {**inputs, **outputs}

        def enqueue(addresses: Mapping[str, int]) -> None:
            for name, shape in shapes.items():
                if addresses[name] not in tensors:
                    tensors[addresses[name]] = _tensor(addresses[name], (batch, *shape), self.gpu)

            def calls() -> None:
                values = [tensors[addresses[name]] for name in inputs]
                made = self._once(*values) if part == "once" else [self._module(*values)]
                for name, value in zip(outputs, made, strict=True):
                    tensors[addresses[name]].copy_(value)

            try:
                run(calls)
            except torch.OutOfMemoryError as error:
                size = "×".join(map(str, (batch, *inputs["x"])))
                raise BackendError(f"the torch backend has not the memory for {size}: {error}") from error

        return enqueue


class TorchNetwork:
    """A `Network` over a module on the CPU in float32: the eager reference."""

    backend, device, precision = "torch", "cpu", "fp32"

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module.eval()

    def bind(self, x: Floats, y: Floats, level: Floats, out: Floats) -> Callable[[], None]:
        """As `Network.bind`; the tensors share the arrays' memory."""
        inputs = [torch.from_numpy(array) for array in (x, y, level)]
        target = torch.from_numpy(out)

        def run() -> None:
            with torch.inference_mode():
                target.copy_(self._module(*inputs))

        return run


def _enqueuer(gpu: Gpu, stream: Stream) -> Callable[[Callable[[], Any]], None]:
    """A function that makes PyTorch's calls in another go to that stream, with memory from one pool."""
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
    interface = {"data": (address, False), "shape": shape, "typestr": "<f4", "version": 3}
    return torch.as_tensor(type("Memory", (), {"__cuda_array_interface__": interface})(), device=f"cuda:{gpu.index}")
