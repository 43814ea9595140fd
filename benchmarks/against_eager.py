"""Time per step, ours against eager float32 PyTorch: `python benchmarks/against_eager.py`.

Both run the whole step (network and update) of the same network on the same state, in turns shuffled within one process, so that a
drifting machine slows both; what is quoted is the ratio of medians. PyTorch's threads wait passively: its default spinning would make
eager far slower beside any other busy core, and flatter us.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from cyclopts import App
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from sr3rt import backends
from sr3rt.backends import Network
from sr3rt.backends.torch import TorchNetwork
from sr3rt.bundle import Bundle, Defaults, Manifest, write_manifest
from sr3rt.engine import Engine, Job
from sr3rt.export.nets.compact import CompactConfig, CompactUNet
from sr3rt.export.nets.janspiry import JanspiryConfig, JanspiryUNet
from sr3rt.export.to_onnx import write_onnx
from sr3rt.samplers import Sampler, table
from sr3rt.schedule import ScheduleSpec, respace
from sr3rt.upscaler import SHIPPED

TRAINED = ScheduleSpec("linear", 2000, 1e-6, 1e-2)


@dataclass(frozen=True)
class Workload:
    """One network at one picture size. bundle: ours; eager: the same weights in PyTorch."""

    name: str
    side: int
    bundle: Bundle
    eager: nn.Module


def shipped(folder: Path) -> Workload:
    """The model that ships, 64 → 256; its weights are the ONNX file's initialisers."""
    bundle = Bundle.open(SHIPPED)
    graph = onnx.load_from_string(bundle.read("network.onnx")).graph
    weights = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    net = CompactUNet(CompactConfig())
    net.load_state_dict({name: weights[name] for name in net.state_dict()})
    return Workload("shipped model, 64→256", 256, bundle, net)


def public(folder: Path) -> Workload:
    """The public implementation's 16→128 configuration, 97,807,491 parameters, random weights (speed does not depend on them)."""
    torch.manual_seed(0)
    net = JanspiryUNet(JanspiryConfig())
    write_onnx(net, folder / "network.onnx")
    parameters = sum(p.numel() for p in net.parameters())
    write_manifest(
        folder, Manifest("public", "sr3", parameters, 3, 8, net.config.stride, "eps", "sqrt_gamma", TRAINED, Defaults(100, "posterior"))
    )
    return Workload("public 16→128, 97.8M", 128, Bundle.open(folder), net)


def stepper(network: Network, workload: Workload, batch: int, threads: int, steps: int) -> Callable[[], NDArray[np.float32]]:
    """A call that makes one step of a run of `steps` and gives the predictions."""
    manifest, side = workload.bundle.manifest, workload.side
    rows = table(Sampler("posterior"), respace(manifest.trained.schedule(), steps), prediction=manifest.prediction, level=manifest.level)
    engine = Engine(network, capacity=batch, channels=3, height=side, width=side, threads=threads)
    x = np.random.default_rng(0).uniform(-1, 1, (batch, 3, side, side)).astype(np.float32)
    jobs = [Job(x[i], rows, seed=i) for i in range(batch)]
    for job in jobs:
        engine.join(job)

    def step() -> NDArray[np.float32]:
        engine.step()
        return np.stack([engine.prediction(job) for job in jobs])

    return step


def interval(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """Ratio of medians a/b and its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    left, right = np.array(a), np.array(b)
    draws = [
        np.median(left[rng.integers(0, len(left), len(left))]) / np.median(right[rng.integers(0, len(right), len(right))])
        for _ in range(2000)
    ]
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(np.median(left) / np.median(right)), float(low), float(high)


def main(*, turns: int = 15, batch: int = 1, threads: int = 0) -> None:
    """Print one row for each workload.

    Parameters
    ----------
    turns
        Steps of each contender.
    batch
        Pictures in a step.
    threads
        0: one for each core that this process may use.
    """
    request = backends.Request(threads=threads)
    torch.set_num_threads(request.thread_count)
    print("| workload | eager, median ms | ours, median ms | eager ÷ ours (95 %) | relative difference |\n|---|---|---|---|---|")
    for make in (shipped, public):
        with tempfile.TemporaryDirectory() as folder:
            workload = make(Path(folder))
            networks: dict[str, Network] = {"eager": TorchNetwork(workload.eager), "ours": backends.load(workload.bundle, request)}
            steps = {name: stepper(net, workload, batch, request.thread_count, turns + 2) for name, net in networks.items()}
            first = {name: step() for name, step in steps.items()}
            error = np.linalg.norm(first["ours"] - first["eager"]) / np.linalg.norm(first["eager"])
            times: dict[str, list[float]] = {name: [] for name in steps}
            for _ in range(turns):
                for name in random.sample(list(steps), len(steps)):
                    begin = time.perf_counter()
                    steps[name]()
                    times[name].append(time.perf_counter() - begin)
        ratio, low, high = interval(times["eager"], times["ours"])
        medians = {name: 1e3 * float(np.median(values)) for name, values in times.items()}
        print(
            f"| {workload.name}, batch {batch} | {medians['eager']:.0f} | {medians['ours']:.0f} | "
            f"{ratio:.2f}× ({low:.2f} to {high:.2f}) | {error:.1e} |"
        )


if __name__ == "__main__":
    app = App(help=__doc__)
    app.default(main)
    app()
