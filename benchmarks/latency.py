"""One workload at one batch size, all contenders against each other: the rows of the report."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import matmul, versus
from benchmarks.contenders import contenders
from benchmarks.versus import Turns, Versus, Worker, WorkerDied
from benchmarks.workloads import Workload
from sr3rt.timing import Ratio, Summary, ratio

REFERENCE, PEAK = "eager", "matmul"
VISITS = 5  # with fewer an interval from drawing them would be too narrow
LONGEST_PICTURES = 600  # seconds for timing whole pictures with all contenders
MOST_OPERATIONS = 6e12  # of a step on a CPU: about a minute for two cores


@dataclass(frozen=True)
class Plan:
    """How to measure. seconds: for the rounds of a visit. steps: of the picture whose error is measured.

    measured: step counts of which whole pictures are timed. told: step counts that the report extrapolates from the time of a step.
    """

    device: str
    threads: int
    seconds: float
    steps: int = 25
    measured: tuple[int, ...] = (25,)
    told: tuple[int, ...] = (25, 100, 2000)
    single_thread: bool = True


class Measurement:
    """What is known of a workload at a batch size: visits add rounds, and `entry` is the report's view of them."""

    def __init__(self, workload: Workload, batch: int, names: Sequence[str], plan: Plan) -> None:
        self._workload, self._batch, self._plan = workload, batch, plan
        known = contenders()
        reasons = {name: known[name].why_not(plan.device) for name in names}
        self.skipped = {name: reason for name, reason in reasons.items() if reason}
        self._names = [name for name in names if name not in self.skipped]
        reason = workload.why_not(len(self._names)) or self._too_long()
        if reason:
            self.skipped.update(dict.fromkeys(self._names, reason))
            self._names = []
        self._result: Versus | None = None
        self._errors: dict[str, dict[str, float]] = {}
        self._pictures: dict[str, dict[int, float]] = {}
        self._cold: dict[str, dict[str, float]] = {}
        self._single: dict[str, Ratio] = {}

    def _too_long(self) -> str | None:
        """Why a CPU should not be asked for such steps, or None."""
        if self._plan.device != "cpu":
            return None
        operations = self._workload.operations(self._batch)
        if operations <= MOST_OPERATIONS:
            return None
        return f"a step takes {operations / 1e12:.0f} TFLOP, minutes on a CPU: --device cuda"

    def visit(self) -> None:
        """Rounds in new processes. The first visit also takes errors, whole pictures and single threads."""
        if self._names:
            self._workload.bundle()  # exported here, once, and not by a contender while another is timed
        done = not self._names
        while not done:
            try:
                self._visit()
                done = True
            except WorkerDied as death:  # for want of memory, say: once more without it
                if death.name not in self._names or death.name == REFERENCE:
                    raise
                self.skipped[death.name] = str(death)
                self._names.remove(death.name)

    def _visit(self) -> None:
        first = self._result is None
        with self._workers(together=not first) as workers:
            result = versus.run(workers, seconds=self._plan.seconds)
            if first:
                racing = [worker for worker in workers if worker.name != PEAK]
                self._errors = _errors(racing)
                self._pictures = {worker.name: {} for worker in racing}
                for steps in self._plan.measured:
                    if steps * sum(result.turns[worker.name].means[0][0] for worker in racing) > LONGEST_PICTURES:
                        continue  # the report extrapolates, and says so
                    for name, seconds in _picture(racing, steps).items():
                        self._pictures[name][steps] = seconds
                self._cold = {worker.name: worker.cold for worker in racing}
        if self._result is None:
            if self._plan.single_thread:
                self._single = _single_thread(self._workload, self._batch, list(self._cold), self._plan)
            self._result = result
        else:
            self._result.extend(result)

    @contextmanager
    def _workers(self, *, together: bool) -> Iterator[list[Worker]]:
        """A process for each contender, and one for the matrix product. Started together they are ready sooner, but none as soon."""
        plan, workers = self._plan, []
        with ExitStack() as stack:
            for name in (*self._names, PEAK):
                worker = Worker(name, self._workload.name, batch=self._batch, steps=plan.steps, threads=plan.threads, device=plan.device)
                stack.push(worker)
                workers.append(worker)
                if not together:
                    worker.ready()
            for worker in workers:
                worker.ready()
            yield workers

    def entry(self) -> dict[str, Any]:
        """The report's entry: what was skipped and why, and a row for each contender."""
        workload, result = self._workload, self._result
        entry: dict[str, Any] = {
            "workload": workload.name, "title": workload.title, "side": workload.side, "batch": self._batch,
            "device": self._plan.device, "skipped": self.skipped, "contenders": [],
        }  # fmt: skip
        if result is None:
            return entry
        operations = workload.operations(self._batch)
        best = matmul.flops(self._plan.device) / min(result.turns[PEAK].wall)
        entry.update(
            parameters=workload.parameters(), flops_per_step=operations, matmul_flops=best, visits=result.visits, rounds=result.rounds,
            dropped=result.dropped, busy=result.busy, foreign_load=result.load,
        )  # fmt: skip
        entry["contenders"] = [self._row(name, result, operations, best) for name in self._names if name in result.turns]
        return entry

    def _row(self, name: str, result: Versus, operations: int, best: float) -> dict[str, Any]:
        turns, reference = result.turns[name], result.turns.get(REFERENCE)
        step = Summary.of(turns.wall)
        timed = self._pictures[name]
        return {
            "name": name,
            "title": contenders()[name].title,
            "step": asdict(step),
            "steps_per_s": self._batch / step.p50,
            "flops_per_s": operations / step.p50,
            "share_of_matmul": operations / step.p50 / best,
            "network_s": float(np.median(turns.network)),
            "outside_network": 1 - sum(turns.network) / sum(turns.wall),
            "host_bytes": turns.host,
            "device_bytes": turns.device,
            "cold": self._cold[name],
            "error": self._errors.get(name),
            "pictures": [
                {"steps": steps, "seconds": timed.get(steps, steps * step.p50), "extrapolated": steps not in timed}
                for steps in self._plan.told
            ],
            "ratio": asdict(ratio(reference.means, turns.means)) if reference else None,
            "one_thread_cpu_ratio": asdict(self._single[name]) if name in self._single else None,
        }


def _errors(workers: Sequence[Worker]) -> dict[str, dict[str, float]]:
    """Each contender's first prediction and whole picture against the reference's, from the same noise."""
    with tempfile.TemporaryDirectory() as folder:
        arrays = {}
        for worker in workers:
            path = Path(folder) / f"{worker.name}.npz"
            worker.ask(do="record", path=str(path))
            with np.load(path) as file:
                arrays[worker.name] = file["first"], file["last"]
    if REFERENCE not in arrays:
        return {}
    first, last = arrays[REFERENCE]
    return {
        name: {
            "relative_l2": float(np.linalg.norm(a - first) / np.linalg.norm(first)),
            "psnr": float(10 * np.log10(4 / max(float(np.mean((b - last) ** 2, dtype=np.float64)), 1e-20))),
        }
        for name, (a, b) in arrays.items()
    }


def _picture(workers: Sequence[Worker], steps: int) -> dict[str, float]:
    """Seconds for a whole picture, timed in five shuffled parts."""
    seconds = {worker.name: 0.0 for worker in workers}
    for part in range(5):
        for worker in random.sample(workers, len(workers)):
            count = steps * (part + 1) // 5 - steps * part // 5
            seconds[worker.name] += sum(worker.ask(do="steps", count=count, warm=1)["wall"])
    return seconds


def _single_thread(workload: Workload, batch: int, names: Sequence[str], plan: Plan) -> dict[str, Ratio]:
    """Ratios of CPU seconds with one thread each: other processes hardly change these."""
    if plan.device != "cpu" or REFERENCE not in names:
        return {}
    with ExitStack() as stack:
        workers = [
            stack.enter_context(Worker(name, workload.name, batch=batch, steps=plan.steps, threads=1, device=plan.device))
            for name in names
            if name != "compiled"  # a minute of compiling for one more figure
        ]
        turns: dict[str, Turns] = versus.run(workers, seconds=plan.seconds / 4).turns
    return {name: ratio(turns[REFERENCE].cpu_means, one.cpu_means) for name, one in turns.items()}
