"""A network of a few operations with the same bits anywhere (data/arithmetic.cu), and engines and jobs of it. For test_device.py."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import cuda_on_host
import numpy as np

from sr3rt.backends import Floats, cuda
from sr3rt.backends.cuda import Gpu, Stream
from sr3rt.backends.device import DeviceEngine, Enqueue
from sr3rt.backends.on_device import bind
from sr3rt.engine import Engine, Job, Stepper
from sr3rt.samplers import Sampler, Table, table
from sr3rt.schedule import named, respace

SHAPE = (3, 16, 24)
SAMPLERS = ("sr3", "posterior", "ddim", "ddim(0.5)", "dpm++2m")


def rows(steps: int = 6, sampler: str = "posterior") -> Table:
    return table(Sampler.parse(sampler), respace(named("linear", 2000, 1e-6, 1e-2), steps), prediction="eps", level="sqrt_gamma")


def picture(i: int = 0) -> Floats:
    return np.random.default_rng(i).uniform(-1, 1, SHAPE).astype(np.float32)


class OnHost:
    """data/arithmetic.cu, in NumPy."""

    backend, device, precision = "arithmetic", "cpu", "fp32"

    def bind(self, x: Floats, y: Floats, level: Floats, out: Floats) -> Callable[[], None]:
        return lambda: np.copyto(out, np.float32(0.7) * y - np.float32(0.4) * x * level.reshape(-1, 1, 1, 1))


class OnGpu:
    """data/arithmetic.cu as a network, for some batch sizes. after: what else a call enqueues, told the stream and the output.

    apart: whether what depends on x alone is computed once for each picture.
    """

    backend, device, precision = "arithmetic", "cuda:0", "fp32"

    def __init__(self, *batches: int, apart: bool = False, after: Callable[[int, int], None] = lambda stream, out: None) -> None:
        from cuda.bindings import driver

        self.gpu, self._batches, self._driver, self._after, self._apart, self.known = Gpu(), batches, driver, after, apart, 0
        library = cuda.checked(driver.cuLibraryLoadData(machine_code(self.gpu.capability), [], [], 0, [], [], 0), "loading")
        names = b"arithmetic", b"known", b"rest"
        self._kernels = {name.decode(): int(cuda.checked(driver.cuLibraryGetKernel(library, name), "looking")) for name in names}

    def batches(self, height: int, width: int) -> tuple[int, ...]:
        return self._batches

    def enqueuer(self, batch: int, height: int, width: int, stream: Stream) -> Enqueue:
        kernel, first = ("rest", "known") if self._apart else ("arithmetic", "x")

        def enqueue(addresses: Mapping[str, int]) -> None:
            self._launch(kernel, [addresses[name] for name in (first, "y", "level", "out")], batch, height * width, stream)
            self._after(stream.handle, addresses["out"])

        return enqueue

    def given(self, height: int, width: int) -> dict[str, tuple[int, int, int]]:
        return {"known": (2 * SHAPE[0], height, width)} if self._apart else {}

    def once(self, height: int, width: int, stream: Stream) -> Enqueue:
        def enqueue(addresses: Mapping[str, int]) -> None:
            self.known += 1
            self._launch("known", [addresses["x"], addresses["known"]], 1, height * width, stream)

        return enqueue

    def _launch(self, kernel: str, addresses: list[int], batch: int, pixels: int, stream: Stream) -> None:
        assert not any(one % cuda.ALIGNED for one in addresses)
        values = SHAPE[0] * pixels
        parameters = (*addresses, values), (*[ctypes.c_void_p] * len(addresses), ctypes.c_uint32)
        blocks = -(-values // 256), batch, 1
        launched = self._driver.cuLaunchKernel(self._kernels[kernel], *blocks, 256, 1, 1, 0, stream.handle, parameters, 0)
        cuda.checked(launched, "starting")

    def bind(self, x: Floats, y: Floats, level: Floats, out: Floats) -> Callable[[], None]:
        return bind(self, x, y, level, out)


@functools.cache
def machine_code(capability: tuple[int, int]) -> bytes:
    """arithmetic.cu for a GPU; for the host's, what looks like it."""
    from cuda.bindings import nvrtc

    if not cuda_on_host.absent():
        source = (Path(__file__).parent / "data" / "arithmetic.cu").read_bytes()
        program = cuda.checked(nvrtc.nvrtcCreateProgram(source, b"arithmetic.cu", 0, [], []), "compiling")
        options = [b"--fmad=false", b"--gpu-architecture=sm_%d%d" % capability]
        cuda.checked(nvrtc.nvrtcCompileProgram(program, len(options), options), "compiling")
        code = bytearray(cuda.checked(nvrtc.nvrtcGetCUBINSize(program), "compiling"))
        cuda.checked(nvrtc.nvrtcGetCUBIN(program, code), "compiling")
        return bytes(code)
    return b"\x7fELF"


def on_gpu(*batches: int, capacity: int = 4, capture: bool = True, apart: bool = False, network: OnGpu | None = None) -> DeviceEngine:
    channels, height, width = SHAPE
    network = network or OnGpu(*(batches or (1, 2, 4)), apart=apart)
    return DeviceEngine(network, capacity=capacity, channels=channels, height=height, width=width, capture=capture)


def on_host(capacity: int = 1) -> Engine:
    return Engine(OnHost(), capacity=capacity, channels=SHAPE[0], height=SHAPE[1], width=SHAPE[2])


def run(engine: Stepper, *jobs: Job) -> list[Floats]:
    for job in jobs:
        engine.join(job)
    found = {}
    while engine.busy:
        found.update({ended.job: ended.picture() for ended in engine.step()})
    return [found[job] for job in jobs]


def jobs(count: int) -> list[Job]:
    return [Job(picture(i), rows(3 + 2 * i, SAMPLERS[i % 5]), seed=2**63 + i, corner=(7 * i, 2**31 * (i % 2))) for i in range(count)]
