"""What memory a network uses for each output pixel, seen in a process of its own: peak resident size at two picture sizes."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sr3rt.backends import Request
from sr3rt.backends.onnxruntime import load
from sr3rt.bundle import Bundle
from sr3rt.errors import BackendError

if TYPE_CHECKING:
    from torch import nn


def bytes_per_pixel(bundle: Path, side: int) -> int:
    """Bytes for each output pixel of one picture: growth of the peak from side×side to 3·side×3·side. Raises BackendError."""
    small, large = (_peak_elsewhere(bundle, size) for size in (side, 3 * side))
    return max(0, (large - small) // (8 * side**2))


def attention_stride(net: nn.Module, side: int) -> int:
    """How much coarser than the picture the finest self-attention of `net` works; 0 when it has none. `side`: a size it takes."""
    import torch

    sizes: list[int] = []

    def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        sizes.append(inputs[0].shape[-1])

    hooks = [m.register_forward_pre_hook(note) for m in net.modules() if type(m).__name__ == "SelfAttention"]
    config: Any = net.config
    with torch.inference_mode():
        blank = torch.zeros(1, config.channels, side, side)
        net(blank, blank, torch.full((1, 1), 0.5))
    for hook in hooks:
        hook.remove()
    return side // max(sizes) if sizes else 0


def _peak_elsewhere(bundle: Path, size: int) -> int:
    command = [sys.executable, "-m", "sr3rt.export.footprint", str(bundle), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}: out of memory?"]
        raise BackendError(f"the exported network could not be run at {size}×{size}: {reason[0]}")
    return int(done.stdout)


def _peak(bundle: Path, size: int) -> int:
    """Peak resident bytes of this process after running the bundle's network once at size×size."""
    opened = Bundle.open(bundle)
    x = np.zeros((1, opened.manifest.channels, size, size), np.float32)
    load(opened, Request()).bind(x, x, np.full((1, 1), 0.5, np.float32), np.zeros_like(x))()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    print(_peak(Path(sys.argv[1]), int(sys.argv[2])))
