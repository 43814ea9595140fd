"""What a run gives: the picture, and what makes it again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from sr3rt.bundle import Consistency


@dataclass(frozen=True, eq=False)
class Result:
    """A picture and how it was made: seed to tile, given to `Upscaler.run`, make it again.

    bundle: its SHA-256. precision: of the network, fp32, fp16 or bf16; given to `load`, it makes the very same picture. before: of a
    `Cascade`, the stage whose picture this one was made from.
    """

    image: Any = field(repr=False)
    seed: int
    steps: int
    sampler: str
    schedule: str | tuple[float, ...] | None
    consistency: Consistency
    tile: int | Literal["off"]
    bundle: str
    precision: str
    before: Result | None = None

    @property
    def provenance(self) -> dict[str, str]:
        """Text fields for the picture's file; of the stage before they are called sr3rt:before:…"""
        fields = {
            "bundle": self.bundle,
            "seed": str(self.seed),
            "steps": str(self.steps),
            "sampler": self.sampler,
            "consistency": self.consistency,
            "precision": self.precision,
        }
        if self.schedule is not None:
            fields["schedule"] = self.schedule if isinstance(self.schedule, str) else json.dumps(self.schedule)
        if self.tile != "off":
            fields["tile"] = str(self.tile)
        if self.before:
            fields |= {f"before:{name.removeprefix('sr3rt:')}": text for name, text in self.before.provenance.items()}
        return {f"sr3rt:{name}": text for name, text in fields.items()}
