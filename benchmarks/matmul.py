"""The machine's best matrix product, which every network's speed is held against; a contender like the others, in the same rounds."""

from __future__ import annotations

import torch

SIDE = {"cpu": 2048, "cuda": 8192}


class Matmul:
    """Square products: float32 on a CPU, float16 on a GPU (its tensor cores' own precision). It steps as contenders do."""

    network = 0.0

    def __init__(self, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        dtype = torch.float16 if device == "cuda" else torch.float32
        self._a, self._b = (torch.randn(SIDE[device], SIDE[device], device=device, dtype=dtype) for _ in range(2))
        self._out, self._device = torch.empty_like(self._a), device

    def step(self) -> None:
        torch.mm(self._a, self._b, out=self._out)

    def finish(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def flops(device: str) -> int:
    """Operations of one step."""
    return 2 * SIDE[device] ** 3
