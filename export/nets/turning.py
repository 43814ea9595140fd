"""Convolutions that turn and mirror as their picture does, as parametrizations of plain ones.

Group-equivariant convolutions over p4m (Cohen and Welling 2016, arXiv 1602.07576): features come in eights, one for each of the eight
ways to turn and mirror a square grid, and one set of weights serves them all. Whoever runs the network sees plain convolutions.
Few photographs then go eight times as far: nothing is learnt once for each direction.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

TURNS = [(quarters, mirrored) for mirrored in (False, True) for quarters in range(4)]
ORDER = len(TURNS)


def turned(h: Tensor, turn: tuple[int, bool]) -> Tensor:
    """(..., H, W) mirrored left to right, perhaps, then turned by quarters."""
    quarters, mirrored = turn
    return torch.rot90(h.flip(-1) if mirrored else h, quarters, (-2, -1))


def _sources() -> list[list[int]]:
    """[h][g] -> the turn h⁻¹·g: what g is, seen from h."""
    grid = torch.arange(9).view(3, 3)
    number = {tuple(turned(grid, turn).flatten().tolist()): i for i, turn in enumerate(TURNS)}
    product = [[number[tuple(turned(turned(grid, first), then).flatten().tolist())] for first in TURNS] for then in TURNS]
    return [[product[row.index(0)][g] for g in range(ORDER)] for row in product]


def _turns(base: Tensor, places: int) -> Tensor:
    """(N, C, k·s, k·s) -> (8N, C, k, s, k, s): each turned in all ways, the s×s places of a picture's square apart."""
    full = torch.stack([turned(base, turn) for turn in TURNS], dim=1).flatten(0, 1)
    split: Tensor = full.unflatten(3, (-1, places)).unflatten(2, (-1, places))  # type: ignore[no-untyped-call]
    return split


class Lifted(nn.Module):
    """(O/8, C, k·s, k·s) -> the weight (O, C·s·s, k, k) of a convolution that makes features of s×s places (pixel_unshuffle)."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.places = places

    def forward(self, base: Tensor) -> Tensor:
        return _turns(base, self.places).permute(0, 1, 3, 5, 2, 4).flatten(1, 3).contiguous(memory_format=torch.channels_last)

    def right_inverse(self, full: Tensor) -> Tensor:
        s = self.places
        split: Tensor = full[::ORDER].unflatten(1, (-1, s, s))  # type: ignore[no-untyped-call]
        return split.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3).contiguous()


class Turned(nn.Module):
    """(O/8, I/8, 8, k, k) -> the weight (O, I, k, k) of a convolution from features to features."""

    sources = _sources()

    def forward(self, base: Tensor) -> Tensor:
        rows = [turned(base[:, :, sources], turn) for sources, turn in zip(self.sources, TURNS, strict=True)]
        return torch.stack(rows, dim=1).flatten(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)

    def right_inverse(self, full: Tensor) -> Tensor:
        split: Tensor = full[::ORDER].unflatten(1, (-1, ORDER))  # type: ignore[no-untyped-call]
        return split.contiguous()


class Lowered(nn.Module):
    """(I/8, C, k·s, k·s) -> the weight (C·s·s, I, k, k) of a convolution that makes a picture's s×s places (pixel_shuffle) of features.

    `base` is what a feature adds to the pixels around it.
    """

    def __init__(self, places: int) -> None:
        super().__init__()
        self.places = places

    def forward(self, base: Tensor) -> Tensor:
        split = _turns(base, self.places).permute(1, 3, 5, 0, 2, 4)
        gathered = split.flip(-1, -2)  # a convolution gathers: to the left of a pixel is who adds to its right
        return gathered.flatten(0, 2).contiguous(memory_format=torch.channels_last)

    def right_inverse(self, full: Tensor) -> Tensor:
        s = self.places
        split: Tensor = full[:, ::ORDER].unflatten(0, (-1, s, s)).flip(-1, -2)  # type: ignore[no-untyped-call]
        return split.permute(3, 0, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3).contiguous()


class Repeated(nn.Module):
    """(O/n,) -> the bias (O,), each n times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, base: Tensor) -> Tensor:
        return base.repeat_interleave(self.times)

    def right_inverse(self, full: Tensor) -> Tensor:
        return full[:: self.times].contiguous()


def tie(conv: nn.Conv2d, weight: Lifted | Turned | Lowered) -> None:
    """From now on `conv` has an eighth of its weights. Of those that it has, each eight's first is kept.

    They are contiguous: PyTorch's fused optimisers change other memory than that of a parameter with gaps (seen with 2.13).
    """
    parametrize.register_parametrization(conv, "weight", weight)
    if conv.bias is not None:
        times = weight.places**2 if isinstance(weight, Lowered) else ORDER
        parametrize.register_parametrization(conv, "bias", Repeated(times))


def untie(net: nn.Module) -> None:
    """Every convolution in `net` is a plain one again, with the weights that it computes with."""
    for module in net.modules():
        for name in ("weight", "bias"):
            if parametrize.is_parametrized(module, name):
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
