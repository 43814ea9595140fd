"""What a request may ask for: named values of a few plain types, as they come over a wire, to a checked `Query`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from sr3rt.bundle import Consistency
from sr3rt.errors import OptionError

Format = Literal["png", "jpeg", "webp", "pixels"]


@dataclass(frozen=True, kw_only=True)
class Query:
    """How one picture is to be upscaled and given back.

    steps, sampler, schedule, consistency, seed: as in `Upscaler.run`; not given: the bundle's own, a random seed.
    priority: higher goes first. timeout_ms: until the answer, waiting included. format: of the result, "pixels" being uint8 (height,
    width, channels); not given: as it came, an encoded picture as PNG. base64: encoded pictures are Base64 text, in and out.
    previews: a picture every so many steps where progress is told; 0: none.
    """

    steps: int | None = None
    sampler: str | None = None
    schedule: str | None = None
    consistency: Consistency | None = None
    seed: int | None = None
    priority: int = 0
    timeout_ms: float | None = None
    format: Format | None = None
    base64: bool = False
    previews: int = 0

    @classmethod
    def parse(cls, parameters: Mapping[str, Any]) -> Query:
        """From a request's parameters; numbers may be text. Raises OptionError, naming the parameter."""
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in parameters if name not in known]:
            raise OptionError(f"unknown parameter {unknown[0]!r}: expected {', '.join(known)}")
        query = cls(**{name: _READ[name](name, value) for name, value in parameters.items()})
        if query.timeout_ms is not None and query.timeout_ms <= 0:
            raise OptionError(f"timeout_ms must be positive, found {query.timeout_ms:g}")
        if query.previews < 0:
            raise OptionError(f"previews must be 0 (none) or more, found {query.previews}")
        return query


def _whole(name: str, value: Any) -> int:
    try:
        number = int(value) if isinstance(value, int | str) and not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None or not -(2**64) < number < 2**64:
        raise OptionError(f"{name} must be a whole number, found {_shown(value)}")
    return number


def _number(name: str, value: Any) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise OptionError(f"{name} must be a number, found {_shown(value)}")
    return number


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise OptionError(f"{name} must be text, found {_shown(value)}")
    return value


def _yes(name: str, value: Any) -> bool:
    if value not in (True, False, "true", "false"):
        raise OptionError(f"{name} must be true or false, found {_shown(value)}")
    return value in (True, "true")


def _one_of(*names: str) -> Any:
    def read(name: str, value: Any) -> str:
        if value not in names:
            raise OptionError(f"{name} must be one of {', '.join(names)}, found {_shown(value)}")
        return str(value)

    return read


def _shown(value: Any) -> str:
    return repr(value)[:80]


_READ: dict[str, Any] = {
    "steps": _whole,
    "sampler": _text,
    "schedule": _one_of("n_timestep"),
    "consistency": _one_of(*get_args(Consistency)),
    "seed": _whole,
    "priority": _whole,
    "timeout_ms": _number,
    "format": _one_of(*get_args(Format)),
    "base64": _yes,
    "previews": _whole,
}
