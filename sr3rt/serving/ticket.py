"""A job in a batcher's hands."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future

from sr3rt.backends import Floats
from sr3rt.engine import Job
from sr3rt.errors import Cancelled, DeadlineExceeded, SR3Error

OnStep = Callable[[int, int, Callable[[], Floats]], None]
"""`on_step(step, steps, prediction)` after each step but the last, on the batcher's thread: be quick. `prediction()` copies x0."""


class Ticket:
    """A job that a batcher has taken. `cancel` from any thread; everything else that changes it is the batcher's.

    future: the picture, float32 (C, H, W) in [-1, 1], or why there is none. since: when it was asked for; began: when it joined a batch
    (both `time.monotonic`), None while it waits. order: lower goes first. step: rows done.
    """

    def __init__(
        self, job: Job, *, since: float, order: float, timeout: float | None, on_step: OnStep | None, wake: Callable[[], None]
    ) -> None:
        self.job, self.since, self.order, self.timeout, self.on_step = job, since, order, timeout, on_step
        self.future: Future[Floats] = Future()
        self.future.set_running_or_notify_cancel()  # `cancel` here is the only way
        self.began: float | None = None
        self.step = 0
        self._cancelled = False
        self._wake = wake

    def cancel(self) -> None:
        """Leave before the next step, if not done by then; `future` then raises Cancelled."""
        self._cancelled = True
        self._wake()

    @property
    def pixels(self) -> int:
        """Of the picture, padding included."""
        _, height, width = self.job.x.shape
        return int(height * width)

    @property
    def waited(self) -> float:
        """Seconds before it began."""
        return (time.monotonic() if self.began is None else self.began) - self.since

    def ends(self, now: float) -> SR3Error | None:
        """Why it must leave now, if so."""
        where = f"after {self.step} of {len(self.job.table)} steps" if self.began is not None else "while it waited"
        if self._cancelled:
            return Cancelled(f"cancelled {where}")
        if self.timeout is not None and now - self.since > self.timeout:
            return DeadlineExceeded(f"its {self.timeout * 1000:.0f} ms ran out {where}: allow more time, or ask when less is to do")
        return None
