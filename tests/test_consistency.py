"""The projection is Pillow's own resizing, and it makes a prediction agree with the input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sr3rt.consistency import Projection, consistency_psnr
from sr3rt.errors import ImageError

PHOTOGRAPH = Path(__file__).parent / "data" / "kodim23_crop.png"
Floats = NDArray[np.float32]


def pil_resize(picture: Floats, height: int, width: int) -> Floats:
    planes = [Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC) for plane in picture]
    return np.stack([np.asarray(plane) for plane in planes])


def photograph() -> Floats:
    with Image.open(PHOTOGRAPH) as image:
        pixels = np.asarray(image, dtype=np.float32) / 255 * 2 - 1
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def noise(*shape: int) -> Floats:
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(1, 1, 4), (1, 1, 2), (2, 3, 4), (3, 2, 8), (17, 33, 3), (64, 80, 4), (1, 70, 4), (131, 1, 2), (16, 16, 8), (9, 9, 1)],
)
def test_down_and_up_are_pillows(height: int, width: int, scale: int) -> None:
    projection = Projection(height, width, scale)
    high, low = noise(3, height * scale, width * scale), noise(3, height, width)
    np.testing.assert_allclose(projection.down(high), pil_resize(high, height, width), rtol=0, atol=1e-5)
    np.testing.assert_allclose(projection.up(low), pil_resize(low, height * scale, width * scale), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_projection_raises_the_consistency_by_tens_of_decibels(scale: int) -> None:
    original = photograph()
    height, width = original.shape[1] // scale, original.shape[2] // scale
    lr = pil_resize(original, height, width)
    drifted = original + np.float32(0.1) + np.float32(0.1) * noise(*original.shape)
    projected = Projection(height, width, scale).project(drifted, lr)
    assert consistency_psnr(drifted, lr, scale) < 28
    assert consistency_psnr(projected, lr, scale) > consistency_psnr(drifted, lr, scale) + 20
    assert np.mean((projected - original) ** 2) < np.mean((drifted - original) ** 2)


def test_a_blurred_picture_comes_closer_too() -> None:
    lr = pil_resize(photograph(), 18, 24)
    blurred = pil_resize(lr, 72, 96)
    assert consistency_psnr(Projection(18, 24, 4).project(blurred, lr), lr, 4) > consistency_psnr(blurred, lr, 4) + 5


def test_repeated_projections_converge() -> None:
    lr = noise(3, 9, 14)
    projection, x0 = Projection(9, 14, 4), noise(3, 36, 56)
    figures = []
    for _ in range(5):
        x0 = projection.project(x0, lr)
        figures.append(consistency_psnr(x0, lr, 4))
    assert figures == sorted(figures)
    assert figures[-1] > figures[0] + 10


def test_a_picture_that_agrees_stays_as_it_is() -> None:
    x0 = photograph()
    projection = Projection(18, 24, 4)
    np.testing.assert_allclose(projection.project(x0, projection.down(x0)), x0, rtol=0, atol=1e-6)


def test_the_arguments_are_left_alone() -> None:
    x0, lr = noise(3, 8, 8), noise(3, 2, 2)
    before = x0.copy(), lr.copy()
    Projection(2, 2, 4).project(x0, lr)
    assert np.array_equal(x0, before[0])
    assert np.array_equal(lr, before[1])


def test_consistency_is_the_psnr_on_the_range_0_to_1() -> None:
    lr = np.zeros((3, 5, 5), np.float32)
    off_by_a_tenth = np.full((3, 20, 20), 0.2, np.float32)  # 0.2 in [-1,1] is 0.1 in [0,1]: 20 dB
    assert consistency_psnr(off_by_a_tenth, lr, 4) == pytest.approx(20, abs=1e-3)
    assert consistency_psnr(np.zeros((3, 20, 20), np.float32), lr, 4) == float("inf")


def test_a_wrong_size_or_dtype_is_refused_with_both_sizes() -> None:
    projection = Projection(4, 4, 4)
    with pytest.raises(ImageError, match=r"\(3, 16, 12\).*\(3, 16, 16\)"):
        projection.project(noise(3, 16, 12), noise(3, 4, 4))
    with pytest.raises(ImageError, match="float64"):
        projection.up(np.zeros((3, 4, 4), np.float64))
