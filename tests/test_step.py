"""The native refinement step against its formula in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sr3rt import _native, noise

Floats = NDArray[np.float32]
SHAPES = [(1, 1, 1, 1), (2, 3, 7, 5), (3, 5, 33, 40), (2, 3, 128, 130)]

# level, p, q, a, b, c, s: ancestral, deterministic with memory, with everything, a last step
ROWS = [
    (0.9, 1.1, -0.4, 0.3, 0.7, 0.0, 0.2),
    (0.8, 1.2, -0.6, 0.9, 0.2, -0.1, 0.0),
    (0.5, 3.0, -2.0, 0.7, 0.2, 0.3, 0.4),
    (1, 1, 0, 0, 1, 0, 0),
]


class Case:
    """A batch with random contents, each picture with its own row, seed and step."""

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        random = np.random.default_rng(5)
        self.y, self.net, self.x0, self.z = (random.standard_normal(shape, dtype=np.float32) for _ in range(4))
        self.x0_new = np.full(shape, np.nan, np.float32)
        self.rows = np.array([ROWS[n % len(ROWS)] for n in range(shape[0])], np.float32).reshape(-1, 7)
        self.seeds = np.arange(100, 100 + shape[0], dtype=np.uint64) << np.uint64(31)
        self.steps = np.arange(7, 7 + shape[0], dtype=np.uint32)

    def step(self, clip: bool = True, threads: int = 1) -> bool:
        return _native.step(self.y, self.net, self.x0, self.rows, self.seeds, self.steps, clip, threads)

    def predict(self, clip: bool = True, threads: int = 1) -> bool:
        return _native.predict(self.y, self.net, self.x0_new, self.rows, clip, threads)

    def advance(self, z: Floats | None = None, threads: int = 1) -> bool:
        return _native.advance(self.y, self.x0_new, self.x0, self.rows, self.seeds, self.steps, z, threads)

    def own_noise(self) -> Floats:
        shape = self.y.shape[1:]
        places = zip(self.seeds, self.steps, strict=True)
        return np.stack([noise.normals((shape[0], shape[1], shape[2]), seed=int(seed), step=int(step)) for seed, step in places])


def formula(case: Case, clip: bool, dtype: type[np.floating[Any]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """(y, x0) after a step, with every operation in `dtype`."""
    _, p, q, a, b, c, s = (column.astype(dtype).reshape(-1, 1, 1, 1) for column in case.rows.T)
    y, net, x0, z = (array.astype(dtype) for array in (case.y, case.net, case.x0, case.own_noise()))
    new = p * y + q * net
    if clip:
        new = np.clip(new, dtype(-1), dtype(1))
    y = a * y + b * new
    y = np.where(c != 0, y + c * x0, y)
    return np.where(s != 0, y + s * z, y), new


def bits(*arrays: Floats) -> list[bytes]:
    return [array.tobytes() for array in arrays]


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_step_is_the_float32_formula_in_every_bit(shape: tuple[int, int, int, int], clip: bool) -> None:
    case = Case(shape)
    y, x0 = formula(case, clip, np.float32)
    assert case.step(clip)
    assert bits(case.y, case.x0) == bits(y, x0)


def test_step_is_close_to_the_float64_formula() -> None:
    case = Case((3, 3, 64, 64))
    y, x0 = formula(case, True, np.float64)
    assert case.step()
    np.testing.assert_allclose(case.x0, x0, rtol=0, atol=4e-6)  # eight roundings of terms up to 15 in size
    np.testing.assert_allclose(case.y, y, rtol=0, atol=4e-6)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_predict_then_advance_is_step_in_every_bit(shape: tuple[int, int, int, int], clip: bool) -> None:
    whole, halves = Case(shape), Case(shape)
    assert whole.step(clip)
    assert halves.predict(clip)
    assert halves.advance()
    assert bits(halves.y, halves.x0, halves.x0_new) == bits(whole.y, whole.x0, whole.x0)


def test_injected_noise_takes_the_place_of_the_seed() -> None:
    own, given, other = Case(SHAPES[2]), Case(SHAPES[2]), Case(SHAPES[2])
    for case in (own, given, other):
        case.predict()
    assert own.advance()
    assert given.advance(given.own_noise())
    assert other.advance(other.z)
    assert bits(given.y) == bits(own.y) != bits(other.y)


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_do_not_change_a_bit(threads: int) -> None:
    one, many, halves = (Case((3, 3, 200, 128)) for _ in range(3))
    assert one.step(threads=1)
    assert many.step(threads=threads)
    assert halves.predict(threads=threads)
    assert halves.advance(threads=threads)
    assert bits(many.y, many.x0) == bits(one.y, one.x0) == bits(halves.y, halves.x0)


def test_a_picture_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    batch, alone = Case(SHAPES[2]), Case(SHAPES[2])
    assert batch.step()
    for name in ("y", "net", "x0", "rows", "seeds", "steps"):
        setattr(alone, name, getattr(alone, name)[2:3].copy())
    assert alone.step()
    assert bits(alone.y, alone.x0) == bits(batch.y[2:3], batch.x0[2:3])


def test_the_previous_prediction_is_not_read_where_c_is_zero() -> None:
    case, clean = Case((1, 3, 20, 20)), Case((1, 3, 20, 20))
    case.x0[:] = np.nan
    assert case.step()
    assert clean.step()
    assert bits(case.y, case.x0) == bits(clean.y, clean.x0)


def test_noise_is_not_read_where_s_is_zero() -> None:
    case = Case((2, 3, 20, 20))
    case.z[1] = np.nan  # the second row has s = 0
    assert case.predict()
    assert case.advance(case.z)
    assert np.isfinite(case.y).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["y", "net", "x0"])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (2, 4, 32, 39), (2, 2, 16, 20)])
def test_step_tells_that_a_value_is_not_finite(name: str, value: float, place: tuple[int, ...]) -> None:
    case = Case(SHAPES[2])
    case.rows[:] = ROWS[2]
    getattr(case, name)[place] = value
    assert not case.step(clip=True)


def test_clipping_does_not_hide_an_overflow_nor_turn_nan_into_a_number() -> None:
    case = Case((1, 1, 1, 2))
    case.net[:] = [[[[3e38, np.nan]]]]
    case.rows[0, 2] = 10
    assert not case.predict(clip=True)
    assert case.x0_new[0, 0, 0, 0] == 1
    assert np.isnan(case.x0_new[0, 0, 0, 1])


def test_advance_tells_that_y_overflows() -> None:
    case = Case((1, 3, 8, 8))
    assert case.predict()
    case.y[0, 1, 2, 3] = 3e38
    case.rows[0, 3] = 10
    assert not case.advance()


def test_large_finite_values_pass() -> None:
    case = Case((1, 1, 4, 4))
    case.rows[0] = (1, 1, 0, 1, 0, 0, 0)
    case.y[:] = np.finfo(np.float32).max
    assert case.step(clip=False)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 0, 8)])
def test_an_empty_batch_is_no_error(shape: tuple[int, int, int, int]) -> None:
    assert Case(shape).step()


def transposed(array: Floats) -> Floats:
    return np.ascontiguousarray(array.swapaxes(2, 3)).swapaxes(2, 3)


def read_only(array: Floats) -> Floats:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("y", lambda y: y[0], r"y must be .*\(N, C, H, W\); found float32 of shape \(3, 7, 5\)"),
        ("y", read_only, "y must be writable"),
        ("net", lambda net: net.astype(np.float64), r"net must be a float32 array of shape \(2, 3, 7, 5\); found float64"),
        ("net", lambda net: net[:, :2].copy(), r"net must be .*; found float32 of shape \(2, 2, 7, 5\)"),
        ("net", transposed, "net must be C-contiguous"),
        ("net", lambda net: net.tolist(), "net must be a float32 array .*; found list"),
        ("x0", lambda x0: x0.astype(np.float16), "x0 must be a float32 array .*; found float16"),
        ("rows", lambda rows: rows[:, :6].copy(), r"rows must be a float32 array of shape \(2, 7\)"),
        ("rows", lambda rows: rows[:1].copy(), r"rows must be .* \(2, 7\); found float32 of shape \(1, 7\)"),
        ("seeds", lambda seeds: seeds.astype(np.int64), r"seeds must be a uint64 array of shape \(2,\); found int64"),
        ("steps", lambda steps: steps.astype(np.uint64), r"steps must be a uint32 array of shape \(2,\); found uint64"),
    ],
)
def test_a_wrong_array_is_refused_by_name_and_nothing_is_written(name: str, change: Callable[[Any], Any], message: str) -> None:
    case, untouched = Case(SHAPES[1]), Case(SHAPES[1])
    setattr(case, name, change(getattr(case, name)))
    with pytest.raises(TypeError, match=message):
        case.step()
    others = {"y", "x0"} - {name}
    assert all(bits(getattr(case, other)) == bits(getattr(untouched, other)) for other in others)


@pytest.mark.parametrize("threads", [0, -1])
def test_fewer_than_one_thread_is_refused(threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads must be at least 1; found {threads}"):
        Case(SHAPES[1]).step(threads=threads)


@pytest.mark.parametrize(("written", "other"), [("y", "net"), ("y", "x0"), ("x0", "net")])
def test_shared_memory_is_refused(written: str, other: str) -> None:
    case = Case(SHAPES[1])
    setattr(case, other, getattr(case, written))
    with pytest.raises(ValueError, match="shares memory"):
        case.step()
