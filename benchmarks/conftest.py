"""Options of `pytest benchmarks/`, and the report that it leaves in benchmarks/report/."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.latency import Measurement, Plan
from benchmarks.peer import CHECKOUT
from sr3rt.backends import Request, cuda


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sr3rt")
    group.addoption("--full", action="store_true", help="every workload, contender and batch size; hours on a CPU")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where contenders run")
    group.addoption("--threads", type=int, default=0, help="of each contender, on a CPU; 0: one for each core")
    group.addoption("--seconds", type=float, default=None, help="for the rounds of one workload at one batch size, in each visit")
    group.addoption("--peer", metavar="DIR", help="a checkout of the public PyTorch implementation, to be timed beside ours (peer.py)")
    group.addoption("--report", type=Path, default=Path(__file__).parent / "report", help="folder for report.json and report.html")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda" and (reason := cuda.why_not()):
        raise pytest.UsageError(f"--device cuda: {reason}")
    if config.getoption("--peer"):
        os.environ[CHECKOUT] = str(Path(config.getoption("--peer")).resolve())


@pytest.fixture(scope="session")
def plan(request: pytest.FixtureRequest) -> Plan:
    """How to measure, from the command line."""
    option = request.config.getoption
    threads = Request(threads=option("--threads")).thread_count
    if option("--full"):
        return Plan(option("--device"), threads, option("--seconds") or 60, measured=(25, 100))
    return Plan(option("--device"), threads, option("--seconds") or 5, steps=4, measured=())


Measurements = dict[tuple[str, int], Measurement]


@pytest.fixture(scope="session")
def measurements(request: pytest.FixtureRequest, plan: Plan) -> Iterator[Measurements]:
    """By workload and batch size, for the versus tests to fill; written as a report at the end."""
    from benchmarks.report import write
    from sr3rt.environment import describe

    environment = describe(threads=plan.threads)
    found: Measurements = {}
    yield found
    if found:
        folder = request.config.getoption("--report")
        write(folder, {"environment": environment, "entries": [one.entry() for one in found.values()]})
        print(f"\nreport: {folder / 'report.html'}")
