"""The networks: the public implementation's reproduces what that implementation computes; the paper's have the paper's sizes."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from sr3rt.export.nets.compact import CompactConfig, CompactUNet, bands, from_bands
from sr3rt.export.nets.janspiry import JanspiryConfig, JanspiryUNet
from sr3rt.export.nets.paper import PRESETS, PaperConfig, PaperUNet

GOLDEN = Path(__file__).parent / "data" / "peer_golden"
CONFIGS = {
    "sr3_a": JanspiryConfig(inner=16, multipliers=(1, 2, 4), blocks=1, attention=(1,), norm_groups=8),
    "sr3_c": JanspiryConfig(inner=64, multipliers=(1, 1), blocks=1, attention=(), norm_groups=32),
    "ddpm_e": JanspiryConfig("ddpm", inner=16, multipliers=(1, 2, 2, 4), blocks=1, attention=(2, 3), norm_groups=8),
}
TOLERANCE = 2e-5  # max abs; 6e-6 was measured


def parameters(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.fixture(scope="module", params=CONFIGS)
def golden(request):
    """(network with the checkpoint's weights, arrays as tensors) of one of the public implementation's networks."""
    name = request.param
    state = torch.load(GOLDEN / name / "I10_E1_gen.pth", weights_only=True)
    net = JanspiryUNet(CONFIGS[name]).eval().requires_grad_(False)
    net.load_state_dict({key.removeprefix("denoise_fn."): value for key, value in state.items() if key.startswith("denoise_fn.")})
    with np.load(GOLDEN / name / "golden.npz") as arrays:
        return net, {key: torch.from_numpy(arrays[key]) for key in arrays}


def level(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float32).reshape(-1, 1)


def test_eps_at_every_level(golden):
    net, arrays = golden
    for y, fed, expected in zip(arrays["eps_y"], arrays["eps_level"], arrays["eps_out"], strict=True):
        assert (net(arrays["x"], y, level(fed)) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("kind", ["mix", "rect"])
def test_eps_of_a_mixed_batch_and_of_a_rectangle(golden, kind):
    net, arrays = golden
    out = net(arrays[f"{kind}_x"], arrays[f"{kind}_y"], level(arrays[f"{kind}_level"]))
    assert (out - arrays[f"{kind}_out"]).abs().max() < TOLERANCE


def test_the_level_matters(golden):
    net, arrays = golden
    x, y = arrays["x"], arrays["eps_y"][0]
    first, last = (net(x, y, level(arrays["eps_level"][i])) for i in (0, -1))
    assert (first - last).abs().max() > 0.1


@pytest.mark.parametrize(("name", "count"), [("sr3_a", 624_467), ("sr3_c", 936_067), ("ddpm_e", 772_915)])
def test_parameters_of_the_golden_networks(name, count):
    with torch.device("meta"):
        assert parameters(JanspiryUNet(CONFIGS[name])) == count


def test_the_defaults_are_the_public_16_to_128_network():
    with torch.device("meta"):
        net = JanspiryUNet(JanspiryConfig())
    assert parameters(net) == 97_807_491
    assert net.config.stride == 16


@pytest.mark.parametrize(
    ("preset", "count", "published", "stride"),
    [
        ("16-128", 560_719_107, 550e6, 16),
        ("64-256", 617_118_467, 625e6, 32),
        ("64-512", 609_802_371, 625e6, 64),
        ("256-1024", 148_746_931, 150e6, 128),
    ],
)
def test_the_papers_presets_have_about_the_papers_sizes(preset, count, published, stride):
    with torch.device("meta"):
        net = PaperUNet(PRESETS[preset])
    assert parameters(net) == count
    assert abs(count - published) < 0.03 * published
    assert net.config.stride == stride


def test_attention_of_the_papers_presets_stands_at_16_pixels():
    for preset, config in PRESETS.items():
        assert [int(preset.split("-")[1]) // 2**i for i in config.attention] == [16]


SMALL = {
    "sr3": JanspiryUNet(JanspiryConfig(inner=8, multipliers=(1, 2), blocks=1, attention=(1,), norm_groups=4)),
    "ddpm": JanspiryUNet(JanspiryConfig("ddpm", inner=8, multipliers=(1, 2), blocks=1, attention=(1,), norm_groups=4)),
    "paper": PaperUNet(PaperConfig(width=8, multipliers=(1, 2), blocks=1, attention=(1,), norm_groups=4)),
    "compact": CompactUNet(CompactConfig(widths=(8, 16), blocks=(1, 1), embedding=16)),
}


@pytest.mark.parametrize("net", SMALL.values(), ids=SMALL)
def test_a_sample_does_not_depend_on_its_neighbours(net):
    torch.manual_seed(0)
    x, y, fed = torch.randn(3, 3, 8, 12), torch.randn(3, 3, 8, 12), torch.tensor([[0.9], [0.5], [0.01]])
    with torch.inference_mode():
        together, alone = net(x, y, fed), net(x[1:2], y[1:2], fed[1:2])
    assert together.shape == x.shape
    assert together.dtype == torch.float32
    assert (together[1:2] - alone).abs().max() < 1e-5


@pytest.mark.parametrize("size", [(2, 4), (8, 6), (64, 40)])
def test_bands_hold_the_whole_picture(size):
    h = torch.randn(2, 3, *size, dtype=torch.float64)
    coarse, details = bands(h)
    assert (coarse.shape[1], details.shape[1]) == (3, 9)
    assert (from_bands(coarse, details) - h).abs().max() < 1e-12


def test_noise_in_a_picture_is_noise_of_the_same_deviation_in_its_bands():
    coarse, details = bands(torch.randn(4, 3, 256, 256, generator=torch.Generator().manual_seed(0)))
    for band in (coarse, *details.split(3, dim=1)):
        assert abs(band.std().item() - 1) < 0.01
        assert abs((band[..., 1:] * band[..., :-1]).mean().item()) < 0.03


def test_details_hold_nothing_of_what_is_even_and_little_below_half_of_nyquists_frequency():
    assert bands(torch.ones(1, 1, 32, 32))[1].abs().max() < 1e-5
    details = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    power = torch.fft.fft2(from_bands(torch.zeros(8, 1, 64, 64), details)).abs().square().mean((0, 1))
    low = torch.fft.fftfreq(128).abs() < 0.25
    assert power[low][:, low].sum() < 0.05 * power.sum()


def test_what_the_compact_network_adds_below_the_details_does_not_depend_on_the_state():
    net, x = copy.deepcopy(SMALL["compact"]), torch.rand(1, 3, 16, 16)
    torch.manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    with torch.inference_mode():
        (first, _), (second, fine) = (bands(net(x, torch.randn_like(x), torch.tensor([[level]]))) for level in (0.1, 0.9))
    assert (first - second).abs().max() < 1e-5
    assert fine.abs().max() > 1e-3


@pytest.mark.parametrize("net", SMALL.values(), ids=SMALL)
def test_what_is_not_saved_is_real_on_the_meta_device(net):
    with torch.device("meta"):
        empty = type(net)(net.config)
    empty.load_state_dict(net.state_dict(), assign=True)
    buffers = dict(net.named_buffers())
    assert buffers
    assert buffers or net is SMALL["paper"]
    for key, value in empty.named_buffers():
        assert torch.equal(value, buffers[key])


def test_the_papers_residual_sums_keep_variance():
    """Whatever a block does, what it adds to is divided by √2."""
    net = PaperUNet(SMALL["paper"].config)
    stage = net.middle[0]
    h, embedding = torch.randn(1, 16, 4, 4), torch.randn(1, 32)
    for last in (stage.block.conv2, stage.attention.out):
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
    with torch.inference_mode():
        assert torch.allclose(stage.block(h, embedding), h / 2**0.5)
        assert torch.allclose(stage(h, embedding), h / 2)
