"""A network's program (docs/program.md) carried out in PyTorch, at any precision: what other implementations are compared with.

Written from the specification, not from the networks. Nothing is ignored: an unknown operation, a key too many or one too few raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

LIFT = (-1.586134342, -0.052980118, 0.882911075, 0.443506852)  # CDF 9/7
GAIN = 1.149604398


def run(
    program: Mapping[str, Any],
    tensors: Mapping[str, NDArray[Any]],
    x: ArrayLike,
    y: ArrayLike,
    level: ArrayLike,
    dtype: torch.dtype = torch.float64,
) -> NDArray[Any]:
    """The register "out" at the end, (N, C, H, W). x, y: (N, C, H, W); level: (N, 1). Raises KeyError, TypeError or ValueError."""
    return _Run(tensors, x, y, level, dtype).run(**program)


class _Run:
    def __init__(self, tensors: Mapping[str, NDArray[Any]], x: ArrayLike, y: ArrayLike, level: ArrayLike, dtype: torch.dtype) -> None:
        self.tensors, self.dtype = tensors, dtype
        self.level = self._of(level)
        self.registers = {"x": self._of(x), "y": self._of(y)}
        self.do: Mapping[str, Callable[..., Tensor]] = {
            "convolution": self.convolution,
            "resample": _resample,
            "attention": _attention,
            "to_bands": self.to_bands,
            "from_bands": self.from_bands,
        }

    def run(self, *, format: int, level: dict[str, Any], operations: list[dict[str, Any]]) -> NDArray[Any]:
        if format != 1:
            raise ValueError(f"format {format}, expected 1")
        self.embedding = self.embed(**level)
        for operation in operations:
            self.step(**operation)
        out: NDArray[Any] = self.registers["out"].numpy()
        return out

    def step(self, *, do: str, to: str, **rest: Any) -> None:
        sources = [self.registers[name] for name in rest.pop("from")]
        if to in self.registers:
            raise ValueError(f"register {to} is written twice")
        self.registers[to] = self.do[do](*sources, **rest)

    def embed(self, *, input: str, scale: float, frequencies: str, layers: list[dict[str, str]], silu: bool) -> Tensor:
        gamma, noise = self._gamma()
        phase = {"level": self.level, "log_sigma": (noise / gamma).log() / 2}[input] * scale * self.tensor(frequencies)
        e = torch.cat([phase.sin(), phase.cos()], dim=1)
        for i, layer in enumerate(layers):
            e = self._linear(F.silu(e) if i else e, **layer)
        return F.silu(e) if silu else e

    def convolution(
        self,
        *sources: Tensor,
        norm: dict[str, Any] | None,
        silu: bool,
        resample: str | None,
        weight: str,
        bias: str | None,
        stride: int,
        level: dict[str, str] | None,
        after: str | None,
        add: str | None,
        gain: float,
    ) -> Tensor:
        h = torch.cat(sources, dim=1)
        if norm is not None:
            h = self._norm(h, **norm)
        if silu:
            h = F.silu(h)
        if resample is not None:
            h = _resample(h, by=resample)
        kernel = self.tensor(weight)
        padding = {(1, 1): 0, (3, 3): 1}[tuple(kernel.shape[2:])]
        h = F.conv2d(h, kernel, None if bias is None else self.tensor(bias), stride=stride, padding=padding)
        if level is not None:
            h = self._conditioned(h, **level)
        h = {None: lambda h: h, "silu": F.silu}[after](h)
        return (h if add is None else h + self.registers[add]) * gain

    def to_bands(self, x: Tensor, y: Tensor, *, detail: float) -> Tensor:
        return torch.cat([F.pixel_unshuffle(x, 2), self._details(x, y) * self._spread(detail).rsqrt()], dim=1)

    def from_bands(self, x: Tensor, y: Tensor, h: Tensor, *, detail: float, coarse: float) -> Tensor:
        _, noise = (value[:, :, None, None] for value in self._gamma())
        spread, channels = self._spread(detail), x.shape[1]
        low, fine = h.split([channels, 3 * channels], dim=1)
        fine = self._details(x, y) * (self.level[:, :, None, None] * detail**2 / spread) + fine * (noise.sqrt() * detail * spread.rsqrt())
        first, second, third = fine.chunk(3, dim=1)
        return x + _merge(_merge(low * coarse, first, 3), _merge(second, third, 3), 2)

    def tensor(self, name: str) -> Tensor:
        return self._of(self.tensors[name])

    def _of(self, values: ArrayLike) -> Tensor:
        return torch.from_numpy(np.asarray(values)).to(self.dtype)

    def _linear(self, e: Tensor, *, weight: str, bias: str) -> Tensor:
        return F.linear(e, self.tensor(weight), self.tensor(bias))

    def _norm(self, h: Tensor, *, groups: int, eps: float, weight: str, bias: str) -> Tensor:
        return F.group_norm(h, groups, self.tensor(weight), self.tensor(bias), eps)

    def _conditioned(self, h: Tensor, *, weight: str, bias: str, kind: str) -> Tensor:
        s = self._linear(self.embedding, weight=weight, bias=bias)[:, :, None, None]
        if kind == "shift":
            return h + s
        if kind == "scale_shift":
            scale, shift = s.chunk(2, dim=1)
            return h * (1 + scale) + shift
        raise ValueError(f"level of kind {kind!r}")

    def _gamma(self) -> tuple[Tensor, Tensor]:
        """γ and 1 - γ, each (N, 1)."""
        gamma = self.level * self.level
        return gamma, (1 - gamma).clamp(min=1e-7)

    def _spread(self, detail: float) -> Tensor:
        gamma, noise = (value[:, :, None, None] for value in self._gamma())
        return gamma * detail**2 + noise

    def _details(self, x: Tensor, y: Tensor) -> Tensor:
        low, high = _split(y - self.level[:, :, None, None] * x, 2)
        _, first = _split(low, 3)
        return torch.cat([first, *_split(high, 3)], dim=1)


def _resample(h: Tensor, *, by: str) -> Tensor:
    if by == "up":
        return h.repeat_interleave(2, 2).repeat_interleave(2, 3)
    if by == "down":
        return (h[:, :, ::2, ::2] + h[:, :, 1::2, ::2] + h[:, :, ::2, 1::2] + h[:, :, 1::2, 1::2]) / 4
    raise ValueError(f"resampling by {by!r}")


def _attention(qkv: Tensor) -> Tensor:
    q, k, v = qkv.flatten(2).transpose(1, 2).chunk(3, dim=2)  # (N, H·W, C)
    weights = torch.softmax(q @ k.transpose(1, 2) * q.shape[2] ** -0.5, dim=2)
    return (weights @ v).transpose(1, 2).unflatten(2, qkv.shape[2:])


def _shifted(h: Tensor, dim: int, by: int) -> Tensor:
    """h[i + by], `by` 1 or -1, the end repeated."""
    n = h.shape[dim]
    return h.index_select(dim, (torch.arange(n) + by).clamp(0, n - 1))


def _split(h: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """One level of CDF 9/7 along `dim`: low and high band."""
    even, odd = (h.index_select(dim, torch.arange(start, h.shape[dim], 2)) for start in (0, 1))
    for i in (0, 2):
        odd = odd + LIFT[i] * (even + _shifted(even, dim, 1))
        even = even + LIFT[i + 1] * (odd + _shifted(odd, dim, -1))
    return even * GAIN, odd / GAIN


def _merge(low: Tensor, high: Tensor, dim: int) -> Tensor:
    """The inverse of `_split`."""
    even, odd = low / GAIN, high * GAIN
    for i in (2, 0):
        even = even - LIFT[i + 1] * (odd + _shifted(odd, dim, -1))
        odd = odd - LIFT[i] * (even + _shifted(even, dim, 1))
    return torch.stack([even, odd], dim + 1).flatten(dim, dim + 1)
