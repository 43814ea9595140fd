"""The CUDA kernels without a GPU: they compile; run on the host, thread after thread, they give the native step's bits, and so does
what CUDA's compiler makes of them.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cuda_on_host
import numpy as np
import ptx
import pytest
from arithmetic_on_gpu import jobs, on_gpu, on_host
from arithmetic_on_gpu import run as done
from cuda_on_host import launch
from numpy.typing import NDArray

from sr3rt import _native
from sr3rt.backends import cuda, kernels
from sr3rt.backends.device import SLOT
from sr3rt.errors import BackendError, MissingExtra
from sr3rt.noise import START, normals
from sr3rt.samplers import LEVEL, Sampler, Table, table
from sr3rt.schedule import named, respace

NAMES = ("sr3_levels", "sr3_start", "sr3_step", "sr3_next")
without_bindings = pytest.mark.skipif(not find_spec("cuda"), reason="cuda-bindings are not installed")


@pytest.fixture(scope="module")
def machine() -> ptx.Machine:
    """With what NVRTC makes of step.cu."""
    return ptx.Machine(ptx.compiled())


@pytest.fixture(params=["compiled for the host", pytest.param("made for a GPU", marks=without_bindings)])
def kernel(request: pytest.FixtureRequest, step_on_host: ctypes.CDLL) -> Callable[..., None]:
    """`kernel(name, blocks, arguments)`: a launch, arrays being pointers. By the host's compiler, or by CUDA's and the interpreter."""

    def on_host(name: str, blocks: tuple[int, int], *arguments: Any) -> None:
        launch(step_on_host, f"sr3_{name}", blocks, 64, addresses(arguments), cuda._TYPES[f"sr3_{name}"])

    def for_gpu(name: str, blocks: tuple[int, int], *arguments: Any) -> None:
        arrays = [argument for argument in arguments if isinstance(argument, np.ndarray)]
        tables = [(int(slot["table"]), int(slot["rows"])) for array in arrays if array.dtype == SLOT for slot in array if slot["rows"]]
        lent = [*arrays, *(np.ctypeslib.as_array((ctypes.c_float * (7 * rows)).from_address(address)) for address, rows in tables)]
        gpu.launch(f"sr3_{name}", blocks, 64, addresses(arguments), lent)

    if request.param == "compiled for the host":
        return on_host
    gpu: ptx.Machine = request.getfixturevalue("machine")
    return for_gpu


def addresses(arguments: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(argument.ctypes.data if isinstance(argument, np.ndarray) else argument for argument in arguments)


def run(sampler: str, steps: int) -> Table:
    return table(Sampler.parse(sampler), respace(named("linear", 2000, 1e-6, 1e-2), steps), prediction="eps", level="sqrt_gamma")


def network(x: NDArray[np.float32], y: NDArray[np.float32], level: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.tanh(np.float32(0.7) * y - np.float32(0.4) * x + level[:, None, None, None])


@pytest.mark.parametrize(("channels", "height", "width"), [(3, 8, 12), (1, 9, 13), (4, 4, 9), (6, 16, 1)])
def test_slots_of_different_runs_do_what_the_native_step_does_in_every_bit(
    kernel: Callable[..., None], channels: int, height: int, width: int
) -> None:
    runs = [run("sr3", 5), run("dpm++2m", 9), run("ddim(0.5)", 3), run("posterior", 1)]
    slots = np.zeros(5, SLOT)  # the last is idle
    for slot, one, seed in zip(slots, runs, (3, 2**63 + 1, 5, 7), strict=False):
        slot["seed"], slot["table"], slot["rows"] = seed, one.ctypes.data, len(one)
    shape = (5, channels, height, width)
    x, y, x0 = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for i in range(4):
        kernel("start", (2, 1), y, slots, i, *shape[1:])
        assert (y[i] == normals(shape[1:], seed=int(slots[i]["seed"]), step=START)).all()
    y[4] = 0.25
    expected_y, expected_x0, level = y.copy(), x0.copy(), np.zeros(5, np.float32)
    for k in range(9):
        kernel("levels", (1, 1), level, slots, 5)
        busy = [i for i in range(4) if k < len(runs[i])]
        assert level.tolist() == [runs[i][k][LEVEL] if i in busy else 1.0 for i in range(5)]
        net = network(x, y, level)
        for i in busy:
            one, steps = slice(i, i + 1), np.array([k], np.uint32)
            assert _native.step(
                expected_y[one], net[one], expected_x0[one], runs[i][k : k + 1], slots["seed"][one].copy(), steps, clip=True, threads=1
            )
        kernel("step", (2, 5), y, net, x0, slots, *shape[1:])
        kernel("next", (1, 1), slots, 5)
        assert (y == expected_y).all()
        assert (x0 == expected_x0).all()
    assert slots["row"].tolist() == [5, 9, 3, 1, 0]
    assert not slots["broken"].any()


@without_bindings
def test_the_loop_with_kernels_made_for_a_gpu_has_the_hosts_bits_and_reaches_no_memory_but_its_own(
    machine: ptx.Machine, gpu: Callable[..., cuda_on_host.Cuda], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, on_the_host = gpu(), cuda_on_host.launch

    def launched(library: ctypes.CDLL, name: str, blocks: tuple[int, int], threads: int, arguments: tuple[Any, ...], types: Any) -> None:
        if name in NAMES:
            machine.launch(name, blocks, threads, arguments, [*made._blocks.values()])
        else:  # the network's
            on_the_host(library, name, blocks, threads, arguments, types)

    monkeypatch.setattr(cuda_on_host, "launch", launched)
    for found, job in zip(done(on_gpu(capacity=5), *jobs(5)), jobs(5), strict=True):
        assert np.array_equal(found, done(on_host(), job)[0])


def test_the_step_in_which_a_slot_broke_is_kept(kernel: Callable[..., None]) -> None:
    rows, slots, shape = run("ddim", 4), np.zeros(2, SLOT), (2, 3, 4, 4)
    slots["rows"], slots["table"] = 4, rows.ctypes.data
    y, x0, net = (np.zeros(shape, np.float32) for _ in range(3))
    for k in range(4):
        net[:] = 0
        if k in (1, 2):
            net[1, 2, 3, 3] = np.inf
        kernel("step", (1, 2), y, net, x0, slots, *shape[1:])
        kernel("next", (1, 1), slots, 2)
    assert slots["broken"].tolist() == [0, 2]


@without_bindings
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_nvrtc_compiles_the_kernels(capability: tuple[int, int]) -> None:
    cubin = kernels.compiled(capability)
    assert all(name.encode() in cubin for name in NAMES)


@without_bindings
def test_what_was_compiled_is_kept_and_an_error_is_the_compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BUILT", tmp_path / "none")
    monkeypatch.setenv("SR3RT_CACHE", str(tmp_path / "cache"))
    cubin = kernels.load((9, 0))
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.read_bytes() == cubin
    kept.write_bytes(b"kept")
    assert kernels.load((9, 0)) == b"kept"
    native = tmp_path / "native"
    shutil.copytree(kernels.NATIVE, native, ignore=shutil.ignore_patterns("*.fatbin"))
    (native / "step.cu").write_text((native / "step.cu").read_text().replace("channels;", "chanels;", 1))
    monkeypatch.setattr(kernels, "NATIVE", native)
    with pytest.raises(BackendError, match=r'(?s)cannot compile step.cu for compute capability \(9, 0\).*"chanels" is undefined'):
        kernels.load((9, 0))
    with pytest.raises(BackendError, match=r"compute capability \(1, 0\)"):
        kernels.compiled((1, 0))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no folder here that even root cannot write to")
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BUILT", tmp_path / "none")
    monkeypatch.setattr(kernels, "compiled", lambda capability: b"cubin")
    monkeypatch.setenv("SR3RT_CACHE", "/proc/self")
    assert kernels.load((9, 0)) == b"cubin"


def test_a_fat_binary_that_was_built_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BUILT", tmp_path / "step.fatbin")
    (tmp_path / "step.fatbin").write_bytes(b"built")
    assert kernels.load((9, 0)) == b"built"


def test_without_the_bindings_the_message_is_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'the CUDA kernels needs the package .*: run  pip install "sr3rt\[gpu\]"'):
        kernels.compiled((9, 0))


@pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc here")
def test_nvcc_compiles_the_kernels_for_the_gpus_that_are_built_for(tmp_path: Path) -> None:
    built = tmp_path / "step.fatbin"
    architectures = [f"-gencode=arch=compute_{v},code=sm_{v}" for v in (80, 90)] + ["-gencode=arch=compute_90,code=compute_90"]
    command = ["nvcc", "-fatbin", "-O3", *kernels.OPTIONS, "-Werror=all-warnings", *architectures, str(kernels.NATIVE / "step.cu")]
    subprocess.run([*command, "-o", str(built)], check=True)
    assert all(name.encode() in built.read_bytes() for name in NAMES)
