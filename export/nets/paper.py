"""The network of the SR3 paper (arXiv 2104.07636, section 2.3 and appendix A), as far as the paper tells.

It is DDPM's U-Net with BigGAN's residual blocks, which resample inside the block (arXiv 1809.11096, appendix B); every residual
sum is scaled by 1/√2 (arXiv 2011.13456, appendix H); self-attention stands at 16×16 and in the middle; the noise level enters as
in WaveGrad (arXiv 2009.00713, section 3.1). No weights were ever published and the paper leaves details open. Chosen here:

- The level fed is √γ, as everywhere in this program, and WaveGrad's scale 5000 goes before the sines and cosines.
- The embedding is four times as wide as the finest level and is added, projected, between the two convolutions of a block.
- A level has one block more on the way up than on the way down, and every block's output is concatenated there (DDPM).
- Resampling: means of 2×2 on the way down, doubled pixels on the way up. GroupNorm has 32 groups, 8 where the width is only 16.

    preset      this network    paper         preset      this network    paper
    16→128       560,719,107    550M          64→512       609,802,371    625M
    64→256       617,118,467    625M          256→1024     148,746,931    150M
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sr3rt.export.nets.janspiry import LevelEncoding, attend

LEVEL_SCALE = 5000.0  # WaveGrad's
HALF_POWER = 0.5**0.5  # keeps the variance of a sum of two


@dataclass(frozen=True)
class PaperConfig:
    """`attention`: the levels that have it, level 0 the full resolution (16×16 in training; the middle always has it)."""

    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 8, 8)
    blocks: int = 3
    attention: tuple[int, ...] = (3,)
    norm_groups: int = 32
    channels: int = 3

    @property
    def stride(self) -> int:
        """Height and width must be divisible by this."""
        return int(2 ** (len(self.multipliers) - 1))


PRESETS = {
    "16-128": PaperConfig(),
    "64-256": PaperConfig(multipliers=(1, 2, 4, 4, 8, 8), attention=(4,)),
    "64-512": PaperConfig(width=64, multipliers=(1, 2, 4, 8, 8, 16, 16), attention=(5,)),
    "256-1024": PaperConfig(width=16, multipliers=(1, 2, 4, 8, 16, 32, 32, 32), blocks=2, attention=(6,), norm_groups=8),
}


class ResidualBlock(nn.Module):
    """BigGAN's block: norm, Swish, resample, convolve; add the embedding; norm, Swish, convolve. `resample`: 0.5, 1 or 2."""

    def __init__(self, in_ch: int, out_ch: int, embedding: int, groups: int, resample: float = 1) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_ch)
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, padding=1)
        self.level = nn.Linear(embedding, out_ch)
        self.norm2 = nn.GroupNorm(groups, out_ch)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, padding=1)
        self.skip = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()
        self.resample = resample

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        out = self.conv1(resized(F.silu(self.norm1(h)), self.resample))
        out = out + self.level(embedding)[:, :, None, None]
        out = self.conv2(F.silu(self.norm2(out)))
        scaled: Tensor = (self.skip(resized(h, self.resample)) + out) * HALF_POWER
        return scaled


def resized(h: Tensor, factor: float) -> Tensor:
    """Means of 2×2 (factor 0.5), h itself (1) or doubled pixels (2)."""
    if factor == 1:
        return h
    return F.avg_pool2d(h, 2) if factor < 1 else F.interpolate(h, scale_factor=2.0, mode="nearest")


class SelfAttention(nn.Module):
    """softmax(QKᵀ/√channels)V over all places, projected, with the input in a scaled sum."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, h: Tensor) -> Tensor:
        scaled: Tensor = (h + self.out(attend(self.qkv(self.norm(h))))) * HALF_POWER
        return scaled


class Stage(nn.Module):
    """A residual block and, on some levels, self-attention."""

    def __init__(self, in_ch: int, out_ch: int, config: PaperConfig, *, attention: bool) -> None:
        super().__init__()
        self.block = ResidualBlock(in_ch, out_ch, 4 * config.width, config.norm_groups)
        self.attention = SelfAttention(out_ch, config.norm_groups) if attention else nn.Identity()

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        out: Tensor = self.attention(self.block(h, embedding))
        return out


class PaperUNet(nn.Module):
    """x (condition), y (state): (B, C, H, W) float32 in [-1, 1] (y: noisy), H and W divisible by `config.stride`.

    level: (B, 1) float32, √γ. Returns the predicted noise ε, (B, C, H, W) float32.
    """

    def __init__(self, config: PaperConfig) -> None:
        super().__init__()
        self.config = config
        width, dim, groups = config.width, 4 * config.width, config.norm_groups
        self.encoding = LevelEncoding(width)
        self.embedding = nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())
        self.first = nn.Conv2d(2 * config.channels, width, 3, padding=1)
        widths = [width * multiplier for multiplier in config.multipliers]
        last = len(widths) - 1
        current, skips = width, [width]
        self.down = nn.ModuleList()
        for level, out_ch in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(Stage(current, out_ch, config, attention=level in config.attention))
                current = out_ch
                skips.append(current)
            if level != last:
                self.down.append(ResidualBlock(current, current, dim, groups, resample=0.5))
                skips.append(current)
        self.middle = nn.ModuleList([Stage(current, current, config, attention=has) for has in (True, False)])
        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(Stage(current + skips.pop(), widths[level], config, attention=level in config.attention))
                current = widths[level]
            if level != 0:
                self.up.append(ResidualBlock(current, current, dim, groups, resample=2))
        self.norm = nn.GroupNorm(groups, current)
        self.last = nn.Conv2d(current, config.channels, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor, level: Tensor) -> Tensor:
        embedding = self.embedding(self.encoding(LEVEL_SCALE * level))
        h = self.first(torch.cat([x, y], dim=1))
        skips = [h]
        for down in self.down:
            h = down(h, embedding)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, embedding)
        for up in self.up:
            h = up(torch.cat([h, skips.pop()], dim=1) if isinstance(up, Stage) else h, embedding)
        eps: Tensor = self.last(F.silu(self.norm(h)))
        return eps
