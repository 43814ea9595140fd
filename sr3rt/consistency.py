"""True colours: move a prediction to one that agrees with the low-res picture that it was made from.

A consistent picture is one that, scaled down, gives the input back: D(x0) = lr. The SR3 paper (Saharia et al. 2021,
arXiv:2104.07636, section 4) measures it as "consistency", the squared error between the low-res input and the downsampled
output. One step of back-projection (Irani and Peleg 1991) brings x0 there but for what D takes of U's result:

    x0 ← x0 + U(lr − D(x0))

D and U are Pillow's bicubic resizing, down and up, since that is how the low-res pictures and the condition are made. Its
kernel (Pillow documentation, Concepts, Filters; Resample.c): Keys' cubic with a = −1/2, of support 2, stretched by the factor
when scaling down; output pixel i is centred at (i + 1/2)·factor; taps beyond the border are cut and the rest is normalised to
sum 1. Resizing is separable, so D and U are one banded matrix along each axis.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sr3rt.errors import ImageError

__all__ = ["Projection", "consistency_psnr"]

Floats = NDArray[np.float32]


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' cubic convolution kernel (1981) with a = −1/2."""
    a, x = -0.5, np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


class _Resize:
    """Pillow's bicubic resizing of one axis from `length` to `target`.

    A banded matrix, kept as dense float32 blocks along the band: a block times a slice of the picture is one BLAS call, which
    is faster than summing over taps although most of a block is zeros.
    """

    BLOCK = 32  # input pixels per block, without the kernel's reach; measured: 16 to 64 are alike, 128 is slower

    def __init__(self, length: int, target: int) -> None:
        factor = length / target
        stretch = max(factor, 1.0)
        centres = (np.arange(target) + 0.5) * factor
        first = np.maximum((centres - 2 * stretch + 0.5).astype(np.int64), 0)
        last = np.minimum((centres + 2 * stretch + 0.5).astype(np.int64), length)
        rows = max(1, round(self.BLOCK / factor))
        self._blocks: list[tuple[slice, slice, Floats]] = []
        for start in range(0, target, rows):
            out = slice(start, min(start + rows, target))
            source = slice(int(first[out].min()), int(last[out].max()))
            places = np.arange(source.start, source.stop)
            inside = (places >= first[out, None]) & (places < last[out, None])
            weights = np.where(inside, _cubic((places + 0.5 - centres[out, None]) / stretch), 0.0)
            self._blocks.append((out, source, (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)))
        self._target = target

    def rows(self, picture: Floats) -> Floats:
        """(C, length, W) to (C, target, W)."""
        result = np.empty((picture.shape[0], self._target, picture.shape[2]), np.float32)
        for out, source, weights in self._blocks:
            np.matmul(weights, picture[:, source], out=result[:, out])
        return result

    def columns(self, picture: Floats) -> Floats:
        """(C, H, length) to (C, H, target)."""
        result = np.empty((*picture.shape[:2], self._target), np.float32)
        for out, source, weights in self._blocks:
            np.matmul(picture[:, :, source], weights.T, out=result[:, :, out])
        return result


class Projection:
    """D, U and the projection between pictures of (height, width) and (height·scale, width·scale).

    Build it once per size; it holds no state, so threads may share it. To agree up to the last row and column of a padded
    picture, crop first and build it for the true size.
    """

    def __init__(self, height: int, width: int, scale: int) -> None:
        self.size = height * scale, width * scale
        """(height, width) of the pictures that `project` takes."""
        self._low = (3, height, width)
        self._high = (3, *self.size)
        self._down = _Resize(height * scale, height), _Resize(width * scale, width)
        self._up = _Resize(height, height * scale), _Resize(width, width * scale)

    def down(self, picture: Floats) -> Floats:
        """D: (3, H, W) float32 to (3, h, w), as PIL's `resize(BICUBIC)` does in mode 'F'."""
        _check(picture, self._high)
        rows, columns = self._down
        return columns.columns(rows.rows(picture))  # rows first: the slices are contiguous, and the rest is smaller

    def up(self, picture: Floats) -> Floats:
        """U: (3, h, w) float32 to (3, H, W), as PIL's `resize(BICUBIC)` does in mode 'F'."""
        _check(picture, self._low)
        rows, columns = self._up
        return rows.rows(columns.columns(picture))

    def project(self, x0: Floats, lr: Floats) -> Floats:
        """x0 + U(lr − D(x0)), a new array, not clipped. x0 (3, H, W) and lr (3, h, w) float32 in [-1,1]."""
        _check(lr, self._low)
        result = self.up(lr - self.down(x0))
        result += x0
        return result


def consistency_psnr(y0: Floats, lr: Floats, scale: int) -> float:
    """PSNR in dB of D(y0) against lr, on the range [0,1]; infinite when they are equal.

    y0 (3, h·scale, w·scale) and lr (3, h, w), float32 in [-1,1].
    """
    difference = Projection(lr.shape[1], lr.shape[2], scale).down(y0) - lr
    error = float(np.mean(np.square(difference, dtype=np.float64))) / 4  # /4: [-1,1] is twice as wide as [0,1]
    return -10 * float(np.log10(error)) if error else float("inf")


def _check(picture: Floats, shape: tuple[int, int, int]) -> None:
    if picture.shape != shape or picture.dtype != np.float32:
        raise ImageError(f"found a {picture.dtype} picture of {picture.shape}; expected float32 {shape}")
