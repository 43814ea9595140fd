"""The native refinement step and its noise; the arithmetic is in native/step.hpp.

Arrays are C-contiguous NumPy arrays on the CPU, of exactly the dtype and shape stated: pictures float32 (N, C, H, W), `rows`
float32 (N, 7) with the columns level, p, q, a, b, c, s (a row of a sampler's table for each picture), `seeds` uint64 (N,),
`steps` uint32 (N,). Written arrays may not share memory with any other argument. The GIL is released during the work, which is
done by `threads` threads (fewer where there is little); their number does not change a bit of the result.

Raises TypeError for a wrong dtype, shape, layout or a read-only output, ValueError for overlapping arrays or threads < 1; the
message names the argument and what was found.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 (Salmon et al., SC 2011): four words from a counter of four words and a key of two."""

def normals(
    out: NDArray[np.float32],
    seeds: NDArray[np.uint64],
    steps: NDArray[np.uint32],
    row: int = 0,
    column: int = 0,
    threads: int = 1,
) -> None:
    """Fill `out` with the standard normals of each picture's seed and step; see `sr3rt.noise.normals`.

    `row` and `column` are the place of the array's corner in the picture.
    """

def step(
    y: NDArray[np.float32],
    net: NDArray[np.float32],
    x0: NDArray[np.float32],
    rows: NDArray[np.float32],
    seeds: NDArray[np.uint64],
    steps: NDArray[np.uint32],
    clip: bool,
    threads: int,
) -> bool:
    """One refinement step in place: x0 = clip(p·y + q·net), y ← a·y + b·x0 + c·x0_before + s·z.

    `x0` holds the previous prediction on entry; it is not read where c = 0. z are the normals of (seed, step) of a picture whose
    corner is at (0, 0), not made where s = 0. The prediction is clipped to [-1, 1] if `clip`. Returns False if any new y, or any
    prediction before clipping, is NaN or infinite.
    """

def predict(
    y: NDArray[np.float32],
    net: NDArray[np.float32],
    x0_new: NDArray[np.float32],
    rows: NDArray[np.float32],
    clip: bool,
    threads: int,
) -> bool:
    """The first half of `step`: x0_new = clip(p·y + q·net)."""

def advance(
    y: NDArray[np.float32],
    x0_new: NDArray[np.float32],
    x0: NDArray[np.float32],
    rows: NDArray[np.float32],
    seeds: NDArray[np.uint64],
    steps: NDArray[np.uint32],
    z: NDArray[np.float32] | None,
    threads: int,
) -> bool:
    """The second half of `step`: y ← a·y + b·x0_new + c·x0 + s·z, then x0 ← x0_new. `z`, unless None, is the noise."""
