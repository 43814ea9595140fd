"""The reference: SR3's loop in PyTorch as people run it, and what PyTorch itself offers to make it faster.

Every step copies the noise level from the host, predicts, clips, takes the posterior's mean and adds `randn`: the paper's algorithm 2
as written, with the constants of `sr3rt.samplers`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sr3rt.noise import START
from sr3rt.samplers import LEVEL, A, B, P, Q, S, Table

Floats = NDArray[np.float32]


class EagerLoop:
    """Runs of `rows` for x (N, C, H, W), one after the other. The state is float32; the network may be narrower.

    network: seconds spent in the network so far; on a GPU by its own clock, counted when `finish` is called.
    exact: whether given noise is followed in true float32, for others to be compared with. On a GPU PyTorch's default is TF32, and timed.
    """

    def __init__(
        self, net: nn.Module, x: Floats, rows: Table, *, dtype: torch.dtype, channels_last: bool, device: str, exact: bool = False
    ) -> None:
        self._exact = exact
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self._net = net.to(device=device, dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
        self._x = torch.from_numpy(x).to(device=device, dtype=dtype, memory_format=layout)
        self._rows, self._dtype, self._layout, self._device = rows, dtype, layout, device
        self.network = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.start()

    def compile(self) -> None:
        """As `torch.compile(…, mode="max-autotune")` makes the network; the first step then takes a minute or more."""
        self._net = torch.compile(self._net, mode="max-autotune", dynamic=False)

    def start(self, noise: Callable[[int], Floats] | None = None) -> None:
        """A new picture; noise(step) (N, C, H, W) replaces `randn` (`sr3rt.bench.Noise`)."""
        self._noise, self._row = noise, 0
        self._y = self._draw(START)
        self._x0 = torch.zeros_like(self._y)

    @torch.inference_mode()
    def step(self) -> None:
        """One row; after the last, the first of a new picture."""
        if self._row == len(self._rows):
            self.start()
        row = [float(value) for value in self._rows[self._row]]
        level = torch.full((len(self._x), 1), row[LEVEL], dtype=torch.float32).to(self._device, self._dtype)
        exactly = torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if self._exact and self._noise else nullcontext()
        with exactly:
            out = self._predict(self._x, self._y.to(dtype=self._dtype, memory_format=self._layout), level)
        self._x0 = (row[P] * self._y + row[Q] * out).clamp_(-1, 1)
        self._y = row[A] * self._y + row[B] * self._x0
        if row[S]:
            self._y = self._y + row[S] * self._draw(self._row)
        self._row += 1

    def finish(self) -> None:
        """Wait for the device."""
        if self._device == "cuda":
            torch.cuda.synchronize()
            self.network += sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
            self._events.clear()

    def prediction(self) -> Floats:
        """The latest x0, (N, C, H, W)."""
        return np.array(self._x0.float().cpu().contiguous())

    def _predict(self, x: Tensor, y: Tensor, level: Tensor) -> Tensor:
        if self._device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            result: Tensor = self._net(x, y, level).float()
            end.record()
            self._events.append((begin, end))
            return result
        start = time.perf_counter()
        result = self._net(x, y, level).float()
        self.network += time.perf_counter() - start
        return result

    def _draw(self, step: int) -> Tensor:
        if self._noise is None:
            return torch.randn(self._x.shape, device=self._device)
        return torch.from_numpy(self._noise(step)).to(self._device)
