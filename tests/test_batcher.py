"""Step-level batching: order, joining, leaving, failing. The network is a few lines of NumPy that waits when told to."""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import wait

import numpy as np
import pytest
from arithmetic import Arithmetic

from sr3rt.backends import Floats
from sr3rt.engine import Engine, Job
from sr3rt.errors import BackendError, Cancelled, DeadlineExceeded, NonFiniteError, OptionError, Stopped
from sr3rt.samplers import Sampler, Table, table
from sr3rt.schedule import named, respace
from sr3rt.serving import batcher as serving
from sr3rt.serving.batcher import FAILURES, PATIENCE, Batcher

TRAINED = named("linear", 2000, 1e-6, 1e-2)
SMALL, LARGE = (3, 8, 8), (3, 24, 16)


class Gate(Arithmetic):
    """Does `open` calls, then waits; None: never waits. A call may be made to fail, or to give NaN."""

    def __init__(self, allowed: int | None = None) -> None:
        super().__init__()
        self.free = allowed is None
        self.calls = threading.Semaphore(allowed or 0)
        self.reached = threading.Semaphore(0)
        self.fail: Callable[[Floats], Exception | None] = lambda x: None
        self.shapes: list[tuple[int, ...]] = []

    def bind(self, x: Floats, y: Floats, level: Floats, out: Floats) -> Callable[[], None]:
        inner = super().bind(x, y, level, out)

        def run() -> None:
            self.reached.release()
            if not self.free:
                assert self.calls.acquire(timeout=20)
            self.shapes.append(x.shape)
            if error := self.fail(x):
                raise error
            inner()

        return run

    def open(self) -> None:
        self.free = True
        self.calls.release()


def rows(steps: int = 6, sampler: str = "posterior") -> Table:
    return table(Sampler.parse(sampler), respace(TRAINED, steps), prediction="eps", level="sqrt_gamma")


def job(i: int = 0, steps: int = 6, shape: tuple[int, ...] = SMALL, sampler: str = "posterior") -> Job:
    return Job(np.random.default_rng(i).uniform(-1, 1, shape).astype(np.float32), rows(steps, sampler), seed=i)


def alone(one: Job) -> Floats:
    channels, height, width = one.x.shape
    engine = Engine(Arithmetic(), capacity=1, channels=channels, height=height, width=width)
    engine.join(one)
    while not (ended := engine.step()):
        pass
    return ended[0].picture()


@pytest.fixture
def gate() -> Gate:
    return Gate(allowed=0)


@pytest.fixture
def batcher(gate: Gate) -> Iterator[Batcher]:
    one = Batcher(gate, slots=3)
    yield one
    gate.open()
    one.close(drain=20)


def test_every_result_is_the_jobs_own_whoever_shares_the_batch() -> None:
    pick = random.Random(1)
    jobs = [
        job(i, pick.randint(1, 12), pick.choice([SMALL, LARGE, (3, 16, 8)]), pick.choice(["sr3", "ddim", "dpm++2m"])) for i in range(60)
    ]
    gate = Gate(allowed=0)
    batcher, tickets = Batcher(gate, slots=4), []
    for one in jobs:
        tickets.append(batcher.submit(one))
        gate.calls.release(pick.randint(1, 3))
    gate.open()
    for one, ticket in zip(jobs, tickets, strict=True):
        assert ticket.future.result(20) == pytest.approx(alone(one), abs=1e-5)
    counts = batcher.counts()
    assert (counts.submitted, counts.finished, counts.queued, counts.running) == (60, 60, 0, 0)
    assert counts.steps == sum(len(one.table) for one in jobs)
    assert counts.calls < counts.steps  # some were together
    assert counts.pixels == sum(one.x[0].size for one in jobs)
    batcher.close()


def test_a_request_joins_a_running_batch_at_the_next_step(gate: Gate, batcher: Batcher) -> None:
    first = batcher.submit(job(0))
    gate.calls.release(2)
    for _ in range(3):
        gate.reached.acquire()
    second = batcher.submit(job(1, steps=2))
    gate.open()
    wait([first.future, second.future], 20)
    assert gate.batches == [1, 1, 1, 2, 2, 1]


def test_the_queue_is_in_order_of_arrival_and_priority(gate: Gate) -> None:
    batcher, done = Batcher(gate, slots=1), list[str]()

    def submit(name: str, priority: int, since: float) -> None:
        ticket = batcher.submit(job(steps=1), priority=priority, since=since)
        ticket.future.add_done_callback(lambda _: done.append(name))

    now = time.monotonic()
    submit("running", 0, now)
    gate.reached.acquire()
    submit("first", 0, now)
    submit("second", 0, now + 1)
    submit("urgent", 1, now + 2)
    submit("idle", -1, now)
    submit("old", 0, now - 2 * PATIENCE)  # has waited longer than any priority here is worth
    gate.open()
    batcher.close(drain=20)
    assert done == ["running", "old", "urgent", "first", "second", "idle"]


def test_another_size_does_not_wait_for_a_slot_of_this_one(gate: Gate) -> None:
    batcher = Batcher(gate, slots=1)
    tickets = [batcher.submit(job(0)), batcher.submit(job(1)), batcher.submit(job(2, shape=LARGE))]
    gate.open()
    wait([ticket.future for ticket in tickets], 20)
    assert gate.shapes.index((1, *LARGE)) < 6
    batcher.close()


def test_running_pictures_stay_within_the_pixels_and_nobody_overtakes_a_large_one(gate: Gate) -> None:
    batcher, done = Batcher(gate, slots=3, pixels=3 * 8 * 8), list[str]()
    for name, shape in (("small", SMALL), ("large", LARGE), ("later", SMALL)):
        batcher.submit(job(shape=shape), priority=0).future.add_done_callback(lambda _, name=name: done.append(name))
    gate.open()
    batcher.close(drain=20)
    assert done == ["small", "large", "later"]  # the large one is over the limit, and so runs alone
    assert gate.shapes == [(1, *SMALL)] * 6 + [(1, *LARGE)] * 6 + [(1, *SMALL)] * 6


def test_small_pictures_do_not_wait_for_large_ones_to_end() -> None:
    class Slow(Arithmetic):
        def bind(self, x: Floats, y: Floats, level: Floats, out: Floats) -> Callable[[], None]:
            inner = super().bind(x, y, level, out)
            return lambda: (time.sleep(0.05 if x.shape[1:] == LARGE else 0.001), inner())[1]  # type: ignore[func-returns-value]

    batcher = Batcher(Slow())
    large = batcher.submit(job(0, steps=20, shape=LARGE))
    small = batcher.submit(job(1, steps=20))
    small.future.result(20)
    assert large.step < 10
    large.future.result(20)
    batcher.close()


def test_whole_request_batching_is_there_to_compare_with(gate: Gate) -> None:
    batcher = Batcher(gate, slots=2, joins="batch")
    batcher.submit(job(steps=2))
    gate.reached.acquire()
    for steps, shape in ((3, LARGE), (4, SMALL), (1, SMALL)):
        batcher.submit(job(steps=steps, shape=shape))
    gate.open()
    batcher.close(drain=20)
    assert [shape[0] for shape in gate.shapes] == [1, 1, 1, 1, 1, 2, 1, 1, 1]


class Watched(Arithmetic):
    """Knows which engines there are, by the width of their pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.bound: dict[int, weakref.ref[Floats]] = {}

    def bind(self, x: Floats, y: Floats, level: Floats, out: Floats) -> Callable[[], None]:
        assert x.base is not None
        self.bound[x.shape[3]] = weakref.ref(x.base)
        return super().bind(x, y, level, out)

    @property
    def widths(self) -> set[int]:
        return {width for width, engine in self.bound.items() if engine() is not None}


def test_idle_engines_are_kept_within_a_number_and_their_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "IDLE_PIXELS", 2 * 8 * (8 + 16 + 24))
    network = Watched()
    batcher = Batcher(network, slots=2)
    for width, left in ((8, {8}), (16, {8, 16}), (24, {8, 16, 24}), (32, {16, 32}), (64, {16, 32}), (40, {40})):
        batcher.submit(job(shape=(3, 8, width))).future.result(20)
        end = time.monotonic() + 20
        while network.widths != left:
            assert time.monotonic() < end, network.widths
            time.sleep(0.01)
    batcher.close()


def test_an_engine_that_finds_no_memory_takes_that_of_idle_ones() -> None:
    class Device(Arithmetic):
        def __init__(self) -> None:
            super().__init__()
            self.engines = weakref.WeakSet[Engine]()

        def engine(self, *, capacity: int, channels: int, height: int, width: int) -> Engine:
            if len(self.engines) == 2:
                raise BackendError("no memory")
            engine = Engine(Arithmetic(), capacity=capacity, channels=channels, height=height, width=width)
            self.engines.add(engine)
            return engine

    batcher = Batcher(Device())
    for width in (8, 16, 24, 32):
        assert batcher.submit(job(shape=(3, 8, width))).future.result(20).shape == (3, 8, width)
    batcher.close()


# --- leaving


def test_a_cancelled_request_leaves_before_the_next_step_and_its_neighbours_do_not_notice(gate: Gate, batcher: Batcher) -> None:
    stays, goes = batcher.submit(job(0)), batcher.submit(job(1))
    queued = [batcher.submit(job(i)) for i in (2, 3)]
    gate.calls.release(2)
    for _ in range(3):
        gate.reached.acquire()
    goes.cancel()
    queued[1].cancel()
    gate.open()
    with pytest.raises(Cancelled, match=r"cancelled after \d of 6 steps"):
        goes.future.result(20)
    with pytest.raises(Cancelled, match="cancelled while it waited"):
        queued[1].future.result(20)
    assert goes.step <= 3
    assert stays.future.result(20) == pytest.approx(alone(stays.job), abs=1e-6)
    assert queued[0].future.result(20) == pytest.approx(alone(queued[0].job), abs=1e-6)
    assert batcher.counts().cancelled == 2


def test_a_thousand_cancels_leave_nothing_behind() -> None:
    pick = random.Random(3)
    gate = Gate(allowed=0)
    batcher, kept, gone = Batcher(gate, slots=8), [], []
    for i in range(1100):
        ticket = batcher.submit(job(i, pick.randint(4, 20), pick.choice([SMALL, LARGE])))
        gate.calls.release()
        (kept if i % 11 == 0 else gone).append(ticket)
        if len(gone) >= 8:
            gone[pick.randrange(len(gone) - 8, len(gone))].cancel()
    for ticket in gone:
        ticket.cancel()
    gate.open()
    batcher.close(drain=60)
    for ticket in kept:
        assert ticket.future.result(0) == pytest.approx(alone(ticket.job), abs=1e-5)
    counts = batcher.counts()
    assert counts.cancelled + counts.finished == 1100
    assert counts.cancelled > 300
    assert (counts.queued, counts.running) == (0, 0)


def test_a_deadline_ends_a_request_that_waits_and_one_that_runs(gate: Gate, batcher: Batcher) -> None:
    long_ago = time.monotonic() - 1
    with pytest.raises(DeadlineExceeded, match="its 500 ms ran out while it waited"):
        batcher.submit(job(), timeout=0.5, since=long_ago).future.result(20)
    runs = batcher.submit(job(), timeout=1)  # which a busy machine does not need to begin
    gate.reached.acquire()
    time.sleep(1.1)
    gate.open()
    with pytest.raises(DeadlineExceeded, match="its 1000 ms ran out after 1 of 6 steps"):
        runs.future.result(20)
    assert batcher.counts().expired == 2


# --- failing


def test_a_call_that_fails_ends_its_requests_once_and_the_others_go_on(gate: Gate, batcher: Batcher) -> None:
    gate.fail = lambda x: MemoryError("no memory") if x.shape[1:] == LARGE else None
    bad, good = [batcher.submit(job(i, shape=LARGE)) for i in range(2)], batcher.submit(job())
    gate.open()
    for ticket in bad:
        with pytest.raises(MemoryError, match="no memory"):
            ticket.future.result(20)
    assert good.future.result(20) == pytest.approx(alone(good.job), abs=1e-6)
    assert not batcher.dead
    assert batcher.counts().failed == 2


def test_a_backend_that_only_fails_is_given_up_and_everyone_is_told(gate: Gate, batcher: Batcher) -> None:
    gate.fail = lambda x: RuntimeError("the device is gone")
    tickets = [batcher.submit(job())]
    gate.reached.acquire()
    tickets += [batcher.submit(job(i)) for i in range(3 * (FAILURES - 1) + 2)]
    gate.open()
    errors = [ticket.future.exception(20) for ticket in tickets]
    assert [type(error) for error in errors] == [RuntimeError] * (1 + 3 * (FAILURES - 1)) + [Stopped] * 2
    assert "3 network calls failed one after another, restart the server; the last: the device is gone" in str(errors[-1])
    assert batcher.dead
    with pytest.raises(Stopped, match="the device is gone"):
        batcher.submit(job())


def test_a_sample_that_is_not_finite_fails_alone() -> None:
    class Poison(Arithmetic):
        def bind(self, x: Floats, y: Floats, level: Floats, out: Floats) -> Callable[[], None]:
            inner = super().bind(x, y, level, out)

            def run() -> None:
                inner()
                out[x[:, 0, 0, 0] == 9] = np.nan

            return run

    batcher, poisoned = Batcher(Poison()), job(0)
    poisoned.x[0, 0, 0] = 9
    bad, good = batcher.submit(poisoned), batcher.submit(job(1))
    with pytest.raises(NonFiniteError, match="step 1 of 6"):
        bad.future.result(20)
    assert good.future.result(20) == pytest.approx(alone(good.job), abs=1e-6)
    batcher.close()


def test_an_observer_or_a_noise_that_fails_ends_its_own_request_only(gate: Gate, batcher: Batcher) -> None:
    def observer(step: int, steps: int, prediction: Callable[[], Floats]) -> None:
        assert prediction().shape == SMALL
        if step == 3:
            raise KeyError((step, steps))

    def noise(step: int) -> Floats:
        raise ValueError("no noise")

    observed, good = batcher.submit(job(0), on_step=observer), batcher.submit(job(1))
    silent = batcher.submit(Job(job().x, rows(), 0, noise=noise))
    gate.open()
    with pytest.raises(KeyError, match="3, 6"):
        observed.future.result(20)
    with pytest.raises(ValueError, match="no noise"):
        silent.future.result(20)
    assert good.future.result(20) == pytest.approx(alone(good.job), abs=1e-6)


# --- ending


def test_closing_finishes_what_is_in_hand_and_takes_nothing_more(gate: Gate) -> None:
    batcher = Batcher(gate, slots=1)
    tickets = [batcher.submit(job(i)) for i in range(3)]
    closing = threading.Thread(target=batcher.close, kwargs={"drain": 20})
    closing.start()
    gate.open()
    closing.join(20)
    assert all(ticket.future.result(0) is not None for ticket in tickets)
    with pytest.raises(Stopped, match="shutting down"):
        batcher.submit(job())


def test_what_is_not_finished_in_time_is_told_so(gate: Gate) -> None:
    batcher = Batcher(gate, slots=1)
    runs, waits = batcher.submit(job(0)), batcher.submit(job(1))
    gate.reached.acquire()
    threading.Timer(0.3, gate.open).start()
    batcher.close(drain=0.1)
    for ticket in (runs, waits):
        with pytest.raises(Stopped, match=r"0\.1 s were not enough"):
            ticket.future.result(0)


@pytest.mark.parametrize("options", [{"slots": 0}, {"pixels": 0}, {"joins": "never"}])
def test_what_makes_no_sense_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="1 or more"):
        Batcher(Arithmetic(), **options)
