"""A bundle whose network takes no time: out = 0.3·y + 0.5·x + 0.1·level (data/README.md)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sr3rt.bundle import Defaults, Manifest, write_manifest, writing
from sr3rt.schedule import ScheduleSpec

NETWORK = Path(__file__).parent / "data" / "tiny.onnx"


def manifest(**changes: Any) -> Manifest:
    """A manifest that uses every kind of field, with `changes`."""
    fields: dict[str, Any] = {
        "name": "tiny",
        "architecture": "sum",
        "parameters": 3,
        "channels": 3,
        "scale": 4,
        "stride": 8,
        "prediction": "x0",
        "level": "sqrt_gamma",
        "trained": ScheduleSpec("linear", 100, 1e-4, 0.2),
        "defaults": Defaults(3, "ddim(0.5)", "final", ScheduleSpec("gammas", gammas=(0.9, 0.5, 0.01))),
        "bytes_per_pixel": 60,
        "attention_stride": 4,
        "parity": {"against": "nothing", "net": {"worst": 1.25e-7, "limit": 2e-5, "unit": "share", "rows": [{"t": 0}]}},
        "source": {"checkpoint_sha256": "ab" * 32, "assumptions": ["groups: one of [1, 2]", "[bold]none[/bold]"]},
    }
    return Manifest(**{**fields, **changes})


def write(target: Path, *, overwrite: bool = False, **changes: Any) -> Path:
    """Write the bundle to `target`, and return it."""
    with writing(target, overwrite=overwrite) as folder:
        shutil.copy(NETWORK, folder / "network.onnx")
        write_manifest(folder, manifest(**changes))
    return target
