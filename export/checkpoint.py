"""A trained checkpoint -> a network ready to export, with everything that running it needs. What cannot be known is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sr3rt.errors import CheckpointError, OptionError
from sr3rt.export.nets.compact import CompactConfig, CompactUNet
from sr3rt.export.nets.janspiry import JanspiryUNet
from sr3rt.export.nets.paper import PaperConfig, PaperUNet
from sr3rt.export.norm_groups import settle
from sr3rt.export.progress import Progress
from sr3rt.export.recognise import (
    check_finite,
    check_keys,
    conflicts,
    locate,
    options_of,
    prefer_average,
    rounding,
    schedule_of,
    with_constants,
)
from sr3rt.export.training_config import DEFAULT_NORM_GROUPS, TrainingConfig, read_config
from sr3rt.export.weights import Weights, load, metadata_json
from sr3rt.schedule import NAMED, ScheduleSpec

Network = JanspiryUNet | PaperUNet | CompactUNet
Architecture = Literal["sr3", "ddpm", "paper", "compact"]
Prediction = Literal["eps", "x0", "v"]
COMPACT_SCALE = 4  # what export/train.py trains


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A network and how to run it.

    net: eval mode, float32, on the CPU; `net(x, y, level)` with `net.config.stride`.
    gammas: γ_t of the training schedule, float64 (T,), from t = 0 (nearly the picture) on.
    trained: that schedule's name and ends where they are known, so that it can be made again exactly.
    inference: the schedule of the config's "val" section, if a config was given and has one.
    level: what the network is conditioned on. variance: of the ancestral sampler, (1-γ_{t-1})/(1-γ_t)·β_t or the paper's 1-α_t.
    image_size: height and width of the pictures in training, pixels, if known.
    sha256: of the file, hexadecimal. config_sha256: of the config, if one was given.
    assumptions: whatever was neither read from the file nor from the config, one sentence each, and how norm_groups was checked.
    """

    net: Network
    architecture: Architecture
    gammas: NDArray[np.float64]
    trained: ScheduleSpec | None
    inference: ScheduleSpec | None
    prediction: Prediction
    level: Literal["sqrt_gamma", "timestep", "gamma"]
    variance: Literal["posterior", "paper"]
    scale: int
    channels: int
    image_size: int | None
    sha256: str
    config_sha256: str | None
    assumptions: tuple[str, ...]


def read(
    path: str | Path,
    *,
    config: str | Path | None = None,
    norm_groups: int | None = None,
    scale: int | None = None,
    image_size: int | None = None,
    on_progress: Progress | None = None,
) -> Checkpoint:
    """Reads a `.pth`, `.pt` or `.ckpt` that torch.save wrote, or a `.safetensors`; the content decides, not the suffix.

    config: the public implementation's JSON training config, // comments and all. norm_groups, scale (size out / size in) and
    image_size (pixels, of the pictures in training) go before what it says. `on_progress` is told, in words, what takes time.

    Code in a file is never run. Raises CheckpointError, which names the tensor, key or value, when the file is not a checkpoint,
    is truncated or holds code; for another architecture, NaN or infinite weights; when config and tensors disagree; when
    norm_groups or scale are not known, or the config's norm_groups is clearly wrong; MissingExtra for a safetensors file without
    that package. Warns (NormGroupsWarning) when the norm_groups asked for is clearly wrong.
    """
    path = Path(path)
    for option, value in (("--norm-groups", norm_groups), ("--scale", scale), ("--image-size", image_size)):
        if value is not None and value < 1:
            raise CheckpointError(f"{option} must be at least 1, found {value}")
    weights = load(path)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if "architecture" in weights.metadata:
        if config is not None or norm_groups is not None:
            raise CheckpointError(f"{path} carries its own config: leave out --config and --norm-groups")
        return read_own(weights, path, scale=scale, image_size=image_size, sha256=sha256)
    said = None if config is None else read_config(Path(config))
    return read_public(
        weights,
        path.name,
        said,
        norm_groups=norm_groups,
        scale=scale,
        image_size=image_size,
        sha256=sha256,
        on_progress=on_progress,
    )


def read_public(
    weights: Weights,
    name: str,
    said: TrainingConfig | None,
    *,
    norm_groups: int | None,
    scale: int | None,
    image_size: int | None,
    sha256: str,
    on_progress: Progress | None,
) -> Checkpoint:
    """A checkpoint of the public PyTorch implementation. name: the file's, for messages; said: its config, if given."""
    found = locate(weights.tensors, name)
    with torch.device("meta"):
        net = JanspiryUNet(options_of(found.tensors, name, norm_groups=1))
    check_keys(net, found.tensors, name)
    found = prefer_average(found, net, name)
    check_finite(found.tensors, name)
    if said is not None and (disagreements := conflicts(said, net.config)):
        raise CheckpointError(f"the config does not belong to {name}: {'; '.join(disagreements)}")
    tensors, remark_on_constants = with_constants(net, found.tensors, name)
    assumptions = [*found.choices, *rounding(found.tensors), *remark_on_constants]
    assumptions.append("eps prediction, posterior variance, one attention head: the implementation has no others")
    gammas, trained, remark = trained_schedule(found.betas, said, name)
    assumptions += remark
    chosen_scale, remark = settle_scale(scale, said, name)
    assumptions += remark
    chosen_size, remark = settle_image_size(image_size, said)
    assumptions += remark
    place(net, tensors)
    config_groups = None if said is None else said.norm_groups or DEFAULT_NORM_GROUPS
    if said is not None and said.norm_groups is None and norm_groups is None:
        assumptions.append(f"the config names no norm_groups: {DEFAULT_NORM_GROUPS}, the implementation's default")
    groups, remark_on_groups = settle(net, gammas, chosen_scale, flag=norm_groups, config=config_groups, name=name, on_progress=on_progress)
    net.config = replace(net.config, norm_groups=groups)
    return Checkpoint(
        net=net,
        architecture=net.config.variant,
        gammas=gammas,
        trained=trained,
        inference=None if said is None else said.inference,
        prediction="eps",
        level="sqrt_gamma" if net.config.variant == "sr3" else "timestep",
        variance="posterior",
        scale=chosen_scale,
        channels=net.config.channels,
        image_size=chosen_size,
        sha256=sha256,
        config_sha256=None if said is None else said.sha256,
        assumptions=(*assumptions, remark_on_groups),
    )


def place(net: Network, tensors: Mapping[str, Tensor]) -> None:
    """Makes the tensors themselves (no copy of float32 ones) the weights of `net`, built on "meta", and puts it in eval mode."""
    net.load_state_dict({key: value.to(torch.float32) for key, value in tensors.items()}, strict=True, assign=True)
    net.requires_grad_(False)
    net.eval()


_ROUNDING = {torch.bfloat16: (2**-8, 0.0), torch.float16: (2**-10, 2**-24)}  # 2**-24 is its smallest number
"""Of betas by the type that they are stored in: relative, absolute."""


def trained_schedule(
    betas: Tensor | None, said: TrainingConfig | None, name: str
) -> tuple[NDArray[np.float64], ScheduleSpec | None, list[str]]:
    """γ (T,) of training, its name if known, and what was assumed. A file's β are float32: γ is made again in float64."""
    if betas is None:
        if said is None:
            raise CheckpointError(f"{name} has no `betas`, so its noise schedule is not known: give the training config with --config")
        return (
            exact_gammas(said.trained),
            said.trained,
            ["training schedule: from the config, the file has no betas to confirm it"],
        )
    check_finite({"betas": betas}, name)
    if betas.ndim != 1 or not len(betas) or not bool(((betas > 0) & (betas < 1)).all()):
        raise CheckpointError(
            f"{name}: betas should be (T,), each between 0 and 1, found {tuple(betas.shape)}, values from {betas.min():.3g}"
        )
    if said is None and betas.dtype in (torch.float16, torch.bfloat16):
        raise CheckpointError(f"{name} has its betas in {betas.dtype}, which do not tell the schedule: give --config")
    recognised = schedule_of(betas)
    if said is not None:
        made = NAMED[said.trained.kind](said.trained.steps, said.trained.start, said.trained.end)
        relative, absolute = _ROUNDING.get(betas.dtype, (3e-7, 0.0))
        if len(made) != len(betas) or not np.allclose(made, betas.double().numpy(), rtol=relative, atol=absolute):
            told = recognised or f"{len(betas)} betas from {betas[0]:.3g} to {betas[-1]:.3g}"
            raise CheckpointError(
                f"the config does not belong to {name}: training schedule: {said.trained} in the config, {told} in the tensors"
            )
        return exact_gammas(said.trained), said.trained, []
    if recognised is not None:
        return exact_gammas(recognised), recognised, []
    remark = "training schedule: the betas are no schedule known by name, so their float32 values were taken as exact"
    return np.cumprod(1 - betas.double().numpy()), None, [remark]


def exact_gammas(schedule: ScheduleSpec) -> NDArray[np.float64]:
    try:
        return schedule.schedule().gammas
    except OptionError as error:
        raise CheckpointError(f"the training schedule ({schedule}) cannot be used: {error}") from None


def settle_scale(flag: int | None, said: TrainingConfig | None, name: str) -> tuple[int, list[str]]:
    """The scale factor from the flag, else from the config's resolutions."""
    low, high = (None, None) if said is None else (said.low_size, said.high_size)
    told = high // low if low and high and high % low == 0 else None
    if flag is not None:
        return flag, [f"scale {flag}: as asked, although the config says {told}"] if told not in (None, flag) else []
    if told is None:
        found = f"the config has l_resolution {low} and r_resolution {high}" if said else "no tensor tells it"
        raise CheckpointError(f"the scale factor of {name} is not known ({found}): give --scale N (size out / size in)")
    return told, []


def settle_image_size(flag: int | None, said: TrainingConfig | None) -> tuple[int | None, list[str]]:
    """The pictures' size in training, from the flag, else from the config."""
    told = None if said is None else said.image_size
    if flag is not None:
        return flag, [f"image_size {flag}: as asked, although the config says {told}"] if told not in (None, flag) else []
    return told, [] if told is not None else ["image_size: not known; to_trt.py builds engines at 128×128 unless told the --size"]


def read_own(weights: Weights, path: Path, *, scale: int | None, image_size: int | None, sha256: str) -> Checkpoint:
    """A safetensors file of `compact.py` or `paper.py`: metadata architecture, config and perhaps scale; a tensor `gammas`."""
    architecture = weights.metadata["architecture"]
    if architecture not in ("compact", "paper"):
        raise CheckpointError(f"{path} is of the architecture {architecture!r}: expected compact or paper")
    tensors = dict(weights.tensors)
    gammas = tensors.pop("gammas", None)
    if gammas is None or gammas.ndim != 1:
        raise CheckpointError(f"{path} has no tensor `gammas` (T,): write the training schedule there")
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in metadata_json(weights, "config", path).items()}
    known = {field.name for field in fields(CompactConfig if architecture == "compact" else PaperConfig)}
    if strange := sorted(set(options) - known):
        raise CheckpointError(f"{path}: the config in its metadata has {', '.join(strange)}: expected only {', '.join(sorted(known))}")
    net: CompactUNet | PaperUNet
    with torch.device("meta"):
        try:
            net = CompactUNet(CompactConfig(**options)) if architecture == "compact" else PaperUNet(PaperConfig(**options))  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: no network can be made from the config in its metadata: {error}") from None
    check_keys(net, tensors, path.name)
    check_finite({**tensors, "gammas": gammas}, path.name)
    told = weights.metadata.get("scale", "")
    if scale is None and not told.isdecimal() and architecture == "paper":
        raise CheckpointError(
            f"the scale factor of {path.name} is not known (no `scale` in its metadata): give --scale N (size out / size in)"
        )
    place(net, tensors)
    compact = architecture == "compact"
    assumptions = rounding(tensors)
    if not (scale or told):
        assumptions.append(f"scale {COMPACT_SCALE}: what the training script trains; the file does not say")
    return Checkpoint(
        net=net,
        architecture="compact" if compact else "paper",
        gammas=gammas.to(torch.float64).numpy(),
        trained=None,
        inference=None,
        prediction="x0" if compact else "eps",
        level="sqrt_gamma",
        variance="posterior" if compact else "paper",
        scale=scale or (int(told) if told.isdecimal() else COMPACT_SCALE),
        channels=net.config.channels,
        image_size=image_size,
        sha256=sha256,
        config_sha256=None,
        assumptions=tuple(assumptions),
    )
