"""The torch backend, where CUDA runs on the host: PyTorch's calls on a stream, captured or not, are the bundle's network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuda_on_host
import numpy as np
import pytest
from cuda_on_host import Cuda
from test_tensorrt import assert_pictures_are_the_cpus, photograph, psnr

torch = pytest.importorskip("torch")

import sr3rt  # noqa: E402
from sr3rt import backends  # noqa: E402
from sr3rt.backends import Request, cuda, load, pytorch  # noqa: E402
from sr3rt.backends import torch as backend  # noqa: E402
from sr3rt.backends.torch import TorchProgram  # noqa: E402
from sr3rt.bundle import PROGRAM, Bundle, write_manifest  # noqa: E402
from sr3rt.errors import BackendError, BundleCorrupt, MissingExtra  # noqa: E402
from sr3rt.upscaler import SHIPPED  # noqa: E402

Made = Callable[..., Cuda]


@pytest.fixture
def on_host(gpu: Made, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """CUDA on the host, with PyTorch's calls in its streams."""
    made = gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(backend, "TorchProgram", lambda *program, device, **rest: TorchProgram(*program, device="cpu", **rest))
    monkeypatch.setattr(backend, "_enqueuer", lambda gpu, stream: partial(made.enqueue, stream.handle))
    monkeypatch.setattr(backend, "_tensor", lambda address, shape, gpu: torch.from_numpy(made.array(address, shape)))
    return made


@pytest.fixture(params=["on the host", "on a GPU"])
def any_gpu(request: pytest.FixtureRequest) -> None:
    if request.param == "on the host":
        request.getfixturevalue("on_host")
    elif cuda_on_host.absent() or not torch.cuda.is_available():
        pytest.skip("there is no GPU here, or PyTorch does not find it")


@pytest.mark.usefixtures("any_gpu")
def test_the_pictures_are_the_cpus() -> None:
    up = sr3rt.load(device="cuda")
    assert (up.network.backend, up.network.precision, up.network.device) == ("torch", "fp32", "cuda:0")
    assert_pictures_are_the_cpus(up)


@pytest.mark.usefixtures("any_gpu")
@pytest.mark.parametrize(("precision", "least"), [("fp16", 45), ("bf16", 35)])
def test_half_precision_is_near(precision: str, least: float) -> None:
    up, small = sr3rt.load(device="cuda", precision=precision), photograph(4, 6)  # which a CPU computes slowly
    assert up.network.precision == precision
    found, wanted = (one.upscale(small, seed=1, steps=2) for one in (up, sr3rt.load(device="cpu", precision="fp32")))
    assert least <= psnr(found, wanted) < 90


def test_a_second_call_takes_no_memory_and_captures_nothing(on_host: Cuda) -> None:
    up = sr3rt.load(device="cuda")
    first = up.upscale(photograph(), seed=1, steps=3)
    on_host.calls.clear()
    assert np.array_equal(up.upscale(photograph(), seed=1, steps=3), first)
    assert not {"cudaMalloc", "cudaHostAlloc", "cudaStreamBeginCapture", "cudaStreamCreateWithFlags"}.intersection(on_host.calls)
    assert on_host.calls.count("cudaGraphLaunch") == 3


def test_what_depends_on_x_alone_is_computed_once_for_each_picture(on_host: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    up, shapes = sr3rt.load(device="cuda"), list[tuple[int, ...]]()
    assert isinstance(up.network, backend.TorchOnGpu)
    once = up.network._once
    monkeypatch.setattr(up.network, "_once", lambda x: (shapes.append(tuple(x.shape)), once(x))[1])
    up.upscale([photograph(), photograph()], seed=1, steps=4)
    assert shapes == [(1, 3, 64, 64)] * 2


def test_a_call_that_was_cancelled_leaves_nothing_behind(on_host: Cuda) -> None:
    up = sr3rt.load(device="cuda")
    expected = up.upscale(photograph(), seed=1, steps=3)
    with pytest.raises(sr3rt.Cancelled):
        up.upscale(photograph(), seed=2, steps=5, on_step=lambda step, steps, preview: step < 2)
    assert np.array_equal(up.upscale(photograph(), seed=1, steps=3), expected)


def test_engines_of_other_sizes_make_room(on_host: Cuda) -> None:
    up = sr3rt.load(device="cuda")
    for side in (16, 24, 32):
        up.upscale(photograph(side, side), seed=1, steps=1)
    kept = on_host.used
    on_host.total = kept + 1000
    up.upscale(photograph(8, 8), seed=1, steps=1)
    assert on_host.used < kept


def test_auto_takes_the_processor_unless_a_gpu_is_asked_for(on_host: Cuda) -> None:
    assert load(Bundle.open(SHIPPED), Request()).backend == "native"
    assert load(Bundle.open(SHIPPED), Request(device="cuda:0")).backend == "torch"


# --- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "int8"}, r"has fp32, fp16 and bf16, precision 'int8' was asked for: use auto \(fp32\) or one of them"),
        ({"device": "cpu"}, "runs on a GPU, device 'cpu' was asked for: use auto, cuda, or cuda:1 for the second one"),
        ({"device": "cuda:1"}, "there is no GPU 1: CUDA finds 1, counted from 0"),
    ],
)
def test_what_it_cannot_do_is_refused(on_host: Cuda, options: dict[str, str], words: str) -> None:
    with pytest.raises(BackendError, match=words):
        load(Bundle.open(SHIPPED), Request("torch", **options))


def test_a_bundle_without_a_program_or_with_a_wrong_one_is_refused(on_host: Cuda, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(SHIPPED, tmp_path / "bundle"))
    program: dict[str, Any] = json.loads((bundle / PROGRAM).read_text())
    for change in ({"do": "fold"}, {"from": ["nowhere"]}, {"weight": "none"}, {"after": "tanh"}, {"resample": "sideways"}, {"norm": {}}):
        operations = [one | change if i == 1 else one for i, one in enumerate(program["operations"])]
        (bundle / PROGRAM).write_text(json.dumps(program | {"operations": operations}))
        write_manifest(bundle, Bundle.open(SHIPPED).manifest)
        with pytest.raises(BundleCorrupt, match=r"network\.json is not a program of format 3: .*Export the bundle again"):
            load(Bundle.open(bundle), Request("torch"))
    (bundle / PROGRAM).unlink()
    write_manifest(bundle, Bundle.open(SHIPPED).manifest)
    with pytest.raises(BackendError, match=r"has no network\.json, which the torch backend runs: export it again"):
        load(Bundle.open(bundle), Request("torch"))


def test_a_pytorch_without_cuda_is_named(gpu: Made) -> None:
    if torch.version.cuda:
        pytest.skip("this PyTorch has CUDA")
    gpu()
    with pytest.raises(BackendError, match=r"PyTorch .* does not find the GPU that CUDA finds: install one that was built for CUDA 13"):
        load(Bundle.open(SHIPPED), Request("torch"))


def test_without_a_gpu_or_pytorch_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cuda.why_not():
        pytest.skip("there is a GPU here")
    assert backends.why_not("torch") == cuda.why_not()
    monkeypatch.setattr(pytorch, "find_spec", lambda name: None)
    assert backends.why_not("torch") == str(MissingExtra("the torch backend", "torch", "export"))


def test_too_little_memory_is_told(on_host: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    up = sr3rt.load(device="cuda")

    def full(*tensors: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(backend, "_enqueuer", lambda gpu, stream: lambda calls: calls())
    monkeypatch.setattr(up.network, "_module", full)
    with pytest.raises(BackendError, match=r"the torch backend has not the memory for 1×3×64×64: CUDA out of memory"):
        up.upscale(photograph(), seed=1)
