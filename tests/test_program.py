"""The program of every architecture computes what the network does, in float64, where the order of sums hardly shows."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sr3rt import safetensors  # noqa: E402
from sr3rt.backends.torch import TorchProgram  # noqa: E402
from sr3rt.export.nets.compact import CompactConfig, CompactUNet  # noqa: E402
from sr3rt.export.nets.janspiry import JanspiryConfig, JanspiryUNet  # noqa: E402
from sr3rt.export.nets.paper import PRESETS, PaperConfig, PaperUNet  # noqa: E402
from sr3rt.export.program import describe, dumps  # noqa: E402
from sr3rt.program import registers  # noqa: E402

NETS = {
    "sr3_a": lambda: JanspiryUNet(JanspiryConfig(inner=16, multipliers=(1, 2, 4), blocks=1, attention=(1,), norm_groups=8)),
    "sr3_c": lambda: JanspiryUNet(JanspiryConfig(inner=64, multipliers=(1, 1), blocks=1, attention=(), norm_groups=32)),
    "ddpm_e": lambda: JanspiryUNet(JanspiryConfig("ddpm", inner=16, multipliers=(1, 2, 2, 4), blocks=1, attention=(2, 3), norm_groups=8)),
    "grey": lambda: JanspiryUNet(JanspiryConfig(channels=1, inner=8, multipliers=(1, 2), blocks=2, attention=(0,), norm_groups=4)),
    "compact": lambda: CompactUNet(CompactConfig()),
    "compact of one level": lambda: CompactUNet(CompactConfig(channels=1, widths=(8,), blocks=(2,), embedding=16)),
    "paper, as small as it gets": lambda: PaperUNet(PaperConfig(width=8, multipliers=(1, 2), blocks=1, attention=(1,), norm_groups=4)),
    **{f"paper {name}": lambda preset=preset: PaperUNet(replace(preset, width=4, norm_groups=2)) for name, preset in PRESETS.items()},
}
SHAPES = [(1, 1, 1), (3, 1, 2), (3, 2, 1)]


def trained(name: str) -> Any:
    """The network with weights none of which is zero or one, so that each matters, and none of which makes numbers grow."""
    torch.manual_seed(0)
    net = NETS[name]()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            spread = max(1, parameter[0].numel()) ** -0.5 if parameter.ndim > 1 else 0.25
            middle = 1 if parameter.ndim == 1 and name.endswith("weight") else 0  # a norm's; biases of one would add up block by block
            parameter.copy_(middle + spread * torch.randn_like(parameter))
    return net.eval()


def tensors(net: Any) -> dict[str, Any]:
    return {name: value.detach().numpy() for name, value in (*net.named_parameters(), *net.named_buffers())}


def computed(program: Any, weights: Any, *inputs: Any) -> Any:
    """What the program gives in float64: NumPy arrays in and out."""
    with torch.inference_mode():
        return TorchProgram(program, weights, dtype=torch.float64)(*(torch.from_numpy(np.asarray(one)).double() for one in inputs)).numpy()


def inputs(net: Any, name: str, shape: tuple[int, int, int]) -> tuple[Any, Any, Any]:
    """x, y and levels of a batch, float64; height and width count the network's strides."""
    channels, stride = net.config.channels, net.config.stride
    batch, height, width = shape[0], shape[1] * stride * (2 if stride < 16 else 1), shape[2] * stride * (2 if stride < 16 else 1)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64) for _ in range(2))
    level = torch.tensor([[0.9], [0.3], [0.01]], dtype=torch.float64)[:batch]
    return x, y, (level * 1000).floor() if name == "ddpm_e" else level


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "×".join(map(str, shape)))
def test_program_computes_what_the_network_does(name: str, shape: tuple[int, int, int]) -> None:
    """A square, and rectangles in a batch of 3 at mixed levels."""
    net = trained(name)
    x, y, level = inputs(net, name, shape)
    program = json.loads(dumps(describe(net)))
    found = computed(program, tensors(net), x, y, level)
    with torch.inference_mode():
        expected = copy.deepcopy(net).double()(x, y, level).numpy()
    assert np.abs(expected).max() > 0.01
    assert np.abs(found - expected).max() < 1e-10 * np.abs(expected).max()


@pytest.mark.parametrize("name", NETS)
def test_program_reads_every_weight_and_only_those(name: str) -> None:
    net = NETS[name]()

    class Noting(dict[str, Any]):
        read: set[str] = set()  # noqa: RUF012

        def __getitem__(self, key: str) -> Any:
            self.read.add(key)
            return super().__getitem__(key)

    weights = Noting(tensors(net))
    TorchProgram(describe(net), weights)
    assert weights.read == set(weights)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_program_in_two_gives_the_same_bits(name: str, dtype: Any) -> None:
    net = trained(name)
    program = TorchProgram(describe(net), tensors(net), dtype=dtype)
    assert bool(program.given) == name.startswith("compact")
    for shape in SHAPES:
        x, y, level = (value.to(program.wide) for value in inputs(net, name, shape))
        with torch.inference_mode():
            assert torch.equal(program(x, y, level, *program.once(x)), program(x, y, level))


@pytest.mark.parametrize("name", NETS)
def test_registers_have_the_shapes_that_are_said(name: str, tmp_path: Path) -> None:
    net = trained(name)
    safetensors.write(tmp_path / "weights", tensors(net))
    program, found = describe(net), dict[str, tuple[int, ...]]()
    with (tmp_path / "weights").open("rb") as stream:
        said = registers(program["operations"], safetensors.Weights(stream), net.config.channels)
    made = TorchProgram(program, tensors(net))

    def noted(to: str, operation: Any) -> Any:
        def run(*given: Any) -> Any:
            value = operation(*given)
            found[to] = tuple(value.shape[1:])
            return value

        return run

    made._all = [(to, noted(to, operation), done) for to, operation, done in made._all]
    x, y, level = (value.float() for value in inputs(net, name, (1, 2, 1)))
    made(x, y, level)
    assert found == {name: said[name].shape(*x.shape[2:]) for name in said.keys() - {"x", "y"}}


@pytest.mark.parametrize("name", NETS)
def test_the_graph_of_a_program_computes_the_same(name: str, tmp_path: Path) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from sr3rt.export.graph import graphs

    net = trained(name)
    safetensors.write(tmp_path / "weights", tensors(net))
    program = describe(net)
    made = graphs(program, tmp_path / "weights", channels=net.config.channels)
    assert set(made) == ({"network.onnx", "network.once.onnx", "network.step.onnx"} if name.startswith("compact") else {"network.onnx"})
    sessions = {}
    for file, model in made.items():
        onnx.save(model, tmp_path / file)
        onnx.checker.check_model(tmp_path / file, full_check=True)
        sessions[file] = onnxruntime.InferenceSession(tmp_path / file, providers=["CPUExecutionProvider"])
    for shape in SHAPES:  # one graph for all
        x, y, level = (value.float().numpy() for value in inputs(net, name, shape))
        expected = computed(program, tensors(net), x, y, level)
        (found,) = sessions["network.onnx"].run(None, {"x": x, "y": y, "level": level})
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
        if len(sessions) > 1:  # what depends on x alone, then the rest
            once = sessions["network.once.onnx"]
            given = dict(zip([one.name for one in once.get_outputs()], once.run(None, {"x": x}), strict=True))
            (parted,) = sessions["network.step.onnx"].run(None, {"x": x, "y": y, "level": level, **given})
            assert np.abs(parted - found).max() <= 1e-6 * np.abs(found).max()


@pytest.mark.parametrize(("change", "error"), [({"do": "wish"}, AttributeError), ({"wings": 2}, TypeError)])
def test_no_graph_is_made_of_what_is_not_known(change: dict[str, Any], error: type[Exception], tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    from sr3rt.export.graph import graphs

    net = trained("sr3_a")
    safetensors.write(tmp_path / "weights", tensors(net))
    program = describe(net)
    program["operations"][0] |= change
    with pytest.raises(error):
        graphs(program, tmp_path / "weights", channels=3)
