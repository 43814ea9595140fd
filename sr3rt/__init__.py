"""sr3rt runs trained SR3 super-resolution models (arXiv 2104.07636) in production, without torch.

    import sr3rt
    sr3rt.save(sr3rt.upscale("small.png"), "large.png")  # with the small model that ships

    up = sr3rt.load("bundle/")                          # your own, exported with  sr3rt export ckpt.pth
    large = up.upscale(image, steps=25, seed=7)

Nothing heavy is imported until it is needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sr3rt.errors import (
    BackendError,
    BundleCorrupt,
    BundleError,
    BundleIncompatible,
    BundleNotFound,
    Cancelled,
    CheckpointError,
    DeadlineExceeded,
    EngineRefused,
    ImageError,
    ImageTooLarge,
    MissingExtra,
    NonFiniteError,
    OptionError,
    Overloaded,
    ParityError,
    ServingError,
    SR3Error,
    Stopped,
)

if TYPE_CHECKING:
    from sr3rt.api import upscale
    from sr3rt.cascade import Cascade
    from sr3rt.decoding import Limits
    from sr3rt.images import ImageLike
    from sr3rt.options import OnStep
    from sr3rt.result import Result
    from sr3rt.saving import save
    from sr3rt.schedule import ScheduleWarning
    from sr3rt.upscaler import Upscaler, load

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BundleCorrupt",
    "BundleError",
    "BundleIncompatible",
    "BundleNotFound",
    "Cancelled",
    "Cascade",
    "CheckpointError",
    "DeadlineExceeded",
    "EngineRefused",
    "ImageError",
    "ImageLike",
    "ImageTooLarge",
    "Limits",
    "MissingExtra",
    "NonFiniteError",
    "OnStep",
    "OptionError",
    "Overloaded",
    "ParityError",
    "Result",
    "SR3Error",
    "ScheduleWarning",
    "ServingError",
    "Stopped",
    "Upscaler",
    "load",
    "save",
    "upscale",
]

_AT = {
    "Cascade": "sr3rt.cascade",
    "Limits": "sr3rt.decoding",
    "ImageLike": "sr3rt.images",
    "OnStep": "sr3rt.options",
    "Result": "sr3rt.result",
    "ScheduleWarning": "sr3rt.schedule",
    "Upscaler": "sr3rt.upscaler",
    "load": "sr3rt.upscaler",
    "save": "sr3rt.saving",
    "upscale": "sr3rt.api",
}


def __getattr__(name: str) -> Any:
    if name in _AT:
        return getattr(import_module(_AT[name]), name)
    if name == "_native":
        try:
            return import_module("sr3rt._native")
        except ModuleNotFoundError:
            raise ImportError(
                f"the sr3rt in {__path__[0]} is a checkout without its compiled part: run  pip install -e .  there, or leave that folder"
            ) from None
    raise AttributeError(f"module 'sr3rt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
