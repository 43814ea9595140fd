"""A moving average of the weights is taken before the last ones, however a training program keeps it, or refused; never passed over."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from checkpoints import FLAGS, TINY, refused, tiny_state

from sr3rt.export.checkpoint import read
from sr3rt.export.nets.janspiry import JanspiryConfig


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "net.pth")
    return folder / "net.pth"


@pytest.mark.parametrize("wrapper", ["ema", "model_ema", "ema_model.module"])
def test_the_moving_average_is_preferred_and_said(tmp_path, wrapper):
    last, average = tiny_state(0), tiny_state(1)
    content = {f"model.{key}": value for key, value in last.items()} | {f"{wrapper}.{key}": value for key, value in average.items()}
    found = read(saved(tmp_path, content), **FLAGS)
    assert torch.equal(found.net.downs[0].weight, average["denoise_fn.downs.0.weight"])
    assert any(wrapper in remark and "moving average" in remark for remark in found.assumptions)


def last_and_average(config: JanspiryConfig = TINY) -> tuple[OrderedDict[str, torch.Tensor], OrderedDict[str, torch.Tensor]]:
    """Two states of a network, and so of its parameters; what is no parameter is the same in both."""
    return tiny_state(0, config), tiny_state(1, config)


def of_parameters(state: OrderedDict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those that torch's `named_parameters()` of the whole model gives, in its order."""
    return {key: value for key, value in state.items() if key != "betas" and not key.endswith("inv_freq")}


def lucidrains(last: OrderedDict[str, torch.Tensor], average: OrderedDict[str, torch.Tensor]) -> dict:
    copies = {f"{part}.{key}": value for part, state in (("online_model", last), ("ema_model", average)) for key, value in state.items()}
    return {"step": 3, "model": last, "ema": {"initted": torch.tensor(True), "step": torch.tensor(3), **copies}}


def torch_ema(last: OrderedDict[str, torch.Tensor], average: OrderedDict[str, torch.Tensor]) -> dict:
    shadows = list(of_parameters(average).values())
    return {"model": last, "ema": {"decay": 0.999, "num_updates": 3, "shadow_params": shadows, "collected_params": []}}


def torch_ema_beside(last: OrderedDict[str, torch.Tensor], average: OrderedDict[str, torch.Tensor]) -> dict:
    bare = {key.removeprefix("denoise_fn."): value for key, value in last.items()}
    return {**bare, "ema": torch_ema(last, average)["ema"]}


def in_a_list(last: OrderedDict[str, torch.Tensor], average: OrderedDict[str, torch.Tensor]) -> dict:
    return {"model": last, "model_ema": list(of_parameters(average).values())}


def in_pairs(last: OrderedDict[str, torch.Tensor], average: OrderedDict[str, torch.Tensor]) -> dict:
    return {"model": last, "ema": [*average.items()]}


def lit_ema(last: OrderedDict[str, torch.Tensor], average: OrderedDict[str, torch.Tensor]) -> dict:
    dotless = {f"model_ema.{key.replace('.', '')}": value for key, value in of_parameters(average).items()}
    kept = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(3, dtype=torch.int)}
    return {"state_dict": {**{f"model.{key}": value for key, value in last.items()}, **kept, **dotless}}


DDPM = JanspiryConfig("ddpm", inner=8, multipliers=(1, 2), blocks=1, attention=(1,), norm_groups=4)


@pytest.mark.parametrize("config", [TINY, DDPM])
@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lucidrains, "'ema.ema_model.denoise_fn.', not those under 'model.denoise_fn.', 'ema.online_model.denoise_fn.'"),
        (torch_ema, "'ema.shadow_params.', not those under 'model.denoise_fn.'"),
        (torch_ema_beside, "'ema.shadow_params.', not those under ''"),
        (in_a_list, "'model_ema.', not those under 'model.denoise_fn.'"),
        (in_pairs, "'ema.denoise_fn.', not those under 'model.denoise_fn.'"),
        (lit_ema, "'state_dict.model_ema.denoise_fn', not those under 'state_dict.model.denoise_fn.'"),
    ],
)
def test_moving_averages_are_found_as_training_programs_keep_them(tmp_path, wrap, said, config):
    last, average = last_and_average(config)
    found = read(saved(tmp_path, wrap(last, average)), **FLAGS)
    expected = {key.removeprefix("denoise_fn."): value for key, value in average.items() if key != "betas"}
    assert all(torch.equal(value, expected[key]) for key, value in found.net.state_dict().items())
    assert f"weights: the moving average under {said}" in found.assumptions


def test_two_networks_of_a_folder_for_averages_are_told_apart_by_what_differs(tmp_path):
    last, average = last_and_average()
    content = {f"ema_run.{part}.{key}": value for part, state in (("net", last), ("net_ema", average)) for key, value in state.items()}
    found = read(saved(tmp_path, content), **FLAGS)
    assert torch.equal(found.net.downs[0].weight, average["denoise_fn.downs.0.weight"])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda content: content["ema"]["shadow_params"].pop(), r"it has \d+ tensors, the network \d+"),
        (lambda content: content["ema"]["shadow_params"].reverse(), r"what should be \S+ is \(.*\) and not \(.*\)"),
        (lambda content: content["model"].move_to_end("denoise_fn.downs.0.weight"), "the file has them in another than the network"),
        (lambda content: content.update(ema2={"shadow_params": content["ema"]["shadow_params"]}), "there are several"),
        (lambda content: content["model"].update({"ema.downs0weight": torch.zeros(1)}), "there are several"),
    ],
)
def test_an_average_that_cannot_be_matched_is_not_passed_over(tmp_path, change, why):
    content = torch_ema(*last_and_average())
    change(content)
    message = refused(saved(tmp_path, content), **FLAGS)
    assert re.search(rf"has a moving average under 'ema.* that does not fit the network under 'model.denoise_fn.': .*{why}. Save", message)


def test_an_average_of_names_without_dots_must_have_them_all(tmp_path):
    content = lit_ema(*last_and_average())
    del content["state_dict"]["model_ema.denoise_fnmid0attnqkvweight"]
    assert "'state_dict.model.denoise_fn.': it has no mid0attnqkvweight. Save" in refused(saved(tmp_path, content), **FLAGS)
