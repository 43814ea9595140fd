"""Who is compared. Each contender runs in a process of its own (`benchmarks/worker.py`)."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

from benchmarks.workloads import Task
from sr3rt import _native, backends
from sr3rt.backends import Floats, onnxruntime
from sr3rt.bench import EngineLoop, Noise

if TYPE_CHECKING:
    from sr3rt.backends.torch import TorchOnGpu


class Stepper(Protocol):
    """A contender at work on one workload: step after step, picture after picture."""

    @property
    def network(self) -> float: ...
    def start(self, noise: Noise | None = None) -> None: ...
    def step(self) -> None: ...
    def finish(self) -> None: ...
    def prediction(self) -> Floats: ...


@dataclass(frozen=True)
class Contender:
    """name: as in test names and reports. package: what it needs imported. why_not(device): why it cannot run here, or None."""

    name: str
    title: str
    package: str
    make: Callable[[Task], Stepper]
    why_not: Callable[[str], str | None]


class Planted:
    """Ours with a share of every step's time wasted after it: the versus mode must see it."""

    def __init__(self, inner: EngineLoop, share: float) -> None:
        self._inner, self._share = inner, share
        self.start, self.finish, self.prediction = inner.start, inner.finish, inner.prediction

    @property
    def network(self) -> float:
        return self._inner.network

    def step(self) -> None:
        begin = time.perf_counter()
        self._inner.step()
        end = time.perf_counter() + self._share * (time.perf_counter() - begin)
        while time.perf_counter() < end:
            pass


def _ours(task: Task, backend: str, *, precision: str = "auto", compiled: bool = False) -> Stepper:
    request = backends.Request(backend, precision, task.device if task.device == "cuda" else "auto", task.threads)
    workload = task.workload
    bundle = workload.bundle_with_engine(task.batch) if backend == "tensorrt" else workload.bundle()
    network = backends.load(bundle, request)
    if compiled:
        network = cast("TorchOnGpu", network).compiled()
    loop = EngineLoop(network, task.condition(), task.rows(), threads=request.thread_count)
    return Planted(loop, task.plant) if task.plant is not None else loop


def _eager(task: Task, *, half: bool = False, compiled: bool = False) -> Stepper:
    import torch

    from benchmarks.eager import EagerLoop

    torch.set_num_threads(task.threads)
    dtype = torch.float32
    if half:
        dtype = torch.float16 if task.device == "cuda" else torch.bfloat16
    net = task.workload.eager()
    exact = not (half or compiled)
    loop = EagerLoop(net, task.condition(), task.rows(), dtype=dtype, channels_last=half, device=task.device, exact=exact)
    if compiled:
        loop.compile()
    return loop


def _peer(task: Task) -> Stepper:
    import torch

    from benchmarks.peer import PeerLoop

    torch.set_num_threads(task.threads)
    return PeerLoop(task)


def _why_not_peer(device: str) -> str | None:
    from benchmarks.peer import why_not

    return why_not()


def _why_not_half(device: str) -> str | None:
    if device == "cuda" or _native.bfloat16():
        return None
    return "this CPU has no bfloat16 instructions (AVX512-BF16), and without them PyTorch's bfloat16 is slower than its float32"


def _why_not_compiled(device: str) -> str | None:
    if device == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return "torch.compile needs a C++ compiler and none is on PATH"
    return None


def _why_not_ours(backend: str, device: str) -> str | None:
    if backend != "onnxruntime" and (device == "cuda") != (backend in ("tensorrt", "torch")):
        return f"this backend does not run on the {device}"
    if reason := backends.why_not(backend):
        return reason
    return onnxruntime.why_not_on_gpu() if backend == "onnxruntime" and device == "cuda" else None


def _why_not_bf16(device: str) -> str | None:
    if reason := _why_not_ours("native", device):
        return reason
    return None if _native.bfloat16() else "this CPU has no AVX512-BF16"


def contenders() -> dict[str, Contender]:
    """The reference first, then what PyTorch offers, then every backend of ours, by name."""
    theirs = [
        Contender("eager", "R: eager PyTorch, fp32", "torch", _eager, lambda device: None),
        Contender("half", "E: eager PyTorch, half precision, channels_last", "torch", partial(_eager, half=True), _why_not_half),
        Contender("compiled", "T: torch.compile, max-autotune, fp32", "torch", partial(_eager, compiled=True), _why_not_compiled),
        Contender("peer", "the public implementation itself", "torch", _peer, _why_not_peer),
    ]
    ours = [
        Contender(name, f"sr3rt, {name}", module, partial(_ours, backend=name), partial(_why_not_ours, name))
        for name, module in backends.MODULES.items()
        if name != "native"
    ]
    native: dict[str, Callable[[str], str | None]] = {"fp32": partial(_why_not_ours, "native"), "bf16": _why_not_bf16}
    ours += [
        Contender(
            "native" if precision == "fp32" else f"native-{precision}",
            f"sr3rt, native, {precision}",
            backends.MODULES["native"],
            partial(_ours, backend="native", precision=precision),
            why_not,
        )
        for precision, why_not in native.items()
    ]
    captured = partial(_ours, backend="torch", precision="fp16"), partial(_why_not_ours, "torch")
    ours += [
        Contender("torch-half", "sr3rt, torch, fp16", "torch", *captured),
        Contender("torch-compiled", "sr3rt, torch, fp16, compiled", "torch", partial(captured[0], compiled=True), captured[1]),
    ]
    return {one.name: one for one in (*theirs, *ours)}
