"""Hidden pixels take the colours of seen ones nearby, at little cost in memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from test_images import pixels

from sr3rt import transparency
from sr3rt.images import read
from sr3rt.transparency import reveal


def noise(height: int, width: int, kind: Any = np.uint8) -> NDArray[Any]:
    most = 1 if kind is np.float32 else np.iinfo(kind).max
    return (np.random.default_rng(7).random((height, width, 3)) * most).astype(kind)


def dots(height: int, width: int) -> NDArray[np.bool_]:
    """A few pixels are seen, near one another and far."""
    return np.random.default_rng(8).random((height, width)) < np.linspace(0, 0.1, width) ** 3


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_a_hidden_pixel_takes_the_mean_of_its_neighbours(kind: type) -> None:
    colour, seen = noise(9, 9, kind), np.ones((9, 9), bool)
    seen[4, 5] = False
    expected = np.delete(colour[3:6, 4:7].reshape(9, 3), 4, axis=0).mean(axis=0, dtype=np.float64)
    before = colour.copy()
    reveal(colour, seen)
    np.testing.assert_allclose(colour[4, 5], expected if kind is np.float32 else np.round(expected), rtol=1e-6)
    assert np.array_equal(colour[seen], before[seen])


def test_a_pixel_takes_what_is_near_and_far_from_everything_the_mean() -> None:
    colour, seen = np.zeros((3, 700, 3), np.uint8), np.zeros((3, 700), bool)
    for column, value in ((100, 10), (600, 60)):
        colour[:, column], seen[:, column] = value, True
    reveal(colour, seen)
    assert (colour[:, 36:165] == 10).all()
    assert (colour[:, 536:665] == 60).all()
    assert (colour[:, 300:400] == 35).all()


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_the_tiles_do_not_show(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, made = dots(300, 500), []
    for tile in (64, 256, 1024):
        monkeypatch.setattr(transparency, "_TILE", tile)
        made.append(noise(300, 500, kind))
        reveal(made[-1], seen)
    assert np.array_equal(made[0], made[1])
    assert np.array_equal(made[0], made[2])


def test_means_stay_within_the_range() -> None:
    for most in (np.float32(1), np.nextafter(np.float32(1), np.float32(0)), np.uint16(65535)):
        colour = np.full((80, 300, 3), most)
        reveal(colour, dots(80, 300))
        assert colour.max() <= most


def test_hidden_pixels_take_little_memory() -> None:
    for hidden in (np.s_[500, 500], np.s_[:, :500]):
        picture = np.dstack([noise(1024, 1024), np.full((1024, 1024), 255, np.uint8)])
        picture[hidden][..., 3] = 0
        tracemalloc.start()
        read(picture)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5 * picture.nbytes


def test_where_nothing_is_seen_nothing_changes() -> None:
    colour = pixels()
    reveal(colour, np.zeros(colour.shape[:2], bool))
    assert np.array_equal(colour, pixels())
