"""Floating-point operations of one forward pass: convolutions, linear layers and attention, a multiplication and an addition each."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count(net: nn.Module, *, batch: int, side: int, channels: int = 3) -> int:
    """Operations of `net(x, y, level)` at side×side, counted as PyTorch dispatches them (torch.utils.flop_counter) on meta tensors.

    Norms, activations and additions, less than a hundredth of the whole here, are not counted.
    """
    x = torch.empty(batch, channels, side, side, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.to("meta")(x, x, torch.empty(batch, 1, device="meta"))
    return int(counter.get_total_flops())
