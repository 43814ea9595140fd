"""Programs of one operation (docs/program.md), bundles of nothing else, and a call of what runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny

from sr3rt import backends, safetensors
from sr3rt.backends import Floats
from sr3rt.bundle import PROGRAM, WEIGHTS, Bundle, write_manifest, writing

Program = dict[str, Any]
Tensors = dict[str, Floats]
LEVEL = {"input": "level", "scale": 1.0, "frequencies": "f", "layers": [], "silu": False}


def convolution(**changes: Any) -> Program:
    """From x and y to the result, in one operation."""
    plain = {
        "norm": None,
        "silu": False,
        "resample": None,
        "bias": None,
        "stride": 1,
        "level": None,
        "after": None,
        "add": None,
        "gain": 1.0,
    }
    return {"do": "convolution", "from": ["x", "y"], "to": "out", "weight": "w", **plain, **changes}


def bands(way: str, to: str, *sources: str, detail: float = 1.0) -> Program:
    return {"do": f"{way}_bands", "from": list(sources), "to": to, "detail": detail}


def program(*operations: Program, **changes: Any) -> Program:
    return {"format": 3, "level": LEVEL, "operations": list(operations), **changes}


def random(*shape: int) -> Floats:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def tensors() -> Tensors:
    return {
        "f": random(2),
        "w": random(3, 6, 3, 3),
        "w1": random(3, 3, 1, 1),
        "b": random(3),
        "six": random(6),
        "level": random(3, 4),
        "w6": random(3, 6),
    }


def bundle_in(folder: Path) -> Callable[..., Bundle]:
    """`make(program, **facts)`: a bundle that has only that, of pictures with three channels; `facts` of its manifest."""

    def make(program: Program, **facts: Any) -> Bundle:
        with writing(folder / "bundle", overwrite=True) as made:
            (made / PROGRAM).write_text(json.dumps(program))
            safetensors.write(made / WEIGHTS, tensors())
            write_manifest(made, replace(tiny.manifest(), **facts))
        return Bundle.open(folder / "bundle")

    return make


def run(network: backends.Network, x: Floats, y: Floats, level: Floats) -> Floats:
    out = np.full_like(y, np.nan)
    network.bind(x, y, level, out)()
    return out
