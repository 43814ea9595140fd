"""What repeated timings say, and whether the machine was quiet while they were taken."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ENOUGH_FOR_P99 = 1000
BUSY = 0.08
"""A turn during which other processes used more than this share of the machine is not quiet."""


@dataclass(frozen=True)
class Summary:
    """Seconds. spread: half the distance between the quartiles, as a share of the median. p99: None below 1000 samples."""

    n: int
    p50: float
    p90: float
    p99: float | None
    minimum: float
    spread: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Summary:
        """Raises ValueError for no samples."""
        if not len(seconds):
            raise ValueError("no samples: nothing was measured")
        q25, p50, q75, p90, p99 = (float(q) for q in np.percentile(seconds, [25, 50, 75, 90, 99]))
        return cls(len(seconds), p50, p90, p99 if len(seconds) >= ENOUGH_FOR_P99 else None, min(seconds), (q75 - q25) / 2 / p50)


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f}× ({self.low:.2f} to {self.high:.2f})"

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 1."""
        return not self.low <= 1 <= self.high


Visits = Sequence[Sequence[float]]
"""Seconds of turns: for each visit, a time when contenders ran in processes of their own, one for each round, in order."""


def ratio(numerator: Visits, denominator: Visits, *, draws: int = 4000) -> Ratio:
    """Ratio of the medians of turns that were taken in the same rounds, with a percentile bootstrap over visits and then over rounds.

    Visits are drawn first, as rounds of one share its processes, which differ in how their memory happens to lie (Davison and Hinkley 1997,
    section 3.8). Rounds are drawn whole, since the two turns of one share the machine's mood, and in blocks of neighbours, since
    moods last (circular blocks: Politis and Romano 1992; of about n^(1/3): Hall et al. 1995). Of one visit the interval knows
    nothing of other processes.
    """
    visits = [np.array([a, b], np.float64) for a, b in zip(numerator, denominator, strict=True) if len(a) == len(b)]
    if len(visits) != len(numerator) or not visits or not all(visit.size for visit in visits):
        lengths = [list(map(len, one)) for one in (numerator, denominator)]
        raise ValueError(f"expected a value for each round of each visit, found {lengths[0]} and {lengths[1]} of them")
    random = np.random.default_rng(0)
    drawn = np.full((2, draws, len(visits), max(visit.shape[1] for visit in visits)), np.nan)
    chosen = random.integers(0, len(visits), (draws, len(visits)))
    for k, visit in enumerate(visits):
        n, (draw, place) = visit.shape[1], np.nonzero(chosen == k)
        block = math.ceil(n ** (1 / 3))
        starts = random.integers(0, n, (len(draw), math.ceil(n / block), 1))
        rounds = ((starts + np.arange(block)) % n).reshape(len(draw), -1)[:, :n]
        drawn[:, draw, place, :n] = visit[:, rounds]
    medians = np.nanmedian(drawn.reshape(2, draws, -1), axis=2)
    low, high = np.percentile(medians[0] / medians[1], [2.5, 97.5])
    a, b = np.median(np.concatenate(visits, axis=1), axis=1)
    return Ratio(float(a / b), float(low), float(high))


class Load:
    """Share of the machine that other processes used since this object was made. Linux only: None elsewhere.

    `mine` gives the CPU seconds of the processes that do not count, now; by default this process's own.
    """

    def __init__(self, *pids: int) -> None:
        self._pids = pids or (os.getpid(),)
        self._start = self._now()

    def foreign(self) -> float | None:
        """0 … 1, of all cores together."""
        end = self._now()
        if self._start is None or end is None:
            return None
        wall, busy, mine = (b - a for a, b in zip(self._start, end, strict=True))
        return max(0.0, busy - mine) / max(wall, 1e-9) / (os.cpu_count() or 1)

    def _now(self) -> tuple[float, float, float] | None:
        tick = 1 / os.sysconf("SC_CLK_TCK")
        try:
            fields = [int(value) for value in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]]
            mine = sum(_cpu_ticks(pid) for pid in self._pids)
        except OSError:
            return None
        user, nice, system, _, _, irq, softirq, steal = fields[:8]
        return time.monotonic(), (user + nice + system + irq + softirq + steal) * tick, mine * tick


def _cpu_ticks(pid: int) -> int:
    """User and system time of a process, with the children that it has waited for (proc(5), fields 14 to 17)."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    return sum(int(value) for value in fields[11:15])
