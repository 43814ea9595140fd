"""The little of CUDA that the loop needs, by cuda-bindings. Every return value is checked; an error says what was being done.

Objects free what they hold when they go. Everything but `why_not` raises BackendError.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sr3rt.backends import kernels
from sr3rt.errors import BackendError, MissingExtra

ALIGNED = 256  # bytes; TensorRT wants it of the tensors that it is given
ALONE = threading.RLock()
"""Held during a capture, and by what would break another thread's: to wait for the whole GPU does, whatever the capture's mode."""

_CAPTURE_ERRORS = range(900, 909)  # cudaErrorStreamCapture…: of the capture, not of the GPU


_ELSE = "or use device='cpu' with backend='auto'"


def why_not(device: int = 0) -> str | None:
    """Why that GPU cannot be used here, or None when it can. To be asked before anything of TensorRT, which crashes without a GPU."""
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        return str(MissingExtra("CUDA", "cuda-bindings", "gpu"))
    from cuda.bindings import runtime

    driver, (status, count) = runtime.cudaDriverGetVersion()[1], runtime.cudaGetDeviceCount()
    if not driver:
        return f"there is no NVIDIA driver here: install one, {_ELSE}"
    if status == runtime.cudaError_t.cudaErrorInsufficientDriver:
        needed, found = runtime.cudaRuntimeGetVersion()[1], f"{driver // 1000}.{driver % 1000 // 10}"
        return f"the NVIDIA driver serves CUDA {found}, cuda-bindings need {needed // 1000}.0: upgrade the driver, {_ELSE}"
    if status != runtime.cudaError_t.cudaSuccess or not count:
        return f"CUDA finds no GPU ({status.name}): look at nvidia-smi and CUDA_VISIBLE_DEVICES, {_ELSE}"
    return None if device < count else f"there is no GPU {device}: CUDA finds {count}, counted from 0"


def runtime_version() -> str:
    """Of the CUDA that cuda-bindings are of."""
    from cuda.bindings import runtime

    version = int(checked(runtime.cudaRuntimeGetVersion(), "asking for the version"))
    return f"{version // 1000}.{version % 1000 // 10}"


def checked(result: Sequence[Any], doing: str) -> Any:
    """What a call of CUDA's gave, without its status. Raises BackendError where that is not success."""
    status, *values = result
    if int(status) != 0:
        raise BackendError(f"CUDA failed {doing}: {status.name}. {_what_now()}")
    return values[0] if len(values) == 1 else values


def _what_now() -> str:
    """Whether a GPU that failed can be used again. Some errors last as long as the process does."""
    from cuda.bindings import runtime

    runtime.cudaGetLastError()
    with ALONE:
        (status,) = runtime.cudaDeviceSynchronize()
    if int(status) == 0 or int(status) in _CAPTURE_ERRORS:
        return "What was running on it is lost, the next call begins anew"
    return f"The GPU is lost to this process ({status.name}): start the process again"


class Gpu:
    """A GPU and the step's kernels on it. capability: compute capability. driver: its major version."""

    def __init__(self, index: int = 0) -> None:
        reason = why_not(index)
        if reason:
            raise BackendError(reason)
        from cuda.bindings import driver, runtime

        self._runtime, self._driver, self.index = runtime, driver, index
        self.use()
        properties = checked(runtime.cudaGetDeviceProperties(index), "asking what the GPU is")
        self.name = properties.name.decode(errors="replace").rstrip("\0")
        self.capability = (int(properties.major), int(properties.minor))
        self.driver = int(checked(runtime.cudaDriverGetVersion(), "asking for the driver's version")) // 1000
        image = kernels.load(self.capability)
        self._library = checked(driver.cuLibraryLoadData(image, [], [], 0, [], [], 0), "loading the step's kernels")
        self._kernels: dict[str, int] = {}

    def use(self) -> None:
        """Make this the calling thread's GPU, which CUDA keeps for each thread."""
        checked(self._runtime.cudaSetDevice(self.index), f"choosing GPU {self.index}")

    def free(self) -> tuple[int, int]:
        """Bytes of its memory that are free, and in all."""
        free, total = checked(self._runtime.cudaMemGetInfo(), "asking for free memory")
        return int(free), int(total)

    def launch(self, name: str, blocks: tuple[int, int], threads: int, arguments: Sequence[int], stream: Stream) -> None:
        """Enqueue a kernel of step.cu. arguments: addresses and unsigned 32-bit numbers, as the kernel has them."""
        if name not in self._kernels:
            found = checked(self._driver.cuLibraryGetKernel(self._library, name.encode()), f"looking for the kernel {name}")
            self._kernels[name] = int(found)
        parameters = tuple(arguments), _TYPES[name]
        launched = self._driver.cuLaunchKernel(self._kernels[name], *blocks, 1, threads, 1, 1, 0, stream.handle, parameters, 0)
        checked(launched, f"starting the kernel {name}")


_P, _U = ctypes.c_void_p, ctypes.c_uint32
_TYPES = {
    "sr3_levels": (_P, _P, _U),
    "sr3_start": (_P, _P, _U, _U, _U, _U),
    "sr3_step": (_P, _P, _P, _P, _U, _U, _U),
    "sr3_next": (_P, _U),
}


class Memory:
    """Bytes on the GPU, at `address`."""

    def __init__(self, gpu: Gpu, size: int, purpose: str) -> None:
        from cuda.bindings import runtime

        status, address = runtime.cudaMalloc(size)
        if status == runtime.cudaError_t.cudaErrorMemoryAllocation:
            runtime.cudaGetLastError()
            raise BackendError(_too_little(gpu, size, purpose))
        checked((status,), f"taking {size:,} bytes for {purpose}")
        self.address, self.size = int(address), size
        self._free = weakref.finalize(self, runtime.cudaFree, self.address)


def _too_little(gpu: Gpu, size: int, purpose: str) -> str:
    free, total = gpu.free()
    return (
        f"{purpose} needs {size / 2**20:,.0f} MiB on {gpu.name}, where {free / 2**20:,.0f} of {total / 2**20:,.0f} are free: "
        "use a smaller batch, crop the picture, or end what else runs there"
    )


class Pinned:
    """Memory of the host that the GPU copies from and to without help; `array` lies in it and must not outlive this."""

    def __init__(self, shape: tuple[int, ...], dtype: Any = np.float32) -> None:
        from cuda.bindings import runtime

        kind = np.dtype(dtype)
        size = int(np.prod(shape)) * kind.itemsize
        address = int(checked(runtime.cudaHostAlloc(size, runtime.cudaHostAllocDefault), f"pinning {size:,} bytes of the host's memory"))
        self._free = weakref.finalize(self, runtime.cudaFreeHost, address)
        self.array: NDArray[Any] = np.frombuffer((ctypes.c_byte * size).from_address(address), kind).reshape(shape)


class Stream:
    """A queue of work, independent of the default stream."""

    def __init__(self) -> None:
        from cuda.bindings import runtime

        self._runtime = runtime
        made = checked(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking), "making a stream")
        self.handle = int(made)
        self._free = weakref.finalize(self, runtime.cudaStreamDestroy, self.handle)

    def to_device(self, address: int, array: NDArray[Any]) -> None:
        """Copy a C-contiguous array to the GPU. From pinned memory it is read when its turn comes, else at once."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        copied = self._runtime.cudaMemcpyAsync(address, array.ctypes.data, array.nbytes, kind, self.handle)
        checked(copied, f"copying {array.nbytes:,} bytes to the GPU")

    def to_host(self, array: NDArray[Any], address: int) -> None:
        """Copy from the GPU; the array has it after `wait`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        copied = self._runtime.cudaMemcpyAsync(array.ctypes.data, address, array.nbytes, kind, self.handle)
        checked(copied, f"copying {array.nbytes:,} bytes from the GPU")

    def move(self, target: int, source: int, size: int) -> None:
        """Copy within the GPU."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        checked(self._runtime.cudaMemcpyAsync(target, source, size, kind, self.handle), f"copying {size:,} bytes within the GPU")

    def clear(self, address: int, size: int) -> None:
        """Zero."""
        checked(self._runtime.cudaMemsetAsync(address, 0, size, self.handle), f"clearing {size:,} bytes of the GPU")

    def wait(self, doing: str = "in the loop") -> None:
        """Until all is done. What went wrong on the GPU since the last time is told here."""
        checked(self._runtime.cudaStreamSynchronize(self.handle), doing)


class Event:
    """A mark in a stream; waiting for it does not keep a core busy."""

    def __init__(self) -> None:
        from cuda.bindings import runtime

        self._runtime = runtime
        self.handle = int(checked(runtime.cudaEventCreateWithFlags(runtime.cudaEventBlockingSync), "making an event"))
        self._free = weakref.finalize(self, runtime.cudaEventDestroy, self.handle)

    def record(self, stream: Stream) -> None:
        """Mark the stream's end as it is now."""
        checked(self._runtime.cudaEventRecord(self.handle, stream.handle), "marking a stream")

    def wait(self) -> None:
        """Until the stream came by. An event that was never recorded does not keep anyone waiting."""
        checked(self._runtime.cudaEventSynchronize(self.handle), "in the loop")

    def since(self, earlier: Event) -> float:
        """Seconds from one mark to another, both passed."""
        return float(checked(self._runtime.cudaEventElapsedTime(earlier.handle, self.handle), "reading a time")) / 1e3


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage may hold memory of the GPU, and to free that in the middle of a capture breaks it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Graph:
    """What `record` enqueued on the stream, to be enqueued again as one. It has the addresses and shapes of that time."""

    def __init__(self, stream: Stream, record: Callable[[], None]) -> None:
        from cuda.bindings import runtime

        self._runtime = runtime
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal  # other threads may take memory meanwhile
        with ALONE, _no_collection():
            checked(runtime.cudaStreamBeginCapture(stream.handle, mode), "beginning a graph's capture")
            try:
                record()
            except BaseException:
                _, graph = runtime.cudaStreamEndCapture(stream.handle)  # the first error is the one to tell
                if graph:
                    runtime.cudaGraphDestroy(graph)
                raise
            ended = runtime.cudaStreamEndCapture(stream.handle)
        graph = checked(ended, "ending a graph's capture")
        made = runtime.cudaGraphInstantiate(graph, 0)
        runtime.cudaGraphDestroy(graph)
        self.handle = int(checked(made, "making a graph"))
        self._free = weakref.finalize(self, runtime.cudaGraphExecDestroy, self.handle)

    def launch(self, stream: Stream) -> None:
        """Enqueue it."""
        checked(self._runtime.cudaGraphLaunch(self.handle, stream.handle), "starting a graph")
