"""Checkpoint to bundle: what is written and measured, what is refused, and that a kill leaves a whole bundle or none."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from conftest import GOLDEN

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
safetensors = pytest.importorskip("safetensors.torch")

from sr3rt.backends import Request, load, native  # noqa: E402
from sr3rt.bundle import NETWORK, PROGRAM, WEIGHTS, WEIGHTS_BEFORE, Bundle, write_manifest, writing  # noqa: E402
from sr3rt.errors import BackendError, CheckpointError, MissingExtra, OptionError, ParityError  # noqa: E402
from sr3rt.export import footprint, to_onnx  # noqa: E402
from sr3rt.export.nets.paper import PaperConfig, PaperUNet  # noqa: E402
from sr3rt.export.recognise import BUFFERS  # noqa: E402
from sr3rt.upscaler import SHIPPED  # noqa: E402

Exported = Callable[[str], Path]
CHECKPOINT = GOLDEN / "sr3_a" / "I10_E1_gen.pth"
CONFIG = GOLDEN / "sr3_a" / "config.json"


@pytest.fixture(scope="module")
def ready(exported: Exported) -> Path:
    """The bundle that belongs to CHECKPOINT."""
    return exported("sr3_a")


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the paper's network, as small as it gets."""
    config = {"width": 8, "multipliers": [1, 2], "blocks": 1, "attention": [1], "norm_groups": 4}
    torch.manual_seed(0)
    net = PaperUNet(PaperConfig(**{**config, "multipliers": (1, 2), "attention": (1,)}))
    path = tmp_path_factory.mktemp("paper") / "paper.safetensors"
    tensors = {**net.state_dict(), "gammas": torch.cumprod(1 - torch.linspace(1e-4, 0.1, 100, dtype=torch.float64), 0)}
    safetensors.save_file(tensors, path, {"architecture": "paper", "config": json.dumps(config), "scale": "4"})
    return path


def run_export(target: Path, *, overwrite: bool = False) -> Path:
    return to_onnx.export(CHECKPOINT, config=CONFIG, output=target, overwrite=overwrite)


# --- what is written


def test_bundle_verifies_and_says_what_it_was_measured_at(exported: Exported) -> None:
    bundle = Bundle.open(exported("sr3_a"))
    bundle.verify()
    assert set(bundle.manifest.files) == {"weights.safetensors", "network.json", "network.onnx"}
    net, picture = bundle.manifest.parity["net"], bundle.manifest.parity["picture"]
    shapes = [tuple(row["shape"]) for row in net["rows"]]
    assert len({row["t"] for row in net["rows"]}) >= 5
    assert {batch for batch, _, _ in shapes} == {1, 3}
    assert {height == width for _, height, width in shapes} == {True, False}
    assert 0 < net["worst"] == max(row["error"] for row in net["rows"]) <= net["limit"] <= 1e-4
    assert picture["steps"] >= 10
    assert 0 < picture["worst"] <= picture["limit"]


def test_bundle_says_what_bfloat16_would_cost_whatever_the_processor(ready: Path) -> None:
    """Measured against the float32 network, and no reason to refuse an export."""
    parity = Bundle.open(ready).manifest.parity
    assert parity["bf16 net"]["worst"] > 10 * parity["native net"]["worst"]
    assert parity["bf16 net"]["limit"] == to_onnx.BF16.net
    assert parity["bf16 picture"]["limit"] == to_onnx.BF16.picture
    assert parity["bf16 picture"]["psnr"] > 30


def test_a_run_that_overflows_in_bfloat16_leaves_no_figures_of_it(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(ready)
    exact, half = load(bundle, Request("native", "fp32")), native.in_bf16(bundle, Request("native"))
    monkeypatch.setattr(half, "bind", lambda x, y, level, out: lambda: out.fill(np.inf))
    monkeypatch.setattr(native, "in_bf16", lambda bundle, request: half)
    assert to_onnx._bf16(exact, bundle, bundle.manifest, lambda text: None) == {}


def test_manifest_says_what_the_checkpoint_and_its_config_say(exported: Exported) -> None:
    manifest = Bundle.open(exported("sr3_a")).manifest
    net = torch.load(CHECKPOINT, weights_only=True)
    assert manifest.parameters == sum(value.numel() for name, value in net.items() if name.startswith("denoise_fn."))
    assert (manifest.architecture, manifest.prediction, manifest.level) == ("sr3", "eps", "sqrt_gamma")
    assert (manifest.channels, manifest.scale, manifest.stride, manifest.attention_stride) == (3, 4, 4, 2)
    assert manifest.source["config_sha256"] == hashlib.sha256(CONFIG.read_bytes()).hexdigest()
    assert (manifest.source["norm_groups"], manifest.source["image_size"]) == (8, 32)
    assert manifest.defaults.sampler == "posterior"
    assert manifest.defaults.schedule is not None
    assert manifest.defaults.steps == manifest.defaults.schedule.steps == 20
    assert 100 < manifest.bytes_per_pixel < 10_000  # 16 channels of float32 take 64 bytes, and a dozen such arrays are alive


def test_graph_is_opset_21_with_free_batch_height_and_width(ready: Path) -> None:
    model = onnx.load(ready / NETWORK)
    assert [(entry.domain, entry.version) for entry in model.opset_import if entry.domain == ""] == [("", 21)]
    assert [value.name for value in model.graph.input] == ["x", "y", "level"]
    assert [value.name for value in model.graph.output] == ["out"]
    for value in (*model.graph.input, *model.graph.output):
        tensor = value.type.tensor_type
        assert tensor.elem_type == onnx.TensorProto.FLOAT
        fixed = [dimension.dim_value for dimension in tensor.shape.dim]
        assert fixed == ([0, 1] if value.name == "level" else [0, 3, 0, 0])


def test_graph_tells_nothing_of_the_machine_that_made_it(ready: Path) -> None:
    model = onnx.load(ready / NETWORK)
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")  # any bytes may be among the weights
    data = model.SerializeToString()
    for secret in (".py", "site-packages", "stack_trace", "forward", str(Path.home()), str(Path(__file__).parents[1])):
        assert secret.encode() not in data


def test_weights_are_the_checkpoints_for_any_reader_of_safetensors(ready: Path) -> None:
    found = safetensors.load_file(ready / WEIGHTS)
    expected = {name.removeprefix("denoise_fn."): value for name, value in torch.load(CHECKPOINT, weights_only=True).items()}
    net = {name: value for name, value in expected.items() if name not in BUFFERS}
    assert set(found) - set(net) == {"noise_level_mlp.0.frequencies"}  # which no checkpoint holds
    assert all(torch.equal(found[name], value) for name, value in net.items())


def test_weights_are_stored_once(ready: Path) -> None:
    bundle, model = Bundle.open(ready), onnx.load(ready / NETWORK, load_external_data=False)
    outside = [item for item in model.graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL]
    assert {entry.value for item in outside for entry in item.external_data if entry.key == "location"} == {WEIGHTS}
    assert max(len(item.raw_data) for item in model.graph.initializer) < 1024
    assert sum(entry["bytes"] for entry in bundle.manifest.files.values()) < 1.1 * 4 * bundle.manifest.parameters
    assert {entry.key: entry.value for entry in model.metadata_props} == {"weights_sha256": bundle.manifest.files[WEIGHTS]["sha256"]}


def test_the_same_network_gives_the_same_bytes(paper: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        to_onnx.write_network(to_onnx.checkpoints.read(paper).net, tmp_path / name)
    for name in (WEIGHTS, PROGRAM, NETWORK):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def predicted(bundle: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    """By onnxruntime, of fixed noise."""
    x, y = np.random.default_rng(0).standard_normal((2, 2, 3, 8, 12), np.float32)
    out = np.empty_like(y)
    load(Bundle.open(bundle), Request("onnxruntime")).bind(x, y, np.array([[0.9], [0.1]], np.float32), out)()
    return out


def test_bundles_load_whatever_the_working_directory_and_so_do_those_from_before(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, weights were in network.onnx, or in network.onnx.data."""
    model, manifest = onnx.load(ready / NETWORK), Bundle.open(ready).manifest
    for name, options in {"inside": {}, "beside": {"save_as_external_data": True, "location": WEIGHTS_BEFORE}}.items():
        (tmp_path / name).mkdir()
        onnx.save(copy.deepcopy(model), tmp_path / name / NETWORK, **options)
        write_manifest(tmp_path / name, manifest)
    monkeypatch.chdir("/")
    assert set(Bundle.open(tmp_path / "beside").manifest.files) == {NETWORK, WEIGHTS_BEFORE}
    for name in ("inside", "beside"):
        assert np.array_equal(predicted(tmp_path / name), predicted(ready))


def test_onnxruntime_and_onnx_read_the_graph_from_the_folder_too(ready: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    onnx.checker.check_model(ready / NETWORK)
    x, y = np.random.default_rng(0).standard_normal((2, 2, 3, 8, 12), np.float32)
    session = onnxruntime.InferenceSession(ready / NETWORK, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"x": x, "y": y, "level": np.array([[0.9], [0.1]], np.float32)})
    assert out == pytest.approx(predicted(ready), abs=1e-6)


def test_training_goes_on_from_the_weights_of_a_bundle(ready: Path) -> None:
    from sr3rt.export.train import from_file

    found = from_file(SHIPPED).state_dict()
    weights = safetensors.load_file(SHIPPED / WEIGHTS)
    assert found.keys() == weights.keys() - {"embedding.frequencies"}
    assert all(torch.equal(value, weights[name]) for name, value in found.items())
    with pytest.raises(OptionError, match=r"sr3_a is not of this script's network: it has no tensor down\.0\.0\.conv1\.bias"):
        from_file(ready)


def test_a_large_network_is_tried_at_every_level_and_every_shape_but_not_at_all_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_onnx.parity, "LARGE", 0)
    rows = Bundle.open(run_export(tmp_path / "b")).manifest.parity["net"]["rows"]
    assert len({row["t"] for row in rows}) == 5
    assert len({tuple(row["shape"]) for row in rows}) == 4
    assert len(rows) == 8


# --- what is refused


def test_a_graph_that_does_not_match_is_refused_and_leaves_nothing(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight of the last convolution is off by a hundredth of the largest."""
    model = onnx.load(ready / NETWORK)
    (last,) = [tensor for tensor in model.graph.initializer if tensor.name.endswith("final_conv.block.3.weight")]
    weights = onnx.numpy_helper.to_array(last).copy()
    weights.flat[0] += 0.01 * np.abs(weights).max()
    last.CopyFrom(onnx.numpy_helper.from_array(weights, last.name))
    monkeypatch.setattr(to_onnx, "write_network", lambda net, folder: onnx.save(model, folder / NETWORK))
    with pytest.raises(ParityError, match=r"differs from eager float32 PyTorch by .* at timestep .*; expected at most 2e-05. Nothing"):
        run_export(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_drifts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_onnx.parity.Limits, "__init__", lambda self: self.__dict__.update(net=1.0, picture=1e-9))
    with pytest.raises(ParityError, match=r"after 10 steps .* expected at most 1e-09"):
        run_export(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_bundle_that_it_was_to_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = Bundle.open(tiny.write(tmp_path / "b")).sha256

    def refuse(*_: object) -> int:
        raise BackendError("no memory")

    monkeypatch.setattr(footprint, "bytes_per_pixel", refuse)
    with pytest.raises(BackendError, match="no memory"):
        run_export(tmp_path / "b", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert Bundle.open(tmp_path / "b").sha256 == old


def test_an_existing_target_is_refused_before_any_work(tmp_path: Path) -> None:
    tiny.write(tmp_path / "b")
    with pytest.raises(OptionError, match="exists"):
        to_onnx.export(tmp_path / "no such checkpoint", output=tmp_path / "b")


def test_a_checkpoint_in_a_read_only_folder_is_refused_before_any_work(read_only: Path) -> None:
    with pytest.raises(OptionError, match=r"read-only/none\.sr3 cannot be made, .* give -o a name elsewhere"):
        to_onnx.export(read_only / "none.pth")


def test_a_missing_package_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_onnx, "find_spec", lambda name: None if name == "onnx" else name)
    with pytest.raises(MissingExtra, match=r"'onnx'.*pip install \"sr3rt\[cpu,export\]\""):
        to_onnx.export(tmp_path / "no such checkpoint", output=tmp_path / "b")


@pytest.mark.parametrize("steps", [0, -1, 2001])
def test_default_steps_must_be_steps_that_the_network_knows(steps: int, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="between 1 and the 2000"):
        to_onnx.export(CHECKPOINT, config=CONFIG, output=tmp_path / "b", steps=steps)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.pth").write_bytes(CHECKPOINT.read_bytes()[:100_000])
    with pytest.raises(CheckpointError):
        to_onnx.export(tmp_path / "in" / "x.pth", config=CONFIG)
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "x.pth"]


@pytest.mark.parametrize("location", ["../secret", "{absolute}", "secret"])
def test_a_graph_cannot_pull_in_files_that_were_not_checked(location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    for folder in (tmp_path, tmp_path / "work"):
        (folder / "secret").write_bytes(np.full(1, 7, np.float32).tobytes())
    model = onnx.load(tiny.NETWORK)
    share = model.graph.initializer[0]
    share.ClearField("float_data")
    share.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location.format(absolute=tmp_path / "secret")), ("length", "4")):
        share.external_data.add(key=key, value=value)
    with writing(tmp_path / "b") as folder:
        (folder / NETWORK).write_bytes(model.SerializeToString())
        write_manifest(folder, tiny.manifest())
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(BackendError, match="cannot load"):
        load(Bundle.open(tmp_path / "b"), Request("onnxruntime"))


@pytest.mark.parametrize(("offset", "length"), [("0", "8"), ("4", "4"), ("4000000000", "4")])
def test_a_graph_cannot_reach_beyond_its_weights(offset: str, length: str, tmp_path: Path) -> None:
    model = onnx.load(tiny.NETWORK)
    share = model.graph.initializer[0]
    share.ClearField("float_data")
    share.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", WEIGHTS), ("offset", offset), ("length", length)):
        share.external_data.add(key=key, value=value)
    with writing(tmp_path / "b") as folder:
        (folder / NETWORK).write_bytes(model.SerializeToString())
        (folder / WEIGHTS).write_bytes(bytes(4))
        write_manifest(folder, tiny.manifest())
    with pytest.raises(BackendError, match="cannot load"):
        load(Bundle.open(tmp_path / "b"), Request("onnxruntime"))


# --- kill -9


def test_a_killed_export_leaves_a_whole_bundle_or_none(tmp_path: Path) -> None:
    """SIGKILL at moments spread over an export's time, half of them while it is to replace a bundle. SR3RT_KILLS: how many (4)."""
    folder = tmp_path / "out"
    target = folder / "b"
    arguments = ["export", CHECKPOINT, "--config", CONFIG, "-o", target, "--overwrite"]

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", "from sr3rt.cli import main; main()", *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def to_the_end() -> None:
        with start() as process:
            _, said = process.communicate()
        assert process.returncode == 0, said.decode()
        assert [path.name for path in folder.iterdir()] == ["b"]
        Bundle.open(target).verify()

    began = time.monotonic()
    to_the_end()
    duration = time.monotonic() - began
    rng, count, outcomes = random.Random(0), int(os.environ.get("SR3RT_KILLS", "4")), []
    for i in range(count):
        if i % 2 == 0:
            shutil.rmtree(target, ignore_errors=True)
        elif not target.exists():
            tiny.write(target)
        with start() as process:
            time.sleep(duration * (i + rng.random()) / count)
            process.kill()
        left = sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) if folder.exists() else []
        if target.exists():
            Bundle.open(target).verify()
        outcomes.append((process.returncode == -signal.SIGKILL, target.exists(), left))
    print(f"{sum(killed for killed, _, _ in outcomes)} of {count} killed in {duration:.0f} s exports;", outcomes)
    assert any(killed for killed, _, _ in outcomes)
    to_the_end()  # and nothing that the killed ones left is there any more
