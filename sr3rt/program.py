"""A bundle's network.json (docs/program.md), read: what every backend that runs it must have found to be there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sr3rt.bundle import PROGRAM, WEIGHTS, Bundle
from sr3rt.errors import BundleCorrupt
from sr3rt.safetensors import Weights

FORMAT = 3
LIFT = (  # of the wavelet: predict, update, predict; each step's taps from the nearest pair of neighbours outwards
    (-0.25449, 0.07703, -0.05229, 0.02829),
    (0.4592, -0.14136, 0.09, -0.05147),
    (-0.270539, 0.08357, -0.05346, 0.03101),
)
GAIN = 0.98704  # of its low band, which makes the transform nearly orthonormal
Program = Mapping[str, Any]
Tensors = Mapping[str, NDArray[np.float32]]

_KEYS = {
    "convolution": {"from", "to", "norm", "silu", "resample", "weight", "bias", "stride", "level", "after", "add", "gain"},
    "resample": {"from", "to", "by"},
    "attention": {"from", "to"},
    "unshuffle": {"from", "to", "by"},
    "to_bands": {"from", "to", "detail"},
    "from_bands": {"from", "to", "detail"},
}


@contextmanager
def opened(bundle: Bundle) -> Iterator[tuple[Program, Tensors]]:
    """The program and its tensors, which are read when they are asked for, in the block.

    Raises BundleCorrupt; KeyError, TypeError and ValueError of the block become that, being due to the program.
    """
    try:
        program = json.loads(bundle.read(PROGRAM))
        with bundle.open_file(WEIGHTS) as stream:
            yield program, Weights(stream)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise BundleCorrupt(f"{bundle.path / PROGRAM} is not a program of format {FORMAT}: {error!r}. Export the bundle again") from error


def check(program: Program) -> None:
    """Raises KeyError, TypeError or ValueError for a format, an operation, a key or a register that is not known, missing or too many."""
    if program["format"] != FORMAT:
        raise ValueError(f"format {program['format']!r}, expected {FORMAT}")
    _expect(program, "format", "level", "operations")
    level = program["level"]
    _expect(level, "input", "scale", "frequencies", "layers", "silu")
    if level["input"] not in ("level", "log_sigma"):
        raise ValueError(f"a level from {level['input']!r}, expected level or log_sigma")
    for layer in level["layers"]:
        _expect(layer, "weight", "bias")
    written = {"x", "y"}
    for operation in program["operations"]:
        _check_operation(operation)
        for name in registers_read(operation):
            if name not in written:
                raise KeyError(name)
        if operation["to"] in written:
            raise ValueError(f"register {operation['to']!r} is written twice")
        written.add(operation["to"])
    if "out" not in written:
        raise KeyError("out")


def registers_read(operation: Program) -> list[str]:
    """By name, those that an operation reads."""
    return [*operation["from"], *filter(None, [operation.get("add")])]


def still_registers(operations: Iterable[Program]) -> set[str]:
    """Those that are made of x alone: what they hold stays the same while x does. x itself is not among them."""
    still = set[str]()
    for operation in operations:
        if operation.get("level") is None and {*registers_read(operation)} <= still | {"x"}:
            still.add(operation["to"])
    return still


def _check_operation(operation: Program) -> None:
    kind = operation["do"]
    if kind not in _KEYS or set(operation) != _KEYS[kind] | {"do"}:
        raise ValueError(f"the operation {kind!r} with {sorted(operation)} is not known")
    if kind == "convolution" and operation["norm"] is not None:
        _expect(operation["norm"], "groups", "eps", "weight", "bias")
        if operation["norm"]["groups"] < 1:
            raise ValueError(f"a norm of {operation['norm']['groups']} groups")
    if kind == "convolution" and operation["level"] is not None:
        _expect(operation["level"], "weight", "bias", "kind")


def _expect(found: Program, *keys: str) -> None:
    if set(found) != set(keys):
        raise ValueError(f"found the keys {sorted(found)}, expected {sorted(keys)}")
