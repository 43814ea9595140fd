"""The loop on a GPU. State, tables and levels stay there; a step is one captured graph, in which the network runs between the kernels
of native/step.cu, and the host neither computes nor waits until a picture is done.

What the step does is read from device memory, so one graph serves every step of every sampler and request: there is one for each way
in which the busy slots are put together from the batch sizes that the network has (`cover`), and slots join and leave without another.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Protocol

import numpy as np

from sr3rt.backends import Floats
from sr3rt.backends.cuda import ALIGNED, Event, Gpu, Graph, Memory, Pinned, Stream
from sr3rt.engine import Ended, Engine, Job, Slot, not_finite
from sr3rt.errors import BackendError, OptionError

Enqueue = Callable[[Mapping[str, int]], None]
"""`enqueue({"x": …, …})` puts one call on its stream: addresses on the GPU by name, of more values than it may know."""

SLOT = np.dtype([("seed", "u8"), ("table", "u8"), *((name, "u4") for name in ("rows", "row", "broken", "top", "left", "unused"))])
"""`Slot` of native/step.cu."""

AHEAD = 2  # steps that may be queued on the GPU: it never waits for the host, and who joins waits for no more than these
TABLES = 32  # different runs whose tables are kept
THREADS = 128  # of a block
TOGETHER = 4  # pixels that a thread of sr3_start and sr3_step does


class DeviceNetwork(Protocol):
    """What runs on a GPU: a `Network` whose calls can be put on a stream."""

    backend: str
    device: str
    precision: str
    gpu: Gpu

    def batches(self, height: int, width: int) -> tuple[int, ...]:
        """Pictures of that size that one call can take, ascending. Raises ImageError where there is none."""
        ...

    def enqueuer(self, batch: int, height: int, width: int, stream: Stream) -> Enqueue:
        """Calls for exactly so many pictures, on that stream: from x, y, level and what is `given` to out. Raises BackendError."""
        ...

    def given(self, height: int, width: int) -> Mapping[str, tuple[int, int, int]]:
        """Shapes (C, H, W) of what the network takes besides, float32, that is computed of a picture's x alone. Empty for most."""
        ...

    def once(self, height: int, width: int, stream: Stream) -> Enqueue:
        """Calls for one picture, from x to what is `given`; where nothing is, never asked for. Raises BackendError."""
        ...

    def bind(self, x: Floats, y: Floats, level: Floats, out: Floats) -> Callable[[], None]:
        """As `Network.bind`."""
        ...


def cover(count: int, batches: Iterable[int]) -> list[tuple[int, int]]:
    """Calls (first slot, batch size) that take `count` pictures: the smallest batch that holds the rest, else the largest there is."""
    sizes, calls, first = sorted(batches), list[tuple[int, int]](), 0
    while first < count:
        size = next((one for one in sizes if one >= count - first), sizes[-1])
        calls.append((first, size))
        first += size
    return calls


class Stage:
    """Device memory for `capacity` pictures of one size, and the network over it.

    x, y, net, x0: addresses of (slots, C, H, W) float32; `slots` is what the calls that take `capacity` pictures take.
    own: what a slot has to itself (x, y, x0, what is given): the first slot's address, and the bytes of each. once: the network's, or None.
    """

    def __init__(self, network: DeviceNetwork, *, capacity: int, channels: int, height: int, width: int) -> None:
        self.gpu, self._network = network.gpu, network
        self.gpu.use()
        self.shape, self.picture = (channels, height, width), channels * height * width * np.dtype(np.float32).itemsize
        self._batches = network.batches(height, width)
        first, last = cover(capacity, self._batches)[-1]
        self.slots = first + last
        given = {name: math.prod(shape) * np.dtype(np.float32).itemsize for name, shape in network.given(height, width).items()}
        starts = [start for start, _ in cover(capacity, self._batches)]
        if any(start * size % ALIGNED for start in starts for size in (self.picture, *given.values())):
            raise BackendError(
                f"{capacity} pictures of {height}×{width} do not fit one engine of {network.backend}, and cannot be split between calls, "
                f"which begin at multiples of {ALIGNED} bytes: use a batch of {max(self._batches)}, or build a larger engine"
            )
        self.stream = Stream()
        alone = {"x": self.picture, **given} if given else {}
        sizes = [*[self.picture] * 4, ALIGNED, *given.values()]
        self._memory, addresses = _taken(
            self.gpu, [*(self.slots * size for size in sizes), *alone.values()], f"a batch of {self.slots} pictures of {width}×{height}"
        )
        self.stream.clear(self._memory.address, self._memory.size)
        self.x, self.y, self.net, self.x0, self._levels = addresses[:5]
        self._given = {name: (address, size) for (name, size), address in zip(given.items(), addresses[5:], strict=False)}
        self._alone = dict(zip(alone, addresses[len(sizes) :], strict=True))  # for one picture, aligned as no slot need be
        self.own = [*((one, self.picture) for one in (self.x, self.y, self.x0)), *self._given.values()]
        self.once = network.once(height, width, self.stream) if given else None
        self._enqueuers: dict[int, Enqueue] = {}

    def cover(self, count: int) -> list[tuple[int, int]]:
        """The network's calls for the first `count` slots."""
        return cover(count, self._batches)

    def level(self, first: int) -> int:
        """Address of the levels of the call whose first slot that is."""
        return self._levels + first * ALIGNED

    def know(self, slot: int) -> None:
        """Enqueue what is computed of a slot's x alone, which steps are given: to be done when its x is new, where there is `once`."""
        assert self.once
        self.stream.move(self._alone["x"], self.x + slot * self.picture, self.picture)
        self.once(self._alone)
        for name, (address, size) in self._given.items():
            self.stream.move(address + slot * size, self._alone[name], size)

    def predict(self, calls: Iterable[tuple[int, int]]) -> None:
        """Enqueue calls of the network."""
        for first, batch in calls:
            if batch not in self._enqueuers:
                self._enqueuers[batch] = self._network.enqueuer(batch, *self.shape[1:], self.stream)
            pictures = {"x": self.x, "y": self.y, "out": self.net}
            addresses = {name: address + first * self.picture for name, address in pictures.items()} | {"level": self.level(first)}
            self._enqueuers[batch](addresses | {name: address + first * size for name, (address, size) in self._given.items()})

    def step(self, calls: Iterable[tuple[int, int]], states: int) -> None:
        """Enqueue one step of every busy slot of `states`, an address. Others in the calls are idle, and keep what they hold."""
        launch, slots = self.gpu.launch, 0
        for first, batch in calls:
            arguments = self.level(first), states + first * SLOT.itemsize, batch
            launch("sr3_levels", (-(-batch // THREADS), 1), THREADS, arguments, self.stream)
            slots += batch
        self.predict(calls)
        launch("sr3_step", (self.blocks, slots), THREADS, (self.y, self.net, self.x0, states, *self.shape), self.stream)
        launch("sr3_next", (-(-slots // THREADS), 1), THREADS, (states, slots), self.stream)

    @property
    def blocks(self) -> int:
        """Of threads, for the pixels of a picture."""
        return -(-self.shape[1] * self.shape[2] // (THREADS * TOGETHER))


def _taken(gpu: Gpu, sizes: Sequence[int], purpose: str) -> tuple[Memory, list[int]]:
    """Memory for so many bytes each, and where each begins, aligned."""
    *starts, size = accumulate((-(-size // ALIGNED) * ALIGNED for size in sizes), initial=0)
    memory = Memory(gpu, size, purpose)
    return memory, [memory.address + start for start in starts]


class DeviceEngine:
    """`sr3rt.engine.Engine` on a GPU. Not thread-safe: an engine belongs to one caller; networks are shared.

    A job with its own noise, or whose every prediction is projected, takes part by a loop on the host.
    seconds: that the GPU spent in the steps that are done, and before them in what depends on x alone.
    capture: whether steps are captured into graphs; False once that has failed.
    """

    def __init__(self, network: DeviceNetwork, *, capacity: int, channels: int, height: int, width: int, capture: bool = True) -> None:
        self._network, self._capacity, self.capture = network, capacity, capture
        self._stage = Stage(network, capacity=capacity, channels=channels, height=height, width=width)
        self._gpu, self._stream = self._stage.gpu, self._stage.stream
        self._states = Memory(self._gpu, 2 * self._stage.slots * SLOT.itemsize, "the slots")
        self._idle = self._states.address + self._states.size // 2  # as many that have nothing to do
        self._stream.clear(self._states.address, self._states.size)
        shape = (capacity, channels, height, width)
        self._x_staged, self._y_staged, self._states_staged = Pinned(shape), Pinned(shape), Pinned((capacity,), SLOT)
        self._states_seen = Pinned((capacity,), SLOT)
        self._sent = [Event() for _ in range(capacity)]  # when what is staged for a slot may be overwritten
        self._marks = [(Event(), Event()) for _ in range(AHEAD)]
        self._marks_once = [(Event(), Event()) for _ in range(capacity)]
        self._known: set[int] = set()  # slots of which these have not been added up
        self._queued = 0  # steps whose marks have not been waited for
        self._steps = 0
        self._steppers: dict[tuple[tuple[int, int], ...], Callable[[], None]] = {}
        self._tables: dict[bytes, Memory] = {}
        self._slots: list[Slot] = []
        self._host: Engine | None = None
        self.seconds = 0.0

    @property
    def busy(self) -> int:
        """As `Engine.busy`."""
        return len(self._slots) + (self._host.busy if self._host else 0)

    @property
    def free(self) -> int:
        """As `Engine.free`."""
        return self._capacity - self.busy

    def join(self, job: Job) -> None:
        """As `Engine.join`."""
        shape = self._stage.shape
        if not self.free:
            raise OptionError(f"all {self._capacity} slots are busy: step until one is free, or make a larger engine")
        if job.x.shape != shape or not len(job.table):
            raise OptionError(f"the engine takes x of {shape} and a table with rows, found {job.x.shape} and {len(job.table)}")
        self._gpu.use()
        if job.noise is not None or job.consistency == "every":
            if self._host is None:
                channels, height, width = shape
                self._host = Engine(self._network, capacity=self._capacity, channels=channels, height=height, width=width)
            self._host.join(job)
            return
        n, stream, stage = len(self._slots), self._stream, self._stage
        self._sent[n].wait()
        self._x_staged.array[n] = job.x
        self._states_staged.array[n] = (job.seed, self._table(job).address, len(job.table), 0, 0, *job.corner, 0)
        stream.to_device(stage.x + n * stage.picture, self._x_staged.array[n])
        stream.clear(stage.x0 + n * stage.picture, stage.picture)
        if stage.once:
            begin, end = self._marks_once[n]
            begin.record(stream)
            stage.know(n)
            end.record(stream)
            self._known.add(n)
        # After what may fail: a slot with rows steps.
        stream.to_device(self._states.address + n * SLOT.itemsize, self._states_staged.array[n : n + 1])
        self._sent[n].record(stream)
        self._gpu.launch("sr3_start", (stage.blocks, 1), THREADS, (stage.y, self._states.address, n, *shape), stream)
        self._slots.append(Slot(job))

    def leave(self, job: Job) -> None:
        """As `Engine.leave`."""
        n = self._find(job)
        if n is None:
            if self._host is None:
                raise OptionError("that job is not in this engine")
            self._host.leave(job)
            return
        self._gpu.use()
        last, stage, stream = len(self._slots) - 1, self._stage, self._stream
        if n != last:
            for base, size in (*stage.own, (self._states.address, SLOT.itemsize)):
                stream.move(base + n * size, base + last * size, size)
            self._slots[n] = self._slots[last]
        stream.clear(self._states.address + last * SLOT.itemsize, SLOT.itemsize)
        self._slots.pop()

    def prediction(self, job: Job) -> Floats:
        """As `Engine.prediction`; waits for the steps that are queued."""
        n = self._find(job)
        if n is None:
            if self._host is None:
                raise OptionError("that job is not in this engine")
            return self._host.prediction(job)
        self._gpu.use()
        self._stream.to_host(self._y_staged.array[n], self._stage.x0 + n * self._stage.picture)
        self.wait()
        x0: Floats = self._y_staged.array[n].copy()
        return x0

    def step(self) -> list[Ended]:
        """As `Engine.step`, but the step is only queued; of jobs whose last it is, the pictures are waited for."""
        ended = self._host.step() if self._host else []
        if not self._slots:
            return ended
        self._gpu.use()
        if self._queued == AHEAD:
            self._pass_oldest()
        begin, end = self._marks[self._steps % AHEAD]
        stepper = self._stepper(len(self._slots))
        begin.record(self._stream)
        stepper()
        end.record(self._stream)
        self._steps, self._queued = self._steps + 1, self._queued + 1
        for slot in self._slots:
            slot.row += 1
        return ended + (self._end() if any(slot.row == len(slot.job.table) for slot in self._slots) else [])

    def wait(self) -> None:
        """Until what is queued is done. Raises BackendError with what went wrong on the GPU."""
        self._stream.wait()
        while self._queued:
            self._pass_oldest()
        while self._known:
            begin, end = self._marks_once[self._known.pop()]
            self.seconds += end.since(begin)

    def _pass_oldest(self) -> None:
        begin, end = self._marks[(self._steps - self._queued) % AHEAD]
        end.wait()
        self.seconds += end.since(begin)
        self._queued -= 1

    def _find(self, job: Job) -> int | None:
        return next((i for i, slot in enumerate(self._slots) if slot.job is job), None)

    def _end(self) -> list[Ended]:
        """The jobs that are done, and those that broke, leave."""
        count, stage = len(self._slots), self._stage
        for i, slot in enumerate(self._slots):
            if slot.row == len(slot.job.table):
                self._stream.to_host(self._y_staged.array[i], stage.y + i * stage.picture)
        states = self._states_seen.array[:count]
        self._stream.to_host(states, self._states.address)
        self.wait()
        ended = []
        for i, slot in enumerate(self._slots):
            if broken := int(states[i]["broken"]):
                ended.append(Ended(slot.job, not_finite(self._network, broken, len(slot.job.table))))
            elif slot.row == len(slot.job.table):
                ended.append(Ended(slot.job, slot.job.result(self._y_staged.array[i].copy())))
        for one in ended:
            self.leave(one.job)
        return ended

    def _stepper(self, count: int) -> Callable[[], None]:
        """A call that enqueues a step of the first `count` slots."""
        calls = tuple(self._stage.cover(count))
        if calls not in self._steppers:
            enqueue: Callable[[], None] = partial(self._stage.step, calls, self._states.address)
            if self.capture:
                self._stage.step(calls, self._idle)  # libraries set themselves up in a first call, which cannot be captured
                self._stream.wait("in the network's first call")
                enqueue = self._captured(enqueue)
            self._steppers[calls] = enqueue
        return self._steppers[calls]

    def _captured(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """The same as one graph; where that cannot be had, and the GPU is well, itself, with a warning."""
        try:
            return partial(Graph(self._stream, enqueue).launch, self._stream)
        except Exception as error:  # the network's own, too
            self._stream.wait("after a capture that failed")
            self.capture = False
            warnings.warn(
                f"steps of {self._network.backend} in {self._network.precision} cannot be captured into a graph on {self._gpu.name}, "
                f"and are started call by call, which is slower: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return enqueue

    def _table(self, job: Job) -> Memory:
        """The job's table on the GPU; runs that are alike share one."""
        key = np.ascontiguousarray(job.table, np.float32).tobytes()
        if key not in self._tables:
            if len(self._tables) >= TABLES:
                self._stream.wait()  # a job that left may have steps queued that read its table
                used = {slot.job.table.tobytes() for slot in self._slots}
                self._tables = {one: memory for one, memory in self._tables.items() if one in used}
            self._tables[key] = Memory(self._gpu, len(key), "a table of steps")
            self._stream.to_device(self._tables[key].address, np.frombuffer(key, np.float32))  # which stays, however late it is read
        return self._tables[key]
