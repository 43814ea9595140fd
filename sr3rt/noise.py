"""The noise as a function of place: normals from Philox4x32-10 and Box–Muller, in NumPy.

The oracle of `sr3rt/native/step.hpp`, which makes the same float32 operations in the same order, so that both agree in every bit.
z depends on seed, step, channel, row and column, and on nothing else: not on the picture's size, the batch or the tiling.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Floats = NDArray[np.float32]

START = 0xFFFFFFFF
"""The step index of the starting noise y_T."""

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_LN = (-0.131921247, 0.139617473, -0.121150166, 0.140110761, -0.166854739, 0.200100332, -0.249996886, 0.333332241, -0.5)
_SIN = (-75.465744, 81.5942307, -41.3416748)
_COS = (58.5612144, -85.4231186, 64.9391403, -19.7392082, 1.0)


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """Four random words for each counter: Philox4x32-10 (Salmon et al., SC 2011, section 3.3 and table 2).

    `counter` is four uint32 arrays that broadcast together, `key` two integers below 2**32.
    """
    x0, x1, x2, x3 = counter
    low, high = key
    for _ in range(10):
        even, odd = x0.astype(np.uint64) * _MULTIPLIERS[0], x2.astype(np.uint64) * _MULTIPLIERS[1]
        x0, x1, x2, x3 = _high(odd) ^ x1 ^ np.uint32(low), _low(odd), _high(even) ^ x3 ^ np.uint32(high), _low(even)
        low, high = (low + _WEYL[0]) & 0xFFFFFFFF, (high + _WEYL[1]) & 0xFFFFFFFF
    return x0, x1, x2, x3


def normals(shape: tuple[int, int, int], *, seed: int, step: int, row: int = 0, column: int = 0) -> Floats:
    """Standard normals z, float32 (C, H, W).

    `seed` is below 2**64, `step` below 2**32 (`START` for y_T); `row` and `column` are the place of the corner in the picture.
    The Philox counter is (column, row, step, c // 4), the key (seed's low word, seed's high word); words 0, 1 give the normals of
    channels 4k and 4k + 1, words 2, 3 those of 4k + 2 and 4k + 3.
    """
    channels, height, width = shape
    columns = np.arange(column, column + width, dtype=np.uint32)[None, :]
    rows = np.arange(row, row + height, dtype=np.uint32)[:, None]
    out = np.empty((-(-channels // 4) * 4, height, width), dtype=np.float32)
    for group in range(len(out) // 4):
        index = np.full((1, 1), group, dtype=np.uint32)
        words = philox((columns, rows, np.full((1, 1), step, dtype=np.uint32), index), (seed & 0xFFFFFFFF, seed >> 32))
        out[4 * group], out[4 * group + 1] = box_muller(words[0], words[1])
        out[4 * group + 2], out[4 * group + 3] = box_muller(words[2], words[3])
    return out[:channels]


def box_muller(first: Words, second: Words) -> tuple[Floats, Floats]:
    """Two normals from two words each (Box and Muller, 1958), of which the top 23 bits are used. The largest |z| is 5.77."""
    radius = np.sqrt(np.float32(-2) * ln(uniform(first >> np.uint32(9))))
    cos, sin = turn(second >> np.uint32(9))
    return radius * cos, radius * sin


def uniform(k: NDArray[np.integer]) -> Floats:
    """(k + 1/2) / 2^23, exact in float32 for |k| < 2^23; never 0 or 1."""
    return (k.astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)


def ln(u: Floats) -> Floats:
    """ln u for u in (0, 1), to 1 ulp: u = 2^e·m with m in [2/3, 4/3), and ln m by a polynomial in f = m - 1."""
    shifted = u.view(np.uint32) - np.uint32(0x3F2AAAAB)
    e = (shifted.view(np.int32) >> np.int32(23)).astype(np.float32)
    f = ((shifted & np.uint32(0x007FFFFF)) + np.uint32(0x3F2AAAAB)).view(np.float32) - np.float32(1)
    tail = e * np.float32(-2.12194440e-4) + f * f * _polynomial(_LN, f)
    return f + tail + e * np.float32(0.693359375)


def turn(k: Words) -> tuple[Floats, Floats]:
    """(cos, sin) of 2π·(k + 1/2) / 2^23: quarter turns from the integer, polynomials on an eighth of a turn either side."""
    quarter = (k + np.uint32(1 << 20)) >> np.uint32(21)
    t = uniform((k - (quarter << np.uint32(21))).view(np.int32))
    square = t * t
    s = t * np.float32(6.28318548) + t * square * _polynomial(_SIN, square)
    c = _polynomial(_COS, square)
    swap = (quarter & np.uint32(1)).astype(bool)
    cos_sign = ((quarter + np.uint32(1)) & np.uint32(2)) << np.uint32(30)
    sin_sign = (quarter & np.uint32(2)) << np.uint32(30)
    return _signed(np.where(swap, s, c), cos_sign), _signed(np.where(swap, c, s), sin_sign)


def _polynomial(coefficients: tuple[float, ...], x: Floats) -> Floats:
    """Horner's rule, highest power first, rounded after every operation."""
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + np.float32(coefficient)
    return value


def _signed(x: Floats, sign: Words) -> Floats:
    return (x.view(np.uint32) ^ sign).view(np.float32)


def _high(product: NDArray[np.uint64]) -> Words:
    return (product >> np.uint64(32)).astype(np.uint32)


def _low(product: NDArray[np.uint64]) -> Words:
    return product.astype(np.uint32)
