"""TensorRT's backend where TensorRT's runtime and CUDA run on the host: engines, built by the real builder, become an `Upscaler`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import cuda_on_host
import numpy as np
import pytest
from cuda_on_host import Cuda

pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx")
pytest.importorskip("onnxruntime")

import onnxruntime
import tensorrt_on_host
from tensorrt_on_host import Plan

import sr3rt
from sr3rt.backends import Floats, Request, cuda, load, tensorrt
from sr3rt.bundle import GOLDEN, WEIGHTS, Bundle, Manifest, write_manifest
from sr3rt.engines import EngineKey
from sr3rt.errors import BackendError, BundleCorrupt, EngineRefused, ImageError, MissingExtra
from sr3rt.export import builder
from sr3rt.export.to_trt import to_trt
from sr3rt.program import given_registers
from sr3rt.upscaler import SHIPPED

Loaded = Callable[[bytes], Plan | None]
Put = Callable[..., Cuda]
KEYS: dict[bytes, EngineKey] = {}
"""Of the engines that were built, by their bytes: these cannot be asked without a GPU."""
GRAPHS: dict[str, bytes] = {}
"""That they were built from, by SHA-256."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with real engines, fp16 for 64×64 and 96×64, fp32 for 64×64."""
    target = Path(shutil.copytree(SHIPPED, tmp_path_factory.mktemp("built") / "photo4x"))
    to_trt(target, batch="1,2", size="64", precision="fp16")
    to_trt(target, batch="1", size="96x64", precision="fp16")
    to_trt(target, batch="1", size="64", precision="fp32")
    note_engines(target)
    return target


def note_engines(path: Path) -> Manifest:
    bundle = Bundle.open(path)
    KEYS.update({bundle.read(name): EngineKey.of(key) for name, key in bundle.manifest.engines.items()})
    GRAPHS.update({entry["sha256"]: bundle.read(name) for name, entry in bundle.manifest.files.items() if name.endswith(".onnx")})
    return bundle.manifest


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A copy, to break."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


@pytest.fixture
def put(gpu: Callable[..., Cuda], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Put]:
    """`put(loaded, compiled)`: from here on there are a GPU and TensorRT, whose engines compute what `loaded(plan)` does."""
    trt, logger, log = tensorrt.module()
    monkeypatch.setenv("SR3RT_CACHE", str(tmp_path / "cache"))

    def here(loaded: Loaded, compiled: list[Plan] | None = None) -> Cuda:
        made, compiled = gpu(), [] if compiled is None else compiled
        monkeypatch.setattr(tensorrt, "module", lambda: (tensorrt_on_host.package(trt, made, loaded, compiled), logger, log))
        return made

    yield here
    log.lines.clear()


class Graph:
    """The graph that an engine was built from, of the engine's shape."""

    sessions: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, key: EngineKey) -> None:
        bundle, size = Bundle.open(SHIPPED), (key.height, key.width)
        if key.onnx_sha256 not in self.sessions:
            self.sessions[key.onnx_sha256] = session(GRAPHS[key.onnx_sha256], bundle.read(WEIGHTS))
        self._session = self.sessions[key.onnx_sha256]
        shapes = {name: register.shape(*size) for name, register in given_registers(bundle).items()}
        shapes |= {"level": (1,)} | dict.fromkeys(("x", "y", "out"), (bundle.manifest.channels, *size))
        self.outputs = tuple(one.name for one in self._session.get_outputs())
        names = (*(one.name for one in self._session.get_inputs()), *self.outputs)
        self.shapes = {name: (key.batch, *shapes[name]) for name in names}

    def __call__(self, arrays: Mapping[str, Floats]) -> dict[str, Floats]:
        return dict(zip(self.outputs, self._session.run(self.outputs, dict(arrays)), strict=True))


def session(graph: bytes, weights: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_external_initializers_from_files_in_memory([WEIGHTS], [weights], [len(weights)])
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def right(plan: bytes) -> Graph:
    return Graph(KEYS[plan])


class Wrong(Graph):
    """One that answers something else, where it is of that part."""

    def __init__(self, key: EngineKey, factor: float, part: str) -> None:
        super().__init__(key)
        self._factor = factor if key.part == part else 1

    def __call__(self, arrays: Mapping[str, Floats]) -> dict[str, Floats]:
        return {name: np.float32(self._factor) * value for name, value in super().__call__(arrays).items()}


def photograph(height: int = 16, width: int = 16) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(rows / 3), np.cos(columns / 4), np.sin((rows + columns) / 5)], axis=2)
    return ((waves + 1) * 127).astype(np.uint8)


# --- pictures


@pytest.mark.parametrize("where", ["on the host", "on a GPU"])
def test_auto_takes_the_engines_and_the_pictures_are_the_cpus(where: str, built: Path, put: Put) -> None:
    if where == "on the host":
        put(right)
    elif cuda_on_host.absent():
        pytest.skip("there is no GPU here")
    on_cpu = sr3rt.load(SHIPPED, device="cpu", precision="fp32")
    pictures = [photograph(), photograph()[::-1].copy(), photograph()[:, ::-1].copy()]
    for precision, least in (("fp16", 40), ("fp32", 60)):
        up = sr3rt.load(built) if precision == "fp16" else sr3rt.load(built, precision=precision)
        assert (up.network.backend, up.network.precision, up.network.device) == ("tensorrt", precision, "cuda:0")
        for options in ({"steps": 4, "sampler": "sr3"}, {"steps": 5, "consistency": "every"}, {}):
            wanted = on_cpu.upscale(pictures, seed=[1, 2, 3], **options)
            for a, b in zip(up.upscale(pictures, seed=[1, 2, 3], **options), wanted, strict=True):
                assert psnr(a, b) >= least
            assert psnr(up.upscale(pictures[2], seed=3, **options), wanted[2]) >= least  # alone, too
    tall = sr3rt.load(built).upscale(photograph(24, 16), seed=1)
    assert psnr(tall, on_cpu.upscale(photograph(24, 16), seed=1)) >= 40


def test_what_is_compiled_on_the_gpu_is_kept_for_the_next_process(
    built: Path, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled() -> int:
        plans = list[Plan]()
        put(right, plans)
        sr3rt.load(built, precision="fp32").upscale(photograph(), seed=1, steps=1)
        return len(plans)

    assert compiled() == 2  # of what x alone decides, and of a step
    files = sorted((tmp_path / "cache").iterdir())
    assert [file.read_bytes() for file in files] == [tensorrt_on_host.CACHE] * 2
    assert compiled() == 0
    files[0].write_bytes(b"of another machine")
    assert compiled() == 1
    assert files[0].read_bytes() == tensorrt_on_host.CACHE
    monkeypatch.setenv("SR3RT_CACHE", "/proc/self/none")
    assert compiled() > 0  # each time, but it runs


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(np.mean((a.astype(float) - b) ** 2))
    return 10 * np.log10(255**2 / max(error, 1e-9))


def assert_pictures_are_the_cpus(up: sr3rt.Upscaler) -> None:
    """In a batch, alone, by the host's loop and at other sizes, within 60 dB."""
    on_cpu = sr3rt.load(device="cpu", precision="fp32")
    pictures = [photograph(), photograph()[::-1].copy(), photograph()[:, ::-1].copy()]
    for options in ({"steps": 3, "sampler": "sr3"}, {"steps": 3, "consistency": "every"}, {"steps": 4}):
        wanted = on_cpu.upscale(pictures, seed=[1, 2, 3], **options)
        for a, b in zip(up.upscale(pictures, seed=[1, 2, 3], **options), wanted, strict=True):
            assert psnr(a, b) >= 60
        assert psnr(up.upscale(pictures[2], seed=3, **options), wanted[2]) >= 60  # alone, too
    tall = photograph(24, 16)
    assert psnr(up.upscale(tall, seed=1, steps=3), on_cpu.upscale(tall, seed=1, steps=3)) >= 60


def test_previews_and_cancelling(built: Path, put: Put) -> None:
    put(right)
    up = sr3rt.load(built, precision="fp32")
    seen: list[np.ndarray] = []

    def watch(step: int, steps: int, preview: Callable[[], np.ndarray]) -> bool:
        seen.append(preview())
        return step < 3

    with pytest.raises(sr3rt.Cancelled, match="after 3 of 9 steps"):
        up.upscale(photograph(), seed=1, steps=9, on_step=watch)
    assert len(seen) == 3 and seen[0].shape == (64, 64, 3)
    assert np.array_equal(up.upscale(photograph(), seed=1), up.upscale(photograph(), seed=1))


@pytest.mark.parametrize("part", ["once", "step"])
def test_an_engine_of_one_part_alone_is_none(part: str, bundle: Path, put: Put) -> None:
    put(right)
    manifest = Bundle.open(bundle).manifest
    write_manifest(bundle, replace(manifest, engines={name: key for name, key in manifest.engines.items() if key["part"] == part}))
    with pytest.raises(BackendError, match="has no TensorRT engine: build one with"):
        load(Bundle.open(bundle), Request("tensorrt"))


def test_engines_of_the_whole_network_run_and_give_way_to_better_ones(
    built: Path, put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks in one have them, and all had before networks were in two."""
    target = Path(shutil.copytree(SHIPPED, tmp_path / "whole"))
    with monkeypatch.context() as before:
        before.setattr(Manifest, "graphs", partialmethod(Manifest.graphs, hoisted=False))
        before.setattr(builder, "build", lambda graph, **options: f"{graph.name} {options['height']}".encode())
        to_trt(target, size="64,96", precision="fp32")
    whole, used = note_engines(target), list[str]()

    def loaded(plan: bytes) -> Plan:
        used.append(KEYS[plan].name)
        return right(plan)

    put(loaded)
    wanted = sr3rt.load(SHIPPED, device="cpu", precision="fp32").upscale(photograph(), seed=1, steps=3)
    assert psnr(sr3rt.load(target, backend="tensorrt").upscale(photograph(), seed=1, steps=3), wanted) >= 60
    assert {*used} == {"fp32-1x64x64.tensorrt_rtx.plan", "fp32-1x96x96.tensorrt_rtx.plan"}
    used.clear()
    better = {name: key for name, key in Bundle.open(built).manifest.engines.items() if key["precision"] == "fp32"}
    for name in better:
        shutil.copy(built / name, target)
    (target / GOLDEN).write_text(json.dumps({**json.loads((built / GOLDEN).read_text()), **json.loads((target / GOLDEN).read_text())}))
    write_manifest(target, replace(whole, engines={**whole.engines, **better}))
    assert psnr(sr3rt.load(target, backend="tensorrt").upscale(photograph(), seed=1, steps=3), wanted) >= 60
    assert {*used} == {f"fp32-{one}.tensorrt_rtx.plan" for one in ("1x96x96", "once-1x64x64", "step-1x64x64")}


def test_precision_and_device_are_what_was_asked_for(built: Path, put: Put) -> None:
    put(right)
    assert sr3rt.load(built, precision="fp32").network.precision == "fp32"
    assert sr3rt.load(built, device="cuda:0").network.device == "cuda:0"
    assert sr3rt.load(built, device="cpu").network.backend == "native"


def test_engines_of_no_square_do_their_own_size_by_default(bundle: Path, put: Put) -> None:
    put(right)
    engines = {name: key for name, key in Bundle.open(bundle).manifest.engines.items() if key["height"] == 96}
    write_manifest(bundle, replace(Bundle.open(bundle).manifest, engines=engines))
    up = sr3rt.load(bundle)
    assert up.run(photograph(24, 16), seed=1)[0].image.shape == (96, 64, 3)
    with pytest.raises(ImageError, match=r"no fp16 engine for a result of 64x64 .*, only for 96x64: build one with  .* --size 64x64"):
        up.upscale(photograph(), seed=1)


# --- refusals


def test_a_size_that_was_not_built(built: Path, put: Put) -> None:
    put(right)
    up, on_cpu = sr3rt.load(built), sr3rt.load(SHIPPED, device="cpu", precision="fp32")
    with pytest.raises(
        ImageError,
        match=r"no fp16 engine for a result of 128x96 \(height x width, padded\), only for 64x64, 96x64: build one with  .* 128x96",
    ):
        up.upscale(photograph(32, 24), seed=1, tile="off")
    for size in ((32, 24), (9, 40)):  # windows of the sizes that were built do any; what is smaller is made as large
        (found,) = up.run(photograph(*size), seed=1)
        assert found.tile == 64 and found.image.shape == (4 * size[0], 4 * size[1], 3)
    (found,) = up.run(photograph(32, 24), seed=1)
    assert psnr(found.image, on_cpu.upscale(photograph(32, 24), seed=1, tile=64)) > 30
    assert up.run(photograph(9, 9), seed=1)[0].image.shape == (36, 36, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "int8"}, "has fp16 and fp32, precision 'int8' was asked for: use auto, fp16 or fp32"),
        ({"device": "cpu"}, "runs on a GPU, device 'cpu' was asked for: use auto, cuda, or cuda:1 for the second one"),
        ({"device": "cuda:1"}, "there is no GPU 1: CUDA finds 1, counted from 0"),
    ],
)
def test_what_it_cannot_do_is_refused(built: Path, put: Put, options: dict[str, str], words: str) -> None:
    put(right)
    with pytest.raises(BackendError, match=words):
        load(Bundle.open(built), Request("tensorrt", **options))


def test_a_bundle_without_engines_says_how_to_build_one(put: Put) -> None:
    put(right)
    with pytest.raises(BackendError, match=rf"has no TensorRT engine: build one with  python -m sr3rt\.export\.to_trt {SHIPPED}$"):
        load(Bundle.open(SHIPPED), Request("tensorrt"))
    assert load(Bundle.open(SHIPPED), Request()).backend == "native"  # auto takes what there is


def test_a_precision_without_engines(bundle: Path, put: Put) -> None:
    put(right)
    manifest = Bundle.open(bundle).manifest
    write_manifest(bundle, replace(manifest, engines={name: key for name, key in manifest.engines.items() if key["precision"] == "fp16"}))
    with pytest.raises(BackendError, match=r"has no TensorRT engine in fp32: build one with .* --precision fp32$"):
        load(Bundle.open(bundle), Request("tensorrt", precision="fp32"))


def test_engines_of_another_gpu_are_refused_before_tensorrt_sees_them(bundle: Path, put: Put) -> None:
    def never(plan: bytes) -> Plan:
        raise AssertionError("TensorRT was given the engine")

    put(never)
    manifest = Bundle.open(bundle).manifest
    write_manifest(bundle, replace(manifest, engines={name: {**key, "capability": "8.6"} for name, key in manifest.engines.items()}))
    with pytest.raises(EngineRefused, match=r"another GPU \(compute capability\): found 8\.6, expected 9\.0\. Build all such anew with"):
        load(Bundle.open(bundle), Request("tensorrt"))
    assert load(Bundle.open(bundle), Request()).backend == "native"


def test_another_tensorrt_is_told_to_build_all_that_there_was(bundle: Path, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    put(right)
    with monkeypatch.context() as before:
        before.setattr(builder, "build", lambda graph, **options: b"engine")
        to_trt(bundle, batch="2,8", size="64,96x64")
    manifest = Bundle.open(bundle).manifest
    write_manifest(bundle, replace(manifest, engines={name: {**key, "version": "1.0"} for name, key in manifest.engines.items()}))
    command = "Build all such anew with .* --batch 1,2,8 --size 64,96x64 --precision fp16$"
    with pytest.raises(
        EngineRefused, match=rf"the engine fp16-step-.* is of another TensorRT version: found 1\.0, expected .*\. {command}"
    ):
        load(Bundle.open(bundle), Request("tensorrt"))


@pytest.mark.parametrize(
    ("part", "factor", "error"), [("step", 0.0, r"1\b"), ("step", 1.1, r"0\.1\b"), ("step", float("nan"), "nan"), ("once", 0.0, r"\d")]
)
def test_an_engine_that_answers_wrongly_is_refused(built: Path, put: Put, part: str, factor: float, error: str) -> None:
    put(lambda plan: Wrong(KEYS[plan], factor, part))
    words = rf"the engine fp16-step-.*\.plan, or fp16-once-.*\.plan before it, answers wrongly on this GPU: it differs .* by {error}"
    with pytest.raises(EngineRefused, match=f"{words}.* again here with .* --batch 1 --size 64 --precision fp16 --rebuild  or use"):
        sr3rt.load(built, backend="tensorrt")
    with pytest.warns(RuntimeWarning, match="backend tensorrt should have worked and is left out: .* answers wrongly on this GPU"):
        assert sr3rt.load(built).network.backend == "native"


def test_an_engine_that_nothing_is_known_of_is_refused(bundle: Path, put: Put) -> None:
    put(right)
    (bundle / GOLDEN).write_text("{}")
    write_manifest(bundle, Bundle.open(bundle).manifest)
    with pytest.raises(BundleCorrupt, match=r"does not say what fp16-.*\.plan should answer: build it again with"):
        load(Bundle.open(bundle), Request("tensorrt"))


def test_an_engine_that_tensorrt_cannot_load(built: Path, put: Put) -> None:
    log = tensorrt.module()[2]

    def broken(plan: bytes) -> None:
        log.lines.append("magic tag does not match")

    put(broken)
    with pytest.raises(BackendError, match=r"tensorrt_rtx [\d.]+ cannot load .*\.plan on Host GPU: magic tag does not match"):
        load(Bundle.open(built), Request("tensorrt"))


def test_too_little_memory_for_a_batch(built: Path, put: Put) -> None:
    made = put(right)
    up = sr3rt.load(built)
    made.total = made.used + 100_000
    with pytest.raises(BackendError, match=r"a batch of 2 pictures of 64×64 needs 1 MiB on Host GPU, .* use a smaller batch"):
        up.upscale([photograph(), photograph()], seed=1)
    made.total = 1 << 28
    up.upscale([photograph(), photograph()], seed=1)


def test_without_a_gpu_or_tensorrt_the_reason_is_told(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cuda.why_not():
        pytest.skip("there is a GPU here")
    with pytest.raises(BackendError, match=r"there is no NVIDIA driver here|the NVIDIA driver serves CUDA|CUDA finds no GPU"):
        load(Bundle.open(built), Request("tensorrt"))
    assert load(Bundle.open(built), Request()).backend == "native"
    monkeypatch.setattr(tensorrt, "FLAVOURS", ("no_tensorrt",))
    assert tensorrt.why_not() == str(MissingExtra("TensorRT", "tensorrt_rtx", "gpu,rtx"))


# --- what the exporter writes


def test_the_golden_outputs_are_the_float32_networks(built: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = json.loads(Bundle.open(built).read(GOLDEN))
    assert set(golden) == {name for name, key in Bundle.open(built).manifest.engines.items() if key["part"] == "step"}
    assert all(len(values) == 64 and np.ptp(values) > 0.1 for values in golden.values())
    assert golden["fp16-step-1x64x64.tensorrt_rtx.plan"] == golden["fp32-step-1x64x64.tensorrt_rtx.plan"]
    assert golden["fp16-step-1x64x64.tensorrt_rtx.plan"] != golden["fp16-step-1x96x64.tensorrt_rtx.plan"]
    monkeypatch.setattr(builder, "build", lambda model, **options: b"engine")
    to_trt(bundle, batch="1", size="32", precision="fp32")
    assert json.loads(Bundle.open(bundle).read(GOLDEN)).items() > golden.items()
