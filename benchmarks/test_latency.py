"""`pytest benchmarks/`: every contender by itself (for pytest-benchmark's own options), and all against each other (for the report)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.contenders import contenders
from benchmarks.latency import Plan, measure
from benchmarks.versus import Worker
from benchmarks.workloads import WORKLOADS

QUICK = {("shipped", 1): ("eager", "half", "compiled"), ("shipped", 4): ("eager", "half"), ("public-128", 1): ("eager", "half")}
BATCHES = (1, 4, 16)
CONTENDERS = contenders()
OURS = tuple(name for name in CONTENDERS if name not in ("eager", "half", "compiled"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    cases = [(name, batch) for name in WORKLOADS for batch in BATCHES] if full else list(QUICK)
    if "contender" in metafunc.fixturenames:
        chosen = [(*case, name) for case in cases for name in (CONTENDERS if full else (*QUICK[case], *OURS))]
        metafunc.parametrize(("workload", "batch", "contender"), chosen, ids=["-".join(map(str, case)) for case in chosen])
    else:
        metafunc.parametrize(("workload", "batch"), cases, ids=[f"{name}-{batch}" for name, batch in cases])


def test_versus(workload: str, batch: int, plan: Plan, entries: list[dict[str, Any]], request: pytest.FixtureRequest) -> None:
    """All contenders interleaved; an entry of the report."""
    full = request.config.getoption("--full")
    names = list(CONTENDERS) if full else [*QUICK[workload, batch], *OURS]
    if (workload, batch) == ("shipped", 1) and not full:
        plan = replace(plan, measured=(25,))
    entry = measure(WORKLOADS[workload], batch, names, plan)
    entries.append(entry)
    if not entry["contenders"]:
        pytest.skip("; ".join(f"{name}: {reason}" for name, reason in entry["skipped"].items()))


def test_step(workload: str, batch: int, contender: str, plan: Plan, benchmark: BenchmarkFixture) -> None:
    """One contender alone, a step at a time. Compare contenders by `test_versus`: these are minutes apart."""
    reason = CONTENDERS[contender].why_not(plan.device) or WORKLOADS[workload].why_not(1)
    if reason:
        pytest.skip(reason)
    WORKLOADS[workload].bundle()
    with Worker(contender, workload, batch=batch, steps=plan.steps, threads=plan.threads, device=plan.device) as worker:
        benchmark.group = f"{workload}, batch {batch}, {plan.device}"
        benchmark.pedantic(lambda: worker.ask(do="steps", count=1), warmup_rounds=1, rounds=5)  # type: ignore[no-untyped-call]
