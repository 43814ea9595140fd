"""Large pictures in windows: they cover, they blend, and what comes out is the whole picture's, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

import sr3rt
from sr3rt import memory
from sr3rt.backends import Floats
from sr3rt.errors import ImageTooLarge, NonFiniteError, OptionError
from sr3rt.noise import normals
from sr3rt.tiles import OVERLAP, SIDES, Canvas, Window, pixels, windows

PHOTO = Path(__file__).parent.parent / "examples" / "photo.png"


def psnr(a: Any, b: Any) -> float:
    error = float(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))
    return 10 * np.log10(255**2 / max(error, 1e-9))


@pytest.fixture(scope="module")
def shipped() -> sr3rt.Upscaler:
    return sr3rt.load()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """112×72, so 448×288 upscaled."""
    return Image.open(PHOTO).convert("RGB").crop((40, 20, 152, 92))


# --- geometry


@pytest.mark.parametrize("seed", range(5))
def test_windows_cover_overlap_and_stay_in_step_with_the_network(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(100):
        unit = int(rng.choice([1, 4, 8, 16, 48]))
        side, height, width = (unit * int(n) for n in (rng.integers(2, 40), rng.integers(1, 120), rng.integers(1, 120)))
        found = windows(height, width, side=side, unit=unit)
        assert all(one.height == min(side, height) and one.width == min(side, width) for one in found)
        assert all(value % unit == 0 for one in found for value in (one.top, one.left))
        for starts, length in (({one.top for one in found}, height), ({one.left for one in found}, width)):
            ordered = sorted(starts)
            assert ordered[0] == 0 and ordered[-1] == max(0, length - side)
            assert all(0 < b - a <= side - min(OVERLAP, side // 2) for a, b in pairwise(ordered))


@pytest.mark.parametrize("size", [(64, 64), (200, 72), (128, 512)])
def test_windows_of_one_picture_blend_to_it(size: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).uniform(-1, 1, (3, *size)).astype(np.float32)
    found = windows(*size, side=64, unit=8)
    canvas = Canvas(picture.shape, found)
    for one in found:
        canvas.add(one, picture[one.part])
    assert np.abs(canvas.picture() - picture).max() < 1e-6


def test_what_a_window_sees_least_of_is_not_used() -> None:
    found = [Window(0, 0, 64, 128), Window(0, 64, 64, 128)]
    canvas = Canvas((1, 64, 192), found)
    canvas.add(found[0], np.ones((1, 64, 128), np.float32))
    assert (canvas.picture()[0, :, :80] == 1).all() and (canvas.picture()[0, :, 112:] == 0).all()
    assert (np.diff(canvas.picture()[0, 0, 80:112]) < 0).all()


# --- pictures


@pytest.mark.parametrize("options", [{"sampler": "sr3"}, {"consistency": "every"}, {"consistency": "off"}, {}])
def test_windows_give_the_picture_that_the_whole_gives(shipped: sr3rt.Upscaler, photo: Image.Image, options: dict[str, Any]) -> None:
    """The network that ships sees about 100 pixels far, so that little is left to differ; another seed's picture is far away."""
    options = {"steps": 4, **options}
    whole, other = (shipped.upscale(photo, seed=seed, tile="off", **options) for seed in (1, 2))
    (result,) = shipped.run(photo, seed=1, tile=256, **options)
    assert result.tile == 256 and result.provenance["sr3rt:tile"] == "256"
    assert psnr(result.image, whole) > max(40, psnr(other, whole) + 8)


def test_the_noise_of_a_window_is_its_places(tmp_path: Path) -> None:
    """Of a network that has no sight, windows and the whole are alike but for the blend's rounding; injected noise is cut, too."""
    up = sr3rt.load(tiny.write(tmp_path / "b"))
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)

    def noise(step: int) -> Floats:
        return normals((3, 160, 240), seed=5, step=step)

    for options in ({"seed": 9}, {"noise": noise}, {"seed": 9, "consistency": "off"}):
        whole = up.upscale(image, steps=5, sampler="sr3", tile="off", **options)
        for tile in (64, 96, 128):
            found = up.upscale(image, steps=5, sampler="sr3", tile=tile, **options)
            assert np.abs(found.astype(int) - whole).max() <= 1


def test_pictures_of_a_list_in_windows_and_whole(shipped: sr3rt.Upscaler, photo: Image.Image) -> None:
    small = photo.resize((32, 32))
    first, second = shipped.upscale([photo, small], seed=[1, 2], steps=3, tile=256)
    assert np.array_equal(first, shipped.upscale(photo, seed=1, steps=3, tile=256))
    assert np.array_equal(second, shipped.upscale(small, seed=2, steps=3, tile="off"))


def test_steps_are_told_of_every_window_and_previews_are_whole(shipped: sr3rt.Upscaler, photo: Image.Image) -> None:
    seen: list[tuple[int, int, Any]] = []
    result = shipped.upscale(photo, seed=1, steps=3, tile=256, on_step=lambda step, steps, preview: seen.append((step, steps, preview())))
    count = len(windows(288, 448, side=256, unit=8))
    assert [step for step, _, _ in seen][-1] == seen[0][1] == 3 * count
    assert all(preview.size == (448, 288) for _, _, preview in seen)
    distances = [psnr(preview, result) for _, _, preview in seen]
    assert distances[0] < distances[-1]


# --- which windows


def test_auto_takes_windows_where_memory_does_not_suffice(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    up = sr3rt.load()  # which holds no memory yet
    sides = (None, *sorted((side for side in SIDES if side < 448), key=lambda side: pixels(288, 448, side=side, unit=8)))
    needed = {side: up._needed(288, 448, side) for side in sides}
    found = set()
    for available in needed.values():
        monkeypatch.setattr(memory, "available", lambda available=available: available)
        tile = sr3rt.load().run(photo, seed=1, steps=1)[0].tile
        assert tile == (next(side for side in sides if needed[side] <= available) or "off")
        found.add(tile)
    assert len(found) > 2 and "off" in found
    monkeypatch.setattr(memory, "available", lambda: needed[None] - 1)
    with pytest.raises(ImageTooLarge, match=r"a 448×288 result needs about 0\.\d GiB .*: use tile=auto, crop the picture"):
        sr3rt.load().upscale(photo, tile="off")
    monkeypatch.setattr(memory, "available", lambda: 1000)
    with pytest.raises(ImageTooLarge, match=r"needs about 0\.\d GiB with this model, 0\.0 GiB are available: crop the picture"):
        sr3rt.load().upscale(photo)


@pytest.mark.parametrize("tile", [0, -8, 8, 100, 1.5, "large", None])
def test_other_tiles_are_refused(shipped: sr3rt.Upscaler, photo: Image.Image, tile: Any) -> None:
    with pytest.raises(OptionError, match=r"tile must be auto, off or a multiple of 8 from 16 on, found"):
        shipped.upscale(photo, tile=tile)


def test_a_window_that_breaks_is_an_error(tmp_path: Path) -> None:
    up = sr3rt.load(tiny.write(tmp_path / "b"))
    noise: Callable[[int], Floats] = lambda step: np.where(np.arange(160 * 160).reshape(1, 160, 160) == 9, np.nan, np.zeros((3, 160, 160)))  # noqa: E731
    with pytest.raises(NonFiniteError):
        up.upscale(np.zeros((40, 40, 3), np.uint8), noise=noise, steps=3, tile=64)
