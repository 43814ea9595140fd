"""Results to files: whole or not at all, with where they came from written into those formats that have a place for it."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sr3rt.durable import write_atomic
from sr3rt.errors import ImageError
from sr3rt.images import Picture, Restored, check_shape

__all__ = ["SUFFIXES", "check", "check_target", "encode", "holds", "save"]

# Pillow's name of a format: the modes that it gives back as they were.
_COLOUR = ("L", "LA", "RGB", "RGBA")
_MODES: dict[str, tuple[str, ...]] = {
    "PNG": (*_COLOUR, "I;16"),
    "JPEG": ("L", "RGB"),
    "WEBP": _COLOUR,
    "BMP": ("L", "RGB"),
    "TIFF": (*_COLOUR, "I;16", "F"),
    "PPM": ("L", "RGB", "I;16"),
    "PGM": ("L", "I;16"),
}
SUFFIXES: dict[str, str] = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".ppm": "PPM",
    ".pgm": "PGM",
}

_LONGEST = {"JPEG": 65535, "WEBP": 16383}  # sides, pixels
_LONGEST_COMMENT = 60_000  # bytes in a JPEG: it must fit, with all else before the pixels, into the 65,536 that Pillow has had for that
QUALITY = 95  # of JPEG (without chroma subsampling) and WebP, the lossy formats
_IMAGE_DESCRIPTION = 270  # TIFF 6.0, page 34


def save(image: Restored, path: str | os.PathLike[str], *, provenance: dict[str, str] | None = None) -> None:
    """Write a picture in the format that the suffix names, with its ICC profile and without EXIF data.

    image: a PIL image, or an array as `upscale` gives it: uint8 (H, W) or (H, W, C), C = 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA; uint16
    (H, W) or (H, W, 1), as Pillow has no 16-bit colour. Floats are refused: how to round them is the caller's to say.

    `provenance` (None: what a PIL image carries from `upscale`; {}: nothing) goes into a PNG as text chunks, one per key (keys: 1 to 79
    Latin-1 characters), into a JPEG's comment and a TIFF's ImageDescription as JSON; WebP, BMP and PPM have no place for it. A JPEG's is
    left out where it is longer than a comment can be, 65,533 bytes. The file appears whole or not at all.

    Raises ImageError where the format cannot hold the picture or the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ImageError(f"{path}: the suffix {path.suffix!r} names no format; expected one of {', '.join(SUFFIXES)}")
    kind = SUFFIXES[path.suffix.lower()]
    try:
        image = _as_image(image)
        if provenance is None:
            provenance = {key: text for key, text in image.info.items() if isinstance(key, str) and key.startswith("sr3rt:")}
        encoded = encode(image, kind, provenance=provenance)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    try:
        write_atomic(path, encoded)
    except OSError as error:
        raise ImageError(f"{path} cannot be written: {error.strerror or error}; nothing was left behind") from error


def _as_image(picture: Restored) -> Image.Image:
    """Raises ImageError, saying what to do, for what Pillow has no mode for."""
    if isinstance(picture, Image.Image):
        return picture
    if not isinstance(picture, np.ndarray):
        raise ImageError(f"expected a PIL image or an array, found {type(picture).__qualname__}: of a list, save each picture")
    what = f"the array {picture.shape} {picture.dtype}"
    check_shape(picture, what)
    if picture.dtype.kind == "f":
        raise ImageError(f"{what}: expected whole numbers: of floats in [0,1], save np.round(array * 255).astype(np.uint8)")
    if picture.dtype.kind != "u" or picture.dtype.itemsize > 2:
        raise ImageError(f"{what}: expected uint8 or uint16: convert it first")
    pixels = picture[..., 0] if picture.shape[2:] == (1,) else picture
    if pixels.ndim == 3 and pixels.dtype.itemsize == 2:
        raise ImageError(f"{what}: Pillow has no 16-bit colour or transparency: save np.round(array / 257).astype(np.uint8)")
    return Image.fromarray(pixels.astype(pixels.dtype.newbyteorder("="), copy=False))


def check_target(picture: Picture, path: Path, *, scale: int) -> None:
    """Raises ImageError where the format that the path's suffix names cannot hold that picture's result."""
    kind = SUFFIXES.get(path.suffix.lower(), "")
    if kind:
        check(picture.mode, kind)
    longest = _LONGEST.get(kind, 2**31 - 1)
    if max(picture.height, picture.width) * scale > longest:
        result = f"{picture.width * scale}×{picture.height * scale}"
        raise ImageError(f"{path}: {kind} holds sides of up to {longest} pixels, the result has {result}: write it as .png")


def holds(mode: str, kind: str) -> bool:
    """Whether format `kind` can hold a picture of that mode."""
    return mode in _MODES[kind]


def check(mode: str, kind: str) -> None:
    """Raises ImageError, saying what could, where format `kind` cannot hold a picture of that mode."""
    if not holds(mode, kind):
        fitting = ", ".join(suffix for suffix, other in SUFFIXES.items() if holds(mode, other))
        raise ImageError(f"{kind} cannot hold a picture of mode {mode}; write it as {fitting or 'another mode'}")


def encode(image: Image.Image, kind: str, *, provenance: dict[str, str] | None = None) -> bytes:
    """The bytes of a file in format `kind`, one of Pillow's names: PNG, JPEG, WEBP, BMP, TIFF, PPM or PGM. Otherwise as `save`."""
    check(image.mode, kind)
    if not (image.width and image.height):
        raise ImageError(f"{image.width}×{image.height} pixels cannot be written as {kind}: there are none")
    encoded = io.BytesIO()
    try:
        image.save(encoded, "PPM" if kind == "PGM" else kind, icc_profile=image.info.get("icc_profile"), **_options(kind, provenance))
    except (OSError, ValueError) as error:  # above all a picture that is too wide for the format
        raise ImageError(f"{image.width}×{image.height} pixels cannot be written as {kind}: {error}") from error
    return encoded.getvalue()


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
    if provenance and format == "JPEG" and len(comment := json.dumps(provenance).encode("ascii")) <= _LONGEST_COMMENT:
        options["comment"] = comment
    if provenance and format == "TIFF":
        options["tiffinfo"] = {_IMAGE_DESCRIPTION: json.dumps(provenance)}
    return options
