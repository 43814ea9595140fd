"""The public PyTorch implementation itself as a contender, from a checkout of the user's: `pytest benchmarks/ --peer DIR`.

    git clone https://github.com/Janspiry/Image-Super-Resolution-via-Iterative-Refinement DIR

Its network gets the weights that ours have (names and shapes are the same) and its own `p_sample` does everything else, so that the
report's error column also tells whether the two compute the same. Only its schedule is replaced, by the run's: it knows no respacing.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.workloads import Task
from sr3rt.backends import Floats
from sr3rt.bench import Noise
from sr3rt.noise import START

CHECKOUT = "SR3RT_PEER"
"""The environment variable by which contenders' processes learn of the checkout."""


def why_not() -> str | None:
    """Why the peer cannot run here, or None."""
    folder = os.environ.get(CHECKOUT)
    if not folder:
        return "no checkout of the public implementation was given: --peer DIR"
    if not (Path(folder) / "model" / "sr3_modules" / "diffusion.py").is_file():
        return f"{folder} is no checkout of it: there is no model/sr3_modules/diffusion.py"
    return None


class PeerLoop:
    """Its `p_sample`, step after step, for the task's x (N, C, H, W). network: seconds spent in its network so far; 0 on a GPU."""

    def __init__(self, task: Task) -> None:
        sys.path.insert(0, os.environ[CHECKOUT])
        theirs = importlib.import_module("model.sr3_modules.diffusion")
        unet = importlib.import_module("model.sr3_modules.unet")
        ours: Any = task.workload.eager()
        c, side = ours.config, task.workload.side
        net = unet.UNet(
            inner_channel=c.inner, norm_groups=c.norm_groups, channel_mults=c.multipliers, res_blocks=c.blocks,
            attn_res=[side >> level for level in c.attention], image_size=side,
        )  # fmt: skip
        net.load_state_dict(ours.state_dict())
        self._diffusion = theirs.GaussianDiffusion(net, side).to(task.device).eval()
        gammas = np.concatenate([[1.0], task.schedule().gammas])
        with mock.patch.object(theirs, "make_beta_schedule", return_value=1 - gammas[1:] / gammas[:-1]):
            options = dict.fromkeys(("schedule", "n_timestep", "linear_start", "linear_end"))
            self._diffusion.set_new_noise_schedule(options, task.device)
        self._x = torch.from_numpy(task.condition()).to(task.device)
        self._device, self._steps, self.network = task.device, task.steps, 0.0
        self._watch(net)
        self.start()

    def _watch(self, net: torch.nn.Module) -> None:
        """Time the network, where calls return when it is done, and keep what it predicts."""
        predict = self._diffusion.predict_start_from_noise

        def remember(*args: Any, **kwargs: Any) -> Tensor:
            x0: Tensor = predict(*args, **kwargs)
            self._x0 = x0  # which its caller clips in place
            return x0

        def begin(*_: object) -> None:
            self.network -= time.perf_counter()

        def end(*_: object) -> None:
            self.network += time.perf_counter()

        self._diffusion.predict_start_from_noise = remember
        if self._device == "cpu":
            net.register_forward_pre_hook(begin)
            net.register_forward_hook(end)

    def start(self, noise: Noise | None = None) -> None:
        """A new picture; noise(step) (N, C, H, W) replaces its `randn`."""
        self._noise, self._step = noise, 0
        self._y = torch.randn_like(self._x) if noise is None else self._given(START)
        self._x0 = torch.zeros_like(self._y)

    def step(self) -> None:
        """One step; after the last, the first of a new picture."""
        if self._step == self._steps:
            self.start()
        t = self._steps - 1 - self._step
        if self._noise is None:
            self._y = self._diffusion.p_sample(self._y, t, condition_x=self._x)
        else:
            with mock.patch.object(torch, "randn_like", return_value=self._given(self._step)):
                self._y = self._diffusion.p_sample(self._y, t, condition_x=self._x)
        self._step += 1

    def finish(self) -> None:
        """Wait for the device."""
        if self._device == "cuda":
            torch.cuda.synchronize()

    def prediction(self) -> Floats:
        """The latest x0, (N, C, H, W)."""
        return np.array(self._x0.cpu())

    def _given(self, step: int) -> Tensor:
        assert self._noise is not None
        return torch.from_numpy(self._noise(step)).to(self._device)
