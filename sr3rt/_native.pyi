"""The native refinement step and its noise; the arithmetic is in native/step.hpp.

Arrays are C-contiguous NumPy arrays on the CPU, of exactly the dtype and shape stated: pictures float32 (N, C, H, W), `rows`
float32 (N, 7) with the columns level, p, q, a, b, c, s (a row of a sampler's table for each picture), `seeds` uint64 (N,),
`steps` uint32 (N,), `corners` uint32 (N, 2): the place (row, column) of each array's corner in its picture, None for (0, 0).
Written arrays may not share memory with any other argument. The GIL is released during the work, which is done by `threads`
threads (fewer where there is little); their number does not change a bit of the result.

Raises TypeError for a wrong dtype, shape, layout or a read-only output, ValueError for overlapping arrays or threads < 1; the
message names the argument and what was found.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 (Salmon et al., SC 2011): four words from a counter of four words and a key of two."""

def normals(
    out: NDArray[np.float32],
    seeds: NDArray[np.uint64],
    steps: NDArray[np.uint32],
    threads: int = 1,
    corners: NDArray[np.uint32] | None = None,
) -> None:
    """Fill `out` with the standard normals of each picture's seed and step; see `sr3rt.noise.normals`."""

def step(
    y: NDArray[np.float32],
    net: NDArray[np.float32],
    x0: NDArray[np.float32],
    rows: NDArray[np.float32],
    seeds: NDArray[np.uint64],
    steps: NDArray[np.uint32],
    clip: bool,
    threads: int,
    corners: NDArray[np.uint32] | None = None,
) -> bool:
    """One refinement step in place: x0 = clip(p·y + q·net), y ← a·y + b·x0 + c·x0_before + s·z.

    `x0` holds the previous prediction on entry; it is not read where c = 0. z are the normals of (seed, step) at the array's
    places, not made where s = 0. The prediction is clipped to [-1, 1] if `clip`. Returns False if any new y, or any
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
    corners: NDArray[np.uint32] | None = None,
) -> bool:
    """The second half of `step`: y ← a·y + b·x0_new + c·x0 + s·z, then x0 ← x0_new. `z`, unless None, is the noise."""

def instructions() -> str | None:
    """The best instruction set that `Network` can use here in float32: "avx512", "avx2", or None where there is neither."""

def bfloat16() -> str | None:
    """The best instruction set with products of bfloat16: "amx_bf16", "avx512_bf16", or None where this processor has neither."""

def has(instructions: str) -> bool:
    """Whether `Network` can use that here."""

_Linear: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32]]  # weight (outputs, inputs), bias (outputs,)
_Norm: TypeAlias = tuple[int, float, NDArray[np.float32], NDArray[np.float32]]  # groups, eps, weight, bias
_Level: TypeAlias = tuple[bool, float, NDArray[np.float32], list[_Linear], bool]  # log_sigma, scale, frequencies, layers, silu

class Network:
    """A network of layers over numbered registers (native/network.hpp), built by `sr3rt.backends.native`; docs/program.md says what
    each layer computes. Every method that adds a layer returns the register that it writes.

    instructions: "auto" (the best in float32), "avx2" or "avx512"; "bf16" (the best in bfloat16), "quick_bf16" (that, where it is
    faster than float32), "amx_bf16" or "avx512_bf16", or "avx2_bf16", which computes the latter's numbers slowly on processors without
    it: weights, and what they are multiplied by, are rounded to bfloat16, sums and all else are float32. threads: that a run uses, the
    caller's among them. Arrays are float32 and C-contiguous; they are copied. Raises ValueError for what does not fit, or a processor
    without those instructions.
    """

    def __init__(self, instructions: str, threads: int, channels: int, level: _Level) -> None: ...
    @property
    def instructions(self) -> str: ...
    def joined_planes(self) -> int:
        """x and y as one register."""

    def unshuffled(self, by: int) -> int: ...
    def to_bands(self, mean: int, detail: float) -> int: ...
    def convolution(
        self,
        sources: list[int],
        weight: NDArray[np.float32],
        bias: NDArray[np.float32] | None,
        stride: int,
        norm: _Norm | None,
        silu: bool,
        resample: str,
        level: _Linear | None,
        scaled: bool,
        after: bool,
        add: int,
        gain: float,
        like: int,
    ) -> int:
        """resample: "none", "up" or "down". scaled: whether the level scales too. add: a register, or -1.

        like: the register that an earlier convolution of the same weight wrote, with which this one may have it in common, or -1.
        """

    def attention(self, source: int) -> int: ...
    def resampling(self, source: int, by: str) -> int: ...
    def result(self, source: int) -> None:
        """That register is the network's prediction."""

    def from_bands(self, bands: int, mean: int, fine: int, detail: float) -> None: ...
    def run(self, x: NDArray[np.float32], y: NDArray[np.float32], level: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        """x, y (N, C, H, W) and level (N, 1) -> out (N, C, H, W), which may not share memory with the others.

        The GIL is released. Calls from several threads take turns. The number of threads and of pictures does not change a bit of a
        picture's result. Raises ValueError for other shapes, also where the network's stride does not divide H or W; MemoryError.
        """

    def forked(self) -> None:
        """To be called first in a process that was forked: the thread that was in `run` meanwhile is not there to leave it."""
    def memory(self, count: int, height: int, width: int) -> int:
        """Bytes that a run of so many pictures takes beyond what the network holds already."""
