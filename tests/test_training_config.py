"""The training config: what is read, and one clear error for each thing that is wrong with one."""

from __future__ import annotations

import json
import re

import pytest
from checkpoints import config_of, refused
from conftest import GOLDEN

from sr3rt.errors import CheckpointError
from sr3rt.export.training_config import read_config, without_comments


def test_comments_go_and_strings_stay():
    text = '{"a": "http://x//y /* z */", // one\n "b": 1, /* two\n */ "c": "\\"//"}'
    assert json.loads(without_comments(text)) == {"a": "http://x//y /* z */", "b": 1, "c": '"//'}


def test_a_config_with_comments(tmp_path):
    text = (GOLDEN / "sr3_a" / "config.json").read_text().replace('"name"', '// the name\n"name"', 1)
    (tmp_path / "config.json").write_text(text)
    assert read_config(tmp_path / "config.json").norm_groups == 8


def test_a_byte_order_mark_does_no_harm(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + (GOLDEN / "sr3_a" / "config.json").read_bytes())
    assert read_config(tmp_path / "config.json").norm_groups == 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (
            "[1]",
            r"should have a string at model\.which_model_G|should have a positive whole number at model\.diffusion\.image_size",
        ),
        (
            '{"model": {"diffusion": {"image_size": "big"}}}',
            r'a positive whole number at model\.diffusion\.image_size, found "big"',
        ),
    ],
)
def test_a_config_that_is_not_one(tmp_path, text, expected):
    (tmp_path / "config.json").write_text(text)
    assert re.search(expected, refused(GOLDEN / "sr3_a" / "I10_E1_gen.pth", config=tmp_path / "config.json"))


@pytest.mark.parametrize("section", ["train", "val"])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "sqrt"}, 'should have one of linear, quad, .* at KEY.schedule, found "sqrt"'),
        ({"n_timestep": 10**12}, "should have at most 1,000,000 steps at KEY.n_timestep, found 1000000000000"),
        ({"n_timestep": 20.0}, "should have a positive whole number at KEY.n_timestep, found 20.0"),
        ({"linear_end": 2}, "should have a number from 0 to 1 at KEY.linear_end, found 2"),
        ({"linear_start": -1e-6}, "should have a number from 0 to 1 at KEY.linear_start, found -1e-06"),
        ({"linear_start": float("nan")}, "should have a number from 0 to 1 at KEY.linear_start, found NaN"),
        ({"linear_start": 0}, r"has a schedule that cannot be used at KEY: .* betas outside \(0, 1\]: 0 to"),
        ({"schedule": "jsd"}, "has a schedule that cannot be used at KEY: the schedule ends at gamma = 0"),
    ],
)
def test_both_schedules_must_be_ones_that_can_be_made(tmp_path, section, changes, expected):
    config = config_of()
    config["model"]["beta_schedule"][section].update(changes)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"config\.json {expected.replace('KEY', rf'model.beta_schedule.{section}')}"):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda model: model.update(which_model_G="ddpm"), "which_model_G: ddpm in the config, sr3 in the tensors"),
        (lambda model: model["unet"].update(inner_channel=32), "inner_channel: 32 in the config, 16 in the tensors"),
        (
            lambda model: model["unet"].update(channel_multiplier=[1, 2]),
            "channel_multiplier: (1, 2) in the config, (1, 2, 4) in the",
        ),
        (lambda model: model["unet"].update(res_blocks=3), "res_blocks: 3 in the config, 1 in the tensors"),
        (
            lambda model: model["unet"].update(attn_res=[8]),
            "levels with attention (attn_res): (2,) in the config, (1,) in the tensors",
        ),
        (
            lambda model: model["beta_schedule"]["train"].update(n_timestep=1000),
            "linear, 1000 steps, beta 1e-06 to 0.01 in the config, linear",
        ),
        (lambda model: model["unet"].update(norm_groups=5), "norm_groups 5 (the config) does not fit"),
    ],
)
def test_a_config_that_does_not_belong(tmp_path, change, expected):
    config = config_of()
    change(config["model"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert expected in refused(GOLDEN / "sr3_a" / "I10_E1_gen.pth", config=tmp_path / "config.json")
