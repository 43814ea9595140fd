"""`pytest benchmarks/`: every contender by itself (for pytest-benchmark's own options), and all against each other (for the report)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.conftest import Measurements
from benchmarks.contenders import contenders
from benchmarks.latency import VISITS, Measurement, Plan
from benchmarks.versus import Worker
from benchmarks.workloads import WORKLOADS

QUICK = {("shipped", 1): ("eager", "half", "compiled"), ("shipped", 4): ("eager", "half"), ("public-128", 1): ("eager", "half")}
THEIRS = ("eager", "half", "compiled")
BATCHES = (1, 4, 16)
CONTENDERS = contenders()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = [(name, batch) for name in WORKLOADS for batch in BATCHES] if metafunc.config.getoption("--full") else list(QUICK)
    if "contender" in metafunc.fixturenames:
        chosen = [(*case, name) for case in cases for name in names(metafunc.config, *case)]
        metafunc.parametrize(("workload", "batch", "contender"), chosen, ids=["-".join(map(str, case)) for case in chosen])
    else:
        metafunc.parametrize(("workload", "batch"), cases, ids=[f"{name}-{batch}" for name, batch in cases])


def names(config: pytest.Config, workload: str, batch: int) -> list[str]:
    """The contenders of a case, all of ours among them; the peer has the public networks only."""
    peer = ["peer"] if config.getoption("--peer") and workload.startswith("public") else []
    theirs = THEIRS if config.getoption("--full") else QUICK[workload, batch]
    return [*theirs, *peer, *(name for name in CONTENDERS if name not in (*THEIRS, "peer"))]


def test_versus(workload: str, batch: int, plan: Plan, measurements: Measurements, request: pytest.FixtureRequest) -> None:
    """All contenders interleaved; an entry of the report."""
    if not request.config.getoption("--full"):
        first = (workload, batch) == next(iter(QUICK))  # whole pictures and single threads of one network are enough in minutes
        plan = replace(plan, measured=(25,) if first else (), single_thread=first)
    measurement = Measurement(WORKLOADS[workload], batch, names(request.config, workload, batch), plan)
    measurements[workload, batch] = measurement
    measurement.visit()
    if not measurement.entry()["contenders"]:
        pytest.skip("; ".join(f"{name}: {reason}" for name, reason in measurement.skipped.items()))


def test_step(workload: str, batch: int, contender: str, plan: Plan, benchmark: BenchmarkFixture) -> None:
    """One contender alone, a step at a time. Compare contenders by `test_versus`: these are minutes apart."""
    reason = CONTENDERS[contender].why_not(plan.device) or WORKLOADS[workload].why_not(1)
    if reason:
        pytest.skip(reason)
    WORKLOADS[workload].bundle()
    with Worker(contender, workload, batch=batch, steps=plan.steps, threads=plan.threads, device=plan.device) as worker:
        benchmark.group = f"{workload}, batch {batch}, {plan.device}"
        benchmark.pedantic(lambda: worker.ask(do="steps", count=1), warmup_rounds=1, rounds=3)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("visit", range(2, VISITS + 1))
def test_versus_again(visit: int, workload: str, batch: int, measurements: Measurements) -> None:
    """The same later and in new processes, for the same entry: its interval then knows how far machine and processes vary."""
    if (workload, batch) not in measurements:
        pytest.skip("adds to test_versus, which did not run")
    measurements[workload, batch].visit()
