"""Pictures in files: what is written is read back, with its provenance, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin
from test_images import photograph, pixels, reopened

import sr3rt
from sr3rt.errors import ImageError
from sr3rt.saving import save

PROVENANCE = {"sr3rt:seed": "7", "sr3rt:sampler": "ddim η=0"}


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".ppm", ".PNG"])
def test_a_lossless_file_gives_the_picture_back(suffix: str, tmp_path: Path) -> None:
    save(photograph(), tmp_path / f"out{suffix}", provenance=PROVENANCE)
    assert np.array_equal(np.asarray(reopened(tmp_path / f"out{suffix}")), pixels())
    assert [file.name for file in tmp_path.iterdir()] == [f"out{suffix}"]


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_a_lossy_file_is_close_and_has_no_exif(suffix: str, tmp_path: Path) -> None:
    image = photograph()
    image.info["exif"] = Image.Exif().tobytes()
    save(image, tmp_path / f"out{suffix}")
    read_back = reopened(tmp_path / f"out{suffix}")
    assert "exif" not in read_back.info
    assert np.abs(np.asarray(read_back).astype(int) - pixels()).mean() < 4


def comment(path: Path) -> str:
    image = reopened(path)
    return str(image.tag_v2.get(270) if isinstance(image, TiffImagePlugin.TiffImageFile) else image.info.get("comment"))


def test_provenance_is_in_the_file(tmp_path: Path) -> None:
    save(photograph(), tmp_path / "out.png", provenance=PROVENANCE)
    png = reopened(tmp_path / "out.png")
    assert isinstance(png, PngImagePlugin.PngImageFile)
    assert {key: str(text) for key, text in png.text.items()} == PROVENANCE
    for name in ("jpg", "tif"):
        save(photograph(), tmp_path / f"out.{name}", provenance=PROVENANCE)
        save(photograph(), tmp_path / f"plain.{name}")
        assert "sr3rt:seed" in comment(tmp_path / f"out.{name}")
        assert "sr3rt" not in comment(tmp_path / f"plain.{name}")


def test_a_comment_that_is_too_long_for_a_jpeg_is_left_out(tmp_path: Path) -> None:
    for length, kept in ((60_000, True), (60_001, False)):
        save(photograph(), tmp_path / "out.jpg", provenance={"sr3rt:schedule": "x" * (length - len('{"sr3rt:schedule": ""}'))})
        assert len(reopened(tmp_path / "out.jpg").info.get("comment", b"")) == (length if kept else 0)


@pytest.mark.parametrize(
    ("shape", "kind", "mode"),
    [
        ((6, 4), np.uint8, "L"),
        ((6, 4, 1), np.uint8, "L"),
        ((6, 4, 2), np.uint8, "LA"),
        ((6, 4, 3), np.uint8, "RGB"),
        ((6, 4, 4), np.uint8, "RGBA"),
        ((6, 4), np.uint16, "I;16"),
        ((6, 4, 1), np.dtype(">u2"), "I;16"),
    ],
)
def test_an_array_is_written_as_the_picture_that_it_is(shape: tuple[int, ...], kind: Any, mode: str, tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, np.iinfo(kind).max, shape).astype(kind)
    sr3rt.save(array, tmp_path / "out.png")
    written = reopened(tmp_path / "out.png")
    assert written.mode == mode
    assert np.array_equal(np.asarray(written), array.reshape(np.asarray(written).shape))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (
            np.zeros((4, 4, 3), np.float32),
            r"out\.png: the array \(4, 4, 3\) float32: .* save np\.round\(array \* 255\)\.astype\(np\.uint8\)",
        ),
        (np.zeros((4, 4, 3), np.uint16), r"no 16-bit colour .*: save np\.round\(array / 257\)\.astype\(np\.uint8\)"),
        (np.zeros((4, 4), np.int64), "int64: expected uint8 or uint16: convert it first"),
        (np.zeros((3, 8, 8), np.uint8), "channels last"),
        (np.zeros((0, 8), np.uint8), "8×0 pixels cannot be written as PNG: there are none"),
        ([np.zeros((4, 4), np.uint8)], "found list: of a list, save each picture"),
    ],
)
def test_what_is_no_picture_of_whole_numbers_is_refused(picture: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=message):
        sr3rt.save(picture, tmp_path / "out.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        ("out.jpg", "RGBA", "JPEG cannot hold a picture of mode RGBA; write it as .png"),
        ("out.bmp", "LA", "BMP cannot hold"),
        ("out.webp", "I;16", r"write it as \.png, \.tif"),
        ("out.gif", "RGB", r"suffix '\.gif' names no format"),
        ("out", "RGB", "suffix ''"),
        ("absent/out.png", "RGB", "cannot be written: No such file or directory"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(name: str, mode: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=message):
        save(Image.new(mode, (4, 4)), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_picture_too_wide_for_the_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="70000×1 pixels cannot be written as JPEG"):
        save(Image.new("L", (70000, 1)), tmp_path / "out.jpg")


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.png"
    target.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ImageError, match="No space left on device"):
        save(photograph(), target)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_new_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    save(photograph(), tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_a_result_carries_is_written_with_it(tmp_path: Path) -> None:
    picture = sr3rt.upscale(Image.fromarray(np.zeros((4, 4, 3), np.uint8)), seed=7, steps=1)
    sr3rt.save(picture, tmp_path / "with.png")
    save(picture, tmp_path / "without.png", provenance={})
    assert Image.open(tmp_path / "with.png").info["sr3rt:seed"] == "7"
    assert not any(str(key).startswith("sr3rt:") for key in Image.open(tmp_path / "without.png").info)
