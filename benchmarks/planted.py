"""Does the versus mode see what is there, and only that? `python -m benchmarks.planted` runs ours against ours with 10 % of every
step's time wasted, and against ours with the same code wasting 0 %. Ends with status 1 unless the first is significant and the
second is not. (Of true no-ops one in twenty is called significant: that is what a 95 % interval means.)
"""

from __future__ import annotations

from contextlib import ExitStack

from cyclopts import App

from benchmarks import versus
from benchmarks.latency import VISITS
from benchmarks.versus import Versus, Worker
from benchmarks.workloads import WORKLOADS
from sr3rt.backends import Request
from sr3rt.timing import ratio

PLANTS = (None, 0.1, 0.0)


def planted(*, workload: str = "shipped", backend: str = "onnxruntime", seconds: float = 60, threads: int = 0) -> bool:
    """Measure and print; whether the slowdown is significant and the no-op is not.

    Parameters
    ----------
    workload
        A name of `benchmarks/workloads.py`.
    backend
        Which of ours.
    seconds
        For the rounds of all visits together.
    threads
        Of each contender; 0: one for each core.
    """
    WORKLOADS[workload].bundle()
    count = Request(threads=threads).thread_count
    result = _visit(workload, backend, count, seconds / VISITS)
    for _ in range(VISITS - 1):
        result.extend(_visit(workload, backend, count, seconds / VISITS))
    ours, slowed, same = result.turns.values()
    slowdown, no_op = ratio(slowed.means, ours.means), ratio(same.means, ours.means)
    print(f"{result.rounds} rounds, {result.dropped} dropped{', machine busy' if result.busy else ''}")
    for title, found in (("10 % planted", slowdown), ("no-op planted", no_op)):
        print(f"{title}: {found} the time of ours, {'significant' if found.significant else 'not significant'}")
    return slowdown.significant and slowdown.value > 1 and not no_op.significant


def _visit(workload: str, backend: str, threads: int, seconds: float) -> Versus:
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(backend, workload, batch=1, steps=25, threads=threads, device="cpu", plant=plant))
            for plant in PLANTS
        ]
        return versus.run(workers, seconds=seconds)


if __name__ == "__main__":
    app = App(help=__doc__)
    app.default(planted)
    raise SystemExit(0 if app(result_action="return_value") else 1)
