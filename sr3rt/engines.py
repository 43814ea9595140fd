"""What decides whether a TensorRT engine may run: its key, and why one is refused.

An engine is machine code for one network, one shape, one TensorRT and a kind of GPU; another TensorRT may refuse it, crash, or answer
wrongly. So nothing hands an engine to TensorRT before its key was compared with the network and the machine at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

PORTABLE = "portable"
"""Capability of engines that are finished on the GPU that loads them (TensorRT for RTX, built without naming a GPU)."""

MEANING = {
    "onnx_sha256": "network",
    "part": "part of the network",
    "precision": "precision",
    "batch": "batch size",
    "height": "height",
    "width": "width",
    "flavour": "TensorRT flavour",
    "version": "TensorRT version",
    "capability": "GPU (compute capability)",
    "driver": "driver's major version",
    "opt_level": "optimisation level",
}


@dataclass(frozen=True)
class EngineKey:
    """onnx_sha256: of the graph it was built from. part: of the network, as in sr3rt.bundle.GRAPHS.

    batch, height, width: its one shape, pictures and pixels.

    flavour: the module, tensorrt or tensorrt_rtx. capability: as "9.0", or "portable". driver: major version; None where it was built
    without one, or does not matter. opt_level: the builder's, None for its default.
    """

    onnx_sha256: str
    precision: str
    batch: int
    height: int
    width: int
    flavour: str
    version: str
    capability: str = PORTABLE
    driver: int | None = None
    opt_level: int | None = None
    part: str = "whole"

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> EngineKey:
        """From JSON. Raises TypeError or ValueError for fields that are missing, unknown, or of the wrong type."""
        key = cls(**content)
        for item in fields(key):
            value: Any = getattr(key, item.name)
            kind = str if item.type == "str" else int
            if not (type(value) is kind or (value is None and "None" in str(item.type))):
                raise ValueError(f"an engine's {item.name} is {value!r}")
        return key

    @property
    def name(self) -> str:
        """The engine's file in a bundle."""
        level = "" if self.opt_level is None else f"-o{self.opt_level}"
        where = "" if self.capability == PORTABLE else f"-sm{self.capability.replace('.', '')}"
        part = "" if self.part == "whole" else f"-{self.part}"
        return f"{self.precision}{part}-{self.batch}x{self.height}x{self.width}{level}{where}.{self.flavour}.plan"

    def difference(self, here: EngineKey) -> str | None:
        """Why it may not run where `here` may: the first field that differs. None when it may."""
        wanted = asdict(here)
        for name, found in asdict(self).items():
            expected = wanted[name]
            anything = (name == "capability" and found == PORTABLE) or (name == "driver" and None in (found, expected))
            if found != expected and not anything:
                return f"the engine {self.name} is of another {MEANING[name]}: found {_short(found)}, expected {_short(expected)}"
        return None


def command(keys: Sequence[EngineKey], *, bundle: object, rebuild: bool = False) -> str:
    """What builds engines of those shapes, of one precision and optimisation level. rebuild: also where the bundle has them."""
    first = keys[0]
    batches = ",".join(str(batch) for batch in sorted({key.batch for key in keys}))
    sizes = ",".join(f"{h}" if h == w else f"{h}x{w}" for h, w in sorted({(key.height, key.width) for key in keys}))
    level = "" if first.opt_level is None else f" --opt-level {first.opt_level}"
    again = " --rebuild" if rebuild else ""
    return f"python -m sr3rt.export.to_trt {bundle} --batch {batches} --size {sizes} --precision {first.precision}{level}{again}"


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text
