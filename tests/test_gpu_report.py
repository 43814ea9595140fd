"""What a GPU is asked to show (benchmarks/gpu.py), where CUDA runs on the host: of bits it says what is so; times say nothing there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

pytest.importorskip("torch")

from test_torch import on_host  # noqa: F401 (a fixture)

from benchmarks import gpu as report
from benchmarks.workloads import WORKLOADS, Task
from sr3rt.backends import Request, cuda, load
from sr3rt.bundle import Bundle
from sr3rt.upscaler import SHIPPED

pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available")


def test_noise_is_compared_in_every_bit(gpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu()
    found = report.noise(side=16)
    assert found == {"values": 2 * (3 * 16 * 16 + 17 * 31 + 6 * 8 * 4), "differing": 0, "holds": True}
    right = report.normals
    monkeypatch.setattr(report, "normals", lambda shape, **place: np.nextafter(right(shape, **place), np.float32(9)))
    assert report.noise(side=16) | {"values": 0} == {"values": 0, "differing": found["values"], "holds": False}


def test_the_step_is_timed_against_a_copy_of_what_it_moves(gpu: Callable[..., Any]) -> None:
    gpu()
    found = report.copy(shape=(2, 3, 8, 12), rounds=2, launches=1)
    assert {name: found[name]["bytes"] for name in ("posterior", "dpm++2m")} == {"posterior": 4 * 2304, "dpm++2m": 5 * 2304}
    assert found["posterior"]["kernel_over_copy"][0] == 1  # all times are alike there
    assert found["holds"]


def test_pictures_and_captures_are_compared(on_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    made, bundle = on_host, Bundle.open(SHIPPED)
    found = report.compare(bundle, "torch", "fp32", side=8)
    assert (found["equal"], found["holds"]) == (True, True)
    assert min(found["alone_db"], found["batch_db"]) >= 60
    monkeypatch.setitem(report.LEAST, "fp32", 200.0)
    assert not report.compare(bundle, "torch", "fp32", side=8)["holds"]
    network: Any = load(bundle, Request("torch", "fp32", "cuda"))
    task = Task(WORKLOADS["shipped"], 1, 2, 0, "cuda")
    monkeypatch.setattr(Task, "condition", lambda self: np.zeros((1, 3, 32, 32), np.float32))
    for kernels, holds in (({}, False), ({"convolution": 1e3}, True), ({"convolution": 1e-9}, False)):
        monkeypatch.setattr(report, "_kernels", lambda run, kernels=kernels: kernels)
        found = report.capture(network, task, runs=1)
        assert (found["captured"], found["equal"], found["holds"]) == (True, True, holds)
    made.fail["cudaGraphInstantiate"] = "cudaErrorInvalidValue"
    monkeypatch.setattr(report, "_kernels", lambda run: {"convolution": 1e3})
    found = report.capture(network, task, runs=1)
    assert (found["captured"], found["equal"], found["holds"]) == (False, True, False)
    assert any("cudaErrorInvalidValue" in one for one in found["warnings"])


def test_without_a_gpu_the_profiler_sees_no_kernel() -> None:
    if not cuda.why_not():
        pytest.skip("there is a GPU here")
    torch = pytest.importorskip("torch")
    assert report._kernels(lambda: torch.ones(3) + 1) == {}


def test_what_cannot_run_is_told_and_what_dies_leaves_the_rest(
    gpu: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not cuda.why_not():
        pytest.skip("there is a GPU here")
    report.way("shipped", "torch", "fp16")
    assert "there is no NVIDIA driver here" in json.loads(capsys.readouterr().out)["not here"]
    with pytest.raises(SystemExit, match="there is no NVIDIA driver here"):
        report.measure(output=tmp_path / "gpu.json")
    gpu()
    monkeypatch.setattr(report, "WAYS", (("torch", "fp16"),))
    for name in ("noise", "copy"):
        monkeypatch.setattr(report, name, lambda: {"holds": True})
    assert not report.measure(output=tmp_path / "gpu.json", workload=["shipped", "nowhere"])
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert "there is no NVIDIA driver here" in written["shipped, torch fp16"]["not here"]
    assert "KeyError: 'nowhere'" in written["nowhere, torch fp16"]["failed"]
    assert "not done after 0 s" in report._apart("shipped", "torch", "fp16", 0.01)["failed"]
