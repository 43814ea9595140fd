"""The training script: what the network's two parts learn from, and that it makes a network which the exporter knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("skimage")

from sr3rt.errors import OptionError  # noqa: E402
from sr3rt.export.checkpoint import read  # noqa: E402
from sr3rt.export.nets.compact import CompactConfig, CompactUNet  # noqa: E402
from sr3rt.export.nets.turning import TURNS, turned, untie  # noqa: E402
from sr3rt.export.train import (  # noqa: E402
    LEFT_OUT,
    Crops,
    Part,
    average,
    draw_gamma,
    from_file,
    leaving_out,
    path_gammas,
    recoloured,
    train,
    turning,
)

DATA = Path(__file__).parent / "data"


def test_crops_are_an_original_and_what_bicubic_makes_of_it() -> None:
    ramp = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    x, y0 = next(iter(Crops([ramp], crop=32, batch=3, seed=(0,))))
    assert (x.shape, y0.shape, x.dtype, y0.dtype) == ((3, 32, 32, 3), (3, 32, 32, 3), torch.uint8, torch.uint8)
    assert (x.float() - y0.float()).abs().mean() < 10
    again = next(iter(Crops([ramp], crop=32, batch=3, seed=(0,))))
    assert torch.equal(again[1], y0)


def test_recoloured_pictures_stay_pictures() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    found = [recoloured(pixels, np.random.default_rng(seed)) for seed in range(40)]
    assert all(one.shape == pixels.shape and one.dtype == np.uint8 for one in found)
    assert 5 < sum(np.array_equal(one, pixels) for one in found) < 35


def test_levels_fall_evenly_on_the_path() -> None:
    gammas = path_gammas()
    drawn = draw_gamma(gammas, 1000, np.random.default_rng(0)).numpy().ravel()
    assert abs(np.mean(drawn > np.median(gammas)) - 0.5) < 0.01
    assert gammas[-1] < drawn.min() < drawn.max() < 1


def test_a_crop_turned_by_any_angle_holds_the_photograph_alone() -> None:
    """No corner from beyond it: a picture of one colour stays one."""
    crops = Crops([np.full((90, 120, 3), 200, np.uint8)], crop=32, batch=1, seed=(0,))
    rng = np.random.default_rng(0)
    assert all((crops.oblique(rng) == 200).all() for _ in range(50))


def small() -> CompactUNet:
    torch.manual_seed(0)
    net = CompactUNet(CompactConfig(mean_width=16, mean_blocks=1, widths=(8, 8), blocks=(1, 1), embedding=16))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


@pytest.mark.parametrize("turn", TURNS)
def test_the_mean_turns_as_its_picture_does_and_plain_convolutions_compute_it(turn: tuple[int, bool]) -> None:
    net, x = small(), torch.randn(1, 3, 16, 24)
    plain = net.mean(x)[1]
    turning(net.mean)
    tied = net.mean(x)[1]
    assert (tied - plain).abs().max() > 0.01
    assert (net.mean(turned(x, turn))[1] - turned(tied, turn)).abs().max() < 1e-5
    untie(net)
    assert set(net.state_dict()) == set(small().state_dict())
    assert (net.mean(x)[1] - tied).abs().max() < 1e-6


def test_a_negative_has_the_mean_negative() -> None:
    net, x = small(), torch.randn(2, 3, 16, 24)
    assert (net.mean(-x)[1] + net.mean(x)[1]).abs().max() < 1e-5
    assert (net.mean(x)[1] - x).abs().max() > 0.01


def test_blocks_leave_some_pictures_out_and_change_the_others_by_as_much_more() -> None:
    net, x = small(), torch.randn(1, 16, 8, 8).repeat(4000, 1, 1, 1)
    block = net.mean.blocks[0]
    changed = block(x) - x
    leaving_out(net.mean)
    found = block(x) - x
    kept = found.abs().amax((1, 2, 3)) > 0
    assert abs((~kept).float().mean() - LEFT_OUT) < 0.03
    assert (found[kept] - changed[kept] / (1 - LEFT_OUT)).abs().max() < 1e-5


def test_tied_weights_are_kept_when_they_are_tied_again() -> None:
    net, x = small(), torch.randn(1, 3, 16, 16)
    turning(net.mean)
    first = net.mean(x)[1]
    untie(net)
    turning(net.mean)
    assert torch.equal(net.mean(x)[1], first)
    assert all(parameter.is_contiguous() for parameter in net.mean.parameters())


def go(out: Path, part: Part, *, minutes: float = 0.02, start: Path | None = None) -> int:
    train(part, images=DATA, output=out, hold_out="kodim2[1-4].*", start=start, minutes=minutes, batch=1, crop=32, threads=1, workers=0)
    return int(torch.load(out.with_suffix(".state"), weights_only=True)["step"])


def test_a_run_goes_on_where_it_ended_and_makes_what_the_exporter_knows(tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    first = go(out, "mean")
    assert 0 < first < go(out, "mean", minutes=0.04)
    found = read(out)
    assert (found.net.config, found.prediction) == (CompactConfig(), "x0")


def test_each_part_is_trained_and_leaves_the_other_as_it_was(tmp_path: Path) -> None:
    mean, both = tmp_path / "mean.safetensors", tmp_path / "both.safetensors"
    go(mean, "mean")
    go(both, "details", start=mean)
    before, after = from_file(mean).state_dict(), from_file(both).state_dict()
    assert all(torch.equal(before[name], after[name]) == name.startswith("mean.") for name in before if "last" in name)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("mean."))


def test_the_average_of_runs_is_a_network_whose_mean_still_turns(tmp_path: Path) -> None:
    first, second, third, made = (tmp_path / f"{name}.safetensors" for name in ("first", "second", "third", "made"))
    go(first, "mean")
    go(second, "mean", start=first, minutes=0.04)
    go(third, "mean", start=second)
    average(first, second, third, output=made)
    runs, net = [from_file(path) for path in (first, second, third)], from_file(made)
    for name, value in net.state_dict().items():
        assert torch.allclose(value, sum(run.state_dict()[name] for run in runs) / 3, atol=1e-6)
    x = torch.randn(1, 3, 16, 16)
    assert (net.mean(x)[1] - runs[0].mean(x)[1]).abs().max() > 0
    assert (net.mean(x.flip(-1))[1] - net.mean(x)[1].flip(-1)).abs().max() < 1e-5
    with pytest.raises(OptionError, match="expected two files or more"):
        average(first, output=made)
    foreign = tmp_path / "foreign.safetensors"
    safetensors.save_file({"a": torch.zeros(1)}, foreign)
    with pytest.raises(OptionError, match="of different networks"):
        average(first, foreign, output=made)


def test_a_folder_without_photographs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="holds nothing to train on: give --images a folder"):
        train("mean", images=tmp_path, output=tmp_path / "net.safetensors")


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    tensors = small().state_dict()
    for change, word in (
        ({}, "has no tensor down.1"),
        (CompactUNet(CompactConfig()).state_dict() | {"mean.first.bias": torch.zeros(96)}, "first.bias"),
    ):
        safetensors.save_file(change or tensors, tmp_path / "other.safetensors")
        with pytest.raises(OptionError, match=f"not of this script's network.*{word}"):
            from_file(tmp_path / "other.safetensors")


def test_details_without_a_mean_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="give --start FILE"):
        train("details", images=DATA, output=tmp_path / "net.safetensors")
