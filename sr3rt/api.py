"""`sr3rt.upscale`: load and upscale in one call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, Unpack

from sr3rt.backends import Request
from sr3rt.bundle import Bundle
from sr3rt.images import ImageLike
from sr3rt.options import Options
from sr3rt.upscaler import SHIPPED, Upscaler, load


@lru_cache(maxsize=2)
def _loaded(model: Path, manifest: str, request: Request, rerun: bool) -> Upscaler:
    """`manifest`, the digest, makes a bundle that was replaced a different one."""
    return load(model, backend=request.backend, precision=request.precision, device=request.device, rerun=rerun)


_LOADING = Lock()  # or each of the threads that come first would load the model


def _forked() -> None:
    """In a new process, whose parent may have been loading."""
    global _LOADING  # noqa: PLW0603
    _LOADING = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def upscale(
    image: ImageLike | Sequence[ImageLike],
    *,
    model: str | os.PathLike[str] | None = None,
    backend: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    rerun: bool = False,
    **options: Unpack[Options],
) -> Any:
    """`load(model, …).upscale(image, …)` in one call; the two most recently used models stay loaded. Options: `Upscaler.run`."""
    path = (SHIPPED if model is None else Path(model)).absolute()
    request = Request(backend, precision, device)
    with _LOADING:
        up = _loaded(path, Bundle.open(path).sha256, request, rerun)
    return up.upscale(image, **options)
