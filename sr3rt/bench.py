"""How fast a bundle runs here: `sr3rt bench`. Steps of every backend that works, in shuffled turns."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sr3rt import backends
from sr3rt.backends import Floats, Network
from sr3rt.bundle import Bundle
from sr3rt.engine import BringsEngine, Job, engine_of
from sr3rt.errors import OptionError, SR3Error
from sr3rt.samplers import Sampler, Table, table
from sr3rt.schedule import respace
from sr3rt.timing import BUSY, Load, Summary

Noise = Callable[[int], Floats]
"""As `sr3rt.engine.Noise`, of all pictures of a batch: (N, C, H, W)."""


class EngineLoop:
    """Runs of `rows` for x (N, C, H, W), one after the other, as `Upscaler` drives them."""

    def __init__(self, network: Network, x: Floats, rows: Table, *, threads: int) -> None:
        self._x, self._rows, self._seed = x, rows, 0
        batch, channels, height, width = x.shape
        self._timed = network if isinstance(network, BringsEngine) else _Timed(network)
        self._engine = engine_of(self._timed, capacity=batch, channels=channels, height=height, width=width, threads=threads)
        self._jobs: list[Job] = []
        self._last = np.zeros_like(x)
        self.start()

    @property
    def network(self) -> float:
        """Seconds spent in the network so far; on a GPU, by its own clock, in the steps that are done."""
        spent = self._timed.seconds if isinstance(self._timed, _Timed) else getattr(self._engine, "seconds", 0.0)
        return float(spent)

    def start(self, noise: Noise | None = None) -> None:
        """New pictures, with new seeds; `noise` replaces the seeded noise."""
        for job in self._jobs:
            self._engine.leave(job)
        self._jobs = [Job(x, self._rows, self._seed + i, noise and _one(noise, i)) for i, x in enumerate(self._x)]
        self._seed += len(self._x)
        for job in self._jobs:
            self._engine.join(job)

    def step(self) -> None:
        """One row of every picture; after the last, the first of new ones."""
        if not self._jobs:
            self.start()
        for ended in self._engine.step():
            self._last[self._jobs.index(ended.job)] = ended.picture()
        if not self._engine.busy:
            self._jobs = []

    def finish(self) -> None:
        """Wait for a GPU's queued steps; a CPU's are done when they return."""
        self._engine.wait()

    def prediction(self) -> Floats:
        """The latest x0, (N, C, H, W)."""
        return np.stack([self._engine.prediction(job) for job in self._jobs]) if self._jobs else self._last.copy()


class _Timed:
    """A `Network` that adds up the seconds spent in it."""

    def __init__(self, inner: Network) -> None:
        self.backend, self.device, self.precision = inner.backend, inner.device, inner.precision
        self._inner, self.seconds = inner, 0.0

    def bind(self, x: Floats, y: Floats, level: Floats, out: Floats) -> Callable[[], None]:
        run = self._inner.bind(x, y, level, out)

        def timed() -> None:
            begin = time.perf_counter()
            run()
            self.seconds += time.perf_counter() - begin

        return timed


def _one(noise: Noise, i: int) -> Callable[[int], Floats]:
    """The noise of picture i of a batch."""
    return lambda step: noise(step)[i]


CANDIDATES = (*((name, "fp32" if name == "native" else "auto") for name in backends.MODULES), ("native", "bf16"))
"""Backends, and the precisions that they are asked for."""


@dataclass(frozen=True)
class Row:
    """One backend in one precision.

    load: seconds. outside: share of a step spent outside the network. quiet: whether other processes kept away.
    """

    backend: str
    precision: str
    load: float
    step: Summary
    outside: float
    quiet: bool


def measure(bundle: Bundle, *, size: int, batch: int, seconds: float, threads: int = 0) -> tuple[list[Row], dict[str, str]]:
    """Rows of the `CANDIDATES` that run this bundle here, and the reasons why the others do not. size: side of the result, pixels.

    Raises OptionError for a size or batch that cannot be, BundleCorrupt.
    """
    manifest = bundle.manifest
    if size < manifest.stride or size % manifest.stride or batch < 1:
        raise OptionError(f"size must be a multiple of {manifest.stride} and batch at least 1, found size {size} and batch {batch}")
    rows = table(
        Sampler.parse(manifest.defaults.sampler),
        respace(manifest.trained.schedule(), manifest.defaults.steps),
        prediction=manifest.prediction,
        level=manifest.level,
    )
    x = np.random.default_rng(0).uniform(-1, 1, (batch, manifest.channels, size, size)).astype(np.float32)
    loops: dict[str, tuple[EngineLoop, Network, float]] = {}
    missing: dict[str, str] = {}
    for backend, precision in CANDIDATES:
        name = f"{backend}, {precision}"
        request = backends.Request(backend, precision, threads=threads)
        begin = time.perf_counter()
        try:
            network = backends.load(bundle, request)
            load = time.perf_counter() - begin
            loop = EngineLoop(network, x, rows, threads=request.thread_count)
            loop.step()
            loop.finish()
        except SR3Error as error:
            missing[name] = str(error)
            continue
        loops[name] = loop, network, load
    times: dict[str, list[float]] = {name: [] for name in loops}
    inside = {name: -loop.network for name, (loop, _, _) in loops.items()}
    watch, end = Load(), time.perf_counter() + seconds
    while loops and (time.perf_counter() < end or len(next(iter(times.values()))) < 5):
        for name in random.sample(list(loops), len(loops)):
            begin = time.perf_counter()
            loops[name][0].step()
            loops[name][0].finish()
            times[name].append(time.perf_counter() - begin)
    quiet = (watch.foreign() or 0.0) <= BUSY
    found = [
        Row(network.backend, network.precision, load, Summary.of(times[name]), 1 - (loop.network + inside[name]) / sum(times[name]), quiet)
        for name, (loop, network, load) in loops.items()
    ]
    return found, missing
