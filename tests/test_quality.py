"""The figures of benchmarks/quality.py, on pictures whose figures are known."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from test_upscaler import upscaler

from sr3rt.errors import OptionError

PATH = Path(__file__).parents[1] / "benchmarks" / "quality.py"


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quality", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quality"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_psnr_is_in_decibels_of_255(quality: ModuleType) -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    assert quality.psnr(black + 255, black) == pytest.approx(0)
    assert quality.psnr(black + 1, black) == pytest.approx(48.13, abs=0.01)


def test_high_frequencies_are_those_above_a_quarter_cycle_a_pixel(quality: ModuleType) -> None:
    column = np.arange(128)

    def wave(cycles: float) -> np.ndarray:  # type: ignore[type-arg]
        return np.broadcast_to(np.sin(2 * np.pi * cycles * column)[None, :, None] * 100 + 128, (128, 128, 3))

    fine, coarse = (quality.high_frequency_energy(wave(cycles)) for cycles in (0.4, 0.1))
    assert fine > 1e5 * coarse
    assert quality.high_frequency_energy(np.full((128, 128, 3), 200)) == pytest.approx(0, abs=1e-6)


def test_six_crops_that_do_not_overlap(quality: ModuleType) -> None:
    ramp = Image.fromarray(np.arange(768 * 512, dtype=np.uint32).view(np.uint8).reshape(512, 768, 4)[..., :3].copy())
    for picture in (ramp, ramp.transpose(Image.Transpose.ROTATE_90)):
        parts = quality.crops(picture)
        assert [part.size for part in parts] == [(128, 128)] * 6
        assert len({part.tobytes() for part in parts}) == 6


def test_measure_compares_with_the_originals(quality: ModuleType) -> None:
    photo = Image.open(PATH.parents[1] / "examples" / "photo.png").convert("RGB")
    original = photo.crop((30, 0, 158, 128))
    figures = quality.measure(upscaler(), [original], samples=3, steps=2, consistency="final")
    assert (figures.crops, figures.samples, figures.steps, figures.sampler) == (1, 3, 2, "ddim")
    assert 15 < figures.bicubic < 35
    assert figures.one < figures.mean < 0  # a network of one line is no upscaler
    assert figures.bicubic_high_frequencies < 0.05
    off = quality.measure(upscaler(), [original], samples=1, steps=2, consistency="off")
    assert off.consistency_db < figures.consistency_db


def test_crops_lie_inside_and_what_is_too_small_or_missing_is_told(quality: ModuleType, tmp_path: Path) -> None:
    Image.new("RGB", (150, 128), "white").save(tmp_path / "a.png")
    (picture,) = quality.photographs(tmp_path, "*.png")
    assert all(crop.size == (128, 128) and np.asarray(crop).min() == 255 for crop in quality.crops(picture))
    with pytest.raises(OptionError, match=r"holds no \*\.jpg: give --images"):
        quality.photographs(tmp_path, "*.jpg")
    Image.new("RGB", (127, 300)).save(tmp_path / "b.png")
    with pytest.raises(OptionError, match=r"b\.png is 127×300: expected 128×128 at least"):
        quality.photographs(tmp_path, "*.png")
