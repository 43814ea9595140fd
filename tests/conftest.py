"""Shared by the tests: the golden data and, where torch is installed, bundles exported from its checkpoints, once for each run."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_on_host import Cuda, compiled
from numpy.typing import NDArray

from sr3rt.backends import kernels
from sr3rt.bundle import Bundle
from sr3rt.upscaler import SHIPPED

collect_ignore = [] if find_spec("tritonclient") else ["server"]  # `make test` runs those in an environment of their own
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's threads would spin beside onnxruntime's

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "peer_golden"
NAMES = ("sr3_a", "sr3_c", "ddpm_e")


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, NDArray[Any]]]:
    """`golden(name)`: the recorded arrays of one of `NAMES`."""
    return lambda name: dict(np.load(GOLDEN / name / "golden.npz"))


@pytest.fixture(scope="session")
def shipped() -> Bundle:
    """The model that ships."""
    return Bundle.open(SHIPPED)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`exported(name)`: the bundle of a golden checkpoint, made by the exporter with the checkpoint's config."""
    pytest.importorskip("torch")
    from sr3rt.export.to_onnx import export

    folder = tmp_path_factory.mktemp("bundles")

    def bundle(name: str) -> Path:
        target = folder / name
        if not target.exists():
            export(GOLDEN / name / "I10_E1_gen.pth", config=GOLDEN / name / "config.json", output=target)
        return target

    return bundle


@pytest.fixture
def read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that may not be written to. To root everything may: it is told what others would be."""
    folder, asked = tmp_path / "read-only", os.access
    folder.mkdir(mode=0o555)
    if asked(folder, os.W_OK):
        monkeypatch.setattr(os, "access", lambda path, mode: asked(path, mode) and not (mode & os.W_OK and Path(path) == folder))
    return folder


@pytest.fixture(scope="session")
def step_on_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """step.cu compiled for the host."""
    return compiled(tmp_path_factory.mktemp("step"))


@pytest.fixture
def gpu(step_on_host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cuda]:
    """`gpu(total=…, devices=…, driver=…)`: from here on CUDA is one that runs on the host (cuda_on_host.py)."""
    bindings = pytest.importorskip("cuda.bindings")

    def put(**options: Any) -> Cuda:
        cuda = Cuda(step_on_host, **options)
        for name in ("runtime", "driver"):
            monkeypatch.setattr(bindings, name, getattr(cuda, name), raising=False)
        monkeypatch.setattr(kernels, "load", lambda capability: b"\x7fELF")
        return cuda

    return put
