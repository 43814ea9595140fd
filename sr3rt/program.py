"""A bundle's network.json (docs/program.md), read: what every backend that runs it must have found to be there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
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
def opened(bundle: Bundle) -> Iterator[tuple[Program, Weights]]:
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


def last_used(operations: Sequence[Program], kept: Iterable[str]) -> list[set[str]]:
    """For each operation, the registers that no later one reads and that are not to be kept."""
    found, later = list[set[str]](), {*kept}
    for one in reversed(operations):
        used = {*registers_read(one), one["to"]}
        found.append(used - later)
        later |= used
    return found[::-1]


def still_registers(operations: Iterable[Program]) -> set[str]:
    """Those that are made of x alone: what they hold stays the same while x does. x itself is not among them."""
    still = set[str]()
    for operation in operations:
        if operation.get("level") is None and {*registers_read(operation)} <= still | {"x"}:
            still.add(operation["to"])
    return still


@dataclass(frozen=True)
class Parts:
    """A program's operations in two: those `once` for each x and those of every `step`. given: what these read of the others, sorted."""

    once: Sequence[Program]
    step: Sequence[Program]
    given: Sequence[str]


def parts(operations: Sequence[Program]) -> Parts | None:
    """The operations in two; None where nothing that takes long depends on x alone."""
    still = still_registers(operations)
    once = [one for one in operations if one["to"] in still]
    step = [one for one in operations if one["to"] not in still]
    if "out" in still or not any(one["do"] == "convolution" for one in once):
        return None
    return Parts(once, step, sorted({name for one in step for name in registers_read(one)} & still))


def given_registers(bundle: Bundle) -> dict[str, Register]:
    """What a bundle's program, where it is in two, gives to every step. Raises BundleCorrupt."""
    with opened(bundle) as (program, weights):
        apart = parts(program["operations"])
        found = registers(program["operations"], weights, bundle.manifest.channels)
        return {name: found[name] for name in (apart.given if apart else ())}


@dataclass(frozen=True)
class Register:
    """channels: how many. side: its height and width, as a part of x's."""

    channels: int
    side: Fraction

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H, W) for an x of that height and width, multiples of the network's stride."""
        return self.channels, int(height * self.side), int(width * self.side)


def registers(operations: Iterable[Program], weights: Weights, channels: int) -> dict[str, Register]:
    """All, by name, where x and y have so many channels. Raises KeyError for a name that is not known."""
    found = dict.fromkeys(("x", "y"), Register(channels, Fraction(1)))
    for one in operations:
        found[one["to"]] = _written(one, found[one["from"][0]], weights)
    return found


def _written(operation: Program, first: Register, weights: Weights) -> Register:
    """What an operation makes of registers of which `first` is the first."""
    channels, side = first.channels, first.side
    match operation["do"]:
        case "convolution":
            channels, side = weights.shape(operation["weight"])[0], side * _TIMES[operation["resample"]] / operation["stride"]
        case "resample":
            side *= _TIMES[operation["by"]]
        case "attention":
            channels //= 3
        case "unshuffle":
            channels, side = channels * operation["by"] ** 2, side / operation["by"]
        case "to_bands":
            channels, side = channels * 7, side / 2
    return Register(channels, side)


_TIMES = {None: Fraction(1), "up": Fraction(2), "down": Fraction(1, 2)}


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
