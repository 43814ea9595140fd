"""What a run can be told, and what users give for it, checked."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypedDict

from sr3rt.bundle import Consistency
from sr3rt.engine import Noise
from sr3rt.errors import OptionError

OnStep = Callable[[int, int, Callable[[], Any]], bool | None]
"""`on_step(step, steps, preview)`: rows done so far (from 1) and in all, over every picture of the call; `preview()` makes the picture
predicted so far, as the call would return it (for a list: a list, None for pictures that have not begun), and is to be called before
`on_step` returns, from any thread. Returning False cancels."""


Tile = int | Literal["auto", "off"]
"""Side of the windows that a picture is refined in, pixels of the result; "off": whole; "auto": whole where that is possible."""


class Method(TypedDict, total=False):
    """How pictures are refined, whatever the number of steps; `Upscaler.run` says what each means."""

    sampler: str | None
    schedule: str | Sequence[float] | None
    consistency: Consistency | None


class _Common(Method, total=False):
    seed: int | Sequence[int] | None
    tile: Tile
    on_step: OnStep | None


class Options(_Common, total=False):
    """What a run can be told; `Upscaler.run` says what each means."""

    steps: int | None
    noise: Noise | None


class CascadeOptions(_Common, total=False):
    """What a run of several models can be told; `Cascade.run` says what each means."""

    steps: int | Sequence[int | None] | None


def seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed for each picture, drawn where None was given. Raises OptionError."""
    if seed is None:
        return [int.from_bytes(os.urandom(4)) for _ in range(count)]
    try:
        given: list[Any] = [operator.index(seed)] * count  # type: ignore[arg-type]
    except TypeError:
        given = list(seed) if isinstance(seed, Iterable) else [seed] * count
    if len(given) != count:
        raise OptionError(f"{len(given)} seeds for {count} pictures: give one, or one for each")
    found = [whole(one, "seed") for one in given]
    for one in found:
        if not 0 <= one < 2**64:
            raise OptionError(f"seed must be a whole number from 0 to 2**64 - 1, found {one!r}")
    return found


def whole(value: Any, name: str, expected: str = "a whole number") -> int:
    """Raises OptionError for what is no whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise OptionError(f"{name} must be {expected}, found {value!r}") from None


def gammas(values: Iterable[float]) -> tuple[float, ...]:
    """Raises OptionError for what are no numbers."""
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        found = ()
    if not found:
        raise OptionError(f"schedule must be None, 'n_timestep' or gammas between 0 and 1, at least one, found {values!r}")
    return found
