"""What an engine must answer when it is loaded: engines that give zeros, and no error, exist.

The exporter writes `golden.json` into the bundle: for each engine, by file name, `SAMPLES` values of the float32 network's output, evenly
spaced over the flattened (B, C, H, W), for the inputs that `inputs` makes. They need no file: noise is a function of place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sr3rt.backends import Floats, Network
from sr3rt.bundle import Manifest
from sr3rt.engines import EngineKey
from sr3rt.noise import normals
from sr3rt.samplers import levels

SAMPLES = 64
LIMITS = {"fp32": 1e-3, "fp16": 3e-2}
"""Largest |difference| over the largest |value| of the samples, by precision: well over rounding, well under any mistake."""


def answer(network: Network, manifest: Manifest, batch: int, height: int, width: int) -> Floats:
    """The `SAMPLES` values that the network gives for one shape."""
    x, y, level = inputs(manifest, batch, height, width)
    out = np.full_like(y, np.nan)
    network.bind(x, y, level, out)()
    return out.reshape(-1)[np.linspace(0, out.size - 1, SAMPLES).astype(np.int64)]


def inputs(manifest: Manifest, batch: int, height: int, width: int) -> tuple[Floats, Floats, Floats]:
    """x, y (B, C, H, W) and level (B, 1): every picture other noise, at another of the trained levels."""
    shape = (manifest.channels, height, width)
    x = np.stack([np.tanh(normals(shape, seed=i, step=0)) for i in range(batch)])
    y = np.stack([normals(shape, seed=i, step=1) for i in range(batch)])
    trained = levels(manifest.trained.schedule(), manifest.level)
    picks = [(2 * i + 1) * len(trained) // (2 * batch) for i in range(batch)]
    return x, y, trained[picks][:, None].astype(np.float32)


def difference(network: Network, manifest: Manifest, key: EngineKey, expected: Sequence[float]) -> str | None:
    """How a loaded engine's answer differs by more than rounding, or None."""
    found, wanted = answer(network, manifest, key.batch, key.height, key.width), np.asarray(expected, np.float32)
    error = float(np.abs(found - wanted).max() / np.abs(wanted).max()) if found.shape == wanted.shape else float("nan")
    if error <= LIMITS[key.precision]:
        return None
    return f"it differs from what the bundle says by {error:.2g} of the largest value, expected at most {LIMITS[key.precision]:.2g}"
