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


def ratio(numerator: Sequence[float], denominator: Sequence[float], *, draws: int = 4000) -> Ratio:
    """Ratio of the medians of turns that were taken in rounds, with a percentile bootstrap over blocks of rounds.

    Both sequences have one value for each round, in order. Rounds are drawn whole, since the two turns of one round share the
    machine's mood, and in blocks of neighbours, since moods last (circular blocks: Politis and Romano 1992; of about n^(1/3): Hall
    et al. 1995).
    """
    a, b = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"expected two sequences of one length, a value for each round, found shapes {a.shape} and {b.shape}")
    n, block = len(a), math.ceil(len(a) ** (1 / 3))
    starts = np.random.default_rng(0).integers(0, n, (draws, math.ceil(n / block), 1))
    drawn = ((starts + np.arange(block)) % n).reshape(draws, -1)[:, :n]
    ratios = np.median(a[drawn], axis=1) / np.median(b[drawn], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Ratio(float(np.median(a) / np.median(b)), float(low), float(high))


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
