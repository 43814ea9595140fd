"""The `parameters` of a model's config.pbtxt."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any, get_args

from sr3rt.backends import PRECISIONS, Request
from sr3rt.errors import OptionError
from sr3rt.serving.batcher import Joins
from sr3rt.serving.service import Settings

_LEAST = {"slots": 1, "slot_pixels": 1, "max_requests": 1, "max_pixels": 1, "max_file_bytes": 1, "drain_s": 0}


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What an operator sets; all are text in config.pbtxt, empty: the default. Raises OptionError for what makes no sense.

    bundle: path; the small 4× model that ships when not given. backend, precision, device, threads: as `sr3rt.load` takes them.
    max_requests, max_pixels: taken on at a time, the pixels being those of the results and previews. max_file_bytes: of a picture file.
    slots: most pictures in one network call. slot_pixels: most in running pictures together. drain_s: to finish in when unloaded.
    joins: "batch" lets requests join only when all are done; for comparison. core: the name of the model that holds the weights.
    """

    bundle: str = ""
    backend: str = "auto"
    precision: str = "auto"
    device: str = "auto"
    threads: int = 0
    slots: int = Settings.slots
    slot_pixels: int = Settings.slot_pixels
    max_requests: int = Settings.requests
    max_pixels: int = Settings.pixels
    max_file_bytes: int = 2**24
    drain_s: int = 30
    joins: str = "step"
    core: str = "sr3_stream"

    def __post_init__(self) -> None:
        Request(self.backend, self.precision, self.device, self.threads)  # which checks them
        if self.precision not in PRECISIONS:
            raise OptionError(f"unknown precision {self.precision!r}: expected {', '.join(PRECISIONS)}")
        for name, least in _LEAST.items():
            found = getattr(self, name)
            if type(found) is not int or found < least:
                raise OptionError(f"{name} must be a whole number from {least} on, found {found!r}")
        if self.joins not in get_args(Joins):
            raise OptionError(f"joins must be one of {', '.join(get_args(Joins))}, found {self.joins!r}")

    @classmethod
    def read(cls, model_config: str) -> Configuration:
        """From the JSON that Triton gives a model. Raises OptionError."""
        given = {key: value["string_value"] for key, value in json.loads(model_config).get("parameters", {}).items()}
        known = {field.name: field.default for field in fields(cls)}
        values: dict[str, Any] = {}
        for key, text in given.items():
            if key not in known:
                raise OptionError(f"config.pbtxt: unknown parameter {key!r}: expected {', '.join(known)}")
            if text:
                values[key] = _whole(key, text) if isinstance(known[key], int) else text
        return cls(**values)

    @property
    def settings(self) -> Settings:
        """The service's part."""
        return Settings(
            slots=self.slots,
            slot_pixels=self.slot_pixels,
            requests=self.max_requests,
            pixels=self.max_pixels,
            joins=self.joins,  # type: ignore[arg-type] # checked above
        )


def _whole(key: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise OptionError(f"config.pbtxt: {key} must be a whole number, found {text!r}") from None
