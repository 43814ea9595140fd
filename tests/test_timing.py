"""What repeated timings say: percentiles, ratios with intervals, and the load of other processes."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import chain

import numpy as np
import pytest

from sr3rt.timing import BUSY, Load, Summary, ratio


def turns(median: float, *, rounds: int, seed: int, drift: np.ndarray | None = None) -> list[float]:
    """Turns as a noisy machine gives them: never faster than the work, often a little slower, now and then much."""
    rng = np.random.default_rng(seed)
    noise = 1 + 0.03 * rng.exponential(size=rounds) + 0.5 * (rng.random(rounds) < 0.03)
    return list(median * noise * (1 if drift is None else drift))


def test_summary() -> None:
    summary = Summary.of([0.004, 0.001, 0.002, 0.003, 0.005])
    assert (summary.n, summary.p50, summary.minimum, summary.p99) == (5, 0.003, 0.001, None)
    assert summary.spread == pytest.approx(1 / 3)  # quartiles 0.002 and 0.004
    assert Summary.of([0.001] * 999 + [1.0]).p99 == pytest.approx(0.001, rel=1e-6)


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        Summary.of([])


def visits(median: float, *, seed: int, differ: float = 0.0, count: int = 5, rounds: int = 4) -> list[list[float]]:
    """Visits, whose processes are slower or faster by about `differ`."""
    each = np.exp(np.random.default_rng(seed).normal(0, differ, count))
    return [turns(median * one, rounds=rounds, seed=count * seed + k) for k, one in enumerate(each)]


def test_ten_percent_is_seen_and_nothing_is_not() -> None:
    seen = [ratio([turns(1.1, rounds=40, seed=2 * i)], [turns(1.0, rounds=40, seed=2 * i + 1)]) for i in range(50)]
    assert all(one.significant and one.low <= 1.1 <= one.high * 1.02 for one in seen)
    same = [ratio([turns(1.0, rounds=40, seed=1000 + i)], [turns(1.0, rounds=40, seed=2000 + i)]) for i in range(200)]
    assert sum(one.significant for one in same) <= 20  # 5 % of 200 are expected, 20 are five standard deviations off


@pytest.mark.parametrize("differ", [0.0, 0.02, 0.05])
def test_processes_that_differ_are_no_difference(differ: float) -> None:
    found = [(visits(1.0, seed=1000 + i, differ=differ), visits(1.0, seed=5000 + i, differ=differ)) for i in range(200)]
    apart = sum(ratio(a, b, draws=500).significant for a, b in found)
    joined = sum(ratio([list(chain(*a))], [list(chain(*b))], draws=500).significant for a, b in found)
    assert apart <= 24  # 10 are expected
    assert differ == 0 or joined > apart  # as if all rounds were of the same processes


def test_ten_percent_is_seen_over_visits() -> None:
    seen = [ratio(visits(1.1, seed=i, differ=0.01), visits(1.0, seed=500 + i, differ=0.01), draws=500) for i in range(50)]
    assert sum(one.significant for one in seen) >= 48


def test_visits_may_have_rounds_as_they_come() -> None:
    found = ratio([[2.0, 2.0], [2.0] * 7], [[1.0, 1.0], [1.0] * 7])
    assert (found.value, found.low, found.high) == (2, 2, 2)


def test_a_drifting_machine_does_not_widen_the_interval() -> None:
    drift = np.linspace(1, 3, 60)
    found = ratio([turns(1.1, rounds=60, seed=1, drift=drift)], [turns(1.0, rounds=60, seed=2, drift=drift)])
    assert 0.95 < found.low < 1.1 < found.high < 1.25  # of turns that differ threefold


@pytest.mark.parametrize(("one", "other"), [([[1.0, 2.0]], [[1.0]]), ([[1.0]], [[1.0], [1.0]]), ([], []), ([[]], [[]])])
def test_ratio_needs_turns_of_the_same_rounds(one: list[list[float]], other: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"a value for each round|zip\(\)"):
        ratio(one, other)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_load_counts_others_and_not_us() -> None:
    spin = [sys.executable, "-c", "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"]
    with subprocess.Popen(spin) as other:
        try:
            time.sleep(0.3)
            everyone, without = Load(), Load(other.pid)
            time.sleep(1.0)
            theirs, rest = everyone.foreign(), without.foreign()
        finally:
            other.kill()
    assert theirs is not None and rest is not None
    assert theirs > rest  # the spinning process is foreign to the first only
    assert theirs > BUSY / 2
