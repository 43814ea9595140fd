"""The pictures of one call: each waits, is made ready once there is a slot for it, and becomes a result when its jobs have ended.

What the network is given of a picture takes many times the room of the picture itself, so only those being refined have it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sr3rt.backends import Floats
from sr3rt.bundle import Consistency
from sr3rt.engine import Ended, Job, Stepper
from sr3rt.errors import OptionError
from sr3rt.images import Picture
from sr3rt.options import Tile
from sr3rt.result import Result
from sr3rt.samplers import Table
from sr3rt.tiles import Assembly, Window


@dataclass(frozen=True, eq=False)
class Plan:
    """How pictures are to be refined, checked: one row of `table` per step. sampler, schedule: as `Result` has them. tile: as asked."""

    table: Table
    sampler: str
    schedule: str | tuple[float, ...] | None
    consistency: Consistency
    tile: Tile


@dataclass(frozen=True, eq=False)
class Task:
    """A picture that is ready for an engine: `job` is the whole of it; `parts`, if any, are jobs for windows of side `tile`."""

    picture: Picture
    job: Job
    plan: Plan
    tile: int | None = None
    parts: tuple[tuple[Window, Job], ...] = ()

    @property
    def jobs(self) -> list[Job]:
        """What an engine is to do."""
        return [job for _, job in self.parts] or [self.job]


class Item:
    """A picture of a call. shape: (C, H, W) of its `count` jobs. steps: in all.

    ready: makes it ready. show, finish: a picture and a result of a prediction, float32 (C, H, W).
    """

    def __init__(
        self,
        plan: Plan,
        shape: tuple[int, int, int],
        count: int,
        *,
        ready: Callable[[], Task],
        show: Callable[[Task, Floats], Any],
        finish: Callable[[Task, Floats], Result],
    ) -> None:
        self.shape, self.count, self.steps = shape, count, count * len(plan.table)
        self._ready, self._show, self._finish = ready, show, finish
        self._left = count
        self._begun: tuple[Task, Assembly] | None = None
        self._result: Result | None = None

    @property
    def result(self) -> Result:
        """Once all of its jobs have ended."""
        assert self._result is not None
        return self._result

    def begin(self) -> list[Job]:
        """The jobs to be done, made now."""
        task = self._ready()
        self._begun = task, Assembly(task.job, task.parts)
        return task.jobs

    def take(self, ended: Ended) -> None:
        """A job that ended, of this picture or another. Raises NonFiniteError."""
        if self._begun is None or not self._begun[1].take(ended):
            return
        self._left -= 1
        if not self._left:
            task, assembly = self._begun
            self._result, self._begun = self._finish(task, assembly.result()), None

    def preview(self, predictions: Mapping[Job, Floats]) -> Any:
        """The picture as it is, given the predictions of the jobs that are running; None where it has not begun."""
        if self._result is not None:
            return self._result.image.copy()
        if self._begun is None:
            return None
        task, assembly = self._begun
        y0 = assembly.preview(predictions)
        return None if y0 is None else self._show(task, y0)


class Preview:
    """What `on_step` is given to make the pictures of the step that it is told of. Raises OptionError once `on_step` has returned."""

    def __init__(self, items: list[Item], engine: Stepper, running: set[Job], *, single: bool) -> None:
        self._items, self._engine, self._running, self._single = items, engine, frozenset(running), single
        self._over = False

    def __call__(self) -> Any:
        if self._over:
            raise OptionError("preview() was called after on_step had returned, when later steps have gone on: call it within on_step")
        predictions = {job: self._engine.prediction(job) for job in self._running}
        previews = [item.preview(predictions) for item in self._items]
        return previews[0] if self._single else previews

    def end(self) -> None:
        """The next step begins."""
        self._over = True
