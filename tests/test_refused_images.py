"""Pictures that are refused: one clear error each, before anything is decoded that need not be."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from test_images import PHOTOGRAPH, encoded, photograph, pixels, tiny_png

from sr3rt.errors import ImageError, ImageTooLarge
from sr3rt.images import Limits, read, restore


def animated(format: str) -> bytes:
    return encoded(photograph(), format, save_all=True, append_images=[photograph().rotate(180)])


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_several_frames_are_refused(format: str) -> None:
    with pytest.raises(ImageError, match="animated, or of several pages"):
        read(animated(format))


def test_an_animated_gif_is_refused_as_a_file_and_as_an_image() -> None:
    with pytest.raises(ImageError, match=r"a GIF, often animated.*accepted are PNG"):
        read(animated("GIF"))
    with pytest.raises(ImageError, match="animated"):
        read(Image.open(io.BytesIO(animated("GIF"))))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"Dear reader, this is no picture.\n", "begins with b'Dear rea'"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\0\0\0\x20ftypheic" + bytes(20), "HEIC"),
        (b"%PDF-1.7\n", "PDF"),
        (b"\x89PNG\r\n\x1a\n", "damaged PNG"),
        (b"\xff\xd8\xff\xe0" + bytes(30), "JPEG"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "damaged WEBP"),
        (b"BM" + bytes(10), "damaged BMP"),
        (b"II*\0\x08\0\0\0", "damaged TIFF"),
        (b"P6 nonsense", "damaged PPM"),
        (b"P6 0 5 255\n", "damaged PPM"),
    ],
)
def test_what_is_no_picture_is_refused_with_what_was_found(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "renamed.png"
    path.write_bytes(data)
    for image in (data, path):
        with pytest.raises(ImageError, match=message):
            read(image)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM"])
def test_a_truncated_file_is_refused(format: str) -> None:
    data = encoded(photograph(), format)
    for length in (len(data) // 2, len(data) - len(data) // 10):
        with pytest.raises(ImageError, match="damaged"):
            read(data[:length])


def test_paths_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"there is no file .*absent\.png"):
        read(tmp_path / "absent.png")
    with pytest.raises(ImageError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(ImageError, match="cannot be read"):
        read("a\0b.png")


@pytest.mark.parametrize(("width", "height"), [(60000, 60000), (11000, 11000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_meets_our_limit_and_not_pillows(width: int, height: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageTooLarge, match=f"{width}×{height}.*the limit is {2**26} pixels"):
            read(tiny_png(width, height))


def test_the_limits_hold_for_every_kind_of_input(tmp_path: Path) -> None:
    small = Limits(pixels=96 * 72 - 1)
    told = r": 96×72 = 6912 pixels; the limit is 6911 pixels: .* sr3rt\.load\(limits=sr3rt\.Limits\(pixels=…\)\)"
    for image in (PHOTOGRAPH, PHOTOGRAPH.read_bytes(), photograph(), pixels()):
        with pytest.raises(ImageTooLarge, match=told):
            read(image, limits=small)
        assert read(image, limits=Limits(pixels=96 * 72)).width == 96
    size = PHOTOGRAPH.stat().st_size
    told = rf"{size} bytes.*; the limit is {size - 1} bytes: .* sr3rt\.load\(limits=sr3rt\.Limits\(file_bytes=…\)\)"
    for file in (PHOTOGRAPH, PHOTOGRAPH.read_bytes()):
        with pytest.raises(ImageTooLarge, match=told):
            read(file, limits=Limits(file_bytes=size - 1))
        assert read(file, limits=Limits(file_bytes=size)).height == 72


def test_pillows_own_limit_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    tiff = encoded(photograph(), "TIFF")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read(PHOTOGRAPH).colour.shape == (72, 96, 3)
    with contextlib.suppress(ImageTooLarge):  # its TIFF reader keeps to it since version 11: that error, and no other
        read(tiff)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((2, 2), 1.5, np.float32), r"floats from 1\.5 to 1\.5; expected \[0,1\]"),
        (np.array([[0.5, -0.25]]), r"floats from -0\.25 to 0\.5"),
        (np.full((2, 2), 1 + 2**-52), r"floats from 1\.0000000000000002 to 1\.0000000000000002; expected \[0,1\]"),
        (np.array([[0.5, np.nan]]), r"some values are NaN; expected floats in \[0,1\]"),
        (np.array([[0.5, np.inf]]), "to inf"),
        (np.zeros((2, 2), np.int64), "int64.*expected uint8, uint16, or float"),
        (np.zeros((2, 2), bool), "bool"),
        (np.zeros((2, 2), complex), "complex"),
        (np.zeros((3, 64, 64), np.uint8), "channels last"),
        (np.zeros((1, 64, 64, 3), np.uint8), "expected .H, W. or .H, W, C."),
        (np.zeros(5, np.uint8), "expected .H, W."),
        (np.zeros((0, 5, 3), np.uint8), "5×0 pixels"),
    ],
)
def test_arrays_that_cannot_be_pictures_are_refused(array: NDArray[Any], message: str) -> None:
    with pytest.raises(ImageError, match=message):
        read(array)


def test_other_objects_and_modes_are_refused() -> None:
    with pytest.raises(ImageError, match=r"builtins\.list"):
        read([[1, 2], [3, 4]])  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="mode 'LAB'"):
        read(Image.new("LAB", (4, 4)))
    with pytest.raises(ImageError, match="values -5 to -5; expected 0 to 65535"):
        read(Image.new("I", (4, 4), -5))
    with pytest.raises(ImageError, match="transparency in 16-bit grey"):
        read(encoded(Image.new("I;16", (4, 4), 300), "PNG", transparency=300))
    with pytest.raises(ImageError, match="0×0"):
        read(Image.new("RGB", (0, 0)))


def test_a_prediction_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ImageError, match=r"\(3, 10, 10\).*at least 288, at least 384"):
        restore(read(photograph()), np.zeros((3, 10, 10), np.float32), scale=4)
