"""Catching a wrong number of normalisation groups, which no tensor tells and which ruins every picture in silence.

A trained network finds nearly all of the noise in a nearly pure-noise state, whatever the picture: with the right number of
groups the mean square of its ε error is far below 1, with any other several times larger. Measured on small networks trained for
three minutes, at the levels below: 0.006 against 0.031 for the next best (8 groups; 4), 0.005 against 0.038 (16; 2), 0.010
against 0.050 (32; 16) and, ddpm, 0.014 against 0.045 (8; 4). Untrained weights give about 1.3 whatever the number.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from sr3rt.errors import CheckpointError
from sr3rt.export.nets.janspiry import JanspiryUNet
from sr3rt.export.progress import Progress

CANDIDATES = (1, 2, 4, 8, 16, 32, 64)
LEVELS = (0.03, 0.01, 0.003)  # γ; above 0.1 what the picture hides begins to drown the difference
TRAINED = 0.5  # a mean square error at least this large says that the network is not trained (or not by this schedule)
MARGIN = 2.0  # the best is clear when every other is so many times worse; 3 and more was measured


class NormGroupsWarning(UserWarning):
    """The norm_groups asked for is not the one that the weights work with."""


@dataclass(frozen=True)
class Probe:
    """errors: mean square of (ε predicted - ε true) for each number of groups that the network's widths allow."""

    errors: Mapping[int, float]

    @property
    def preferred(self) -> int | None:
        """The number that is clearly right, if there is one."""
        best, *others = sorted(self.errors, key=self.errors.__getitem__)
        clear = self.errors[best] < TRAINED and all(self.errors[other] >= MARGIN * self.errors[best] for other in others)
        return best if clear else None

    def __str__(self) -> str:
        return ", ".join(f"{groups}: {error:.3g}" for groups, error in self.errors.items())


def allowed(net: nn.Module, given: int | None = None) -> list[int]:
    """The candidates, and the number given, that divide the width of every normalisation."""
    widths = [module.num_channels for module in net.modules() if isinstance(module, nn.GroupNorm)]
    candidates = sorted({*CANDIDATES, given or 1})
    return [groups for groups in candidates if groups > 0 and all(width % groups == 0 for width in widths)]


def set_groups(net: nn.Module, groups: int) -> None:
    """No parameter depends on it."""
    for module in net.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = groups


def probe(
    net: JanspiryUNet,
    gammas: NDArray[np.float64],
    scale: int,
    on_progress: Progress | None = None,
    *,
    given: int | None = None,
) -> Probe:
    """Measures every candidate on a made-up picture. gammas: (T,), of training. Leaves `net` with the last candidate's number."""
    y0, x = example(net, scale)
    generator = torch.Generator().manual_seed(0)
    steps = [int(np.abs(gammas - gamma).argmin()) for gamma in LEVELS]
    gamma = torch.from_numpy(gammas[steps]).to(torch.float32)[:, None, None, None]
    eps = torch.randn(len(steps), *y0.shape, generator=generator)
    y = gamma.sqrt() * y0 + (1 - gamma).sqrt() * eps
    level = gamma.flatten(1).sqrt() if net.config.variant == "sr3" else torch.tensor(steps, dtype=torch.float32)[:, None]
    errors = {}
    for groups in allowed(net, given):
        if on_progress is not None:
            on_progress(f"trying norm_groups {groups}")
        set_groups(net, groups)
        with torch.inference_mode():
            errors[groups] = float((net(x.expand_as(y), y, level) - eps).square().mean())
    return Probe(errors)


def example(net: JanspiryUNet, scale: int) -> tuple[Tensor, Tensor]:
    """A made-up picture, of a photograph's 1/f spectrum and one edge, and its bicubic condition: (C, S, S) float32 in [-1, 1]."""
    channels, stride = net.config.channels, net.config.stride
    size = max(2, -(-64 // stride)) * stride
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    frequency[0, 0] = 1 / size
    white = 0.9 * rng.standard_normal((1, size, size)) + 0.3 * rng.standard_normal((channels, size, size))
    smooth = np.fft.ifft2(np.fft.fft2(white) / frequency).real
    row, column = np.mgrid[:size, :size]
    y0 = np.clip(0.4 * smooth / smooth.std() + 0.3 * np.sign(0.7 * column + row - 0.8 * size), -1, 1).astype(np.float32)
    low = (max(1, size // scale),) * 2
    x = [Image.fromarray(channel).resize(low, Image.Resampling.BICUBIC).resize((size, size), Image.Resampling.BICUBIC) for channel in y0]
    return torch.from_numpy(y0), torch.from_numpy(np.stack([np.asarray(channel) for channel in x])).clamp(-1, 1)


def settle(
    net: JanspiryUNet,
    gammas: NDArray[np.float64],
    scale: int,
    *,
    flag: int | None,
    config: int | None,
    name: str,
    on_progress: Progress | None = None,
) -> tuple[int, str]:
    """Gives `net` its number of groups: the flag's, else the config's. Returns it and, in words, how it was checked.

    Raises CheckpointError when neither is given, when the number does not divide the network's widths, or when the config's is
    clearly worse. A flag is obeyed, with a NormGroupsWarning when another is clearly better.
    """
    given = config if flag is None else flag
    possible = allowed(net, given)
    if given is not None and given not in possible:
        source = "the config" if flag is None else "--norm-groups"
        raise CheckpointError(f"{name}: norm_groups {given} ({source}) does not fit this network's widths: expected one of {possible}")
    result = probe(net, gammas, scale, on_progress, given=given)
    preferred = result.preferred
    figures = f"mean square of the noise error by norm_groups: {result}"
    if given is None:
        advice = f"the weights point to --norm-groups {preferred}" if preferred else "the weights point to none of them clearly"
        raise CheckpointError(
            f"{name} does not tell norm_groups, and a wrong value ruins every picture: give --norm-groups N or --config FILE; "
            f"{advice} ({figures})"
        )
    if flag is None and preferred not in (None, given):
        raise CheckpointError(
            f"{name}: norm_groups is {given} in the config, but the weights work with {preferred} ({figures}): correct it, or "
            "give --norm-groups N, which is obeyed"
        )
    set_groups(net, given)
    if preferred not in (None, given):
        message = f"{name}: norm_groups {given}, as asked, but the weights work with {preferred} ({figures})"
        warnings.warn(message, NormGroupsWarning, stacklevel=4)
        return given, message
    source = "the config" if flag is None else "--norm-groups"
    verdict = "the weights agree" if preferred else "the weights cannot confirm it"
    return given, f"norm_groups {given}: from {source}; {verdict} ({figures})"
