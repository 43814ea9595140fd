"""The machine's best matrix product, which every network's speed is held against; a contender like the others, in the same rounds."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.nn.functional import conv2d

SIDE = {"cpu": 2048, "cuda": 8192}


class Matmul:
    """Square products: float32 on a CPU, float16 on a GPU (its tensor cores' own precision). It steps as contenders do.

    A CPU's are made by whichever is quicker, the BLAS or oneDNN (as a 1×1 convolution): PyTorch's BLAS, MKL, leaves half of
    an AMD processor unused.
    """

    network = 0.0

    def __init__(self, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        side, dtype = SIDE[device], torch.float16 if device == "cuda" else torch.float32
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        out, self._device = torch.empty_like(a), device
        ways: list[Callable[[], object]] = [lambda: torch.mm(a, b, out=out)]
        if device == "cpu":
            pixels = a.reshape(1, 1, side, side).permute(0, 3, 1, 2)  # a row of `a` is a pixel's channels
            weight = b.T.reshape(side, side, 1, 1).contiguous(memory_format=torch.channels_last)
            ways.append(lambda: conv2d(pixels, weight))
        self.step = min(ways, key=_seconds) if len(ways) > 1 else ways[0]

    def finish(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def flops(device: str) -> int:
    """Operations of one step."""
    return 2 * SIDE[device] ** 3


def _seconds(product: Callable[[], object]) -> float:
    """The quickest of three, after one to warm up."""
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        product()
        times.append(time.perf_counter() - begin)
    return min(times[1:])
