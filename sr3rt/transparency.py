"""Colours for what a picture hides: a file may hold anything there, and upscaling would carry it into the edges of what is seen."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["reveal"]

_CELL = 64  # the largest cell, in pixels: bicubic reaches 2, and what a network sees from afar matters ever less
_TILE = 256  # what is worked on at once, and so what bounds the memory; a multiple of the largest cell


def reveal(colour: NDArray[Any], seen: NDArray[np.bool_]) -> None:
    """Give hidden pixels the colours of seen ones nearby, in place. Where nothing at all is seen, nothing changes.

    colour  (H, W, 3) uint8, uint16 or float32 in [0,1]
    seen    (H, W)

    Cells of 1, 2×2, 4×4 … 64×64 pixels divide the picture. A hidden pixel takes the mean of what is seen in its cell and the eight
    around it, by the smallest cells that show anything; where even the largest do not, the mean of all that is seen.
    """
    if seen.all() or not seen.any():
        return
    mean = (np.einsum("hwc,hw->c", colour, seen, dtype=np.float64) / np.count_nonzero(seen)).astype(np.float32)
    for top in range(0, seen.shape[0], _TILE):
        for left in range(0, seen.shape[1], _TILE):
            tile = np.s_[top : top + _TILE, left : left + _TILE]
            rows, columns = np.nonzero(~seen[tile])
            if rows.size:
                found = _nearby(_sums(colour, seen, top, left), mean)[:, rows, columns].T
                colour[tile][rows, columns] = found if colour.dtype == np.float32 else np.round(found)


def _sums(colour: NDArray[Any], seen: NDArray[np.bool_], top: int, left: int) -> NDArray[np.float32]:
    """(4, rows, columns) of a tile and a cell around it: the colour where it is seen, and 1 there; all 0 beyond the picture."""
    side = _TILE + 2 * _CELL
    sums = np.zeros((4, side, side), np.float32)
    y, x = max(0, top - _CELL), max(0, left - _CELL)
    part = np.s_[y : top - _CELL + side, x : left - _CELL + side]
    height, width = seen[part].shape
    inside = sums[:, y - top + _CELL :, x - left + _CELL :][:, :height, :width]
    inside[3] = seen[part]
    np.multiply(colour[part].transpose(2, 0, 1), inside[3], out=inside[:3])
    return sums


def _nearby(sums: NDArray[np.float32], mean: NDArray[np.float32], *, cell: int = 1) -> NDArray[np.float32]:
    """(3, rows, columns): the colours for the tile's cells of that side, whose sums are given; float32 holds those of 8 bits exactly."""
    around = _around(sums, margin=_CELL // cell)
    if cell == _CELL or not sums[3].any():
        further = mean[:, None, None]
    else:
        further = _nearby(_fours(sums), mean, cell=2 * cell).repeat(2, axis=1).repeat(2, axis=2)
    return np.where(around[3] > 0, around[:3] / np.maximum(around[3], 1), further)


def _around(sums: NDArray[np.float32], *, margin: int) -> NDArray[np.float32]:
    """Each cell with the eight around it, without the margin."""
    cut = slice(margin - 1, 1 - margin or None)
    sums = sums[:, cut, cut]
    sums = sums[:, :-2] + sums[:, 1:-1] + sums[:, 2:]
    return sums[..., :-2] + sums[..., 1:-1] + sums[..., 2:]


def _fours(sums: NDArray[np.float32]) -> NDArray[np.float32]:
    """The cells of twice the side."""
    sums = sums[:, ::2] + sums[:, 1::2]
    return sums[..., ::2] + sums[..., 1::2]
