"""Weights averaged over training, which make better pictures than the last ones: where training programs keep them in a checkpoint.

ema.downs.0.weight     a network like the other one, under a wrapper with "ema" in its name (lucidrains', timm's)
model_ema.downs0weight the parameters by their names without the dots (CompVis' LitEma)
ema.shadow_params.0    a list of the parameters in their order (torch_ema, diffusers), or one called "ema" itself
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

_INDEX = re.compile(r"((?:.*\.)?([^.]+)\.)\d+")


def says_so(name: str) -> bool:
    """Whether what is called that, a list as well, holds an average."""
    return name == "shadow_params" or "ema" in name.lower().split("_")


def averaged(prefixes: Sequence[str]) -> list[str]:
    """Those prefixes (dotted, ending with a dot or empty) whose names say "ema" where they differ from the others."""
    parts = [prefix.split(".") for prefix in prefixes]
    shared = 0
    while len(parts) > 1 and len({tuple(part[: shared + 1]) for part in parts}) == 1:
        shared += 1
    found = [prefix for prefix, part in zip(prefixes, parts, strict=True) if any(map(says_so, part[shared:]))]
    return averaged(found) if 1 < len(found) < len(prefixes) else found


def beside(tensors: Mapping[str, Tensor], first: str) -> dict[str, dict[str, Tensor]]:
    """The averages that are no network by themselves, by what their names begin with: a list's items, or names without dots.

    first: the network's first tensor.
    """
    dotless = first.replace(".", "")
    heads = {key.removesuffix(dotless) for key in tensors if key.endswith(dotless)}
    heads |= {match[1] for key in tensors if (match := _INDEX.fullmatch(key)) and says_so(match[2])}
    return {head: {key.removeprefix(head): value for key, value in tensors.items() if key.startswith(head)} for head in sorted(heads)}


def matched(average: Mapping[str, Tensor], parameters: Mapping[str, Tensor], order: Sequence[str]) -> dict[str, Tensor] | str:
    """The average's tensors by the parameters' names, or why they cannot be told.

    parameters: as the network has them, one after another. order: their names as the file has them.
    """
    if all(key.isdecimal() for key in average):
        if list(order) != list(parameters):
            return "it goes by the order of the parameters, and the file has them in another than the network"
        if len(average) != len(parameters):
            return f"it has {len(average)} tensors, the network {len(parameters)}"
        found = {name: average[str(i)] for i, name in enumerate(parameters)}
    else:
        names = {name: name.replace(".", "") for name in parameters}
        missing = [name for name, key in names.items() if key not in average]
        if missing:
            return f"it has no {names[missing[0]]}"
        found = {name: average[key] for name, key in names.items()}
    for name, value in found.items():
        if value.shape != parameters[name].shape:
            return f"what should be {name} is {tuple(value.shape)} and not {tuple(parameters[name].shape)}"
    return found
