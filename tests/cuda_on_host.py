"""CUDA on the host, for tests of what drives a GPU where there is none: the calls of cuda-bindings that sr3rt makes, over host memory.

It is stricter than a GPU where that finds mistakes: nothing on a stream happens before it is waited for, new memory is NaN, memory that
was freed or is not the program's is an error that lasts, and so is what may not be done during a capture. The kernels are step.cu's,
compiled for the host. Every call is also made to the real bindings, which check its arguments and then find no driver.
"""

# ruff: noqa: N802 (the names are CUDA's)

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sr3rt.backends import kernels

Work = Callable[[], None]
LASTING = "cudaErrorIllegalAddress"


def absent() -> bool:
    """Whether CUDA itself finds no GPU here."""
    runtime = import_module("cuda.bindings.runtime")  # not the one that a test may have put in its place
    status, count = runtime.cudaGetDeviceCount()
    return int(status) != 0 or not count


def compiled(folder: Path) -> ctypes.CDLL:
    """step.cu for the host."""
    library = folder / "step.so"
    source = Path(__file__).parent / "data" / "step_on_host.cpp"
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wextra", f"-I{kernels.NATIVE}", f"-I{source.parent}"]
    subprocess.run([shutil.which("c++") or "g++", *flags, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.launch.restype = ctypes.c_bool
    return loaded


def launch(
    library: ctypes.CDLL, name: str, blocks: tuple[int, int], threads: int, arguments: tuple[Any, ...], types: tuple[Any, ...]
) -> None:
    """A kernel, as cuLaunchKernel has it."""
    values = [kind(value) for value, kind in zip(arguments, types, strict=True)]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in values))
    assert library.launch(name.encode(), *blocks, threads, pointers), f"step.cu has no {name}"


class _Stream:
    def __init__(self) -> None:
        self.queue: list[Work] = []
        self.captured: list[Work] | None = None


class Cuda:
    """`runtime` and `driver` stand for the modules of cuda.bindings. fail: errors by function name, each met once.

    calls: names, in order. total: bytes of the GPU. lost: the error that lasts, once one has come.
    """

    def __init__(self, library: ctypes.CDLL, *, total: int = 1 << 28, devices: int = 1, driver: int = 13000) -> None:
        real_driver, real_runtime = (import_module(f"cuda.bindings.{name}") for name in ("driver", "runtime"))
        self._library, self.total, self._devices, self._driver = library, total, devices, driver
        self._errors, self._real = real_runtime.cudaError_t, {"cuda": real_runtime, "cu": real_driver}
        self._without_gpu = absent()
        self.calls: list[str] = []
        self.fail: dict[str, str] = {}
        self.lost = ""
        self._handles: dict[int, Any] = {}
        self._blocks: dict[int, NDArray[np.uint8]] = {}
        self._pinned: dict[int, NDArray[np.uint8]] = {}
        self.runtime = self._module(real_runtime, "cuda", real_runtime.cudaError_t)
        self.driver = self._module(real_driver, "cu", real_driver.CUresult)

    def _module(self, real: Any, prefix: str, errors: Any) -> Any:
        """What of `real` is not a function, and our functions in place of those."""
        module = SimpleNamespace(**{name: getattr(real, name) for name in dir(real) if not name.startswith("_")})
        for name in dir(type(self)):
            if name.startswith(prefix) and (prefix == "cuda" or not name.startswith("cuda")):
                setattr(module, name, self._checked(name, getattr(self, name), getattr(real, name), errors))
        return module

    def _checked(self, name: str, ours: Callable[..., Any], real: Callable[..., Any], errors: Any) -> Callable[..., Any]:
        success, outputs = errors(0), [] if name == "cuLaunchKernel" else [None]

        def call(*arguments: Any) -> tuple[Any, ...]:
            nonlocal outputs
            if self._without_gpu:
                with suppress(RuntimeError):  # the driver's library is not there; a mistake in the call is a TypeError
                    outputs = [None] * (len(real(*arguments)) - 1)
            self.calls.append(name)
            capturing = any(one.captured is not None for one in self._streams())
            if self.lost and name not in ("cudaGetLastError", "cudaDriverGetVersion"):
                return (getattr(self._errors, self.lost), *outputs)
            if capturing and name in NOT_IN_A_CAPTURE:
                return (self._errors.cudaErrorStreamCaptureUnsupported, *outputs)
            try:
                value = ours(*arguments) if name not in self.fail or name == "cudaStreamEndCapture" else None
            except _CudaError as error:
                return (getattr(self._errors, str(error)), *outputs)
            if name in self.fail:
                return (getattr(errors, self.fail.pop(name)), *outputs)
            return (success,) if value is None else (success, *value) if isinstance(value, tuple) else (success, value)

        return call

    def _streams(self) -> list[_Stream]:
        return [one for one in self._handles.values() if isinstance(one, _Stream)]

    def _handle(self, thing: Any) -> int:
        handle = 0x1000 + 8 * len(self._handles)
        self._handles[handle] = thing
        return handle

    # --- what tests and stand-ins use

    def array(self, address: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Float32 memory of the GPU."""
        count = int(np.prod(shape))
        return self._bytes(address, 4 * count).view(np.float32).reshape(shape)

    def enqueue(self, stream: int, work: Work) -> None:
        """Put work on a stream, or into what it captures."""
        one = self._handles[int(stream)]
        (one.queue if one.captured is None else one.captured).append(work)

    @property
    def queued(self) -> int:
        """Pieces of work that nobody has waited for."""
        return sum(len(one.queue) for one in self._streams())

    @property
    def used(self) -> int:
        """Bytes of the GPU that are taken."""
        return sum(block.size for block in self._blocks.values())

    def _bytes(self, address: int, size: int) -> NDArray[np.uint8]:
        for start, block in self._blocks.items():
            if start <= address and address + size <= start + block.size:
                return block[address - start : address - start + size]
        raise _CudaError(LASTING)

    def _drain(self, stream: _Stream) -> None:
        while stream.queue:
            try:
                stream.queue.pop(0)()
            except _CudaError as error:
                self.lost = str(error)
                stream.queue.clear()
                raise

    # --- the runtime

    def cudaDriverGetVersion(self) -> int:
        return self._driver

    def cudaGetDeviceCount(self) -> int:
        if self._driver < 13000:
            raise _CudaError("cudaErrorInsufficientDriver")
        if not self._devices:
            raise _CudaError("cudaErrorNoDevice")
        return self._devices

    def cudaGetLastError(self) -> None: ...

    def cudaSetDevice(self, index: int) -> None:
        assert 0 <= index < self._devices

    def cudaGetDeviceProperties(self, index: int) -> Any:
        return SimpleNamespace(name=b"Host GPU", major=9, minor=0)

    def cudaDeviceSynchronize(self) -> None:
        for stream in self._streams():
            self._drain(stream)

    def cudaMemGetInfo(self) -> tuple[int, int]:
        return self.total - self.used, self.total

    def cudaMalloc(self, size: int) -> int:
        if self.used + size > self.total:
            raise _CudaError("cudaErrorMemoryAllocation")
        whole = np.full(size + 256, 0xFF, np.uint8)  # NaN
        start = -whole.ctypes.data % 256
        block = whole[start : start + size]
        self._blocks[block.ctypes.data] = block
        return block.ctypes.data

    def cudaFree(self, address: int) -> None:
        self.cudaDeviceSynchronize()
        del self._blocks[address]

    def cudaHostAlloc(self, size: int, flags: int) -> int:
        block = np.full(size, 0xFF, np.uint8)
        self._pinned[block.ctypes.data] = block
        return block.ctypes.data

    def cudaFreeHost(self, address: int) -> None:
        del self._pinned[address]

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: int) -> None:
        kinds = self._real["cuda"].cudaMemcpyKind

        def host(address: int) -> NDArray[np.uint8]:
            return np.frombuffer((ctypes.c_byte * size).from_address(address), np.uint8)

        def pinned(address: int) -> bool:
            return any(start <= address < start + block.size for start, block in self._pinned.items())

        if kind == kinds.cudaMemcpyHostToDevice:
            data = host(source) if pinned(source) else host(source).copy()
            self.enqueue(stream, lambda: self._bytes(target, size).__setitem__(slice(None), data))
        elif kind == kinds.cudaMemcpyDeviceToHost:
            self.enqueue(stream, lambda: host(target).__setitem__(slice(None), self._bytes(source, size)))
        else:
            assert kind == kinds.cudaMemcpyDeviceToDevice
            self.enqueue(stream, lambda: self._bytes(target, size).__setitem__(slice(None), self._bytes(source, size).copy()))

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: int) -> None:
        self.enqueue(stream, lambda: self._bytes(address, size).__setitem__(slice(None), value))

    def cudaStreamCreateWithFlags(self, flags: int) -> int:
        assert flags == self._real["cuda"].cudaStreamNonBlocking
        return self._handle(_Stream())

    def cudaStreamDestroy(self, stream: int) -> None:
        self._handles[stream] = None

    def cudaStreamSynchronize(self, stream: int) -> None:
        self._drain(self._handles[stream])

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> None:
        assert mode == self._real["cuda"].cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        assert not self._handles[stream].queue, "a first call is waited for before a capture"
        self._handles[stream].captured = []

    def cudaStreamEndCapture(self, stream: int) -> int:
        captured, self._handles[stream].captured = self._handles[stream].captured, None
        return self._handle(captured)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> int:
        assert flags == 0
        return self._handle(list(self._handles[graph]))

    def cudaGraphDestroy(self, graph: int) -> None:
        self._handles[graph] = None

    def cudaGraphExecDestroy(self, graph: int) -> None:
        self._handles[graph] = None

    def cudaGraphLaunch(self, graph: int, stream: int) -> None:
        for work in self._handles[graph]:
            self.enqueue(stream, work)

    def cudaEventCreateWithFlags(self, flags: int) -> int:
        return self._handle({"stream": None, "recorded": 0, "passed": 0})

    def cudaEventDestroy(self, event: int) -> None:
        self._handles[event] = None

    def cudaEventRecord(self, event: int, stream: int) -> None:
        mark = self._handles[event]
        mark["stream"] = self._handles[stream]
        mark["recorded"] += 1
        self.enqueue(stream, lambda: mark.update(passed=mark["passed"] + 1))

    def cudaEventSynchronize(self, event: int) -> None:
        mark = self._handles[event]
        while mark["passed"] < mark["recorded"]:
            try:
                mark["stream"].queue.pop(0)()
            except _CudaError as error:
                self.lost = str(error)
                raise

    def cudaEventElapsedTime(self, begin: int, end: int) -> float:
        if not all(mark["recorded"] and mark["passed"] == mark["recorded"] for mark in (self._handles[begin], self._handles[end])):
            raise _CudaError("cudaErrorNotReady")
        return 2.0

    # --- the driver

    def cuLibraryLoadData(self, image: bytes, *options: Any) -> int:
        assert image[:4] in (b"\x7fELF", b"\x50\xed\x55\xba")  # a cubin or a fat binary
        return self._handle("library")

    def cuLibraryGetKernel(self, library: int, name: bytes) -> int:
        return self._handle(name.decode())

    def cuLaunchKernel(self, kernel: int, x: int, y: int, z: int, threads: int, *rest: Any) -> None:
        _, _, shared, stream, (arguments, types), extra = rest
        assert (z, shared, extra) == (1, 0, 0)
        name = self._handles[kernel]
        self.enqueue(stream, lambda: launch(self._library, name, (x, y), threads, arguments, types))


NOT_IN_A_CAPTURE = (
    "cudaMalloc",
    "cudaHostAlloc",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
    "cudaDeviceSynchronize",
    "cuLibraryLoadData",
)


class _CudaError(Exception):
    """The name of a cudaError_t."""
