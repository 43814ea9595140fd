"""The training script: what its two parts learn from, and that it makes a network which the exporter knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("skimage")

from sr3rt.errors import OptionError  # noqa: E402
from sr3rt.export.checkpoint import read  # noqa: E402
from sr3rt.export.nets.compact import CompactConfig, CompactUNet  # noqa: E402
from sr3rt.export.train import Crops, draw_gamma, from_file, loss_of, path_gammas, recoloured, train  # noqa: E402

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


def test_what_samples_changes_nothing_in_what_predicts_the_mean() -> None:
    torch.manual_seed(0)
    net = CompactUNet(CompactConfig(mean_width=8, mean_blocks=1, widths=(8, 8), blocks=(1, 1), embedding=16))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, y0 = torch.rand(2, 2, 3, 16, 16)

    def gradients(gamma: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        net.zero_grad()
        loss_of(net, x, y0, torch.full((2, 1), gamma, dtype=torch.float64)).backward()
        of_mean = {id(one) for one in net.mean.parameters()}
        return tuple([one.grad.clone() for one in net.parameters() if (id(one) in of_mean) is mean] for mean in (True, False))  # type: ignore[return-value]

    (mean, details), (mean_of_other, details_of_other) = gradients(0.9), gradients(0.1)
    assert all(torch.equal(a, b) for a, b in zip(mean, mean_of_other, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(details, details_of_other, strict=True))
    assert all(one.abs().max() > 0 for one in mean)


def test_a_run_goes_on_where_it_ended_and_makes_what_the_exporter_knows(tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"

    def go(minutes: float) -> int:
        train(images=DATA, output=out, hold_out="kodim2[1-4].*", minutes=minutes, batch=1, crop=32, threads=1, workers=0)
        return int(torch.load(out.with_suffix(".state"), weights_only=True)["step"])

    first = go(0.02)
    assert 0 < first < go(0.04)
    found = read(out)
    assert (found.net.config, found.prediction) == (CompactConfig(), "x0")
    assert from_file(out).config == CompactConfig()


def test_a_folder_without_photographs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="holds nothing to train on: give --images a folder"):
        train(images=tmp_path, output=tmp_path / "net.safetensors")
