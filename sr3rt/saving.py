"""Results to files: whole or not at all, with where they came from written into those formats that have a place for it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sr3rt.errors import ImageError

__all__ = ["SUFFIXES", "save", "write_atomic"]

# Suffix: Pillow's format, and the modes that the format gives back as they were.
_COLOUR = ("L", "LA", "RGB", "RGBA")
SUFFIXES: dict[str, tuple[str, tuple[str, ...]]] = {
    ".png": ("PNG", (*_COLOUR, "I;16")),
    ".jpg": ("JPEG", ("L", "RGB")),
    ".jpeg": ("JPEG", ("L", "RGB")),
    ".webp": ("WEBP", _COLOUR),
    ".bmp": ("BMP", ("L", "RGB")),
    ".tif": ("TIFF", (*_COLOUR, "I;16", "F")),
    ".tiff": ("TIFF", (*_COLOUR, "I;16", "F")),
    ".ppm": ("PPM", ("L", "RGB", "I;16")),
    ".pgm": ("PPM", ("L", "I;16")),
}

QUALITY = 95  # of JPEG (without chroma subsampling) and WebP, the lossy formats
_IMAGE_DESCRIPTION = 270  # TIFF 6.0, page 34


def save(image: Image.Image, path: str | os.PathLike[str], *, provenance: dict[str, str] | None = None) -> None:
    """Write a PIL image in the format that the suffix names, with its ICC profile and without EXIF data.

    `provenance` goes into a PNG as text chunks, one per key (keys: 1 to 79 Latin-1 characters), into a JPEG's comment and a
    TIFF's ImageDescription as JSON; WebP, BMP and PPM have no place for it. The file appears whole or not at all.

    Raises ImageError where the format cannot hold the picture or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ImageError(f"{path}: the suffix {path.suffix!r} names no format; expected one of {', '.join(SUFFIXES)}")
    kind, modes = SUFFIXES[path.suffix.lower()]
    if image.mode not in modes:
        fitting = ", ".join(suffix for suffix, (_, others) in SUFFIXES.items() if image.mode in others)
        raise ImageError(f"{path}: {kind} cannot hold a picture of mode {image.mode}; write it as {fitting or 'another mode'}")
    encoded = io.BytesIO()
    try:
        image.save(encoded, kind, icc_profile=image.info.get("icc_profile"), **_options(kind, provenance))
    except (OSError, ValueError) as error:  # above all a picture that is too wide for the format
        raise ImageError(f"{path}: {image.width}×{image.height} pixels cannot be written as {kind}: {error}") from error
    write_atomic(path, encoded.getvalue())


def _options(format: str, provenance: dict[str, str] | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if format in ("JPEG", "WEBP"):
        options["quality"] = QUALITY
    if format == "JPEG":
        options["subsampling"] = 0
    if provenance and format == "PNG":
        options["pnginfo"] = PngInfo()
        for key, text in provenance.items():
            options["pnginfo"].add_text(key, text)
    if provenance and format == "JPEG":
        options["comment"] = json.dumps(provenance).encode("ascii")
    if provenance and format == "TIFF":
        options["tiffinfo"] = {_IMAGE_DESCRIPTION: json.dumps(provenance)}
    return options


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` beside `path`, flush it to the disk, then rename it over `path`. Raises ImageError.

    A process that is killed meanwhile leaves `path` as it was and at most a hidden `.sr3rt-….tmp` beside it.
    """
    path = Path(path)
    temporary = path.parent / f".sr3rt-{secrets.token_hex(8)}.tmp"
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise ImageError(f"{path} cannot be written: {error.strerror or error}; nothing was left behind") from error
    if os.name == "posix":
        with contextlib.suppress(OSError):  # makes the rename itself durable; some network file systems cannot
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
