"""What memory a network uses for each output pixel, seen in a process of its own: peak resident size at two picture sizes."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sr3rt.backends import Network, Request
from sr3rt.backends.onnxruntime import load
from sr3rt.bundle import Bundle
from sr3rt.errors import BackendError
from sr3rt.export.parity import LARGE

if TYPE_CHECKING:
    from torch import nn

    from sr3rt.bundle import Manifest

SIDE = 384  # of the larger picture
SIDE_OF_LARGE = 192  # of a large network's, which is wide enough to be measured well on less
TOKENS = 48**2  # at most, where self-attention is finest: its scores should not drown what grows with the picture


def bytes_per_pixel(bundle: Path, manifest: Manifest) -> int:
    """Bytes for each output pixel of one picture: growth of the peak between two sizes, less the attention's scores.

    manifest: with `attention_stride` filled in. Raises BackendError when the network cannot be run.
    """
    attention, stride = manifest.attention_stride, manifest.stride
    side = SIDE_OF_LARGE if manifest.parameters >= LARGE else SIDE
    side = min(side, attention * int(TOKENS**0.5)) if attention else side
    large = max(2, side // stride) * stride
    small = max(1, large // 3 // stride) * stride
    least, most = _peaks_elsewhere(bundle, small, large)
    scores = 4 * (large**4 - small**4) // attention**4 if attention else 0
    return max(0, (most - least - scores) // (large**2 - small**2))


def attention_stride(net: nn.Module) -> int:
    """How much coarser than the picture the finest self-attention of `net` works; 0 when it has none."""
    import torch

    sizes: list[int] = []

    def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        sizes.append(inputs[0].shape[-1])

    hooks = [m.register_forward_pre_hook(note) for m in net.modules() if type(m).__name__ == "SelfAttention"]
    config: Any = net.config
    with torch.inference_mode():
        side = 2 * config.stride  # at the stride itself a norm of one channel a group would have one value
        blank = torch.zeros(1, config.channels, side, side)
        net(blank, blank, torch.full((1, 1), 0.5))
    for hook in hooks:
        hook.remove()
    return int(side) // max(sizes) if sizes else 0


def _peaks_elsewhere(bundle: Path, *sizes: int) -> list[int]:
    # -P: not the sr3rt of the folder that one happens to be in, which may be a checkout that was not built
    command = [sys.executable, "-P", "-m", "sr3rt.export.footprint", str(bundle), *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}: out of memory?"]
        raise BackendError(f"the exported network could not be run at {sizes[-1]}×{sizes[-1]}: {reason[0]}")
    return [int(line) for line in done.stdout.split()]


def _peak(network: Network, channels: int, size: int) -> int:
    """Peak resident bytes of this process while the network runs once at size×size."""
    x = np.zeros((1, channels, size, size), np.float32)
    run = network.bind(x, x, np.full((1, 1), 0.5, np.float32), np.zeros_like(x))
    try:
        # Linux: forget the peak of loading, which hides that of running a large network. getrusage's figure would be no use: it
        # starts at the peak of the process that started this one.
        Path("/proc/self/clear_refs").write_text("5")
        run()
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        run()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    opened = Bundle.open(sys.argv[1])
    loaded = load(opened, Request())
    print(*(_peak(loaded, opened.manifest.channels, int(size)) for size in sys.argv[2:]))
