"""The U-Net of the public PyTorch implementation of SR3 (github.com/Janspiry/Image-Super-Resolution-via-Iterative-Refinement).

Two variants share the body. "sr3" is conditioned on the noise level √γ through a positional encoding (WaveGrad, arXiv 2009.00713,
section 3.1; SR3, arXiv 2104.07636, section 2.3); "ddpm" on the integer timestep through the transformer's sinusoids (arXiv
2006.11239). Every level has its residual blocks, with self-attention on some levels and in the middle; the skip of every
block and of every down-sampling is concatenated on the way up, where a level has one block more than on the way down.

Module names are those of that implementation's checkpoints: `load_state_dict(…, strict=True)` takes their `denoise_fn.*` tensors.
Dropout, which only matters in training, is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Variant = Literal["sr3", "ddpm"]


@dataclass(frozen=True)
class JanspiryConfig:
    """The options of the implementation's `unet` section. Level 0 is the full resolution; the defaults are its 16→128 network.

    attention: the levels with self-attention (its `attn_res` is r_resolution / 2**level). The middle always has it.
    """

    variant: Variant = "sr3"
    channels: int = 3
    inner: int = 64
    multipliers: tuple[int, ...] = (1, 2, 4, 8, 8)
    blocks: int = 2
    attention: tuple[int, ...] = (3,)
    norm_groups: int = 32

    @property
    def stride(self) -> int:
        """Height and width must be divisible by this."""
        return int(2 ** (len(self.multipliers) - 1))


class LevelEncoding(nn.Module):
    """√γ (B, 1) -> (B, dim): sines, then cosines, of √γ·10000^(-i/(dim/2)). Nothing is learnt and nothing is saved."""

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        steps = torch.arange(dim // 2, dtype=torch.float32, device="cpu") / (dim // 2)  # real even where the net is built on "meta"
        self.register_buffer("frequencies", torch.exp(-math.log(1e4) * steps), persistent=False)

    def forward(self, level: Tensor) -> Tensor:
        phase = level * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], dim=-1)


class TimestepEncoding(nn.Module):
    """Timestep (B, 1), as a float -> (B, dim): sines, then cosines. The frequencies are constants, though checkpoints hold them."""

    inv_freq: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        steps = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu")  # real even where the net is built on "meta"
        self.register_buffer("inv_freq", torch.exp(steps * (-math.log(1e4) / dim)))

    def forward(self, level: Tensor) -> Tensor:
        phase = level * self.inv_freq
        return torch.cat([phase.sin(), phase.cos()], dim=-1)


class Shift(nn.Module):
    """The sr3 variant's projection of the embedding; its name in checkpoints is `noise_func.noise_func.0`."""

    def __init__(self, embedding: int, out_ch: int) -> None:
        super().__init__()
        self.noise_func = nn.Sequential(nn.Linear(embedding, out_ch))

    def forward(self, embedding: Tensor) -> Tensor:
        shift: Tensor = self.noise_func(embedding)
        return shift


class Block(nn.Module):
    """GroupNorm, Swish, 3×3 convolution. Place 2 is the implementation's dropout."""

    def __init__(self, in_ch: int, out_ch: int, groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.GroupNorm(groups, in_ch), nn.SiLU(), nn.Identity(), nn.Conv2d(in_ch, out_ch, 3, padding=1))

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.block(h)
        return out


class ResidualBlock(nn.Module):
    """Two blocks and a skip; the embedding, projected, is added between the blocks. The ddpm variant has a Swish before that."""

    def __init__(self, in_ch: int, out_ch: int, config: JanspiryConfig) -> None:
        super().__init__()
        if config.variant == "sr3":
            self.noise_func = Shift(config.inner, out_ch)
        else:
            self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(config.inner, out_ch))
        self.block1 = Block(in_ch, out_ch, config.norm_groups)
        self.block2 = Block(out_ch, out_ch, config.norm_groups)
        self.res_conv = nn.Conv2d(in_ch, out_ch, 1) if in_ch != out_ch else nn.Identity()
        self.variant = config.variant

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        shift = self.noise_func(embedding) if self.variant == "sr3" else self.mlp(embedding)
        out: Tensor = self.block2(self.block1(h) + shift[:, :, None, None]) + self.res_conv(h)
        return out


def attend(qkv: Tensor) -> Tensor:
    """Softmax attention of one head over all places. qkv: (B, 3·C, H, W), queries first -> (B, C, H, W)."""
    query, key, value = qkv.flatten(2).chunk(3, dim=1)  # each (B, C, H·W)
    weights = torch.softmax((query * query.shape[1] ** -0.5).transpose(1, 2) @ key, dim=-1)
    mixed: Tensor = value @ weights.transpose(1, 2)
    return mixed.reshape(*mixed.shape[:2], *qkv.shape[2:])


class SelfAttention(nn.Module):
    """softmax(QKᵀ/√channels)V over all places, a 1×1 convolution, the input added. Its U-Nets never have more than one head."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, h: Tensor) -> Tensor:
        attended: Tensor = self.out(attend(self.qkv(self.norm(h))))
        return h + attended


class Stage(nn.Module):
    """A residual block and, on some levels, self-attention."""

    def __init__(self, in_ch: int, out_ch: int, config: JanspiryConfig, *, attention: bool) -> None:
        super().__init__()
        self.res_block = ResidualBlock(in_ch, out_ch, config)
        self.attn = SelfAttention(out_ch, config.norm_groups) if attention else nn.Identity()

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        out: Tensor = self.attn(self.res_block(h, embedding))
        return out


class Downsample(nn.Module):
    """3×3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.conv(h)
        return out


class Upsample(nn.Module):
    """Every pixel doubled, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.conv(nn.functional.interpolate(h, scale_factor=2.0, mode="nearest"))
        return out


class JanspiryUNet(nn.Module):
    """x (condition), y (state): (B, C, H, W) float32 in [-1, 1] (y: noisy), H and W divisible by `config.stride`.

    level: (B, 1) float32, √γ ("sr3") or the timestep 0…T-1 ("ddpm"). Returns the predicted noise ε, (B, C, H, W) float32.
    """

    def __init__(self, config: JanspiryConfig) -> None:
        super().__init__()
        self.config = config
        inner = config.inner
        if config.variant == "sr3":
            self.noise_level_mlp = nn.Sequential(LevelEncoding(inner), *perceptron(inner))
        else:
            self.time_mlp = nn.Sequential(TimestepEncoding(inner), *perceptron(inner))
        widths = [inner * multiplier for multiplier in config.multipliers]
        last = len(widths) - 1
        width, skips = inner, [inner]
        self.downs = nn.ModuleList([nn.Conv2d(2 * config.channels, inner, 3, padding=1)])
        for level, out_ch in enumerate(widths):
            for _ in range(config.blocks):
                self.downs.append(Stage(width, out_ch, config, attention=level in config.attention))
                width = out_ch
                skips.append(width)
            if level != last:
                self.downs.append(Downsample(width))
                skips.append(width)
        self.mid = nn.ModuleList([Stage(width, width, config, attention=has) for has in (True, False)])
        self.ups = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for _ in range(config.blocks + 1):
                self.ups.append(Stage(width + skips.pop(), widths[level], config, attention=level in config.attention))
                width = widths[level]
            if level != 0:
                self.ups.append(Upsample(width))
        self.final_conv = Block(width, config.channels, config.norm_groups)

    def forward(self, x: Tensor, y: Tensor, level: Tensor) -> Tensor:
        embedding = self.noise_level_mlp(level) if self.config.variant == "sr3" else self.time_mlp(level)
        h = torch.cat([x, y], dim=1)
        skips = []
        for down in self.downs:
            h = down(h, embedding) if isinstance(down, Stage) else down(h)
            skips.append(h)
        for stage in self.mid:
            h = stage(h, embedding)
        for up in self.ups:
            h = up(torch.cat([h, skips.pop()], dim=1), embedding) if isinstance(up, Stage) else up(h)
        eps: Tensor = self.final_conv(h)
        return eps


def perceptron(dim: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Linear, Swish, Linear on the encoding, with four times the width between."""
    return nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim)
