"""Bundle to TensorRT engines, with a real builder: the float16 graph, the engines, their keys, and what is refused."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GOLDEN, NAMES
from cuda_on_host import Cuda

onnx = pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx")

import sr3rt  # noqa: E402
from sr3rt.backends import Request, cuda, load, tensorrt  # noqa: E402
from sr3rt.bundle import Bundle, write_manifest  # noqa: E402
from sr3rt.engines import EngineKey, command  # noqa: E402
from sr3rt.errors import BackendError, BundleCorrupt, NonFiniteError, OptionError, ParityError  # noqa: E402
from sr3rt.export import builder  # noqa: E402
from sr3rt.export import to_trt as script  # noqa: E402
from sr3rt.export.precision import half  # noqa: E402
from sr3rt.export.to_trt import to_trt  # noqa: E402
from sr3rt.upscaler import SHIPPED  # noqa: E402

Exported = Callable[[str], Path]


@pytest.fixture
def bundle(exported: Exported, tmp_path: Path) -> Path:
    """A copy of a golden checkpoint's bundle, to build into."""
    return Path(shutil.copytree(exported("sr3_a"), tmp_path / "bundle"))


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Engines are made at once, and are none; gives the calls."""
    calls: list[dict[str, Any]] = []

    def build(model: bytes, **options: Any) -> bytes:
        calls.append(options)
        return b"engine"

    monkeypatch.setattr(builder, "build", build)
    return calls


def scaled(bundle: Path, factor: float) -> None:
    """Multiply the weights of the convolutions by `factor`; the graph then holds them itself, as graphs did before."""
    model = onnx.load(bundle / "network.onnx")
    convolutions = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    for item in model.graph.initializer:
        if item.name in convolutions:
            item.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(item) * np.float32(factor), item.name))
    manifest = Bundle.open(bundle).manifest
    onnx.save(model, bundle / "network.onnx")
    write_manifest(bundle, manifest)


# --- what is built


@pytest.mark.parametrize("name", [*NAMES, "shipped"])
def test_engines_of_both_precisions_are_built_into_the_bundle(name: str, exported: Exported, tmp_path: Path) -> None:
    target = Path(shutil.copytree(SHIPPED if name == "shipped" else exported(name), tmp_path / name))
    to_trt(target, batch="1,2", size="32", precision="fp16")
    to_trt(target, batch="1", size="32x64", precision="fp32")
    made = Bundle.open(target)
    made.verify()
    keys = {file: EngineKey.of(content) for file, content in made.manifest.engines.items()}
    found = {(key.precision, key.batch, key.height, key.width) for key in keys.values()}
    assert found == {("fp16", 1, 32, 32), ("fp16", 2, 32, 32), ("fp32", 1, 32, 64)}
    apart = name == "shipped"
    assert {key.part for key in keys.values()} == ({"once", "step"} if apart else {"whole"})
    assert sorted((key.precision, key.batch) for key in keys.values() if key.part == "once") == (
        [("fp16", 1), ("fp32", 1)] if apart else []
    )
    for file, key in keys.items():
        assert file == key.name and len(made.read(file)) > 100_000
        part, half_ = f".{key.part}" if apart else "", ".fp16" if key.precision == "fp16" else ""
        assert key.onnx_sha256 == made.manifest.files[f"network{part}{half_}.onnx"]["sha256"]
        assert (key.flavour, key.version) == ("tensorrt_rtx", builder.version())
    net = made.manifest.parity["fp16 net"]
    assert {tuple(row["shape"]) for row in net["rows"]} == {(1, 32, 32), (2, 32, 32)}  # whatever was built was compared
    assert 1e-6 < net["worst"] <= net["limit"] <= 0.01
    assert made.manifest.parity["net"] == Bundle.open(SHIPPED if name == "shipped" else exported(name)).manifest.parity["net"]


@pytest.mark.parametrize("preset", ["16-128", "256-1024"])
def test_the_papers_networks_are_read_and_built_at_reduced_width(preset: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from sr3rt.export.nets.paper import PRESETS, PaperUNet
    from sr3rt.export.to_onnx import write_network

    config = replace(PRESETS[preset], width=4, norm_groups=2, blocks=1)
    torch.manual_seed(0)
    write_network(PaperUNet(config), tmp_path)
    model = half(onnx.load(tmp_path / "network.onnx")).SerializeToString()
    assert len(builder.build(model, batch=1, height=config.stride, width=config.stride, tf32=False)) > 100_000


def test_a_checkpoint_is_exported_first(tmp_path: Path, instant: list[dict[str, Any]]) -> None:
    ckpt, config = GOLDEN / "sr3_a" / "I10_E1_gen.pth", GOLDEN / "sr3_a" / "config.json"
    target = to_trt(ckpt, config=config, output=tmp_path / "b", size="32")
    assert set(Bundle.open(target).manifest.engines) == {"fp16-1x32x32.tensorrt_rtx.plan"}
    to_trt(ckpt, config=config, output=tmp_path / "b", size="64")  # into the same
    assert len(Bundle.open(target).manifest.engines) == len(instant) == 2
    with pytest.raises(OptionError, match="is the bundle of another checkpoint"):
        to_trt(GOLDEN / "sr3_c" / "I10_E1_gen.pth", output=tmp_path / "b")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"config": GOLDEN / "ddpm_e" / "config.json"}, r"--config is of SHA-256 \w{12}…, the bundle's is of SHA-256 \w{12}…"),
        ({"norm_groups": 4, "scale": 2}, "--norm-groups is 4, the bundle's is 8; --scale is 2, the bundle's is 4"),
        ({"image_size": 64}, "--image-size is 64, the bundle's is 32"),
    ],
)
def test_a_bundle_is_not_taken_for_one_of_other_options(
    options: dict[str, Any], words: str, exported: Exported, instant: list[dict[str, Any]]
) -> None:
    with pytest.raises(OptionError, match=f"{words}. To use it as it is leave that out; .* --overwrite"):
        to_trt(GOLDEN / "sr3_a" / "I10_E1_gen.pth", output=exported("sr3_a"), size="32", **options)
    assert not instant


def test_a_bundle_that_does_not_say_its_options_is_not_taken_for_one_of_them(bundle: Path, instant: list[dict[str, Any]]) -> None:
    ckpt, config, manifest = GOLDEN / "sr3_a" / "I10_E1_gen.pth", GOLDEN / "sr3_a" / "config.json", Bundle.open(bundle).manifest
    write_manifest(bundle, replace(manifest, source={"checkpoint_sha256": manifest.source["checkpoint_sha256"]}))
    with pytest.raises(OptionError, match=r"--config is of SHA-256 \w{12}…, the bundle's is not known"):
        to_trt(ckpt, output=bundle, size="32", config=config)
    to_trt(ckpt, output=bundle, size="32", scale=4)  # which every bundle says


def test_overwrite_exports_a_checkpoint_anew(bundle: Path, instant: list[dict[str, Any]]) -> None:
    to_trt(bundle, size="64")
    to_trt(GOLDEN / "sr3_a" / "I10_E1_gen.pth", output=bundle, size="32", norm_groups=4, scale=2, overwrite=True)
    made = Bundle.open(bundle).manifest
    assert (made.scale, made.source["norm_groups"]) == (2, 4)
    assert set(made.engines) == {"fp16-1x32x32.tensorrt_rtx.plan"}


def test_what_is_there_is_not_built_again_and_what_is_stale_goes(bundle: Path, instant: list[dict[str, Any]]) -> None:
    to_trt(bundle, batch="1,2", size="32", precision="fp32")
    to_trt(bundle, batch="2,4", size="32", precision="fp32")
    assert [call["batch"] for call in instant] == [1, 2, 4]
    to_trt(bundle, batch="2", size="32", precision="fp32", rebuild=True)
    assert [call["batch"] for call in instant[3:]] == [2]
    assert len(Bundle.open(bundle).manifest.engines) == 3
    scaled(bundle, 1.01)
    to_trt(bundle, batch="8", size="32", precision="fp32")
    assert {EngineKey.of(key).batch for key in Bundle.open(bundle).manifest.engines.values()} == {8}
    Bundle.open(bundle).verify()


def test_engines_are_of_the_size_of_training_when_no_size_is_given(bundle: Path, instant: list[dict[str, Any]]) -> None:
    to_trt(bundle, precision="fp32")
    manifest = Bundle.open(bundle).manifest
    assert [(call["height"], call["width"]) for call in instant] == [(32, 32)] == [(manifest.source["image_size"],) * 2]


@pytest.mark.parametrize("size", [None, 0, -32, 32.0, True, "32"])
def test_where_the_size_of_training_is_not_known_128_is_taken_and_said(size: object, bundle: Path, instant: list[dict[str, Any]]) -> None:
    manifest = Bundle.open(bundle).manifest
    write_manifest(bundle, replace(manifest, source={**manifest.source, "image_size": size}))
    with pytest.warns(UserWarning, match=r"does not say what size the network was trained at: 128×128 is taken; give --size"):
        to_trt(bundle, precision="fp32")
    assert [(call["height"], call["width"]) for call in instant] == [(128, 128)]


def test_the_builder_is_told_what_was_asked(bundle: Path, instant: list[dict[str, Any]], tmp_path: Path) -> None:
    to_trt(bundle, size="32x64", precision="fp32", opt_level=2, timing_cache=tmp_path / "cache")
    shape = {"batch": 1, "height": 32, "width": 64, "given": {}}
    assert instant == [{**shape, "tf32": False, "opt_level": 2, "timing_cache": tmp_path / "cache"}]
    (name,) = Bundle.open(bundle).manifest.engines
    assert name == "fp32-1x32x64-o2.tensorrt_rtx.plan"


def test_tensorrt_for_rtx_has_no_use_for_a_timing_cache_and_says_so(exported: Exported, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="measures nothing when it builds: the timing cache is neither read nor written"):
        plan = builder.build(exported("sr3_a") / "network.onnx", batch=1, height=32, width=32, tf32=False, timing_cache=tmp_path / "cache")
    assert len(plan) > 100_000
    assert not list(tmp_path.iterdir())


def test_a_timing_cache_that_cannot_be_written_costs_no_engine(tmp_path: Path) -> None:
    builder._keep(tmp_path / "cache", b"measured")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("cache", b"measured")]
    with pytest.warns(UserWarning, match=r"the timing cache .*gone/cache was not written \(No such file or directory\)"):
        builder._keep(tmp_path / "gone" / "cache", b"measured")


# --- the float16 graph


def test_float16_is_where_it_may_be_and_float32_where_it_must(exported: Exported) -> None:
    graph = half(onnx.load(exported("sr3_a") / "network.onnx")).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    types |= {item.name: item.data_type for item in graph.initializer}
    types |= {name: onnx.TensorProto.FLOAT for node in graph.node for name in node.output if name.endswith(".float32")}
    types |= {node.output[0]: node.attribute[0].i for node in graph.node if node.op_type == "Cast"}
    assert {types[value.name] for value in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    types["out.half"] = onnx.TensorProto.FLOAT16
    for node in graph.node:
        found = {types[name] for name in (*node.input, *node.output) if name}
        if node.op_type == "Conv":
            assert found == {onnx.TensorProto.FLOAT16}
        if node.op_type in ("GroupNormalization", "Softmax", "Sin", "Cos"):
            assert found == {onnx.TensorProto.FLOAT}
    level = {name for name in types if name.startswith("noise_level_mlp")}
    assert level and all(types[name] == onnx.TensorProto.FLOAT for name in level)


def test_weights_in_a_file_of_their_own_are_converted_too(exported: Exported, tmp_path: Path) -> None:
    model = onnx.load(exported("sr3_a") / "network.onnx")
    inside = half(model)
    onnx.save(model, tmp_path / "n.onnx", save_as_external_data=True, location="n.data", size_threshold=0)
    outside = half(onnx.load(tmp_path / "n.onnx", load_external_data=False), (tmp_path / "n.data").read_bytes())
    assert [node.SerializeToString() for node in outside.graph.node] == [node.SerializeToString() for node in inside.graph.node]
    for found, expected in zip(outside.graph.initializer, inside.graph.initializer, strict=True):
        assert np.array_equal(onnx.numpy_helper.to_array(found), onnx.numpy_helper.to_array(expected))


@pytest.mark.parametrize(("factor", "message"), [(1e7, "float16 ends at 65504"), (3000.0, "differs from the float32 network by inf")])
def test_what_float16_cannot_hold_is_refused_and_the_bundle_stays(factor: float, message: str, bundle: Path) -> None:
    scaled(bundle, factor)
    before = Bundle.open(bundle).sha256
    with pytest.raises(ParityError, match=message):
        to_trt(bundle, size="32")
    assert Bundle.open(bundle).sha256 == before


def test_onnxruntime_runs_the_float16_network_when_asked(bundle: Path, instant: list[dict[str, Any]]) -> None:
    with pytest.raises(BackendError, match=r"has no network in fp16: make it with  python -m sr3rt\.export\.to_trt"):
        load(Bundle.open(bundle), Request(precision="fp16"))
    to_trt(bundle, size="32")
    network = load(Bundle.open(bundle), Request(precision="fp16"))
    assert network.precision == "fp16"
    assert load(Bundle.open(bundle), Request()).precision == "fp32"


def test_what_overflows_in_float16_is_an_error_or_done_again_in_float32(bundle: Path, instant: list[dict[str, Any]]) -> None:
    to_trt(bundle, size="32")
    model = onnx.load(bundle / "network.fp16.onnx")
    weights = {item.name: item for item in model.graph.initializer}
    largest = weights[next(node.input[1] for node in model.graph.node if node.op_type == "Conv")]
    largest.CopyFrom(onnx.numpy_helper.from_array(np.full(largest.dims, 6e4, np.float16), largest.name))
    onnx.save(model, bundle / "network.fp16.onnx")
    write_manifest(bundle, Bundle.open(bundle).manifest)
    picture, options = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8), {"steps": 3, "seed": 5}
    with pytest.raises(NonFiniteError, match="step 1 of 3 produced NaN or infinity on backend onnxruntime in fp16"):
        sr3rt.load(bundle, precision="fp16").upscale(picture, **options)
    allowed = sr3rt.load(bundle, precision="fp16", rerun=True)
    expected = sr3rt.upscale(picture, model=bundle, **options)
    for images in (picture, [picture, picture[:4]]):
        with pytest.warns(RuntimeWarning, match=r"step 1 of 3 .* in fp16: .* All of it is done again in fp32"):
            found = allowed.upscale(images, **options)
        assert np.array_equal(found[0] if isinstance(images, list) else found, expected)


# --- what is refused


HERE = EngineKey("ab" * 32, "fp16", 4, 128, 96, "tensorrt", "10.16.1", "9.0", 580, 3)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("onnx_sha256", "cd" * 32, "network: found cdcdcdcdcdcd…, expected abababababab…"),
        ("precision", "fp32", "precision: found fp32, expected fp16"),
        ("batch", 8, "batch size: found 8, expected 4"),
        ("height", 64, "height: found 64, expected 128"),
        ("width", 64, "width: found 64, expected 96"),
        ("flavour", "tensorrt_rtx", "TensorRT flavour: found tensorrt_rtx, expected tensorrt"),
        ("version", "10.15.0", "TensorRT version: found 10.15.0, expected 10.16.1"),
        ("capability", "8.0", r"GPU \(compute capability\): found 8.0, expected 9.0"),
        ("driver", 575, "driver's major version: found 575, expected 580"),
        ("opt_level", 5, "optimisation level: found 5, expected 3"),
    ],
)
def test_an_engine_of_another_place_differs(field: str, value: Any, words: str) -> None:
    found = replace(HERE, **{field: value})
    assert re.fullmatch(rf"the engine {re.escape(found.name)} is of another {words}", found.difference(HERE) or "")


def test_an_engine_of_this_place_does_not_differ() -> None:
    assert HERE.difference(HERE) is None
    assert replace(HERE, capability="portable", driver=None).difference(HERE) is None


def test_the_command_builds_every_engine_that_it_is_told() -> None:
    keys = [HERE, replace(HERE, batch=8, height=96), replace(HERE, batch=1)]
    expected = "python -m sr3rt.export.to_trt b --batch 1,4,8 --size 96,128x96 --precision fp16 --opt-level 3"
    assert command(keys, bundle="b") == expected
    assert command([replace(HERE, opt_level=None)], bundle="b", rebuild=True).endswith(
        " --batch 4 --size 128x96 --precision fp16 --rebuild"
    )


@pytest.mark.parametrize("broken", [{"batch": "4"}, {"driver": "580"}, {"onnx_sha256": None}, {"wings": 2}])
def test_a_manifest_with_a_broken_key_is_refused(broken: dict[str, Any], bundle: Path, instant: list[dict[str, Any]]) -> None:
    to_trt(bundle, size="32", precision="fp32")
    manifest = Bundle.open(bundle).manifest
    engines = {name: {**key, **broken} for name, key in manifest.engines.items()}
    write_manifest(bundle, replace(manifest, engines=engines))
    with pytest.raises(BundleCorrupt, match="is not a manifest"):
        Bundle.open(bundle)
    write_manifest(bundle, replace(manifest, engines={"other.plan": asdict(HERE)}))
    with pytest.raises(BundleCorrupt, match=r"engines lists 'other\.plan'"):
        Bundle.open(bundle)


def test_without_tensorrt_the_float16_network_is_made_and_the_rest_is_said(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "FLAVOURS", ("no_tensorrt",))
    with pytest.raises(BackendError, match=r'has the network in fp16, and no new engine: .*pip install "sr3rt\[rtx\]"'):
        to_trt(bundle, size="32")
    made = Bundle.open(bundle)
    made.verify()
    assert "network.fp16.onnx" in made.manifest.files and not made.manifest.engines


def test_tensorrt_proper_says_that_it_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, gpu: Callable[..., Cuda]) -> None:
    monkeypatch.setattr(builder, "flavour", lambda: "tensorrt")
    with monkeypatch.context() as without:
        without.setattr(cuda, "find_spec", lambda name: None)
        with pytest.raises(BackendError, match=r'builds on the GPU that it builds for .* pip install "sr3rt\[gpu\]"'):
            builder.target()
    gpu(devices=0)
    with pytest.raises(BackendError, match=r"\(pip install tensorrt-rtx-cu13 builds without\): CUDA finds no GPU"):
        builder.target()
    gpu()
    assert builder.target() == ("9.0", 13)


def test_what_tensorrt_cannot_read_is_said_in_its_words() -> None:
    with pytest.raises(BackendError, match=r"tensorrt_rtx [\d.]+ cannot read the network: .+"):
        builder.build(b"no network", batch=1, height=32, width=32, tf32=False)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_graph_that_takes_weights_from_elsewhere_is_refused(precision: Any, bundle: Path) -> None:
    model, manifest = onnx.load(bundle / "network.onnx", load_external_data=False), Bundle.open(bundle).manifest
    weight = next(item for item in model.graph.initializer if item.external_data)
    (place,) = (entry for entry in weight.external_data if entry.key == "location")
    place.value = "../weights"
    (bundle / "network.onnx").write_bytes(model.SerializeToString())
    write_manifest(bundle, manifest)
    with pytest.raises(BundleCorrupt, match=r"takes weights from \.\./weights, weights\.safetensors, expected weights\.safetensors"):
        to_trt(bundle, size="32", precision=precision)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": "0"}, "--batch is '0', expected whole numbers from 1 on"),
        ({"batch": "1,many"}, "--batch is '1,many'"),
        ({"size": "32x32x32"}, "--size is '32x32x32', expected sides in pixels"),
        ({"size": "33"}, "--size has 33×33, expected multiples of 4"),
        ({"opt_level": 9}, "--opt-level must be from 0 to 5, found 9"),
        (
            {"output": Path("other"), "scale": 2},
            "is a bundle, which engines are built into: --output, --scale can only be told for a checkpoint",
        ),
        ({"overwrite": True}, "is a bundle, which engines are built into: --overwrite can only be told for a checkpoint"),
    ],
)
def test_shapes_that_cannot_be_are_refused(options: dict[str, Any], words: str, bundle: Path) -> None:
    with pytest.raises(OptionError, match=words):
        to_trt(bundle, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": "30"}, "--size has 30×30, expected multiples of 4"),
        ({"timing_cache": Path("nowhere/cache")}, "--timing-cache nowhere/cache is in nowhere, which is no folder: expected a file"),
        ({"timing_cache": Path()}, r"--timing-cache \. is a folder"),
        ({"output": GOLDEN / "sr3_a" / "config.json" / "b"}, "b cannot be made, .*config.json is no folder: give -o a name elsewhere"),
    ],
)
def test_what_cannot_be_is_found_before_a_checkpoint_is_exported(
    options: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=words):
        to_trt(GOLDEN / "sr3_a" / "I10_E1_gen.pth", norm_groups=8, scale=4, **{"output": Path("b"), **options})
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_built(
    exported: Exported, read_only: Path, tmp_path: Path, instant: list[dict[str, Any]]
) -> None:
    with pytest.raises(OptionError, match=r"--timing-cache .*read-only/cache may not be written to"):
        to_trt(exported("sr3_a"), timing_cache=read_only / "cache")
    with pytest.raises(OptionError, match=r"read-only/none\.sr3 cannot be made, .* give -o a name elsewhere"):
        to_trt(read_only / "none.pth")
    assert not instant


def test_the_script_explains_itself(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["to_trt.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(option in said for option in ("--batch", "--size", "--precision", "--opt-level", "--timing-cache"))
