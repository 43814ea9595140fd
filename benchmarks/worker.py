"""One contender in a process of its own: `python -m benchmarks.worker '{"contender": …}'`, then one JSON line in and one out.

{"do": "steps", "count": n}      wall, CPU and network seconds of each of n steps, after "warm" (0) uncounted ones; on a GPU, where a loop
                                 queues its steps, one mean over n of them, waited for together
{"do": "record", "path": FILE}   a picture from fixed noise; its first prediction and its end go to FILE (.npz)
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

BORN = time.perf_counter()


def end_with(parent: int) -> None:
    """However that process ends, this one does too, even while it is stopped (prctl(2), PR_SET_PDEATHSIG). On Linux."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended already
            sys.exit(1)


def serve(order: dict[str, Any]) -> None:
    """Make the contender, say how long that took, answer until stdin ends."""
    replies, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print must not be taken for an answer

    def reply(**content: object) -> None:
        print(json.dumps(content), file=replies, flush=True)

    from benchmarks.contenders import contenders
    from benchmarks.workloads import WORKLOADS, Task

    task = Task(WORKLOADS[order["workload"]], **{name: order[name] for name in ("batch", "steps", "threads", "device", "plant")})
    if order["contender"] == "matmul":
        from benchmarks.matmul import Matmul

        imported = time.perf_counter()
        stepper: Any = Matmul(task.device, task.threads)
    else:
        contender = contenders()[order["contender"]]
        importlib.import_module(contender.package)
        imported = time.perf_counter()
        stepper = contender.make(task)
    loaded = time.perf_counter()
    stepper.step()
    stepper.finish()
    first = time.perf_counter()
    reply(import_s=imported - BORN, load_s=loaded - imported, first_step_s=first - loaded)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "steps":
            for _ in range(command.get("warm", 0)):
                stepper.step()
                stepper.finish()
            reply(
                **_steps(stepper, command["count"], together=task.device != "cpu"),
                host_bytes=_peak(),
                device_bytes=_device_peak(task.device),
            )
        elif command["do"] == "record":
            _record(stepper, task, Path(command["path"]))
            reply()


def _steps(stepper: Any, count: int, *, together: bool) -> dict[str, list[float]]:
    wall, cpu, network = [], [], []
    group = count if together else 1
    for _ in range(count // group):
        spent, begin, used = stepper.network, time.perf_counter(), time.process_time()
        for _ in range(group):
            stepper.step()
        stepper.finish()
        wall.append((time.perf_counter() - begin) / group)
        cpu.append((time.process_time() - used) / group)
        network.append((stepper.network - spent) / group)
    return {"wall": wall, "cpu": cpu, "network": network}


def _record(stepper: Any, task: Any, path: Path) -> None:
    import numpy as np

    def noise(step: int) -> Any:
        return np.random.default_rng(step).standard_normal(task.condition().shape, np.float32)

    stepper.start(noise)
    stepper.step()
    first = stepper.prediction()
    for _ in range(task.steps - 1):
        stepper.step()
    np.savez(path, first=first, last=stepper.prediction())
    stepper.start()


def _peak() -> int:
    """Highest resident memory so far, bytes."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():  # on Linux, ru_maxrss starts with that of the process that started this one
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _device_peak(device: str) -> int | None:
    """Highest memory that PyTorch took on the GPU, bytes."""
    torch = sys.modules.get("torch")
    return int(torch.cuda.max_memory_reserved()) if device == "cuda" and torch is not None else None


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    asked = json.loads(sys.argv[1])
    end_with(asked.pop("parent"))
    serve(asked)
