"""Does the exported network do what the checkpoint's does? Both are driven by the same loop with the same noise, and compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sr3rt.backends import Network
from sr3rt.bundle import Manifest
from sr3rt.engine import Engine, Job
from sr3rt.errors import ParityError
from sr3rt.export.progress import Progress
from sr3rt.noise import normals
from sr3rt.samplers import Sampler, levels, table
from sr3rt.schedule import Schedule, respace

Floats = NDArray[np.float32]

STEPS = 10  # of the trajectory that is compared
LARGE = 100_000_000  # parameters from which on a network is slow enough to be tried on less


@dataclass(frozen=True)
class Limits:
    """What an exported network may differ by. ε: largest |difference| over the reference's largest value; picture: in [-1, 1] units."""

    net: float = 2e-5
    picture: float = 1e-3


def measure(
    reference: Network,
    exported: Network,
    manifest: Manifest,
    *,
    limits: Limits | None = None,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    against: str = "eager float32 PyTorch",
    required: bool = True,
    progress: Progress = lambda text: None,
) -> dict[str, Any]:
    """Compare at five noise levels, batches of 1 and 3 (mixed levels), square and not, and over a run of 10 steps.

    shapes: (batch, height, width) to compare at instead, the run at the first's height and width. against: what `reference` is. required:
    whether to raise what is beyond the limits, which the figures show in any case.
    Every shape is tried at every level; of a large network the first shape is, the others at the middle one.

    Returns figures for the manifest's `parity`. Raises ParityError, naming the worst figure and where it was found.
    """
    limits = limits or Limits()
    side = max(32, 2 * manifest.stride)
    side -= side % manifest.stride
    shapes = shapes or ((1, side, side), (3, side, side), (1, side, 2 * side), (3, 2 * side, side))
    trained = manifest.trained.schedule()
    rows, worst = [], 0.0
    indices = sorted({0, len(trained) // 20, len(trained) // 4, len(trained) // 2, len(trained) - 1})
    for batch, height, width in shapes:
        progress(f"comparing the network at {batch}×{height}×{width}")
        few = manifest.parameters >= LARGE and (batch, height, width) != shapes[0]
        for index in [indices[len(indices) // 2]] if few else indices:
            x, y, level = _inputs(manifest, trained, index, (batch, height, width))
            expected, found = _run(reference, x, y, level), _run(exported, x, y, level)
            error = float(np.abs(found - expected).max() / max(1e-6, np.abs(expected).max()))
            error = error if np.isfinite(error) else float("inf")
            worst = max(worst, error)
            rows.append({"t": index, "shape": [batch, height, width], "error": error})
            if required and error > limits.net:
                raise ParityError(
                    f"the exported network differs from {against} by {error:.2g} of its largest value at timestep {index}, batch "
                    f"{batch}, {height}×{width}; expected at most {limits.net:.2g}. Nothing was written"
                )
    progress(f"comparing a run of {STEPS} steps")
    difference, psnr = _trajectory(reference, exported, manifest, trained, shapes[0][1:])
    if required and not difference <= limits.picture:
        raise ParityError(
            f"after {STEPS} steps the exported network's picture differs from {against}'s by {difference:.2g}, expected at most "
            f"{limits.picture:.2g} (pictures are in [-1, 1]). Nothing was written"
        )
    return {
        "against": against,
        "net": {"worst": worst, "limit": limits.net, "unit": "largest |difference| / largest |value|", "rows": rows},
        "picture": {"worst": difference, "limit": limits.picture, "psnr": psnr, "unit": "largest |difference|, [-1, 1]", "steps": STEPS},
    }


def _inputs(manifest: Manifest, trained: Schedule, index: int, shape: tuple[int, int, int]) -> tuple[Floats, Floats, Floats]:
    """x: smooth pictures; y: the same with noise; level. The first of the batch is at timestep `index`, the others at others."""
    batch, height, width = shape
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32) / 16
    waves = [np.sin(rows * (c + 1) + b) * np.cos(columns * 0.7 + c) for b in range(batch) for c in range(manifest.channels)]
    x = np.stack(waves).reshape(batch, manifest.channels, height, width)
    z = np.stack([normals(x.shape[1:], seed=b, step=index) for b in range(batch)])
    picks = [(index + b * len(trained) // batch) % len(trained) for b in range(batch)]
    gamma = trained.gammas[picks][:, None, None, None]
    y = (np.sqrt(gamma) * x + np.sqrt(1 - gamma) * z).astype(np.float32)
    return x, y, levels(trained, manifest.level)[picks][:, None].astype(np.float32)


def _run(network: Network, x: Floats, y: Floats, level: Floats) -> Floats:
    out = np.full_like(y, np.nan)
    network.bind(x, y, level, out)()
    return out


def _trajectory(reference: Network, exported: Network, manifest: Manifest, trained: Schedule, size: tuple[int, int]) -> tuple[float, float]:
    """Of the two pictures after a run: largest |difference|, and PSNR in dB with a range of 2 (200 where they are equal)."""
    rows = table(Sampler("posterior"), respace(trained, min(STEPS, len(trained))), prediction=manifest.prediction, level=manifest.level)
    x, _, _ = _inputs(manifest, trained, len(trained) - 1, (1, *size))
    pictures = []
    for network in (reference, exported):
        engine = Engine(network, capacity=1, channels=manifest.channels, height=size[0], width=size[1])
        engine.join(Job(x[0], rows, seed=1))
        while not (ended := engine.step()):
            pass
        pictures.append(ended[0].picture())
    difference = pictures[0].astype(np.float64) - pictures[1]
    return float(np.abs(difference).max()), -10 * math.log10(max(1e-20, float(np.mean(difference**2)) / 4))
