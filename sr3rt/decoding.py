"""Picture files to opened, not yet decoded PIL images: the allow-list of formats, and the limits.

The reader is chosen here by the file's first bytes. `Image.open` is not used: it applies Pillow's process-wide pixel limit,
which belongs to the caller, and warns by it; `Limits` is ours, and is checked before any pixel is decoded.
"""

from __future__ import annotations

import importlib
import io
import os
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from sr3rt.errors import ImageError, ImageTooLarge

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

ACCEPTED = "PNG, JPEG, WebP, BMP, TIFF and PPM"


@dataclass(frozen=True)
class Limits:
    """What `read` accepts: `file_bytes` of encoded file and `pixels` (width × height) of decoded picture."""

    file_bytes: int = 64 * 2**20
    pixels: int = 2**26


# The allow-list: a file's first bytes, from each format's specification, and the reader that they choose.
# JpegImageFile and not `Image.open`: the latter takes a phone's JPEG with an embedded preview (MPO) for an animation.
# Pillow's readers are imported one by one, when they are needed: all of them take longer than a small network's first step.
_READERS: tuple[tuple[Callable[[bytes], bool], str], ...] = (
    (lambda head: head.startswith(b"\x89PNG\r\n\x1a\n"), "Png"),
    (lambda head: head.startswith(b"\xff\xd8\xff"), "Jpeg"),
    (lambda head: head.startswith(b"RIFF") and head[8:12] == b"WEBP", "WebP"),
    (lambda head: head.startswith(b"BM"), "Bmp"),
    (lambda head: head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")), "Tiff"),
    (lambda head: head[:2] in (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6") and head[2:3].isspace(), "Ppm"),
)

# What a refused file most often is, so that the message can say it.
_REFUSED: tuple[tuple[Callable[[bytes], bool], str], ...] = (
    (lambda head: head.startswith(b"GIF8"), "a GIF, often animated and of 256 colours at most"),
    (lambda head: head[4:8] == b"ftyp", "an HEIC, AVIF or video file"),
    (lambda head: head.lstrip().lower().startswith((b"<svg", b"<?xml")), "an SVG or XML text, which has no pixels"),
    (lambda head: head.startswith(b"%PDF"), "a PDF"),
    (lambda head: head.startswith((b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51")), "a JPEG 2000"),
)


def too_large(found: str, field: Literal["file_bytes", "pixels"], limits: Limits) -> ImageTooLarge:
    """The error for what was found to be over that field of the limits."""
    limit = f"{getattr(limits, field)} {field.removeprefix('file_')}"
    todo = f"give a smaller picture, or set another by sr3rt.load(limits=sr3rt.Limits({field}=…))"
    return ImageTooLarge(f"{found}; the limit is {limit}: {todo}")


def read_bytes(path: Path, limits: Limits) -> bytes:
    """The file's bytes, at most one more than the limit."""
    try:
        kind = os.stat(path)
        if not stat.S_ISREG(kind.st_mode):  # a pipe or a device might never end
            raise ImageError(f"{path} is {'a folder' if stat.S_ISDIR(kind.st_mode) else 'not a regular file'}; expected a picture file")
        if kind.st_size > limits.file_bytes:
            raise too_large(f"{path}: {kind.st_size} bytes", "file_bytes", limits)
        with open(path, "rb") as file:
            return file.read(limits.file_bytes + 1)
    except FileNotFoundError as error:
        raise ImageError(f"there is no file {path}") from error
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ImageError(f"{path} cannot be read: {error}") from error


def open_header(data: bytes, what: str) -> ImageFile:
    """The picture with its header read and its pixels not yet decoded."""
    if not data:
        raise ImageError(f"{what}: the file is empty; expected a picture ({ACCEPTED})")
    head = data[:64]
    name = next((name for matches, name in _READERS if matches(head)), None)
    if name is None:
        found = next((kind for matches, kind in _REFUSED if matches(head)), f"a file that begins with {head[:8]!r}")
        raise ImageError(f"{what}: found {found}; accepted are {ACCEPTED}: convert it first")
    reader = getattr(importlib.import_module(f"PIL.{name}ImagePlugin"), f"{name}ImageFile")
    try:
        image: ImageFile = reader(io.BytesIO(data))
    except Image.DecompressionBombError as error:  # Pillow's WebP reader has its own check
        raise ImageTooLarge(f"{what}: {error}") from error
    except Exception as error:  # decoders raise nearly anything on a damaged file
        raise ImageError(f"{what}: a damaged {reader.format} file: {reason(error)}") from error
    if _is_16_bit_colour(image):
        message = f"{what}: a file of 16 bits per channel, read at 8 bits; pass the picture as a uint16 array to keep 16"
        warnings.warn(message, stacklevel=3)
    return image


def _is_16_bit_colour(image: ImageFile) -> bool:
    """What Pillow is about to reduce to 8 bits: its raw mode says so for PNG and TIFF, the largest value for PPM."""
    if image.mode.startswith("I") or not image.tile:
        return False
    arguments = image.tile[0][3]  # by number: it has names since Pillow 11 only
    if image.format == "PPM":
        return isinstance(arguments, tuple) and isinstance(arguments[-1], int) and arguments[-1] > 255
    return image.format in ("PNG", "TIFF") and ";16" in str(arguments)


def reason(error: Exception) -> str:
    """An error of Pillow's, some of which have no message."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
