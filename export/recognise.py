"""What the tensors of a checkpoint tell: where the network is in the file, its options, its schedule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sr3rt.errors import CheckpointError
from sr3rt.export.averages import averaged, beside, matched
from sr3rt.export.nets.janspiry import JanspiryConfig, JanspiryUNet
from sr3rt.export.training_config import TrainingConfig
from sr3rt.schedule import NAMED, ScheduleSpec

FIRST = "downs.0.weight"  # the tensor that a network of the public implementation is found by
BUFFERS = frozenset(  # that implementation's diffusion, which lies beside the network
    {
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    }
)
SHOWN = 10


@dataclass(frozen=True, eq=False)
class Found:
    """The network's own tensors, by the names it gives them; the β of training, if there; what was chosen, in words.

    prefix: what their names begin with in the file. averages: see `averages.beside`; none where the tensors are an average themselves.
    """

    prefix: str
    tensors: dict[str, Tensor]
    averages: Mapping[str, Mapping[str, Tensor]]
    betas: Tensor | None
    choices: tuple[str, ...]


def locate(tensors: Mapping[str, Tensor], name: str) -> Found:
    """Finds the network under whatever wraps it: `module.`, `model.`, `state_dict.`, `denoise_fn.`, a moving average.

    A network of weights averaged over training is taken before that of the last ones. `name`: the file's, for errors.
    Raises CheckpointError when there is no such network, or more than one of a kind.
    """
    prefixes = [key.removesuffix(FIRST) for key in tensors if key == FIRST or key.endswith("." + FIRST)]
    if not prefixes:
        with torch.device("meta"):
            expected = JanspiryUNet(JanspiryConfig()).state_dict()
        raise CheckpointError(
            f"{name} is not a network known here. Of its {len(tensors)} tensors the first are {listed(tensors)}; a checkpoint of "
            f"the public implementation has {listed(expected)}; a safetensors file of this program's own networks names its "
            "architecture in its metadata"
        )
    of_averages = averaged(prefixes)
    wanted = of_averages or prefixes
    if len(wanted) > 1:
        raise CheckpointError(
            f"{name} holds several networks, under {quoted(wanted)}: save the tensors of one of them to a file of its own"
        )
    prefix = wanted[0]
    choices = []
    if len(prefixes) > 1:
        others = [other for other in prefixes if other != prefix]
        choices.append(f"weights: the moving average under {prefix!r}, not those under {quoted(others)}")
    elif prefix not in ("", "denoise_fn."):
        choices.append(f"weights: found under {prefix!r}")
    averages = beside(tensors, FIRST)
    folders = {head[: head.rfind(".") + 1] for head in averages}
    elsewhere = tuple(folder for folder in folders if not prefix.startswith(folder))
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix) and not key.startswith(elsewhere)}
    return Found(
        prefix=prefix,
        tensors={key: value for key, value in own.items() if key not in BUFFERS},
        averages={} if of_averages else averages,
        betas=betas_near(tensors, prefix),
        choices=tuple(choices),
    )


def prefer_average(found: Found, net: nn.Module, name: str) -> Found:
    """The same with the average over training that lies beside the network, if one does. `name`: the file's, for errors.

    Raises CheckpointError when its tensors cannot be told to be the network's.
    """
    if not found.averages:
        return found
    (head, average), *others = found.averages.items()
    parameters = dict(net.named_parameters())
    order = [key for key in found.tensors if key in parameters]
    taken = "there are several" if others else matched(average, parameters, order)
    if isinstance(taken, str):
        raise CheckpointError(
            f"{name} has a moving average under {quoted(found.averages)} that does not fit the network under {found.prefix!r}: {taken}. "
            "Save the tensors that are wanted to a file of their own"
        )
    said = f"weights: the moving average under {head!r}, not those under {found.prefix!r}"
    return replace(found, tensors={**found.tensors, **taken}, choices=(said,))


def quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def betas_near(tensors: Mapping[str, Tensor], prefix: str) -> Tensor | None:
    """The `betas` of the innermost wrapper around the network that has them, else the only ones in the file."""
    parts = prefix.split(".")[:-1]
    for depth in range(len(parts), -1, -1):
        key = ".".join([*parts[:depth], "betas"])
        if key in tensors:
            return tensors[key]
    elsewhere = [value for key, value in tensors.items() if key.endswith(".betas")]
    return elsewhere[0] if len(elsewhere) == 1 else None


def listed(tensors: Mapping[str, Tensor]) -> str:
    """The first ten names with their shapes."""
    shown = [f"{key} {tuple(value.shape)}" for key, value in list(tensors.items())[:SHOWN]]
    return ", ".join(shown) + (" …" if len(tensors) > SHOWN else "")


def options_of(tensors: Mapping[str, Tensor], name: str, norm_groups: int) -> JanspiryConfig:
    """The options that the tensors' names and shapes tell. What does not fit together is left for `check_keys` to name.

    Raises CheckpointError for networks that are not conditioned on a picture.
    """

    def size(key: str, axis: int) -> int:
        value = tensors.get(key)
        if value is None or value.ndim != 4:
            raise CheckpointError(f"{name} lacks a convolution {key}: it has {listed(tensors)}")
        return int(value.shape[axis])

    inner, in_channels = size(FIRST, 0), size(FIRST, 1)
    channels = size("final_conv.block.3.weight", 0)
    if in_channels != 2 * channels:
        raise CheckpointError(
            f"{name} takes {in_channels} channels and returns {channels}; super-resolution takes twice as many as it returns, "
            "condition and state. A network without a condition cannot be used"
        )
    widths, counts, attention = [inner], [0], set()
    for i in range(1, sum(key.startswith("downs.") for key in tensors)):
        if f"downs.{i}.conv.weight" in tensors:
            widths.append(widths[-1])
            counts.append(0)
        elif f"downs.{i}.res_block.block2.block.3.weight" in tensors:
            widths[-1] = size(f"downs.{i}.res_block.block2.block.3.weight", 0)
            counts[-1] += 1
            if f"downs.{i}.attn.qkv.weight" in tensors:
                attention.add(len(widths) - 1)
    if any(width % inner for width in widths):
        raise CheckpointError(f"{name} has levels {widths} channels wide, which should be multiples of the first convolution's {inner}")
    return JanspiryConfig(
        variant="ddpm" if any(key.startswith("time_mlp.") for key in tensors) else "sr3",
        channels=channels,
        inner=inner,
        multipliers=tuple(width // inner for width in widths),
        blocks=max(1, counts[0]),
        attention=tuple(sorted(attention)),
        norm_groups=norm_groups,
    )


def check_keys(net: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Raises CheckpointError that lists the first ten missing, unexpected and mis-shaped tensors, if any."""
    wanted: dict[str, Tensor] = net.state_dict()
    missing = {key: value for key, value in wanted.items() if key not in tensors}
    unexpected = {key: value for key, value in tensors.items() if key not in wanted}
    common = [key for key in wanted if key in tensors]
    shapes = [f"{k} {tuple(tensors[k].shape)} not {tuple(wanted[k].shape)}" for k in common if tensors[k].shape != wanted[k].shape]
    problems = [f"{len(part)} {word}: {listed(part)}" for word, part in (("missing", missing), ("unexpected", unexpected)) if part]
    if shapes:
        problems.append(f"{len(shapes)} of another shape: {', '.join(shapes[:SHOWN])}{' …' if len(shapes) > SHOWN else ''}")
    if problems:
        raise CheckpointError(f"{name} does not fit the network that its first tensors tell of ({net.config}): {'; '.join(problems)}")


def check_finite(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raises CheckpointError for the first tensor with a NaN or infinite value, or of a type that weights do not have."""
    for key, value in tensors.items():
        if not value.is_floating_point():
            raise CheckpointError(f"{name}: the tensor {key} is {value.dtype}, expected floating point; quantised weights cannot be used")
        bad = value.numel() - int(torch.isfinite(value).sum())
        if bad:
            raise CheckpointError(
                f"{name}: the tensor {key} has {bad} NaN or infinite values of {value.numel()}: the training diverged or the "
                "file is damaged"
            )


def with_constants(net: nn.Module, tensors: Mapping[str, Tensor], name: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors, with those that no training changes (ddpm's frequencies) made anew where the file has them rounded; and what was done.

    A phase is a timestep of up to 2000 times a frequency: float16's would be off by up to a radian. Raises CheckpointError where the
    file's are others.
    """
    exact = {key: value for key, value in net.named_buffers() if key in tensors}
    errors = {key: float((tensors[key].double() / value.double() - 1).abs().max()) for key, value in exact.items()}
    for key, error in errors.items():
        if not error < 2**-8:  # what bfloat16 rounds by
            raise CheckpointError(
                f"{name}: {key}, a constant, differs by up to {100 * error:.2g} % from that of the implementation: this is another network"
            )
    rounded = {key: exact[key] for key, error in errors.items() if error > 1e-6}
    return {**tensors, **rounded}, [f"{key}: rounded in the file, made again by its formula" for key in rounded]


def rounding(tensors: Mapping[str, Tensor]) -> list[str]:
    """In words, that the weights are of less than float32, if they are."""
    kinds = {str(value.dtype).removeprefix("torch.") for value in tensors.values() if value.dtype.itemsize < torch.float32.itemsize}
    return [f"weights: {' and '.join(sorted(kinds))} in the file, and so no finer in the bundle"] if kinds else []


def conflicts(config: TrainingConfig, found: JanspiryConfig) -> list[str]:
    """Where the config and the tensors disagree, with both values, in the config's own names."""
    pairs = {
        "which_model_G": (config.variant, found.variant),
        "in_channel": (config.in_channels, 2 * found.channels),
        "out_channel": (config.channels, found.channels),
        "inner_channel": (config.inner, found.inner),
        "channel_multiplier": (config.multipliers, found.multipliers),
        "res_blocks": (config.blocks, found.blocks),
        "levels with attention (attn_res)": (config.attention, found.attention),
    }
    return [f"{key}: {said} in the config, {told} in the tensors" for key, (said, told) in pairs.items() if said != told]


def schedule_of(betas: Tensor) -> ScheduleSpec | None:
    """The named schedule that float32 `betas` (T,) were made by; None if no known one makes them, or they are of half precision.

    Its ends are read back as the shortest decimals that round to the float32 ends, so 1e-06 and 0.01 come out exactly.
    """
    if betas.dtype in (torch.float16, torch.bfloat16):
        return None
    rounded: NDArray[np.float32] = betas.to(torch.float32).numpy()
    start, end = float(str(rounded[0])), float(str(rounded[-1]))
    for kind, make in NAMED.items():
        if np.allclose(make(len(rounded), start, end), rounded, rtol=3e-7, atol=0):
            return ScheduleSpec(kind, len(rounded), start, end)
    return None
