"""Small checkpoints of the public implementation, made and golden; for the tests of the exporter's reading."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN

from sr3rt.errors import CheckpointError
from sr3rt.export.checkpoint import read
from sr3rt.export.nets.janspiry import JanspiryConfig, JanspiryUNet
from sr3rt.schedule import NAMED

TINY = JanspiryConfig(inner=8, multipliers=(1, 2), blocks=1, attention=(1,), norm_groups=4)
FLAGS = {"norm_groups": 4, "scale": 2}


def tiny_state(seed: int = 0, config: JanspiryConfig = TINY) -> OrderedDict[str, torch.Tensor]:
    """A small checkpoint as the public implementation writes it, less the buffers that follow from the betas."""
    torch.manual_seed(seed)
    state = OrderedDict(betas=torch.from_numpy(NAMED["linear"](50, 1e-4, 0.1)).to(torch.float32))
    state.update({f"denoise_fn.{key}": value for key, value in JanspiryUNet(config).state_dict().items()})
    return state


def config_of(name: str = "sr3_a") -> dict:
    return json.loads((GOLDEN / name / "config.json").read_text())


def refused(path: Path, **options: object) -> str:
    """The message of `read`'s CheckpointError."""
    with pytest.raises(CheckpointError) as error:
        read(path, **options)
    return str(error.value)
