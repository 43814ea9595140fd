"""Large pictures in windows: each is a job of its own, and where windows overlap their results are blended.

The noise is a function of place, so that windows agree where they overlap, up to what each sees beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sr3rt.backends import Floats
from sr3rt.consistency import Projection
from sr3rt.engine import Ended, Job

OVERLAP = 64  # least pixels that neighbours share
SIDES = (1024, 768, 512, 384, 256, 192, 128)  # of windows, that "auto" chooses from


@dataclass(frozen=True)
class Window:
    """A rectangle of the result, pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def part(self) -> tuple[slice, slice, slice]:
        """Of an array (C, H, W)."""
        return slice(None), slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


def windows(height: int, width: int, *, side: int, unit: int) -> list[Window]:
    """Windows of side × side (less where the picture has less) that cover (height, width), in reading order.

    Neighbours share at least OVERLAP pixels, or half a window. height, width and side must be multiples of `unit`; so are all places.
    """
    rows, columns = _starts(height, side, unit), _starts(width, side, unit)
    return [Window(top, left, min(side, height), min(side, width)) for top in rows for left in columns]


def pixels(height: int, width: int, *, side: int, unit: int) -> int:
    """Of all windows together."""
    return sum(one.height * one.width for one in windows(max(height, side), max(width, side), side=side, unit=unit))


def _starts(length: int, side: int, unit: int) -> list[int]:
    if length <= side:
        return [0]
    most = max(unit, side - max(unit, math.ceil(min(OVERLAP, side // 2) / unit) * unit))  # from one to the next
    count = 1 + math.ceil((length - side) / most)
    return [unit * (i * (length - side) // ((count - 1) * unit)) for i in range(count)]


def part(job: Job, window: Window, *, scale: int) -> Job:
    """The job of one window. Its result is projected only if each step's is: the whole is, once the windows are blended."""
    x, corner, noise = np.ascontiguousarray(job.x[window.part]), (window.top, window.left), job.noise
    inside = None if noise is None else (lambda step: np.ascontiguousarray(noise(step)[window.part]))
    if job.consistency != "every" or job.lr is None:
        return Job(x, job.table, job.seed, inside, corner=corner)
    top, left = window.top // scale, window.left // scale
    lr = np.ascontiguousarray(job.lr[:, top : top + window.height // scale, left : left + window.width // scale])
    return Job(x, job.table, job.seed, inside, "every", lr, Projection(lr.shape[1], lr.shape[2], scale), corner)


class Assembly:
    """What of a picture has ended, put together. job: the whole. parts: the windows' jobs; none, where the whole is done at once."""

    def __init__(self, job: Job, parts: Sequence[tuple[Window, Job]]) -> None:
        self._job, self._windows = job, {one: window for window, one in parts}
        self._canvas = Canvas(job.x.shape, self._windows.values()) if parts else None
        self._ended = set[Job]()
        self._whole: Floats | None = None

    def take(self, ended: Ended) -> bool:
        """A job that ended; whether it was this picture's. Raises NonFiniteError."""
        if ended.job is self._job:
            self._whole = ended.picture()
            return True
        if self._canvas is not None and ended.job in self._windows:
            self._canvas.add(self._windows[ended.job], ended.picture())
            self._ended.add(ended.job)
            return True
        return False

    def preview(self, predictions: Mapping[Job, Floats]) -> Floats | None:
        """The picture as it is: the condition where a window has not begun, None where nothing has."""
        if self._canvas is None:
            return predictions.get(self._job, self._whole)
        if not self._ended and self._windows.keys().isdisjoint(predictions):
            return None
        rest = self._windows.keys() - self._ended
        return self._canvas.with_others((self._windows[job], predictions.get(job, job.x)) for job in rest)

    def result(self) -> Floats:
        """Once every job has ended."""
        if self._canvas is not None:
            y = self._canvas.picture()
            return y if self._job.consistency == "off" else self._job.project(np.clip(y, -1, 1))
        assert self._whole is not None
        return self._whole


class Canvas:
    """The blend of windows' results. A window counts less towards its edges, and not at all in the outer quarter of an overlap, where
    it sees least; every pixel's weights are made to add up to one.
    """

    def __init__(self, shape: tuple[int, int, int], windows: Iterable[Window]) -> None:
        _, height, width = shape
        found = list(windows)
        self._rows = _Ramps(height, {(one.top, one.height) for one in found})
        self._columns = _Ramps(width, {(one.left, one.width) for one in found})
        self._sum = np.zeros(shape, np.float32)

    def add(self, window: Window, y: Floats) -> None:
        """A window's result, float32 (C, h, w)."""
        rows, columns = self._rows.of(window.top, window.height), self._columns.of(window.left, window.width)
        self._sum[window.part] += y * rows[:, None] * columns

    def picture(self) -> Floats:
        """What has been added up, float32 (C, H, W): the whole, once every window was."""
        return self._sum

    def with_others(self, others: Iterable[tuple[Window, Floats]]) -> Floats:
        """A copy of the picture as it would be with these windows added."""
        copy = object.__new__(Canvas)
        copy._rows, copy._columns, copy._sum = self._rows, self._columns, self._sum.copy()
        for window, y in others:
            copy.add(window, y)
        return copy._sum


class _Ramps:
    """Weights along one axis, of spans (start, length) that cover it. At every place they add up to one."""

    def __init__(self, length: int, spans: Iterable[tuple[int, int]]) -> None:
        ordered = sorted(spans)
        self._weights = {}
        total = np.zeros(length)
        for i, (start, size) in enumerate(ordered):
            places: NDArray[np.float64] = np.arange(size, dtype=np.float64) + 0.5
            weight = np.ones(size)
            if i:
                weight *= _rise(places, ordered[i - 1][0] + ordered[i - 1][1] - start)
            if i + 1 < len(ordered):
                weight *= _rise(size - places, start + size - ordered[i + 1][0])
            self._weights[start, size] = weight
            total[start : start + size] += weight
        for (start, size), weight in self._weights.items():
            weight /= total[start : start + size]

    def of(self, start: int, size: int) -> Floats:
        return self._weights[start, size].astype(np.float32)


def _rise(distance: NDArray[np.float64], overlap: int) -> NDArray[np.float64]:
    """From 0 at a quarter of the overlap to 1 at three quarters."""
    return np.clip(2 * distance / overlap - 0.5, 0, 1)
