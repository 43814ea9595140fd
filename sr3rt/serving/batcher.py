"""Step-level batching: requests join and leave a running batch between steps, since each slot of an engine has its own noise level.

One thread steps. Requests of one size share a lane, an engine of `slots` slots. Of several lanes, that one steps whose requests have
had the least of the machine, so that each running request gets an equal share of time, large or small.
"""

from __future__ import annotations

import bisect
import dataclasses
import logging
import threading
import time
from typing import Literal

from sr3rt.backends import Floats, Network
from sr3rt.engine import BringsEngine, Job, Stepper, engine_of
from sr3rt.errors import BackendError, Cancelled, DeadlineExceeded, OptionError, Stopped
from sr3rt.serving.counts import Counts
from sr3rt.serving.ticket import OnStep, Ticket

Joins = Literal["step", "batch"]

PATIENCE = 10.0  # seconds that a request waits for one of the next higher priority; so none waits for ever
FAILURES = 3  # network calls that fail one after another before the batcher gives up
IDLE_LANES = 4  # sizes that keep their engine while nothing of that size is asked for
IDLE_PIXELS = 2**20  # and, on the host, of all their slots: to make an engine anew takes little there, and its memory is pictures' own

log = logging.getLogger(__name__)


class _Lane:
    """The running requests of one size."""

    def __init__(self, engine: Stepper, clock: float) -> None:
        self.engine, self.clock = engine, clock
        self.tickets: dict[Job, Ticket] = {}


class Batcher:
    """Takes jobs, steps them together, resolves their tickets. Thread-safe.

    A job's result does not depend on its neighbours, but for the network's own rounding at another batch size. A call of the network
    that fails ends the requests in it, each once, and the others go on; after `FAILURES` in a row the batcher is dead: every
    request is told why, and `dead` says so.
    """

    def __init__(self, network: Network, *, slots: int = 8, pixels: int = 2**24, threads: int = 1, joins: Joins = "step") -> None:
        """slots: most pictures in one network call. pixels: most in running pictures together (one picture always runs).

        joins "step": at any step. "batch": only when all are done, and then of one size; for comparison.
        """
        if slots < 1 or pixels < 1 or joins not in ("step", "batch"):
            raise OptionError(f"slots and pixels must be 1 or more, joins 'step' or 'batch'; found {slots}, {pixels} and {joins!r}")
        self._network, self._slots, self._pixels, self._threads, self._joins = network, slots, pixels, threads, joins
        self._condition = threading.Condition()  # its lock may be taken again by who holds it
        self._queue: list[Ticket] = []  # in order
        self._lanes: dict[tuple[int, ...], _Lane] = {}
        self._counts = Counts()
        self._failures = 0
        self._closing, self._dead = False, ""
        self.moved = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="sr3rt-batcher", daemon=True)
        self._thread.start()

    def submit(
        self,
        job: Job,
        *,
        priority: int = 0,
        timeout: float | None = None,
        since: float | None = None,
        on_step: OnStep | None = None,
    ) -> Ticket:
        """Queue a job. priority: higher goes first, a level being worth `PATIENCE` seconds of waiting. timeout: seconds until it is done,
        counted from `since` (`time.monotonic`; now, when not given).

        The ticket's future raises Cancelled, DeadlineExceeded, NonFiniteError, Stopped or what the backend raised. Raises Stopped.
        """
        since = time.monotonic() if since is None else since
        ticket = Ticket(job, since=since, order=since - PATIENCE * priority, timeout=timeout, on_step=on_step, wake=self._wake)
        with self._condition:
            if self._dead or self._closing:
                raise Stopped(self._dead or "the server is shutting down: ask another")
            bisect.insort(self._queue, ticket, key=lambda one: one.order)
            self._counts.submitted += 1
            self._condition.notify()
        return ticket

    def close(self, *, drain: float = 0.0) -> None:
        """Take nothing more; finish what is in hand within `drain` seconds, end the rest with Stopped. May be called again."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join(drain)
        with self._condition:
            if self._thread.is_alive():
                self._dead = self._dead or f"the server shut down and {drain:g} s were not enough for this request"
                self._condition.notify()
        self._thread.join()

    @property
    def dead(self) -> str:
        """Why nothing will be done any more; empty while all is well."""
        return self._dead

    @property
    def busy(self) -> bool:
        """Whether there is something to do. `moved` is when something was last done (`time.monotonic`)."""
        with self._condition:
            return bool(self._queue) or any(lane.tickets for lane in self._lanes.values())

    def counts(self) -> Counts:
        """The figures of this moment, a copy."""
        with self._condition:
            running = sum(len(lane.tickets) for lane in self._lanes.values())
            return dataclasses.replace(self._counts, queued=len(self._queue), running=running)

    # --- the thread

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify()

    def _run(self) -> None:
        reason = "the server is shutting down"
        try:
            while self._wait():
                self._turn()
        except Exception as error:  # a mistake of ours: better dead and saying so than silent
            log.exception("the batcher failed")
            self._dead = f"the batcher failed, restart the server: {type(error).__name__}: {error}"
        with self._condition:
            self._closing = True
            left = self._queue + [ticket for lane in self._lanes.values() for ticket in lane.tickets.values()]
            self._queue, self._lanes = [], {}
        for ticket in left:
            self._end(ticket, Stopped(self._dead or reason))

    def _wait(self) -> bool:
        """Sleep until there is something to do. False when all is done."""
        with self._condition:
            while not self._dead:
                if self.busy:
                    return True
                if self._closing:
                    return False
                self._condition.wait()
            return False

    def _turn(self) -> None:
        self._dismiss()
        with self._condition:
            joining = self._joining()
        for ticket in joining:
            self._join(ticket)
        running = [lane for lane in self._lanes.values() if lane.tickets]
        if running:
            self._step(min(running, key=lambda lane: lane.clock))
        self._forget(lanes=IDLE_LANES, pixels=None if isinstance(self._network, BringsEngine) else IDLE_PIXELS)

    def _forget(self, *, lanes: int, pixels: int | None = None) -> int:
        """Drop idle engines but for so many, with so many pixels in their slots, the last used first. Returns how many were dropped."""
        kept = taken = dropped = 0
        with self._condition:
            for shape in [shape for shape, lane in reversed(self._lanes.items()) if not lane.tickets]:
                size = self._slots * shape[1] * shape[2]
                if kept < lanes and (pixels is None or taken + size <= pixels):
                    kept, taken = kept + 1, taken + size
                else:
                    del self._lanes[shape]
                    dropped += 1
        return dropped

    def _dismiss(self) -> None:
        """Those that were cancelled, or whose time ran out, leave."""
        now = time.monotonic()
        with self._condition:
            gone = [(ticket, why) for ticket in self._queue if (why := ticket.ends(now))]
            self._queue = [ticket for ticket in self._queue if all(ticket is not one for one, _ in gone)]
        for lane in self._lanes.values():
            for ticket in list(lane.tickets.values()):
                if why := ticket.ends(now):
                    lane.engine.leave(ticket.job)
                    del lane.tickets[ticket.job]
                    gone.append((ticket, why))
        for ticket, why in gone:
            self._end(ticket, why)

    def _joining(self) -> list[Ticket]:
        """Take those off the queue that find room: in order, but one whose size has no free slot does not hold up the others."""
        free = {shape: lane.engine.free for shape, lane in self._lanes.items()}
        room = self._pixels - sum(ticket.pixels for lane in self._lanes.values() for ticket in lane.tickets.values())
        idle = room == self._pixels
        if self._joins == "batch" and not idle:
            return []
        chosen: list[Ticket] = []
        for ticket in self._queue:
            shape = ticket.job.x.shape
            if self._joins == "batch" and chosen and shape != chosen[0].job.x.shape:
                continue
            if ticket.pixels > room and not (idle and not chosen):
                break  # nobody overtakes a large one for ever
            if free.setdefault(shape, self._slots) > 0:
                free[shape] -= 1
                room -= ticket.pixels
                chosen.append(ticket)
        self._queue = [ticket for ticket in self._queue if all(ticket is not one for one in chosen)]
        return chosen

    def _join(self, ticket: Ticket) -> None:
        shape = ticket.job.x.shape
        try:
            lane = self._lanes.get(shape) or self._lane(shape)
            lane.engine.join(ticket.job)
        except Exception as error:  # its own noise, or memory: others are not concerned
            self._end(ticket, error)
            return
        with self._condition:
            if not lane.tickets:
                lane.clock = max(lane.clock, min((one.clock for one in self._lanes.values() if one.tickets), default=0.0))
            lane.tickets[ticket.job] = ticket
            ticket.began = time.monotonic()
            self._counts.queue_seconds += ticket.waited
            self._lanes.pop(shape, None)
            self._lanes[shape] = lane  # last: the most recently used

    def _lane(self, shape: tuple[int, ...]) -> _Lane:
        try:
            return _Lane(self._engine(*shape), 0.0)
        except BackendError:
            if not self._forget(lanes=0):
                raise
        return _Lane(self._engine(*shape), 0.0)  # what was kept may have been in the way

    def _engine(self, channels: int, height: int, width: int) -> Stepper:
        return engine_of(self._network, capacity=self._slots, channels=channels, height=height, width=width, threads=self._threads)

    def _step(self, lane: _Lane) -> None:
        pictures, start = len(lane.tickets), time.monotonic()
        try:
            ended = lane.engine.step()
        except Exception as error:
            log.exception("a step of %d pictures failed", pictures)
            self._fail(lane, error)
            return
        self._failures = 0
        self.moved = time.monotonic()
        seconds = self.moved - start
        lane.clock += seconds / pictures
        with self._condition:
            self._counts.steps += pictures
            self._counts.calls += 1
            self._counts.busy_seconds += seconds
        for ticket in lane.tickets.values():
            ticket.step += 1
        for one in ended:
            self._end(lane.tickets.pop(one.job), one.outcome)
        for ticket in list(lane.tickets.values()):
            if ticket.on_step is not None:
                self._tell(lane, ticket, ticket.on_step)

    def _tell(self, lane: _Lane, ticket: Ticket, on_step: OnStep) -> None:
        try:
            on_step(ticket.step, len(ticket.job.table), lambda: lane.engine.prediction(ticket.job))
        except Exception as error:
            lane.engine.leave(ticket.job)
            del lane.tickets[ticket.job]
            self._end(ticket, error)

    def _fail(self, lane: _Lane, error: Exception) -> None:
        """A call of the network failed: its requests end, its engine goes."""
        self._failures += 1
        with self._condition:
            self._lanes = {shape: one for shape, one in self._lanes.items() if one is not lane}
        for ticket in lane.tickets.values():
            self._end(ticket, error)
        if self._failures >= FAILURES:
            self._dead = f"{self._failures} network calls failed one after another, restart the server; the last: {error}"

    def _end(self, ticket: Ticket, outcome: Floats | Exception) -> None:
        with self._condition:
            counts = self._counts
            if isinstance(outcome, Cancelled):
                counts.cancelled += 1
            elif isinstance(outcome, DeadlineExceeded):
                counts.expired += 1
            elif isinstance(outcome, Exception):
                counts.failed += 1
            else:
                counts.finished += 1
                counts.pixels += ticket.pixels
                counts.run_seconds += time.monotonic() - (ticket.began or ticket.since)
        if isinstance(outcome, Exception):
            ticket.future.set_exception(outcome)
        else:
            ticket.future.set_result(outcome)
