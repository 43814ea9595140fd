"""The loop. An engine holds slots of one size; a step advances every busy slot by one row of its own table.

Pictures of a batch, and requests that join and leave between steps, are the same thing here: a `Job` in a slot. Busy slots are kept
at the front of the arrays, so the network runs on exactly the first n; a job's result does not depend on its slot or neighbours.

`Engine` is the loop over arrays of the host; a network that lives on a GPU brings its own (backends/device.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sr3rt import _native
from sr3rt.backends import Floats, Network
from sr3rt.bundle import Consistency
from sr3rt.consistency import Projection
from sr3rt.errors import BackendError, NonFiniteError, OptionError
from sr3rt.noise import START
from sr3rt.samplers import LEVEL, Table

Noise = Callable[[int], Floats]
"""`noise(step)` gives z (C, H, W) float32 of a step, counted from 0 in execution order; of y_T for `step` = START. H and W are those of the
padded result, the next multiples of the network's stride."""


@dataclass(frozen=True, eq=False)
class Job:
    """One picture to refine.

    x: condition, float32 (C, H, W) in [-1, 1]. table: a run (`sr3rt.samplers.table`). seed: 0 … 2**64−1, of the Philox noise;
    `noise` replaces it (a replay of recorded noise). consistency "final" or "every" projects with `lr`, the low-resolution picture,
    float32 (C, h, w) in [-1, 1]; where x is padded at the bottom and right, `lr` is not, and the padding is left as it is.
    corner: (row, column) of x in the picture that it is a part of; the noise is that place's.
    """

    x: Floats
    table: Table
    seed: int
    noise: Noise | None = None
    consistency: Consistency = "off"
    lr: Floats | None = None
    projection: Projection | None = None
    corner: tuple[int, int] = (0, 0)

    def drawn(self, step: int) -> Floats:
        """What `noise` gives for that step. Raises OptionError for what is not an array like x."""
        assert self.noise is not None
        z = np.asarray(self.noise(step))
        if z.shape != self.x.shape or z.dtype.kind != "f":
            raise OptionError(f"noise must give float32 of {self.x.shape}, the padded result's, found {z.dtype} {z.shape}")
        return np.ascontiguousarray(z, np.float32)

    def project(self, x0: Floats) -> Floats:
        """x0 (C, H, W) made to agree with the input, within [-1, 1]."""
        if self.lr is None or self.projection is None:
            raise OptionError("a job with consistency needs `lr` and `projection`")
        height, width = self.projection.size
        result = x0.copy()
        result[:, :height, :width] = np.clip(self.projection.project(x0[:, :height, :width], self.lr), -1, 1)
        return result

    def result(self, y: Floats) -> Floats:
        """What the job gives for the y (C, H, W) of its last step."""
        return self.project(np.clip(y, -1, 1)) if self.consistency == "final" else y


@dataclass(eq=False)
class Slot:
    """A job in an engine, and the row of its table that is next."""

    job: Job
    row: int = 0


@dataclass(frozen=True, eq=False)
class Ended:
    """A job that has left, and how it ended."""

    job: Job
    outcome: Floats | NonFiniteError

    def picture(self) -> Floats:
        """The refined picture, float32 (C, H, W) in [-1, 1]. Raises NonFiniteError, naming the step."""
        if isinstance(self.outcome, NonFiniteError):
            raise self.outcome
        return self.outcome


class Stepper(Protocol):
    """An engine, wherever it runs; `Engine` says what each of these does."""

    @property
    def busy(self) -> int: ...
    @property
    def free(self) -> int: ...
    def join(self, job: Job) -> None: ...
    def leave(self, job: Job) -> None: ...
    def prediction(self, job: Job) -> Floats: ...
    def step(self) -> list[Ended]: ...
    def wait(self) -> None: ...


@runtime_checkable
class BringsEngine(Protocol):
    """A network with a loop of its own."""

    def engine(self, *, capacity: int, channels: int, height: int, width: int) -> Stepper:
        """As `engine_of`."""
        ...


def engine_of(network: Network, *, capacity: int, channels: int, height: int, width: int, threads: int = 1) -> Stepper:
    """An engine of `capacity` slots for that network: its own, or else `Engine`. Raises BackendError."""
    if isinstance(network, BringsEngine):
        return network.engine(capacity=capacity, channels=channels, height=height, width=width)
    return Engine(network, capacity=capacity, channels=channels, height=height, width=width, threads=threads)


class Engines:
    """A network's engines for one caller after another. Those on a GPU are kept for the next: to make one takes memory and a capture.

    threads: of engines on the host. Safe to use from several threads.
    """

    KEPT = 2  # that nobody uses

    def __init__(self, network: Network, *, threads: int = 1) -> None:
        self._network, self._threads = network, threads
        self._idle: list[tuple[dict[str, int], Stepper]] = []
        self._lock = Lock()

    @contextmanager
    def using(self, *, capacity: int, channels: int, height: int, width: int) -> Iterator[Stepper]:
        """An engine as `engine_of` makes it, for the block; it must be left empty. One that was not, or failed, is not used again."""
        shape = {"capacity": capacity, "channels": channels, "height": height, "width": width}
        engine = self._kept(shape) or self._made(shape)
        yield engine
        if isinstance(self._network, BringsEngine) and not engine.busy:
            with self._lock:
                self._idle = [*self._idle, (shape, engine)][-self.KEPT :]

    def _kept(self, shape: dict[str, int]) -> Stepper | None:
        with self._lock:
            found = next((one for one in self._idle if one[0] == shape), None)
            if found:
                self._idle.remove(found)
        return found and found[1]

    def _made(self, shape: dict[str, int]) -> Stepper:
        try:
            return engine_of(self._network, **shape, threads=self._threads)
        except BackendError:
            with self._lock:
                held = bool(self._idle)
                self._idle = []
            if not held:
                raise
        return engine_of(self._network, **shape, threads=self._threads)  # what was kept may have been in the way


def not_finite(network: Network, step: int, steps: int) -> NonFiniteError:
    """The error of a job in whose step (from 1) something was NaN or infinite."""
    if network.precision == "fp32":
        reason = "the weights or the schedule are not usable; `sr3rt info` shows what the bundle was measured at"
    else:
        reason = (
            "it probably does not hold this network's numbers; load it with precision='fp32', or with rerun=True, which falls back to that"
        )
    return NonFiniteError(f"step {step} of {steps} produced NaN or infinity on backend {network.backend} in {network.precision}: {reason}")


class Engine:
    """`capacity` slots of (channels, height, width). Not thread-safe: an engine belongs to one caller; networks are shared.

    Usage: `join` jobs (at any time between steps), call `step` until `busy` is 0; a job that ended is in what `step` returns.
    """

    def __init__(self, network: Network, *, capacity: int, channels: int, height: int, width: int, threads: int = 1) -> None:
        shape = (capacity, channels, height, width)
        self._network, self._threads = network, threads
        self._x, self._y, self._out, self._x0 = (np.zeros(shape, np.float32) for _ in range(4))
        self._x0_new: Floats | None = None  # only consistency "every" needs it
        self._levels = np.zeros((capacity, 1), np.float32)
        self._runs: dict[int, Callable[[], None]] = {}
        self._slots: list[Slot] = []

    @property
    def busy(self) -> int:
        """Jobs in flight."""
        return len(self._slots)

    @property
    def free(self) -> int:
        """Jobs that can still join."""
        return len(self._x) - len(self._slots)

    def join(self, job: Job) -> None:
        """Put a job into a free slot; it takes part from the next step on. Raises OptionError when it does not fit."""
        if not self.free:
            raise OptionError(f"all {len(self._x)} slots are busy: step until one is free, or make a larger engine")
        if job.x.shape != self._x.shape[1:] or not len(job.table):
            raise OptionError(f"the engine takes x of {self._x.shape[1:]} and a table with rows, found {job.x.shape} and {len(job.table)}")
        n = self.busy
        self._x[n] = job.x
        self._x0[n] = 0
        if job.noise is not None:
            self._y[n] = job.drawn(START)
        else:
            one = slice(n, n + 1)
            seeds, steps, corners = np.array([job.seed], np.uint64), np.array([START], np.uint32), np.array([job.corner], np.uint32)
            _native.normals(self._y[one], seeds, steps, threads=self._threads, corners=corners)
        self._slots.append(Slot(job))

    def leave(self, job: Job) -> None:
        """Take a job out, finished or not. Raises OptionError when it is not here."""
        n = next((i for i, slot in enumerate(self._slots) if slot.job is job), None)
        if n is None:
            raise OptionError("that job is not in this engine")
        last = self.busy - 1
        if n != last:
            for array in (self._x, self._y, self._x0):
                array[n] = array[last]
            self._slots[n] = self._slots[last]
        self._slots.pop()

    def prediction(self, job: Job) -> Floats:
        """A copy of the job's latest predicted picture x0, float32 (C, H, W) in [-1, 1]."""
        return next(self._x0[i].copy() for i, slot in enumerate(self._slots) if slot.job is job)

    def step(self) -> list[Ended]:
        """Advance every busy slot by one row. Returns the jobs that ended: finished, or no longer finite, the others unharmed.

        An error of the network's own passes through; the engine is not usable then.
        """
        n = self.busy
        if not n:
            return []
        rows = np.stack([slot.job.table[slot.row] for slot in self._slots])
        self._levels[:n, 0] = rows[:, LEVEL]
        if n not in self._runs:
            self._runs[n] = self._network.bind(self._x[:n], self._y[:n], self._levels[:n], self._out[:n])
        self._runs[n]()
        broken = set() if self._advance(n, rows) else self._broken(n)
        ended = list[Ended]()
        for i, slot in enumerate(self._slots):
            slot.row += 1
            if i in broken:
                ended.append(Ended(slot.job, not_finite(self._network, slot.row, len(slot.job.table))))
            elif slot.row == len(slot.job.table):
                ended.append(Ended(slot.job, slot.job.result(self._y[i].copy())))
        for one in ended:
            self.leave(one.job)
        return ended

    def wait(self) -> None:
        """Until what `step` began is done: on the host it is."""

    def _broken(self, n: int) -> set[int]:
        """The slots that hold NaN or infinity; all n, where only an intermediate value did and so none does."""
        found = {i for i in range(n) if not (np.isfinite(self._out[i]).all() and np.isfinite(self._y[i]).all())}
        return found or set(range(n))

    def _advance(self, n: int, rows: NDArray[np.float32]) -> bool:
        """x0 and y of the n busy slots from the network's output. The common case is one fused pass."""
        y, out, x0 = self._y[:n], self._out[:n], self._x0[:n]
        jobs = [slot.job for slot in self._slots]
        seeds = np.array([job.seed for job in jobs], np.uint64)
        steps = np.array([slot.row for slot in self._slots], np.uint32)
        corners = np.array([job.corner for job in jobs], np.uint32)
        if all(job.noise is None and job.consistency != "every" for job in jobs):
            return _native.step(y, out, x0, rows, seeds, steps, clip=True, threads=self._threads, corners=corners)
        if self._x0_new is None:
            self._x0_new = np.zeros_like(self._x0)
        new = self._x0_new[:n]
        ok = _native.predict(y, out, new, rows, clip=True, threads=self._threads)
        for i, (job, slot) in enumerate(zip(jobs, self._slots, strict=True)):
            if job.consistency == "every" and (ok or np.isfinite(new[i]).all()):
                new[i] = job.project(new[i])
            z = None if job.noise is None else job.drawn(slot.row)[None]
            one = slice(i, i + 1)
            ok &= _native.advance(
                y[one], new[one], x0[one], rows[one], seeds[one], steps[one], z=z, threads=self._threads, corners=corners[one]
            )
        return ok
