"""The shipped model's network: SR3 on the finest details of what a mean leaves, made for a CPU.

It is an SR3 network in its contract (condition `x`, state `y`, noise level √γ in; a prediction out) with four changes that a
small network trained on few photographs needs, each from the literature:

- A part that sees neither state nor level predicts the mean given `x`; what is sampled is the rest, y0 less that mean (Whang et al.
  2022, arXiv 2112.02475). It works at the input's resolution, where a pixel's work reaches furthest (ESPCN, arXiv 1609.05158), its
  features turn and mirror as the picture does (`turning.py`), and the part that samples is given them too.
- Only three detail bands are sampled, of one level of a wavelet with a steep edge (`LIFT`), made of lifting steps (Daubechies and
  Sweldens 1998): texture is drawn, what lies between it and the input's resolution is not rolled dice for (docs/model.md).
- Input, output and skip are scaled so that the sampling part always sees and makes unit variance (EDM, arXiv 2206.00364, table
  1); the prediction is therefore y0 itself, and colours cannot drift by a factor √(1/γ).
- No normalisation over the picture (EDSR, arXiv 1707.02921) and no attention: what a pixel becomes depends on its
  neighbourhood only, at any size that `stride` divides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sr3rt.program import GAIN, LIFT

SCALE = 4  # of the picture to its input
MEAN, DETAIL = 0.1, 0.08  # deviations of y0 - x, and of the detail bands of what the mean leaves, of photographs in [-1, 1]


@dataclass(frozen=True)
class CompactConfig:
    """Of the mean: width and blocks. Of the sampling part: widths and blocks per level, finest (half resolution) first;
    `blocks[i]` on the way down, one more on the way up.
    """

    channels: int = 3
    mean_width: int = 96
    mean_blocks: int = 10
    widths: tuple[int, ...] = (32, 64, 96)
    blocks: tuple[int, ...] = (1, 2, 2)
    embedding: int = 128

    @property
    def stride(self) -> int:
        """Height and width must be divisible by this."""
        return max(SCALE, int(2 ** len(self.widths)))


def _lifted(line: Tensor, other: Tensor, taps: tuple[float, ...], dim: int, *, odd: bool, sign: float = 1.0) -> Tensor:
    """line[i] + Σ taps[k] · (other[i - k] + other[i + 1 + k]) on odd places, other[i - 1 - k] and other[i + k] on even ones.

    Beyond an end lies the end's own value.
    """
    n, reach = line.shape[dim], len(taps)
    ends = [other.narrow(dim, i, 1) for i in (0, n - 1)]
    wide = torch.cat([ends[0]] * (reach - odd) + [other] + [ends[1]] * (reach - 1 + odd), dim)
    for k, tap in enumerate(taps):
        line = line + sign * tap * (wide.narrow(dim, reach - 1 - k, n) + wide.narrow(dim, reach + k, n))
    return line


def _split(h: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    even, odd = h.unflatten(dim, (-1, 2)).unbind(dim + 1)  # type: ignore[no-untyped-call]
    odd = _lifted(odd, even, LIFT[0], dim, odd=True)
    even = _lifted(even, odd, LIFT[1], dim, odd=False)
    odd = _lifted(odd, even, LIFT[2], dim, odd=True)
    return even * GAIN, odd / GAIN


def _merge(even: Tensor, odd: Tensor, dim: int) -> Tensor:
    even, odd = even / GAIN, odd * GAIN
    odd = _lifted(odd, even, LIFT[2], dim, odd=True, sign=-1)
    even = _lifted(even, odd, LIFT[1], dim, odd=False, sign=-1)
    odd = _lifted(odd, even, LIFT[0], dim, odd=True, sign=-1)
    return torch.stack([even, odd], dim + 1).flatten(dim, dim + 1)


def bands(h: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) -> coarse band (B, C, H/2, W/2) and detail bands (B, 3C, H/2, W/2)."""
    low, high = _split(h, 2)
    coarse, first = _split(low, 3)
    return coarse, torch.cat([first, *_split(high, 3)], dim=1)


def from_bands(coarse: Tensor, details: Tensor) -> Tensor:
    """The inverse of `bands`."""
    first, second, third = details.chunk(3, dim=1)
    return _merge(_merge(coarse, first, 3), _merge(second, third, 3), 2)


class LevelEmbedding(nn.Module):
    """ln σ -> features: sines and cosines of geometric frequencies, then two linear layers."""

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        exponents = torch.linspace(math.log(0.25), math.log(8.0), 16, device="cpu")  # real even where the net is built on "meta"
        self.register_buffer("frequencies", torch.exp(exponents), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(32, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())

    def forward(self, log_sigma: Tensor) -> Tensor:
        phase = log_sigma * self.frequencies
        features: Tensor = self.mlp(torch.cat([phase.sin(), phase.cos()], dim=1))
        return features


class PlainBlock(nn.Module):
    """Residual block without normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.kaiming_normal_(self.conv1.weight)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, h: Tensor) -> Tensor:
        changed: Tensor = self.conv2(F.silu(self.conv1(h)))
        return h + changed


class Block(nn.Module):
    """Residual block; the noise level scales and shifts its features."""

    def __init__(self, in_ch: int, out_ch: int, embedding: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.level = nn.Linear(embedding, 2 * out_ch)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, padding=1)
        self.skip = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()
        nn.init.kaiming_normal_(self.conv1.weight)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.level.weight)
        nn.init.zeros_(self.level.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.level(embedding)[:, :, None, None].chunk(2, dim=1)
        skipped: Tensor = self.skip(h) + self.conv2(F.silu(self.conv1(h) * (1 + scale) + shift))
        return skipped


class Mean(nn.Module):
    """x (B, C, H, W) -> features at the input's resolution (B, width, H/4, W/4) and E[y0 | x] (B, C, H, W).

    Of a negative it predicts the negative: the prediction is x and half the difference of what it makes of x and of -x.
    """

    def __init__(self, config: CompactConfig) -> None:
        super().__init__()
        places, width = SCALE * SCALE * config.channels, config.mean_width
        self.first = nn.Conv2d(places, width, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList([PlainBlock(width) for _ in range(config.mean_blocks)])
        self.last = nn.Conv2d(width, places, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.first.weight)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        places = self.first(F.pixel_unshuffle(x, SCALE))
        h = torch.cat([places, -places])
        for block in self.blocks:
            h = block(h)
        features, negative = h.chunk(2)
        rest = self.last(features) - self.last(negative)
        return features, x + F.pixel_shuffle(rest.to(x.dtype) * (MEAN / 2), SCALE)


class CompactUNet(nn.Module):
    """x, y: (B, C, H, W) float32 in [-1, 1] (y: the noisy state); level: (B, 1) = √γ. Returns the predicted y0, (B, C, H, W)."""

    def __init__(self, config: CompactConfig) -> None:
        super().__init__()
        self.config = config
        c, dim = config, config.embedding
        self.mean = Mean(c)
        self.embedding = LevelEmbedding(dim)
        self.first = nn.Conv2d(7 * c.channels, c.widths[0], 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        for i, (width, blocks) in enumerate(zip(c.widths, c.blocks, strict=True)):
            features = c.mean_width if i == 1 else 0
            self.down.append(nn.ModuleList([Block(width + (0 if j else features), width, dim) for j in range(blocks)]))
            if i + 1 < len(c.widths):
                self.shrink.append(nn.Conv2d(width, c.widths[i + 1], 3, stride=2, padding=1))
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for i in reversed(range(len(c.widths) - 1)):
            width = c.widths[i]
            self.grow.append(nn.Conv2d(c.widths[i + 1], width, 3, padding=1))
            ups = [Block(2 * width, width, dim)] + [Block(width, width, dim) for _ in range(c.blocks[i])]
            self.up.append(nn.ModuleList(ups))
        self.last = nn.Conv2d(c.widths[0], 3 * c.channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, y: Tensor, level: Tensor) -> Tensor:
        gamma = (level * level)[:, :, None, None]
        root = level[:, :, None, None]
        noise = (1 - gamma).clamp(min=1e-7)  # variance of the noise in y; float32 holds no level between 1 - 6e-8 and 1
        spread = gamma * DETAIL**2 + noise  # variance of the noisy details
        features, mean = self.mean(x)
        _, details = bands(y - root * mean)
        fine = self.inner(mean, details * spread.rsqrt(), (noise / gamma).flatten(1).log() / 2, features)
        fine = details * (root * DETAIL**2 / spread) + fine * (noise.sqrt() * DETAIL * spread.rsqrt())
        drawn: Tensor = mean + from_bands(torch.zeros_like(mean[:, :, ::2, ::2]), fine)
        return drawn

    def inner(self, mean: Tensor, details: Tensor, log_sigma: Tensor, features: Tensor) -> Tensor:
        """The part that samples, unit variance in and out: details of y - √γ mean, and what `Mean` made of x -> details.

        log_sigma: (B, 1).
        """
        embedding = self.embedding(log_sigma)
        h = self.first(torch.cat([F.pixel_unshuffle(mean, 2), details], dim=1))
        skips = []
        for i, blocks in enumerate(self.down):
            h = torch.cat([h, features], dim=1) if i == 1 else h
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, embedding)
            if i < len(self.shrink):
                skips.append(h)
                h = self.shrink[i](h)
        for grow, blocks in zip(self.grow, self.up, strict=True):
            h = grow(F.interpolate(h, scale_factor=2.0, mode="nearest"))
            h = torch.cat([h, skips.pop()], dim=1)
            for block in blocks:  # type: ignore[attr-defined]
                h = block(h, embedding)
        fine: Tensor = self.last(F.silu(h))
        return fine
