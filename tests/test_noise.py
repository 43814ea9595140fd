"""The noise: Philox, the normals, and that the native module and the NumPy oracle agree in every bit."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray

from sr3rt import _native, noise

ALL_K = np.arange(1 << 23, dtype=np.uint32)

# Random123's published vectors (its file kat_vectors): counter, key, result of philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def native_normals(
    shape: tuple[int, int, int], *, seed: int, step: int, row: int = 0, column: int = 0, threads: int = 1
) -> NDArray[np.float32]:
    out = np.full(shape, np.nan, dtype=np.float32)
    _native.normals(out[None], np.array([seed], np.uint64), np.array([step], np.uint32), threads, np.array([[row, column]], np.uint32))
    return out


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return a.shape == b.shape and bool(np.array_equal(a.view(np.uint32), b.view(np.uint32)))


def ulps(got: NDArray[np.float32], wanted: NDArray[np.float64]) -> float:
    return float(np.max(np.abs(got - wanted) / np.spacing(np.abs(wanted).astype(np.float32))))


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter: str, key: str, wanted: str) -> None:
    c0, c1, c2, c3 = (int(word, 16) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    words = [int(word, 16) for word in wanted.split()]
    one = [np.array([word], np.uint32) for word in (c0, c1, c2, c3)]
    assert [int(word[0]) for word in noise.philox((one[0], one[1], one[2], one[3]), (k0, k1))] == words
    assert list(_native.philox([c0, c1, c2, c3], [k0, k1])) == words


def test_uniforms_are_exact_and_never_0_or_1() -> None:
    u = noise.uniform(ALL_K)
    assert np.array_equal(u.astype(np.float64), (ALL_K + 0.5) / 2**23)
    assert 0 < u.min() < u.max() < 1


def test_ln_and_the_turn_are_accurate_over_all_their_arguments() -> None:
    u = noise.uniform(ALL_K)
    assert ulps(noise.ln(u), np.log(u.astype(np.float64))) < 0.87
    angle = 2 * np.pi * u.astype(np.float64)
    cos, sin = noise.turn(ALL_K)
    assert ulps(cos, np.cos(angle)) < 2.02
    assert ulps(sin, np.sin(angle)) < 2.02


@pytest.mark.parametrize(
    ("seed", "step", "row", "column"),
    [
        (0, 0, 0, 0),
        (2**64 - 1, noise.START, 0, 0),
        (0x0123456789ABCDEF, 37, 2**32 - 1024, 2**32 - 1024),
        (1 << 32, 1999, 12345, 678),
    ],
)
def test_native_and_oracle_agree_in_every_bit(seed: int, step: int, row: int, column: int) -> None:
    native = native_normals((4, 1024, 1024), seed=seed, step=step, row=row, column=column)  # four times: 16.8 million values
    for top in range(0, 1024, 128):
        oracle = noise.normals((4, 128, 1024), seed=seed, step=step, row=row + top, column=column)
        assert same_bits(oracle, np.ascontiguousarray(native[:, top : top + 128]))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (3, 1, 700), (5, 700, 1), (9, 17, 31)])
def test_native_and_oracle_agree_on_odd_shapes(shape: tuple[int, int, int]) -> None:
    assert same_bits(native_normals(shape, seed=5, step=6, row=7, column=8), noise.normals(shape, seed=5, step=6, row=7, column=8))


def test_each_picture_of_a_batch_has_its_own_seed_and_step() -> None:
    out = np.empty((3, 3, 40, 50), np.float32)
    _native.normals(out, np.array([9, 8, 9], np.uint64), np.array([1, 1, 2], np.uint32))
    for n, (seed, step) in enumerate([(9, 1), (8, 1), (9, 2)]):
        assert same_bits(out[n], noise.normals((3, 40, 50), seed=seed, step=step))


def test_noise_belongs_to_the_place_and_not_to_the_size() -> None:
    whole = native_normals((6, 90, 110), seed=3, step=4)
    part = native_normals((2, 30, 41), seed=3, step=4, row=50, column=60)
    assert same_bits(part, np.ascontiguousarray(whole[:2, 50:80, 60:101]))


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    shape = (3, 256, 300)
    assert same_bits(native_normals(shape, seed=1, step=2, threads=threads), native_normals(shape, seed=1, step=2))


# The bounds below are five standard errors: for the right distribution one such check fails once in two million seeds.


def test_moments_are_those_of_the_standard_normal() -> None:
    z = native_normals((4, 2048, 2048), seed=2024, step=11).astype(np.float64).ravel()
    error = 5 / np.sqrt(z.size)
    square = z * z
    assert abs(np.mean(z)) < error
    assert abs(np.mean(square) - 1) < np.sqrt(2) * error
    assert abs(np.mean(square * z)) < np.sqrt(15) * error
    assert abs(np.mean(square * square) - 3) < np.sqrt(96) * error  # kurtosis


@pytest.mark.parametrize("channel", range(4))
def test_values_fall_evenly_into_bins_of_equal_probability(channel: int) -> None:
    z = native_normals((4, 1024, 1024), seed=77, step=noise.START)[channel].ravel()
    bins = 256
    edges = [NormalDist().inv_cdf(i / bins) for i in range(1, bins)]
    counts = np.bincount(np.searchsorted(edges, z), minlength=bins)
    expected = z.size / bins
    chi_square = np.sum((counts - expected) ** 2) / expected
    assert abs(chi_square - (bins - 1)) < 5 * np.sqrt(2 * (bins - 1))


def test_steps_pixels_channels_and_seeds_are_independent() -> None:
    shape = (6, 512, 512)
    z = native_normals(shape, seed=10, step=20)
    others = {
        "next step": native_normals(shape, seed=10, step=21),
        "starting noise": native_normals(shape, seed=10, step=noise.START),
        "next seed": native_normals(shape, seed=11, step=20),
        "seed's high word": native_normals(shape, seed=10 + (1 << 32), step=20),
        "seed and step exchanged": native_normals(shape, seed=20, step=10),
        "next pixel": np.roll(z, 1, axis=2),
        "next but one pixel": np.roll(z, 2, axis=2),
        "next row": np.roll(z, 1, axis=1),
        "row and column exchanged": np.triu(z, 1).swapaxes(1, 2),
        "next channel": np.roll(z, 1, axis=0),
        "next but one channel": np.roll(z, 2, axis=0),
        "next group of channels": np.roll(z, 4, axis=0),
    }
    for name, other in others.items():
        for power in (1, 2):  # squares too: the two normals of a pair have one radius, and must not show it
            a, b = (standardised(array.astype(np.float64) ** power) for array in (z, other))
            products = a * b
            assert abs(np.mean(products)) < 5 * np.std(products) / np.sqrt(products.size), (name, power)


def standardised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    centred: NDArray[np.float64] = values - np.mean(values)
    return centred / np.std(centred)


def test_a_place_beyond_32_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="below 2"):
        native_normals((1, 2, 2), seed=0, step=0, column=2**32 - 1)
