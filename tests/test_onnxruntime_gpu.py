"""onnxruntime in the loop of a GPU, where CUDA runs on the host: its calls on a stream, captured or not, are the bundle's network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_on_host
import numpy as np
import pytest
from cuda_on_host import Cuda
from test_tensorrt import assert_pictures_are_the_cpus, photograph

ort = pytest.importorskip("onnxruntime")

import sr3rt  # noqa: E402
from sr3rt.backends import Request, load  # noqa: E402
from sr3rt.backends import onnxruntime as backend  # noqa: E402
from sr3rt.bundle import Bundle  # noqa: E402
from sr3rt.errors import BackendError  # noqa: E402
from sr3rt.upscaler import SHIPPED  # noqa: E402

Made = Callable[..., Cuda]


@pytest.fixture
def on_host(gpu: Made, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """CUDA on the host, with onnxruntime's calls in its streams."""
    made = gpu()
    monkeypatch.setattr(ort, "get_available_providers", lambda: [backend.CUDA, backend.CPU])
    monkeypatch.setattr(backend, "_on_stream", lambda gpu, stream: ("CPUExecutionProvider", {}))
    monkeypatch.setattr(backend.OrtOnGpu, "_place", lambda network: ("cpu", 0))

    def enqueuer(session: Any, stream: Any) -> Callable[[Any], None]:
        return lambda binding: made.enqueue(stream.handle, lambda: session.run_with_iobinding(binding))

    monkeypatch.setattr(backend, "_enqueuer", enqueuer)
    return made


@pytest.fixture(params=["on the host", "on a GPU"])
def any_gpu(request: pytest.FixtureRequest) -> None:
    if request.param == "on the host":
        request.getfixturevalue("on_host")
    elif cuda_on_host.absent() or backend.why_not_on_gpu():
        pytest.skip("there is no GPU here, or an onnxruntime without CUDA")


@pytest.mark.usefixtures("any_gpu")
def test_the_pictures_are_the_cpus() -> None:
    up = sr3rt.load(backend="onnxruntime", device="cuda")
    assert (up.network.backend, up.network.precision, up.network.device) == ("onnxruntime", "fp32", "cuda:0")
    assert_pictures_are_the_cpus(up)


def test_a_second_call_takes_no_memory_and_captures_nothing(on_host: Cuda) -> None:
    up = sr3rt.load(backend="onnxruntime", device="cuda")
    first = up.upscale(photograph(), seed=1, steps=3)
    on_host.calls.clear()
    assert np.array_equal(up.upscale(photograph(), seed=1, steps=3), first)
    assert not {"cudaMalloc", "cudaHostAlloc", "cudaStreamBeginCapture", "cudaStreamCreateWithFlags"}.intersection(on_host.calls)
    assert on_host.calls.count("cudaGraphLaunch") == 3


def test_a_stream_has_sessions_of_its_own_and_takes_them_along(on_host: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    session = backend._session
    monkeypatch.setattr(backend, "_session", lambda *of, **options: made.append(of) or session(*of, **options))
    up = sr3rt.load(backend="onnxruntime", device="cuda")
    assert isinstance(up.network, backend.OrtOnGpu) and made == []
    up.upscale([photograph()] * 3, seed=1, steps=2)  # three pictures, then what is left of them: calls for 4 and fewer
    assert len(made) == 2 * len(up.network._sessions) == 2  # of what depends on x alone, and of the rest
    for side in (8, 12, 16):
        up.upscale(photograph(side, side), seed=1, steps=1)
    assert len(made) == 8 and len(up.network._sessions) <= 1 + up._engines.KEPT


def test_a_call_that_is_not_waited_for_is_onnxruntimes_own() -> None:
    session = backend._session(Bundle.open(SHIPPED), "network.onnx", [backend.CPU], threads=1)
    x, level, out = np.zeros((1, 3, 32, 32), np.float32), np.full((1, 1), 0.5, np.float32), np.full((1, 3, 32, 32), np.nan, np.float32)
    binding = session.io_binding()
    for name, array in (("x", x), ("y", x), ("level", level)):
        binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
    binding.bind_output("out", "cpu", 0, np.float32, out.shape, out.ctypes.data)
    backend._enqueuer(session, object())(binding)  # type: ignore[arg-type]
    assert np.isfinite(out).all()


def test_the_provider_is_told_stream_device_and_float32() -> None:
    class Given:
        index, handle = 1, 4096

    assert backend._on_stream(Given(), Given()) == (  # type: ignore[arg-type]
        "CUDAExecutionProvider",
        {"device_id": "1", "user_compute_stream": "4096", "use_tf32": "0"},
    )


def test_auto_takes_it_for_a_gpu_without_engines(on_host: Cuda) -> None:
    assert load(Bundle.open(SHIPPED), Request(device="cuda")).backend == "onnxruntime"
    assert load(Bundle.open(SHIPPED), Request()).backend == "native"
    assert load(Bundle.open(SHIPPED), Request("onnxruntime")).device == "cpu"


# --- refusals


def test_an_onnxruntime_that_a_capture_would_end_is_named(on_host: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "__version__", "1.31.0")
    with pytest.raises(BackendError, match=r'1\.31\.0 ends the process .* pip install --upgrade "onnxruntime-gpu>=1\.31\.1"'):
        load(Bundle.open(SHIPPED), Request("onnxruntime", device="cuda"))
    monkeypatch.setattr(ort, "__version__", "1.31.1")
    assert load(Bundle.open(SHIPPED), Request("onnxruntime", device="cuda")).backend == "onnxruntime"


def test_an_onnxruntime_that_does_not_find_cuda_does_not_take_the_processor(on_host: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    up = sr3rt.load(backend="onnxruntime", device="cuda")
    monkeypatch.setattr(backend, "_on_stream", lambda gpu, stream: (backend.CUDA, {}))
    session, asked = ort.InferenceSession, list[Any]()
    monkeypatch.setattr(ort, "preload_dlls", lambda **options: asked.append(options))

    def as_without_libraries(*of: Any, providers: Any, enable_fallback: int) -> Any:
        asked.append(enable_fallback)
        return session(*of, providers=[backend.CPU])

    monkeypatch.setattr(ort, "InferenceSession", as_without_libraries)
    with pytest.raises(BackendError, match=r'does not find the libraries of CUDA and cuDNN .* pip install "onnxruntime-gpu\[cuda,cudnn\]"'):
        up.upscale(photograph(), seed=1)
    assert asked == [{"msvc": False}, 0]


def test_an_onnxruntime_for_the_cpu_is_named() -> None:
    if backend.CUDA in ort.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(BackendError, match=r"onnxruntime .* was built for the CPU alone: .* pip install onnxruntime-gpu"):
        load(Bundle.open(SHIPPED), Request("onnxruntime", device="cuda"))


def test_a_gpu_that_is_not_there_is_named(on_host: Cuda) -> None:
    with pytest.raises(BackendError, match="there is no GPU 1: CUDA finds 1, counted from 0"):
        load(Bundle.open(SHIPPED), Request("onnxruntime", device="cuda:1"))


def test_a_bundle_without_half_precision_is_refused(on_host: Cuda) -> None:
    with pytest.raises(BackendError, match=r"has no network in fp16: make it with  python -m sr3rt\.export\.to_trt"):
        load(Bundle.open(Path(SHIPPED)), Request("onnxruntime", "fp16", "cuda"))


def test_what_onnxruntime_says_is_passed_on(on_host: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(binding: Any) -> None:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 20000000000")

    monkeypatch.setattr(backend, "_enqueuer", lambda session, stream: full)
    with pytest.raises(BackendError, match=r"onnxruntime failed on 1×3×64×64 on Host GPU: Failed to allocate memory"):
        sr3rt.load(backend="onnxruntime", device="cuda").upscale(photograph(), seed=1)
