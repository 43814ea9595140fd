"""The `parameters` of a model's config.pbtxt."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

from sr3rt.errors import OptionError
from sr3rt.serving.service import Settings


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What an operator sets; all are text in config.pbtxt, empty: the default.

    bundle: path; the small 4× model that ships when not given. backend, precision, device, threads: as `sr3rt.load` takes them.
    max_requests, max_pixels: taken on at a time, the pixels being those of the results. max_file_bytes: of a picture file.
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
            joins=self.joins,  # type: ignore[arg-type] # checked by Batcher
        )


def _whole(key: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise OptionError(f"config.pbtxt: {key} must be a whole number, found {text!r}") from None
