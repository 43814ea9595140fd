"""All contenders of a workload against each other: each in its own process, in shuffled turns of one run.

A machine drifts and its other work comes and goes; whatever it does meets all contenders alike, because every round gives each of
them one turn, in an order drawn anew. Between turns a contender is stopped (SIGSTOP), so that no thread of it spins into another's
turn. Rounds with a turn during which other processes used more than 8 % of the machine are dropped and counted. All of it is done in
several visits, each with new processes. What is quoted are ratios of medians over the kept rounds of all visits, with an interval.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from sr3rt.timing import BUSY, Load

TURN = 0.4  # seconds that a turn should take at least: /proc counts CPU time in hundredths
LEAST, MOST = 3, 400  # rounds, of them quiet where that can be had; rounds at most
STEADY = {
    "OMP_WAIT_POLICY": "passive",  # PyTorch's threads would spin
    # PyTorch on a CPU gives large tensors back at every step and has them again page by page, which takes a tenth of a step or a quarter,
    # by how the kernel's memory lies that minute (mallopt(3); of the GNU C library).
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184",
}


class WorkerDied(RuntimeError):
    """A contender's process ended; the message has the last lines that it wrote. name: the contender's."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class Worker:
    """A contender's process, stopped, once it is ready, but while it has a turn. Use as a context manager, whose block begins then."""

    def __init__(
        self, contender: str, workload: str, *, batch: int, steps: int, threads: int, device: str, plant: float | None = None
    ) -> None:
        self.name = contender if plant is None else f"{contender} with {plant:.0%} planted"
        order = {"contender": contender, "workload": workload, "batch": batch, "steps": steps, "threads": threads, "device": device}
        compilers = os.cpu_count() if device == "cuda" else 1  # a pool that is left running would disturb others on the CPU
        environment = {**os.environ, **STEADY, "TORCHINDUCTOR_COMPILE_THREADS": str(compilers)}
        self._words: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115, __exit__ closes it
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps({**order, "plant": plant, "parent": os.getpid()})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            env=environment,
            cwd=Path(__file__).parent.parent,
        )
        self.pid = self._process.pid
        self.cold: dict[str, float] = {}

    def ready(self) -> None:
        """Wait until it has done a first step, and stop it; `cold` then says how long that took. Raises WorkerDied."""
        if not self.cold:
            self.cold = self._answer()
            self._stop()

    def ask(self, **command: object) -> dict[str, Any]:
        """One turn. Raises WorkerDied."""
        os.kill(self.pid, signal.SIGCONT)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead: there will be no answer
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        answer = self._answer()
        self._stop()
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._words.seek(0)
            words = self._words.read().strip().splitlines()[-5:]
            raise WorkerDied(self.name, f"{self.name} ended with status {self._process.returncode}: " + " | ".join(words))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def __enter__(self) -> Self:
        try:
            self.ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()
        self._words.close()


@dataclass
class Turns:
    """What one contender did in the kept rounds. wall, cpu, network: seconds of every step. host, device: peak bytes.

    means: of each visit, wall seconds a step, one for each round. cpu_means: the same of CPU seconds, of all threads.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    network: list[float] = field(default_factory=list)
    means: list[list[float]] = field(default_factory=lambda: [[]])
    cpu_means: list[list[float]] = field(default_factory=lambda: [[]])
    host: int = 0
    device: int | None = None

    def add(self, answer: dict[str, Any]) -> None:
        for name in ("wall", "cpu", "network"):
            getattr(self, name).extend(answer[name])
        self.means[-1].append(sum(answer["wall"]) / len(answer["wall"]))
        self.cpu_means[-1].append(sum(answer["cpu"]) / len(answer["cpu"]))
        self.host, self.device = answer["host_bytes"], answer["device_bytes"]

    def extend(self, later: Turns) -> None:
        """Those of a later visit after these."""
        for name in ("wall", "cpu", "network", "means", "cpu_means"):
            getattr(self, name).extend(getattr(later, name))
        self.host = max(self.host, later.host)
        self.device = None if self.device is None or later.device is None else max(self.device, later.device)


@dataclass
class Versus:
    """turns: by contender, of the `rounds` that were kept. dropped: rounds that other processes disturbed.

    busy: of a visit fewer than 3 rounds were quiet, so all were kept and none was dropped. load: mean over rounds of the worst turn's
    foreign load.
    """

    turns: dict[str, Turns]
    rounds: int
    dropped: int
    busy: bool
    load: float
    visits: int = 1

    def extend(self, later: Versus) -> None:
        """The rounds of a later visit after these, of who was there both times."""
        self.turns = {name: turns for name, turns in self.turns.items() if name in later.turns}
        for name, turns in self.turns.items():
            turns.extend(later.turns[name])
        everything = self.rounds + self.dropped, later.rounds + later.dropped
        self.load = (self.load * everything[0] + later.load * everything[1]) / sum(everything)
        self.visits += later.visits
        self.rounds, self.dropped, self.busy = self.rounds + later.rounds, self.dropped + later.dropped, self.busy or later.busy


def run(workers: Sequence[Worker], *, seconds: float) -> Versus:
    """Rounds for `seconds`, at least 3; up to twice as long while fewer than 3 of them were quiet. Raises WorkerDied."""
    counts = {worker.name: _steps_of_a_turn(worker) for worker in workers}
    pids = [os.getpid(), *(worker.pid for worker in workers)]
    taken: list[tuple[float, dict[str, dict[str, Any]]]] = []
    quiet: list[dict[str, dict[str, Any]]] = []
    begin = time.monotonic()
    while len(taken) < MOST and (len(taken) < LEAST or time.monotonic() - begin < (seconds if len(quiet) >= LEAST else 2 * seconds)):
        answers, worst = {}, 0.0
        for worker in random.sample(workers, len(workers)):
            load = Load(*pids)
            count = counts[worker.name]
            answers[worker.name] = worker.ask(do="steps", count=count, warm=int(count > 1))  # long steps have time to warm up
            worst = max(worst, load.foreign() or 0.0)
        taken.append((worst, answers))
        if worst <= BUSY:
            quiet.append(answers)
    busy = len(quiet) < LEAST
    kept = [answers for _, answers in taken] if busy else quiet
    turns = {worker.name: Turns() for worker in workers}
    for answers in kept:
        for name, answer in answers.items():
            turns[name].add(answer)
    return Versus(turns, len(kept), len(taken) - len(kept), busy, sum(worst for worst, _ in taken) / len(taken))


def _steps_of_a_turn(worker: Worker) -> int:
    """Enough for `TURN`, judged by a step after one to warm up."""
    seconds: float = worker.ask(do="steps", count=1, warm=1)["wall"][0]
    return max(1, math.ceil(TURN / seconds))
