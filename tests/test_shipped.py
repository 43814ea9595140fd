"""The model that ships, on each backend for CPUs: one seed, one picture, however it is run; and no torch."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sr3rt
from sr3rt.bundle import Bundle
from sr3rt.consistency import consistency_psnr
from sr3rt.engine import Engine, Job
from sr3rt.images import condition, read
from sr3rt.noise import START, normals
from sr3rt.samplers import Sampler, table
from sr3rt.schedule import respace
from sr3rt.upscaler import SHIPPED, Upscaler

PHOTO = Path(__file__).parent / "data" / "kodim23_crop.png"
STEPS = 4


@pytest.fixture(scope="module", params=["native", "onnxruntime"])
def up(request: pytest.FixtureRequest) -> Upscaler:
    return sr3rt.load(backend=request.param)


@pytest.fixture
def small() -> Image.Image:
    """Not a multiple of the stride on either side."""
    return Image.open(PHOTO).resize((23, 17), Image.Resampling.BICUBIC)


def floats(up: Upscaler, picture: Image.Image, **options: Any) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """Results before rounding to 8 bits: a float picture in gives a float picture out."""
    array = np.asarray(picture, np.float32) / 255
    return up.upscale([array] * options.pop("count", 1), steps=STEPS, **options)  # type: ignore[no-any-return]


def test_it_verifies_and_is_small() -> None:
    bundle = Bundle.open(SHIPPED)
    bundle.verify()
    assert sum(entry["bytes"] for entry in bundle.manifest.files.values()) < 12_000_000
    assert bundle.manifest.scale == 4


def test_one_seed_gives_one_picture_alone_in_a_batch_and_from_two_threads(up: Upscaler, small: Image.Image) -> None:
    (alone,) = floats(up, small, seed=7)
    third = floats(up, small, count=5, seed=[1, 2, 7, 3, 4])[2]
    assert np.abs(third - alone).max() <= 1e-5
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.extend(floats(up, small, seed=7))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert all(np.abs(picture - alone).max() <= 1e-5 for picture in found)


def test_another_seed_gives_another_picture(up: Upscaler, small: Image.Image) -> None:
    (first,), (second,) = floats(up, small, seed=1), floats(up, small, seed=2)
    assert np.abs(first - second).max() > 0.01


def test_the_first_noise_is_the_same_on_any_width(up: Upscaler) -> None:
    rows = table(Sampler("ddim"), respace(up.bundle.manifest.trained.schedule(), 1), prediction="x0", level="sqrt_gamma")
    for width in (32, 64):
        engine = Engine(up.network, capacity=1, channels=3, height=32, width=width)
        engine.join(Job(np.zeros((3, 32, width), np.float32), rows, seed=9))
        assert (engine._y[0, :, :, :32] == normals((3, 32, 32), seed=9, step=START)).all()


def test_the_result_agrees_with_the_input(up: Upscaler, small: Image.Image) -> None:
    result = up.upscale(small, seed=0)
    assert result.size == (92, 68)
    y0 = np.asarray(result, np.float32).transpose(2, 0, 1) / np.float32(127.5) - np.float32(1)
    lr = condition(read(small), scale=4, stride=4).lr
    assert consistency_psnr(np.ascontiguousarray(y0), lr, 4) >= 45


def test_padding_leaves_no_seam(up: Upscaler) -> None:
    """A picture cut by a few columns gives what the whole gives, up to the network's own view across the cut."""
    whole = Image.open(PHOTO).resize((40, 24), Image.Resampling.BICUBIC)
    cut = whole.crop((0, 0, 35, 24))
    full, part = (np.asarray(up.upscale(picture, seed=3, steps=STEPS), np.float64) for picture in (whole, cut))
    difference = np.abs(full[:, : 35 * 4] - part).mean(axis=(0, 2))
    assert difference[: 24 * 4].mean() < 2
    assert difference[-8:].mean() < 12


def test_one_pixel_and_extreme_shapes(up: Upscaler) -> None:
    for size in ((1, 1), (1, 37), (37, 1)):
        assert up.upscale(Image.new("RGB", size, (200, 30, 90)), seed=0, steps=2).size == (size[0] * 4, size[1] * 4)


def test_upscaling_never_imports_torch_or_the_exporter() -> None:
    code = (
        "import sys, sr3rt\n"
        "light = [m for m in ('numpy', 'PIL', 'onnxruntime', 'rich', 'cyclopts') if m in sys.modules]\n"
        "assert not light, f'import sr3rt brings {light}'\n"
        f"sr3rt.upscale({str(PHOTO)!r}, steps=1)\n"
        "heavy = [m for m in sys.modules if m.split('.')[0] in ('torch', 'onnx', 'export') or m.startswith('sr3rt.export')]\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PHOTO.parent)
