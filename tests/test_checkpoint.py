"""The checkpoint reader: what it recognises, what it asks for, and one clear error for every kind of wrong file."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoints import FLAGS, TINY, config_of, refused, tiny_state
from conftest import GOLDEN
from PIL import Image

from sr3rt.errors import CheckpointError
from sr3rt.export.checkpoint import read
from sr3rt.export.nets.compact import CompactConfig, CompactUNet
from sr3rt.export.nets.janspiry import JanspiryConfig
from sr3rt.export.nets.paper import PaperConfig, PaperUNet
from sr3rt.schedule import NAMED, ScheduleSpec, named


@pytest.fixture
def file(tmp_path):
    """Saves an object with torch.save and returns the path."""

    def save(content: object, name: str = "net_gen.pth", **options: object) -> Path:
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return save


# What is recognised


TRAINED = ScheduleSpec("linear", 2000, 1e-6, 1e-2)
LINEAR = ScheduleSpec("linear", 50, 1e-4, 0.1)  # of tiny_state
SHORT = ScheduleSpec("linear", 20, 1e-4, 0.5)
EXPECTED = {
    "sr3_a": (JanspiryConfig("sr3", 3, 16, (1, 2, 4), 1, (1,), 8), TRAINED, SHORT),
    "sr3_c": (JanspiryConfig("sr3", 3, 64, (1, 1), 1, (), 32), TRAINED, ScheduleSpec("cosine", 20, 1e-6, 1e-2)),
    "ddpm_e": (JanspiryConfig("ddpm", 3, 16, (1, 2, 2, 4), 1, (2, 3), 8), ScheduleSpec("linear", 2000, 1e-4, 2e-2), SHORT),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_checkpoints_with_their_configs(name):
    expected, trained, inference = EXPECTED[name]
    found = read(GOLDEN / name / "I10_E1_gen.pth", config=GOLDEN / name / "config.json")
    assert found.net.config == expected
    assert (found.trained, found.inference) == (trained, inference)
    assert (found.architecture, found.prediction, found.variance) == (expected.variant, "eps", "posterior")
    assert found.level == ("sqrt_gamma" if expected.variant == "sr3" else "timestep")
    assert (found.scale, found.channels, found.image_size) == (4, 3, config_of(name)["model"]["diffusion"]["image_size"])
    assert found.gammas.dtype == np.float64
    assert np.array_equal(found.gammas, named(trained.kind, trained.steps, trained.start, trained.end).gammas)
    assert not found.net.training
    assert any("cannot confirm" in remark for remark in found.assumptions)  # random weights tell nothing about norm_groups


def test_the_network_read_computes_what_the_public_implementation_does():
    found = read(GOLDEN / "sr3_a" / "I10_E1_gen.pth", norm_groups=8, scale=4)
    with np.load(GOLDEN / "sr3_a" / "golden.npz") as arrays:
        x, y, level, expected = (torch.from_numpy(arrays[f"mix_{key}"]) for key in ("x", "y", "level", "out"))
    assert (found.net(x, y, level) - expected).abs().max() < 2e-5


def test_flags_stand_in_for_a_config(file):
    found = read(file(tiny_state()), norm_groups=4, scale=2, image_size=48)
    assert found.net.config == TINY
    assert (found.scale, found.image_size, found.inference) == (2, 48, None)
    assert found.trained == LINEAR


@pytest.mark.parametrize("kind", ["linear", "quad", "warmup10", "warmup50", "const", "cosine"])
def test_named_schedules_come_back_exactly(file, kind):
    state = tiny_state()
    state["betas"] = torch.from_numpy(NAMED[kind](60, 1e-4, 2e-2)).to(torch.float32)
    found = read(file(state), **FLAGS)
    assert found.trained is not None
    assert found.trained.kind == ("linear" if kind == "const" else kind)  # a constant is linear with equal ends
    assert np.array_equal(found.gammas, named(kind, 60, 1e-4, 2e-2).gammas)


def test_a_schedule_without_a_name_is_taken_from_its_betas(file):
    state = tiny_state()
    betas = np.linspace(1e-4, 0.1, 50) ** 1.5
    state["betas"] = torch.from_numpy(betas).to(torch.float32)
    found = read(file(state), **FLAGS)
    assert found.trained is None
    assert np.allclose(found.gammas, np.cumprod(1 - betas), rtol=1e-5)
    assert any("no schedule known by name" in remark for remark in found.assumptions)


def test_half_precision_and_the_old_file_format(file):
    state = OrderedDict((key, value if key == "betas" else value.half()) for key, value in tiny_state().items())
    found = read(file(state, "old.ckpt", _use_new_zipfile_serialization=False), **FLAGS)
    assert all(parameter.dtype == torch.float32 for parameter in found.net.parameters())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_betas_of_half_precision_belong_to_their_config(tmp_path, kind):
    state = torch.load(GOLDEN / "sr3_a" / "I10_E1_gen.pth", weights_only=True)
    torch.save({key: value.to(kind) for key, value in state.items()}, tmp_path / "half.pth")
    config = GOLDEN / "sr3_a" / "config.json"
    found, whole = (read(path, config=config) for path in (tmp_path / "half.pth", GOLDEN / "sr3_a" / "I10_E1_gen.pth"))
    assert np.array_equal(found.gammas, whole.gammas) and found.trained == whole.trained
    with pytest.raises(CheckpointError, match=r"has its betas in torch\.b?float16, which do not tell the schedule: give --config"):
        read(tmp_path / "half.pth", **FLAGS)
    other = json.loads(config.read_text())
    other["model"]["beta_schedule"]["train"]["linear_end"] *= 1.1
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(CheckpointError, match=r"the config does not belong to half\.pth: training schedule"):
        read(tmp_path / "half.pth", config=tmp_path / "other.json")


@pytest.fixture
def ddpm_state() -> OrderedDict[str, torch.Tensor]:
    """The golden checkpoint of the variant that holds its encoding's frequencies, a constant."""
    return torch.load(GOLDEN / "ddpm_e" / "I10_E1_gen.pth", weights_only=True)


FREQUENCIES = "denoise_fn.time_mlp.0.inv_freq"


@pytest.mark.parametrize("widened", [False, True])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_weights_and_not_the_frequencies_of_the_timestep(file, ddpm_state, kind, widened):
    rounded = OrderedDict((key, value if key == "betas" else value.to(kind)) for key, value in ddpm_state.items())
    found = read(file({key: value.float() for key, value in rounded.items()} if widened else rounded), norm_groups=8, scale=4)
    assert torch.allclose(found.net.time_mlp[0].inv_freq, ddpm_state[FREQUENCIES], rtol=1e-6, atol=0)
    assert "time_mlp.0.inv_freq: rounded in the file, made again by its formula" in found.assumptions
    said = [remark for remark in found.assumptions if remark.startswith("weights: ")]
    assert said == ([] if widened else [f"weights: {str(kind)[6:]} in the file, and so no finer in the bundle"])
    with np.load(GOLDEN / "ddpm_e" / "golden.npz") as arrays:
        x, y, level, expected = (torch.from_numpy(arrays[key]) for key in ("x", "eps_y", "eps_level", "eps_out"))
    errors = [float((found.net(x, y[t], level[t][None].float()) - expected[t]).abs().max() / expected[t].abs().max()) for t in (0, 5)]
    assert errors[1] < 1.5 * errors[0]  # at timestep 1999 no more than at 0


def test_whole_frequencies_stay_the_files_and_nothing_is_said(file, ddpm_state):
    found = read(file(ddpm_state), norm_groups=8, scale=4)
    assert torch.equal(found.net.time_mlp[0].inv_freq, ddpm_state[FREQUENCIES])
    assert not any("inv_freq" in remark or remark.startswith("weights") for remark in found.assumptions)


def test_other_frequencies_are_another_network(file, ddpm_state):
    ddpm_state[FREQUENCIES] = ddpm_state[FREQUENCIES] ** 1.01
    assert "time_mlp.0.inv_freq, a constant, differs by up to 7.7 % from" in refused(file(ddpm_state), norm_groups=8, scale=4)


def test_safetensors_and_torch_files_give_the_same_network(file, tmp_path):
    state = tiny_state()
    safetensors.torch.save_file(dict(state), tmp_path / "net.safetensors")
    first, second = read(file(state), **FLAGS), read(tmp_path / "net.safetensors", **FLAGS)
    assert np.array_equal(first.gammas, second.gammas)
    assert all(torch.equal(a, b) for a, b in zip(first.net.parameters(), second.net.parameters(), strict=True))
    assert first.sha256 != second.sha256


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {
            "state_dict": {f"model.{key}": value for key, value in state.items()},
            "epoch": 3,
            "optimizer": {"state": {}},
        },
        lambda state: {key.replace("denoise_fn.", ""): value for key, value in state.items()},
        lambda state: {"model": {key.replace("denoise_fn.", "module."): value for key, value in state.items()}},
    ],
)
def test_wrappings_are_taken_off(file, wrap):
    state = tiny_state()
    found = read(file(wrap(state)), **FLAGS)
    assert torch.equal(found.net.downs[0].weight, state["denoise_fn.downs.0.weight"])
    assert found.trained == LINEAR


@pytest.mark.parametrize(
    ("architecture", "net"),
    [
        ("compact", CompactUNet(CompactConfig(widths=(8, 16), blocks=(1, 1), embedding=16))),
        ("paper", PaperUNet(PaperConfig(width=8, multipliers=(1, 2), blocks=1, attention=(1,), norm_groups=4))),
    ],
)
def test_own_networks_carry_their_config(tmp_path, architecture, net):
    gammas = named("linear", 50, 1e-4, 0.1).gammas
    tensors = {**net.state_dict(), "gammas": torch.from_numpy(gammas)}
    metadata = {"architecture": architecture, "config": json.dumps(asdict(net.config))}
    safetensors.torch.save_file(tensors, tmp_path / "net.safetensors", metadata=metadata)
    found = read(tmp_path / "net.safetensors", scale=8)
    assert found.net.config == net.config
    assert (found.architecture, found.scale) == (architecture, 8)
    assert (found.prediction, found.variance) == (("x0", "posterior") if architecture == "compact" else ("eps", "paper"))
    assert np.array_equal(found.gammas, gammas)
    torch.manual_seed(0)
    x, y, level = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8), torch.tensor([[0.3]])
    with torch.inference_mode():
        assert torch.allclose(found.net(x, y, level), net.eval()(x, y, level), atol=1e-5)
    assert refused(tmp_path / "net.safetensors", scale=0) == "--scale must be at least 1, found 0"
    assert refused(tmp_path / "net.safetensors", scale=8, image_size=-1) == "--image-size must be at least 1, found -1"
    assert "carries its own config" in refused(tmp_path / "net.safetensors", norm_groups=4)
    metadata["config"] = json.dumps({**asdict(net.config), "depth": 3})
    safetensors.torch.save_file(tensors, tmp_path / "strange.safetensors", metadata=metadata)
    assert "has depth: expected only" in refused(tmp_path / "strange.safetensors", scale=8)


def test_a_flag_goes_before_the_config_and_says_so():
    folder = GOLDEN / "sr3_a"
    found = read(folder / "I10_E1_gen.pth", config=folder / "config.json", scale=2, image_size=64, norm_groups=4)
    assert (found.scale, found.image_size, found.net.config.norm_groups) == (2, 64, 4)
    assert "scale 2: as asked, although the config says 4" in found.assumptions
    assert "image_size 64: as asked, although the config says 32" in found.assumptions


def test_the_scale_is_asked_for(file):
    assert "give --scale N" in refused(file(tiny_state()), norm_groups=4)


def test_the_schedule_is_asked_for(file):
    state = tiny_state()
    del state["betas"]
    assert "give the training config with --config" in refused(file(state), **FLAGS)


# Wrong files


@pytest.mark.parametrize("beside", [True, False])
def test_the_optimizers_file(file, beside):
    content = {"epoch": 1, "iter": 10, "scheduler": None, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}
    path = file(content, "I10_E1_opt.pth")
    if beside:
        file(tiny_state(), "I10_E1_gen.pth")
    message = refused(path)
    assert "holds the optimizer's state (epoch, iter, scheduler, optimizer)" in message
    assert ("I10_E1_gen.pth instead" if beside else "*_gen.pth") in message


def test_another_networks_tensors(file):
    message = refused(file({f"layer{i}.weight": torch.zeros(i + 1, 2) for i in range(12)}))
    assert "is not a network known here" in message
    assert "layer9.weight (10, 2) …" in message
    assert "layer10" not in message
    assert "downs.0.weight (64, 6, 3, 3)" in message


def test_missing_unexpected_and_misshapen_tensors_are_listed(file):
    state = tiny_state()
    del state["denoise_fn.mid.0.attn.qkv.weight"]
    state["denoise_fn.mid.0.attn.extra"] = torch.zeros(5)
    state["denoise_fn.ups.0.res_block.block1.block.0.weight"] = torch.zeros(7)
    message = refused(file(state), **FLAGS)
    assert "1 missing: mid.0.attn.qkv.weight (48, 16, 1, 1)" in message
    assert "1 unexpected: mid.0.attn.extra (5,)" in message
    assert "1 of another shape: ups.0.res_block.block1.block.0.weight (7,) not (32,)" in message


def test_a_network_without_a_condition(file):
    state = tiny_state()
    state["denoise_fn.downs.0.weight"] = state["denoise_fn.downs.0.weight"][:, :3].clone()
    assert "takes 3 channels and returns 3" in refused(file(state), **FLAGS)


def test_several_networks_in_one_file(file):
    state = tiny_state()
    content = {f"{part}.{key}": value for part in ("first", "second") for key, value in state.items()}
    assert "holds several networks, under 'first.denoise_fn.', 'second.denoise_fn.'" in refused(file(content), **FLAGS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(file, value):
    state = tiny_state()
    state["denoise_fn.mid.0.attn.out.bias"][2] = value
    assert "the tensor mid.0.attn.out.bias has 1 NaN or infinite values of 16" in refused(file(state), **FLAGS)


def test_betas_that_are_not_betas(file):
    state = tiny_state()
    state["betas"] = -state["betas"]
    assert "betas should be (T,), each between 0 and 1" in refused(file(state), **FLAGS)


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("kept", [0.01, 0.3, 0.999])
def test_truncated_files(file, old_format, kept):
    path = file(tiny_state(), _use_new_zipfile_serialization=not old_format)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert "truncated" in refused(path, **FLAGS)


@pytest.mark.parametrize("kept", [0.01, 0.5, 0.999])
def test_truncated_safetensors(tmp_path, kept):
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_file(dict(tiny_state()), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert "truncated or damaged safetensors file" in refused(path, **FLAGS)


def written(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: written(path, b""), "is empty"),
        (lambda path: written(path, b"# a readme\n"), "is a text file"),
        (lambda path: written(path, b"<!DOCTYPE html>"), "is a web page"),
        (lambda path: written(path, b"version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"),
        (lambda path: written(path, bytes(range(256))), "is not in a format known here"),
        (lambda path: Image.new("RGB", (8, 8)).save(path, "PNG"), "is a PNG picture"),
        (lambda path: zipfile.ZipFile(path, "w").writestr("holiday.txt", "sun"), "is a zip archive of holiday.txt"),
        (lambda path: written(path, pickle.dumps({"a": 1}, protocol=4)), "is a pickle, but damaged or not one of tensors"),
        (lambda path: torch.save({"epoch": 3}, path), "holds the optimizer's state"),
        (lambda path: torch.save({"name": "x"}, path), "holds no tensors, only name"),
        (lambda path: torch.save([torch.zeros(3)], path), "holds one list"),
        (
            lambda path: torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path),
            "is a TorchScript archive",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_not_a_checkpoint(tmp_path, make, expected):
    path = tmp_path / "file.pth"
    make(path)
    assert re.search(expected, refused(path))


class Payload:
    """Unpickled, it would run `os.mkdir(target)`."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("new", [True, False])
def test_numbers_of_numpy_beside_the_weights_are_no_code(tmp_path, file, new):
    content = {**tiny_state(), "loss": np.float64(0.3), "step": np.int64(7), "mixed": [np.float32(1), np.bool_(True)]}
    assert read(file(content, _use_new_zipfile_serialization=new), **FLAGS).net


@pytest.mark.parametrize("form", ["zip", "old", "plain"])
def test_code_in_a_file_is_not_run(tmp_path, file, form):
    target = tmp_path / "was_run"
    content = {**tiny_state(), "extra": Payload(target)}
    if form == "plain":
        path = tmp_path / "net_gen.pth"
        path.write_bytes(pickle.dumps({"extra": Payload(target)}))
    else:
        path = file(content, _use_new_zipfile_serialization=form == "zip")
    message = refused(path, **FLAGS)
    assert "holds code as well as tensors" in message
    assert f"{os.mkdir.__module__}.mkdir" in message
    assert "was not run" in message
    assert "torch.save(net.state_dict(), FILE)" in message
    assert not target.exists()
