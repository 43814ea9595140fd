"""Pictures in and out: whatever the caller has becomes a `Picture`, a `Picture` becomes the network's arrays, and the
network's prediction becomes a picture of the kind that came in.

    read(image) ─▶ Picture ─▶ condition(picture, scale=4, stride=8) ─▶ x, lr ─▶ … y0 … ─▶ restore(picture, y0, scale=4)
"""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from sr3rt.decoding import Limits, open_header, read_bytes, reason, too_large
from sr3rt.errors import ImageError, ImageTooLarge
from sr3rt.transparency import reveal

__all__ = [
    "Condition",
    "ImageLike",
    "Limits",
    "Picture",
    "Restored",
    "check_shape",
    "check_size",
    "condition",
    "in_8_bits",
    "padded",
    "read",
    "restore",
]

Restored = Image.Image | NDArray[Any]


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture, upright, with what is needed to give the result back in the form that came in.

    colour      (H, W, 3) uint8, uint16 or float32 in [0,1]; a grey picture has three equal channels
    alpha       (H, W) of the same dtype, or None
    grey        the result has one colour channel
    dtype       the dtype of the array to give back; None gives a PIL image
    channel_axis  the array came as (H, W, C): one grey channel goes back as (H, W, 1) and not as (H, W)
    icc         the ICC profile that describes the colours, or None
    """

    colour: NDArray[Any]
    alpha: NDArray[Any] | None = None
    grey: bool = False
    dtype: np.dtype[Any] | None = None
    channel_axis: bool = False
    icc: bytes | None = None

    @property
    def height(self) -> int:
        return int(self.colour.shape[0])

    @property
    def width(self) -> int:
        return int(self.colour.shape[1])

    @property
    def mode(self) -> str:
        """Of the PIL image that the result will be."""
        if self.colour.dtype != np.uint8:
            return "I;16" if self.colour.dtype == np.uint16 else "F"
        return ("L" if self.grey else "RGB") + ("" if self.alpha is None else "A")


ImageLike = str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[Any] | Picture


def read(image: ImageLike, *, limits: Limits | None = None) -> Picture:
    """Read a path, the bytes of a file, a PIL image or an array into a `Picture`.

    Files: PNG, JPEG, WebP, BMP, TIFF, PPM; one frame (of a phone's multi-picture JPEG, the first picture). Arrays: (H, W) or
    (H, W, C) with C = 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA; uint8, uint16, or float in [0,1]. The EXIF orientation is applied,
    and the EXIF data is dropped. CMYK becomes RGB by Pillow's plain formula, without its ICC profile.

    A `Picture` is given back as it is. Pillow has no 16-bit RGB: such a file is read at 8 bits, with a warning; a uint16 array keeps
    all 16.

    Raises ImageTooLarge over `limits`, ImageError for anything else that cannot be used.
    """
    if isinstance(image, Picture):
        return image
    limits = limits or Limits()
    if isinstance(image, np.ndarray):
        return _from_array(image, limits)
    if isinstance(image, Image.Image):
        return _from_pil(image, "the PIL image", limits)
    if isinstance(image, bytes | bytearray | memoryview):
        data = bytes(image)
        what = found = f"the {len(data)} bytes given"
    elif isinstance(image, str | os.PathLike):
        data, what = read_bytes(Path(image), limits), str(image)
        found = f"{what}: {len(data)} bytes"
    else:
        raise ImageError(
            f"a picture is a path, bytes, a PIL image or a NumPy array; found {type(image).__module__}.{type(image).__qualname__}"
        )
    if len(data) > limits.file_bytes:
        raise too_large(found, "file_bytes", limits)
    return _from_pil(open_header(data, what), what, limits)


# --- PIL images ------------------------------------------------------------------------------------------------------------

# Mode of the input: mode to work in without and with transparency. 16- and 32-bit modes are read by `_deep`.
_WORKING = {
    "1": ("L", "LA"),
    "L": ("L", "LA"),
    "LA": ("LA", "LA"),
    "La": ("LA", "LA"),
    "P": ("RGB", "RGBA"),
    "PA": ("RGBA", "RGBA"),
    "RGB": ("RGB", "RGBA"),
    "RGBX": ("RGB", "RGB"),
    "RGBA": ("RGBA", "RGBA"),
    "RGBa": ("RGBA", "RGBA"),
    "CMYK": ("RGB", "RGB"),
    "YCbCr": ("RGB", "RGB"),
    "HSV": ("RGB", "RGB"),
}
_DEEP = ("I;16", "I;16L", "I;16B", "I", "F")

# The EXIF specification's orientations (tag 0x0112), and what brings each upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _from_pil(image: Image.Image, what: str, limits: Limits) -> Picture:
    check_size(image.height, image.width, what, limits)
    if image.mode not in _WORKING and image.mode not in _DEEP:
        raise ImageError(f"{what}: the mode {image.mode!r} is not accepted; convert it to RGB first")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # is_animated: counting the frames may read the whole file
        raise ImageError(f"{what}: animated, or of several pages; expected one picture: extract a frame first")
    try:
        image.load()
    except Image.DecompressionBombError as error:  # Pillow's TIFF reader has its own check
        raise ImageTooLarge(f"{what}: {error}") from error
    except Exception as error:
        raise ImageError(f"{what}: a damaged or truncated {image.format or 'picture'}: {reason(error)}") from error
    icc = image.info.get("icc_profile") if image.mode != "CMYK" else None  # the result is RGB; a CMYK profile would be wrong
    if (turn := _UPRIGHT.get(_orientation(image))) is not None:
        image = image.transpose(turn)
    if image.mode in _DEEP:
        return _picture(_deep(image, what), icc=icc)
    mode = _WORKING[image.mode][image.has_transparency_data]
    return _picture(np.array(image if image.mode == mode else image.convert(mode)), icc=icc)


def _orientation(image: Image.Image) -> int:
    """Of a loaded picture: a PNG may have its EXIF data behind the pixels."""
    with contextlib.suppress(Exception):  # damaged EXIF data is no reason to refuse the pixels: as stored, as viewers do
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    return 1


def _deep(image: Image.Image, what: str) -> NDArray[Any]:
    """(H, W) uint16 or float32 of a grey picture deeper than 8 bits."""
    if image.has_transparency_data:
        raise ImageError(f"{what}: transparency in 16-bit grey, which PIL cannot give back; pass a uint16 (H, W, 2) array")
    pixels = np.array(image)
    if image.mode == "F":
        return _checked_floats(pixels, what)
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 65535:
        raise ImageError(f"{what}: mode {image.mode!r} with values {low} to {high}; expected 0 to 65535")
    return pixels.astype(np.uint16)


# --- arrays ----------------------------------------------------------------------------------------------------------------


def _from_array(array: NDArray[Any], limits: Limits) -> Picture:
    what = f"the array {array.shape} {array.dtype}"
    check_shape(array, what)
    check_size(array.shape[0], array.shape[1], what, limits)
    if array.dtype.kind == "f":
        pixels = _checked_floats(array, what)
    elif array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        pixels = array.astype(array.dtype.newbyteorder("="))  # a copy: the caller may write on while we work
    else:
        raise ImageError(f"{what}: expected uint8, uint16, or float in [0,1]: convert it first")
    return _picture(pixels, dtype=array.dtype, channel_axis=array.ndim == 3)


def check_shape(array: NDArray[Any], what: str) -> None:
    """Raises ImageError for other than (H, W) or (H, W, C) with C = 1 to 4."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4)):
        raise ImageError(f"{what}: expected (H, W) or (H, W, C) with C = 1 to 4, channels last")


def _checked_floats(array: NDArray[Any], what: str) -> NDArray[np.float32]:
    low, high = float(array.min()), float(array.max())
    if np.isnan(low):
        raise ImageError(f"{what}: some values are NaN; expected floats in [0,1]")
    if low < 0.0 or high > 1.0:
        raise ImageError(f"{what}: floats from {low!r} to {high!r}; expected [0,1]: scale or clip them first")
    return array.astype(np.float32)


def check_size(height: int, width: int, what: str, limits: Limits) -> None:
    """Raises ImageTooLarge for a picture of more pixels than `limits` has, ImageError for one of none."""
    if height < 1 or width < 1:
        raise ImageError(f"{what}: {width}×{height} pixels; expected at least 1×1")
    if height * width > limits.pixels:
        raise too_large(f"{what}: {width}×{height} = {height * width} pixels", "pixels", limits)


def _picture(pixels: NDArray[Any], *, icc: bytes | None = None, dtype: np.dtype[Any] | None = None, channel_axis: bool = False) -> Picture:
    """Split (H, W) or (H, W, 1…4) into colour and alpha."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    grey, has_alpha = pixels.shape[2] < 3, pixels.shape[2] in (2, 4)
    colour = np.repeat(pixels[..., :1], 3, axis=2) if grey else np.ascontiguousarray(pixels[..., :3])
    alpha = np.ascontiguousarray(pixels[..., -1]) if has_alpha else None
    if alpha is not None:
        reveal(colour, alpha > 0)
    return Picture(colour=colour, alpha=alpha, grey=grey, dtype=dtype, channel_axis=channel_axis, icc=icc)


# --- to the network and back -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Condition:
    """What the network is given: a canvas that holds the picture at its top left, padded at the bottom and right.

    x     (3, h·scale, w·scale) float32 in [-1,1]: the condition; both sizes are multiples of the network's stride
    lr    (3, h, w) float32 in [-1,1]: the padded low-res picture that x was made of
    size  (height, width) of the true result; `restore` crops to it
    """

    x: NDArray[np.float32]
    lr: NDArray[np.float32]
    size: tuple[int, int]


def padded(length: int, *, scale: int, stride: int, minimum: int | None = None) -> int:
    """The low-res length of the canvas: the smallest one ≥ `length` whose upscaled length is a multiple of `stride` and at
    least `minimum` (default: the stride)."""
    unit = stride // math.gcd(stride, scale)
    return unit * max(1, -(-length // unit), -(-(minimum or stride) // (unit * scale)))


def condition(picture: Picture, *, scale: int, stride: int, minimum: int | None = None) -> Condition:
    """The network's input, from a picture of (H, W).

    The low-res picture is padded before it is upscaled, so that the bicubic kernel sees no edge where the picture goes on:
    mirrored without repeating the border where the picture is large enough, else with the border repeated.

    uint8 pictures: exactly PIL's `Image.BICUBIC` on uint8, then /255·2−1 in float32: the public implementation's convention,
    which its checkpoints were trained on. uint16 and float pictures: PIL's bicubic in mode 'F', channel by channel, clipped
    to [0,1] after each of the two passes, as the 8-bit path clips. Rounding them to 8 bits would lose what the caller's format
    holds; so the two paths differ by the 8-bit path's roundings alone (at most 1.2 of its codes).
    """
    height, width = (padded(n, scale=scale, stride=stride, minimum=minimum) for n in picture.colour.shape[:2])
    canvas = _pad(picture.colour, height, width)
    x = _resized(canvas, height * scale, width * scale)
    return Condition(x=_signed(x), lr=_signed(canvas), size=(picture.height * scale, picture.width * scale))


def restore(picture: Picture, y0: NDArray[np.float32], *, scale: int) -> Restored:
    """The result, in the form in which `picture` came, from the prediction y0 (3, ≥ H·scale, ≥ W·scale) float32 in [-1,1].

    Integers are round((clip(y0) + 1)/2 · 255), half to even (65535 for 16 bits). Alpha is upscaled bicubically beside the
    colour. PIL modes: L and 1 → L, LA → LA, I;16 → I;16, F → F, anything else → RGB or RGBA, with the ICC profile; grey is made
    of the three channels by ITU-R 601, as `Image.convert("L")` does. Arrays keep dtype and channel count.

    `restore(picture, condition(picture, …).x, scale=…)` is the bicubic picture itself.
    """
    height, width = picture.height * scale, picture.width * scale
    if y0.ndim != 3 or y0.shape[0] != 3 or y0.shape[1] < height or y0.shape[2] < width:
        raise ImageError(f"the prediction is {y0.shape}; expected (3, at least {height}, at least {width})")
    depth = picture.colour.dtype
    unit = ((np.clip(y0[:, :height, :width], -1, 1) + 1) / 2).transpose(1, 2, 0)
    channels = [_grey(unit, depth) if picture.grey else _quantised(unit, depth)]
    if picture.alpha is not None:
        channels.append(_quantised(_resized(picture.alpha, height, width), depth)[..., None])
    pixels = np.concatenate(channels, axis=2)
    if pixels.shape[2] == 1 and not picture.channel_axis:
        pixels = pixels[..., 0]
    if picture.dtype is not None:
        return pixels.astype(picture.dtype, copy=False)
    image = Image.fromarray(pixels)
    if picture.icc:
        image.info["icc_profile"] = picture.icc
    return image


def in_8_bits(image: Image.Image) -> Image.Image:
    """A result of mode I;16, which Pillow would cut off at 255, or F in [0,1], which it would cut down to 0 and 1; others as they are."""
    if image.mode not in ("I;16", "F"):
        return image
    return Image.fromarray(_quantised(_unit(np.asarray(image)), np.dtype(np.uint8)))


def _pad(pixels: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """(H, W, C) grown to (height, width, C) at the bottom and right."""
    for axis, length in enumerate((height, width)):
        extra = length - pixels.shape[axis]
        if extra:
            margins = [(0, extra if axis == other else 0) for other in range(pixels.ndim)]
            pixels = np.pad(pixels, margins, mode="reflect" if extra < pixels.shape[axis] else "edge")
    return pixels


def _resized(pixels: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """PIL's bicubic of (H, W) or (H, W, C): uint8 stays uint8; uint16 and float32 become float32 in [0,1]."""
    if pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    if pixels.ndim == 3:
        return np.stack([_resized(pixels[..., c], height, width) for c in range(pixels.shape[2])], axis=2)
    plane = _unit(np.ascontiguousarray(pixels))
    for size in ((width, plane.shape[0]), (width, height)):  # first along the rows, as Pillow does
        plane = np.clip(np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC)), 0, 1)
    return plane


def _unit(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """Any dtype of ours to float32 in [0,1]."""
    return pixels if pixels.dtype == np.float32 else pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)


def _signed(pixels: NDArray[Any]) -> NDArray[np.float32]:
    """(H, W, 3) of any dtype of ours to (3, H, W) float32 in [-1,1]."""
    return np.ascontiguousarray((_unit(pixels) * 2 - 1).transpose(2, 0, 1))


def _quantised(unit: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """[0,1] to the dtype, rounded half to even; what is in the integer dtype already stays."""
    if unit.dtype == dtype:
        return unit
    return np.round(unit * np.float32(np.iinfo(dtype).max)).astype(dtype)


def _grey(unit: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """(H, W, 3) in [0,1] to (H, W, 1): Pillow's own integer luma for 8 bits, the same ITU-R 601 weights for the others."""
    if dtype == np.uint8:
        return np.asarray(Image.fromarray(_quantised(unit, dtype)).convert("L"))[..., None]
    luma = unit @ np.array([[0.299], [0.587], [0.114]], dtype=np.float32)
    return _quantised(np.clip(luma, 0, 1), dtype)
