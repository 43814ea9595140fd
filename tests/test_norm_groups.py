"""A wrong number of normalisation groups is caught by what the weights do with noise, or the number is asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from sr3rt.errors import CheckpointError
from sr3rt.export.checkpoint import read
from sr3rt.export.nets.janspiry import JanspiryConfig, JanspiryUNet
from sr3rt.export.norm_groups import NormGroupsWarning, Probe, allowed

DATA = Path(__file__).parent / "data"
TRAINED = DATA / "trained_8_groups.pth"
UNTRAINED = DATA / "peer_golden" / "sr3_a"


@pytest.fixture
def config_of_trained(tmp_path):
    """Writes the config of the trained checkpoint, with another norm_groups, and returns its path."""

    def write(norm_groups: int | None) -> Path:
        config = json.loads((UNTRAINED / "config.json").read_text())
        config["model"]["unet"].update(inner_channel=16, channel_multiplier=[1, 2], norm_groups=norm_groups)
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path / "config.json"

    return write


def test_trained_weights_confirm_the_right_groups(config_of_trained):
    for options in ({"norm_groups": 8, "scale": 4}, {"config": config_of_trained(8)}):
        found = read(TRAINED, **options)
        assert found.net.config.norm_groups == 8
        assert re.search("norm_groups 8: .*the weights agree", found.assumptions[-1])


def test_the_probe_separates_by_more_than_its_margin():
    found = read(TRAINED, norm_groups=8, scale=4)
    errors = {int(groups): float(error) for groups, error in re.findall(r"(\d+): (0\.\d+)", found.assumptions[-1])}
    assert set(errors) == {1, 2, 4, 8, 16}
    assert errors.pop(8) < 0.02
    assert min(errors.values()) > 0.03


def test_a_number_that_is_no_power_of_two_is_taken_where_it_divides():
    net = JanspiryUNet(JanspiryConfig(inner=24, multipliers=(1, 2), blocks=1, attention=(), norm_groups=12))
    assert allowed(net) == [1, 2, 4, 8] and allowed(net, 12) == [1, 2, 4, 8, 12] and allowed(net, 5) == allowed(net, 0) == allowed(net)


def test_groups_are_asked_for_and_the_weights_advice_given():
    with pytest.raises(CheckpointError, match=r"give --norm-groups N or --config FILE; the weights point to --norm-groups 8"):
        read(TRAINED, scale=4)


def test_untrained_weights_give_no_advice():
    with pytest.raises(CheckpointError, match=r"the weights point to none of them clearly"):
        read(UNTRAINED / "I10_E1_gen.pth", scale=4)


def test_wrong_groups_in_the_config_are_refused_with_both_figures(config_of_trained):
    with pytest.raises(CheckpointError, match=r"is 16 in the config, but the weights work with 8 \(.* 8: 0\.0.*, 16: 0\.[1-9]"):
        read(TRAINED, config=config_of_trained(16))


def test_groups_asked_for_are_obeyed_with_a_warning(config_of_trained):
    with pytest.warns(NormGroupsWarning, match="norm_groups 4, as asked, but the weights work with 8"):
        found = read(TRAINED, config=config_of_trained(16), norm_groups=4)
    assert found.net.config.norm_groups == 4
    assert {module.num_groups for module in found.net.modules() if isinstance(module, torch.nn.GroupNorm)} == {4}


def test_a_config_without_groups_means_32(tmp_path):
    folder = DATA / "peer_golden" / "sr3_c"
    config = json.loads((folder / "config.json").read_text())
    del config["model"]["unet"]["norm_groups"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read(folder / "I10_E1_gen.pth", config=tmp_path / "config.json")
    assert found.net.config.norm_groups == 32
    assert any("the implementation's default" in remark for remark in found.assumptions)


@pytest.mark.parametrize(
    ("errors", "preferred"),
    [
        ({8: 0.01, 16: 0.02, 32: 0.05}, 8),
        ({8: 0.01, 16: 0.019, 32: 0.05}, None),  # not clear enough
        ({8: 0.6, 16: 1.9, 32: 2.5}, None),  # not trained
        ({1: 0.01}, 1),
    ],
)
def test_what_is_clear(errors, preferred):
    assert Probe(errors).preferred == preferred
