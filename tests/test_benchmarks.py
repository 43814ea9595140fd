"""The latency benchmarks: known operation counts, a contender in its own process, and a report that says what its JSON says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import latency, report, versus  # noqa: E402
from benchmarks.contenders import contenders  # noqa: E402
from benchmarks.versus import Worker, WorkerDied  # noqa: E402
from benchmarks.workloads import WORKLOADS  # noqa: E402
from sr3rt.timing import ratio  # noqa: E402

ROW: dict[str, Any] = {
    "step": {"n": 40, "p50": 0.25, "p90": 0.3, "p99": None, "minimum": 0.2, "spread": 0.02},
    "steps_per_s": 4.0,
    "flops_per_s": 6.8e10,
    "share_of_matmul": 0.62,
    "network_s": 0.24,
    "outside_network": 0.01,
    "host_bytes": 2**28,
    "device_bytes": None,
    "cold": {"import_s": 0.3, "load_s": 0.2, "first_step_s": 0.3},
    "error": {"relative_l2": 2e-7, "psnr": 140.0},
    "pictures": [{"steps": 25, "seconds": 6.3, "extrapolated": False}, {"steps": 2000, "seconds": 500.0, "extrapolated": True}],
    "one_thread_cpu_ratio": None,
}


def entry(batch: int) -> dict[str, Any]:
    ratios = {"eager": 1.0, "onnxruntime": 1.6}
    rows = [
        {**ROW, "name": name, "title": f"<{name}>", "ratio": {"value": value, "low": value - 0.1, "high": value + 0.1}}
        for name, value in ratios.items()
    ]
    return {
        "workload": "shipped", "title": "shipped model, 64→256", "side": 256, "batch": batch, "device": "cpu", "contenders": rows,
        "skipped": {"half": "this CPU has no bfloat16"}, "parameters": 2_896_204, "flops_per_step": 17_271_693_312,
        "matmul_flops": 1.1e11, "visits": 5, "rounds": 40, "dropped": 2, "busy": False, "foreign_load": 0.01,
    }  # fmt: skip


DATA = {
    "environment": {"cpu": "Example CPU", "gpu": None, "threads": 2, "date": "2026-01-01T00:00:00+00:00"},
    "entries": [entry(1), entry(4)],
}


@pytest.mark.parametrize(("name", "giga"), [("public-128", 92.4), ("public-512", 1246)])
def test_operations_are_the_known_figures(name: str, giga: float) -> None:
    assert WORKLOADS[name].operations(1) / 1e9 == pytest.approx(giga, rel=1e-3)
    assert WORKLOADS[name].operations(3) / 3e9 == pytest.approx(giga, rel=1e-3)


def test_ours_in_its_own_process_agrees_with_the_reference_in_another(tmp_path: Path) -> None:
    found = {}
    for name in ("eager", "onnxruntime"):
        with Worker(name, "shipped", batch=1, steps=2, threads=1, device="cpu") as worker:
            answer = worker.ask(do="steps", count=2)
            worker.ask(do="record", path=str(tmp_path / f"{name}.npz"))
        assert len(answer["wall"]) == 2 and answer["host_bytes"] > 2**20
        assert all(0 < inside <= wall for inside, wall in zip(answer["network"], answer["wall"], strict=True))
        with np.load(tmp_path / f"{name}.npz") as file:
            found[name] = file["first"], file["last"]
    for ours, reference in zip(found["onnxruntime"], found["eager"], strict=True):
        assert np.linalg.norm(ours - reference) <= 1e-5 * np.linalg.norm(reference)


def test_a_contender_that_dies_is_named_with_its_last_words() -> None:
    with Worker("onnxruntime", "shipped", batch=1, steps=2, threads=1, device="cpu") as worker:
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="onnxruntime ended with status -9"):
            worker.ask(do="steps", count=1)
    with pytest.raises(WorkerDied, match="KeyError: 'nobody'"), Worker("nobody", "shipped", batch=1, steps=2, threads=1, device="cpu"):
        pass


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has what it takes")
def test_no_contender_outlives_the_benchmark() -> None:
    code = (
        "import time\n"
        "from benchmarks.versus import Worker\n"
        "with Worker('matmul', 'shipped', batch=1, steps=2, threads=1, device='cpu') as worker:\n"
        "    print(worker.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as benchmark:
        assert benchmark.stdout is not None
        pid = int(benchmark.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        benchmark.kill()
    end = time.monotonic() + 20
    while Path(f"/proc/{pid}/exe").exists() and time.monotonic() < end:  # a zombie, where nobody reaps, has none
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}/exe").exists()


def test_every_contender_says_why_it_cannot_run() -> None:
    for contender in contenders().values():
        for device in ("cpu", "cuda"):
            reason = contender.why_not(device)
            assert reason is None or len(reason) > 10


def test_page_is_self_contained_and_complete(tmp_path: Path) -> None:
    report.write(tmp_path, DATA)
    assert json.loads((tmp_path / "report.json").read_text()) == DATA
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page)  # links within a plot's SVG only
    assert page.count("<svg") >= 4  # step, share, picture, batch
    for text in ("&lt;onnxruntime&gt;", "1.60× (1.50 to 1.70)", "no bfloat16", "250 ms", "2000 steps (extrapolated)", "2 dropped"):
        assert text in page
    assert "<onnxruntime>" not in page and not re.search(r"\$(summary|plots|tables|quality|environment)", page)


def test_markdown_has_a_line_for_each_row() -> None:
    table = report.markdown(DATA)
    assert table.count("\n| shipped model") == 4
    assert "| shipped model, 64→256, batch 4 | <onnxruntime> | 250 ms | 1.60× (1.50 to 1.70) | 62% | 2e-07 |" in table


def test_readme_is_what_the_committed_report_says() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    data = json.loads(report.COMMITTED.read_text(encoding="utf-8"))
    assert report.in_readme(text, report.markdown(data)) == text, "run  python -m benchmarks.report readme"


def test_readme_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="performance"):
        report.in_readme("# sr3rt", "table")


class Scripted:
    """A worker that answers at once: every step takes `seconds`, and after `lives` turns it is dead."""

    pid = os.getpid()

    def __init__(self, name: str, seconds: float, lives: int = 10**6) -> None:
        self.name, self.seconds, self.lives = name, seconds, lives
        self.cold: dict[str, float] = {}

    def ready(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...

    def ask(self, *, do: str, count: int, warm: int) -> dict[str, Any]:
        self.lives -= 1
        if self.lives < 0:
            raise WorkerDied(self.name, f"{self.name} ended with status -9")
        times = [self.seconds] * count
        return {"wall": times, "cpu": times, "network": times, "host_bytes": 2**20, "device_bytes": None}


def race(*workers: Scripted, seconds: float = 0.05) -> versus.Versus:
    return versus.run(workers, seconds=seconds)  # type: ignore[arg-type]


def test_every_round_gives_each_contender_a_turn_of_its_length() -> None:
    result = race(Scripted("slow", 0.3), Scripted("quick", 0.01))
    slow, quick = result.turns["slow"], result.turns["quick"]
    assert [len(slow.means[0])] == [len(one) for one in quick.means] == [result.rounds] and result.rounds >= versus.LEAST
    assert len(slow.wall) == 2 * result.rounds and len(quick.wall) == 40 * result.rounds  # 0.4 s each
    assert ratio(slow.means, quick.means).value == pytest.approx(30)


def test_a_later_visit_adds_its_rounds_of_who_is_still_there() -> None:
    first, second = race(Scripted("a", 0.1), Scripted("b", 0.2)), race(Scripted("a", 0.3))
    rounds, taken = first.rounds + second.rounds, first.rounds + first.dropped + second.rounds + second.dropped
    first.extend(second)
    assert set(first.turns) == {"a"} and sum(map(len, first.turns["a"].means)) == first.rounds == rounds
    assert len(first.turns["a"].means) == first.visits == 2
    assert first.rounds + first.dropped == taken
    assert (first.turns["a"].means[0][0], first.turns["a"].means[1][-1]) == (pytest.approx(0.1), pytest.approx(0.3))


def test_a_contender_that_dies_in_a_race_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = {"eager": 10**6, "onnxruntime": 2, "matmul": 10**6}

    def scripted(name: str, *_: object, **__: object) -> Scripted:
        return Scripted(name, 0.1, turns[name])

    monkeypatch.setattr(latency, "Worker", scripted)
    monkeypatch.setattr(latency, "_errors", lambda workers: {})
    plan = latency.Plan("cpu", 1, 0.05, measured=(), single_thread=False)
    measurement = latency.Measurement(WORKLOADS["shipped"], 1, ["eager", "onnxruntime"], plan)
    measurement.visit()
    assert measurement.skipped == {"onnxruntime": "onnxruntime ended with status -9"}
    turns["eager"] = 2
    with pytest.raises(WorkerDied, match="eager"):  # without the reference there is nothing to report
        measurement.visit()


def test_what_would_take_a_cpu_minutes_a_step_is_left_out() -> None:
    plan = latency.Plan("cpu", 1, 0.05)
    assert "28 TFLOP" in latency.Measurement(WORKLOADS["paper-256"], 16, ["eager"], plan).skipped["eager"]
    assert not latency.Measurement(WORKLOADS["public-128"], 1, ["eager"], plan).skipped


def test_the_peer_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = contenders()["peer"]
    monkeypatch.delenv("SR3RT_PEER", raising=False)
    assert "--peer DIR" in str(peer.why_not("cpu"))
    monkeypatch.setenv("SR3RT_PEER", str(tmp_path))
    assert f"{tmp_path} is no checkout" in str(peer.why_not("cpu"))
