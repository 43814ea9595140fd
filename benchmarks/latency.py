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

from benchmarks import flops, matmul, versus
from benchmarks.contenders import contenders
from benchmarks.versus import Turns, Versus, Worker, WorkerDied
from benchmarks.workloads import Workload
from sr3rt.timing import Ratio, Summary, ratio

REFERENCE, PEAK = "eager", "matmul"


@dataclass(frozen=True)
class Plan:
    """How to measure. seconds: for the rounds of one workload at one batch size. steps: of the picture whose error is measured.

    measured: step counts of which whole pictures are timed. told: step counts that the report extrapolates from the time of a step.
    """

    device: str
    threads: int
    seconds: float
    steps: int = 25
    measured: tuple[int, ...] = (25,)
    told: tuple[int, ...] = (25, 100, 2000)
    single_thread: bool = True


def measure(workload: Workload, batch: int, names: Sequence[str], plan: Plan) -> dict[str, Any]:
    """The report's entry for this workload and batch: what was skipped and why, and a row for each contender."""
    entry: dict[str, Any] = {
        "workload": workload.name, "title": workload.title, "side": workload.side, "batch": batch, "device": plan.device,
        "skipped": {}, "contenders": [],
    }  # fmt: skip
    known = contenders()
    for name in names:
        reason = known[name].why_not(plan.device)
        if reason:
            entry["skipped"][name] = reason
    fit = [name for name in names if name not in entry["skipped"]]
    reason = workload.why_not(len(fit))
    if reason:
        entry["skipped"].update(dict.fromkeys(fit, reason))
        return entry
    workload.bundle()  # exported here, once, and not by a contender while another is timed
    while True:
        try:
            with _workers(workload, batch, fit, plan, entry["skipped"]) as workers:
                result = versus.run(workers, seconds=plan.seconds)
                errors = _errors([w for w in workers if w.name != PEAK])
                pictures = _pictures([w for w in workers if w.name != PEAK], plan, result)
                cold = {worker.name: worker.cold for worker in workers}
            break
        except WorkerDied as death:  # for want of memory, say: once more without it
            if death.name not in fit or death.name == REFERENCE:
                raise
            entry["skipped"][death.name] = str(death)
            fit.remove(death.name)
    single = _single_thread(workload, batch, [w.name for w in workers if w.name != PEAK], plan) if plan.single_thread else {}
    operations = flops.count(workload.eager(), batch=batch, side=workload.side)
    best = matmul.flops(plan.device) / min(result.turns[PEAK].wall)
    entry.update(
        parameters=workload.parameters(), flops_per_step=operations, matmul_flops=best, rounds=result.rounds, dropped=result.dropped,
        busy=result.busy, foreign_load=result.load,
    )  # fmt: skip
    reference = result.turns.get(REFERENCE)
    for name in (name for name in names if name in cold):
        turns = result.turns[name]
        step = Summary.of(turns.wall)
        entry["contenders"].append(
            {
                "name": name,
                "title": known[name].title,
                "step": asdict(step),
                "steps_per_s": batch / step.p50,
                "flops_per_s": operations / step.p50,
                "share_of_matmul": operations / step.p50 / best,
                "network_s": float(np.median(turns.network)),
                "outside_network": 1 - sum(turns.network) / sum(turns.wall),
                "host_bytes": turns.host,
                "device_bytes": turns.device,
                "cold": cold[name],
                "error": errors.get(name),
                "pictures": pictures[name],
                "ratio": asdict(ratio(reference.means, turns.means)) if reference else None,
                "one_thread_cpu_ratio": asdict(single[name]) if name in single else None,
            }
        )
    return entry


@contextmanager
def _workers(workload: Workload, batch: int, names: Sequence[str], plan: Plan, skipped: dict[str, str]) -> Iterator[list[Worker]]:
    """A process for each contender that starts, and one for the matrix product; who does not start is skipped with its reason."""
    with ExitStack() as stack:
        workers = []
        for name in (*names, PEAK):
            try:
                worker = Worker(name, workload.name, batch=batch, steps=plan.steps, threads=plan.threads, device=plan.device)
            except WorkerDied as error:
                if name in (REFERENCE, PEAK):
                    raise
                skipped[name] = str(error)
                continue
            workers.append(stack.enter_context(worker))
        yield workers


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


def _pictures(workers: Sequence[Worker], plan: Plan, result: Versus) -> dict[str, list[dict[str, Any]]]:
    """Seconds for whole pictures: timed in five shuffled parts where the plan says so, else from the median step and labelled."""
    rows: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    for steps in plan.told:
        timed = steps in plan.measured
        seconds = {worker.name: 0.0 if timed else steps * Summary.of(result.turns[worker.name].wall).p50 for worker in workers}
        for part in range(5 if timed else 0):
            for worker in random.sample(workers, len(workers)):
                count = steps * (part + 1) // 5 - steps * part // 5
                seconds[worker.name] += sum(worker.ask(do="steps", count=count, warm=1)["wall"])
        for name, total in seconds.items():
            rows[name].append({"steps": steps, "seconds": total, "extrapolated": not timed})
    return rows


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
