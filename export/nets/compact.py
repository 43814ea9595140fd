"""The shipped model's network: SR3 on the residual, worked out on patches, made for a CPU.

It is an SR3 network in its contract (condition `x`, state `y`, noise level √γ in; a prediction out) with three changes that a
small network trained on few photographs needs, each from the literature:

- It denoises the *residual* y0 - x, whose deviation (`SIGMA`, about 0.12) is an eighth of the picture's (SRDiff, arXiv
  2104.14951).
- Input, output and skip are scaled so that the inner network always sees and makes unit variance (EDM, arXiv 2206.00364, table
  1); the prediction is therefore y0 itself, and colours cannot drift by a factor √(1/γ).
- It works on 2×2 patches (space to depth), so its cheapest features cost a quarter of what full resolution would.

No attention: the receptive field is local and any size that `stride` divides will do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIGMA = 0.12  # deviation of y0 - x on photographs at 4×, pictures in [-1, 1]


@dataclass(frozen=True)
class CompactConfig:
    """Widths and blocks per level, finest (half resolution) first; `blocks[i]` on the way down, one more on the way up."""

    channels: int = 3
    patch: int = 2
    widths: tuple[int, ...] = (32, 96, 160)
    blocks: tuple[int, ...] = (1, 3, 2)
    norm_groups: int = 8
    embedding: int = 128

    @property
    def stride(self) -> int:
        """Height and width must be divisible by this."""
        return int(self.patch * 2 ** (len(self.widths) - 1))


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


class Block(nn.Module):
    """Residual block; the noise level scales and shifts what the second normalisation leaves."""

    def __init__(self, in_ch: int, out_ch: int, groups: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_ch)
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.level = nn.Linear(embedding, 2 * out_ch)
        self.norm2 = nn.GroupNorm(groups, out_ch)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, padding=1)
        self.skip = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.level.weight)
        nn.init.zeros_(self.level.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.level(embedding)[:, :, None, None].chunk(2, dim=1)
        out = self.conv1(F.silu(self.norm1(h)))
        out = self.conv2(F.silu(self.norm2(out) * (1 + scale) + shift))
        skipped: Tensor = self.skip(h) + out
        return skipped


class CompactUNet(nn.Module):
    """x, y: (B, C, H, W) float32 in [-1, 1] (y: the noisy state); level: (B, 1) = √γ. Returns the predicted y0, (B, C, H, W)."""

    def __init__(self, config: CompactConfig) -> None:
        super().__init__()
        self.config = config
        c, dim, groups = config, config.embedding, config.norm_groups
        patch_ch = c.channels * c.patch**2
        self.embedding = LevelEmbedding(dim)
        self.first = nn.Conv2d(2 * patch_ch, c.widths[0], 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        for i, (width, blocks) in enumerate(zip(c.widths, c.blocks, strict=True)):
            self.down.append(nn.ModuleList([Block(width, width, groups, dim) for _ in range(blocks)]))
            if i + 1 < len(c.widths):
                self.shrink.append(nn.Conv2d(width, c.widths[i + 1], 3, stride=2, padding=1))
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for i in reversed(range(len(c.widths) - 1)):
            width = c.widths[i]
            self.grow.append(nn.Conv2d(c.widths[i + 1], width, 3, padding=1))
            ups = [Block(2 * width, width, groups, dim)] + [Block(width, width, groups, dim) for _ in range(c.blocks[i])]
            self.up.append(nn.ModuleList(ups))
        self.norm = nn.GroupNorm(groups, c.widths[0])
        self.last = nn.Conv2d(c.widths[0], patch_ch, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, y: Tensor, level: Tensor) -> Tensor:
        gamma = (level * level)[:, :, None, None]
        root = level[:, :, None, None]
        noise = 1 - gamma  # variance of the noise in y
        spread = gamma * SIGMA**2 + noise  # variance of y - √γ x
        centred = y - root * x
        inner = self.inner(x, centred * spread.rsqrt(), (noise.flatten(1) / (level * level)).log() / 2)
        return x + centred * (root * SIGMA**2 / spread) + inner * (noise.sqrt() * SIGMA * spread.rsqrt())

    def inner(self, x: Tensor, noisy: Tensor, log_sigma: Tensor) -> Tensor:
        """The scaled network: unit variance in and out. noisy: (y - √γ x) / its deviation; log_sigma: (B, 1)."""
        embedding = self.embedding(log_sigma)
        h = self.first(F.pixel_unshuffle(torch.cat([x, noisy], dim=1), self.config.patch))
        skips = []
        for i, blocks in enumerate(self.down):
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
        return F.pixel_shuffle(self.last(F.silu(self.norm(h))), self.config.patch)
