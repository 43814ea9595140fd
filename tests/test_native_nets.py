"""Networks through sr3rt's own engine for CPUs against float64: every architecture, and random ones under sanitizers.

Float32 alone makes a relative difference of 5e-7 to 2e-6 here, in PyTorch as in the engine. Bfloat16 makes one of up to 6e-2 of the largest
value; what is in the wrong place makes one of its whole size.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_program import NETS, computed, tensors, trained  # noqa: E402

from sr3rt import _native  # noqa: E402
from sr3rt.backends import Floats, native  # noqa: E402
from sr3rt.backends.native import compiled  # noqa: E402
from sr3rt.export.program import describe, dumps  # noqa: E402

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"auto": 1e-5, "avx2": 1e-5, "avx2_bf16": 6e-2, "avx512_bf16": 6e-2, "amx_bf16": 2e-2}
INSTRUCTIONS = tuple(filter(_native.has, LIMITS))
LEVELS = (0.875, 0.25, 0.0078125)
"""Powers of two, nearly: the paper's networks multiply the level by 5000, and float32 rounds that of others by up to 2e-4."""


@cache
def made(name: str) -> tuple[Any, dict[str, Any], int, int]:
    """Program, weights, channels and stride."""
    net = trained(name)
    return json.loads(dumps(describe(net))), tensors(net), net.config.channels, net.config.stride


def inputs(name: str, batch: int, height: int, width: int) -> tuple[Floats, Floats, Floats]:
    """x, y and level of pictures whose sides are that many of the network's strides."""
    _, _, channels, stride = made(name)
    x, y = np.random.default_rng(1).standard_normal((2, batch, channels, height * stride, width * stride)).astype(np.float32)
    level = np.array(LEVELS[:batch], np.float32).reshape(-1, 1)
    return x, y, np.floor(level * 1000) if name == "ddpm_e" else level


def run(network: _native.Network, x: Floats, y: Floats, level: Floats) -> Floats:
    out = np.full_like(y, np.nan)
    network.run(np.ascontiguousarray(x), np.ascontiguousarray(y), np.ascontiguousarray(level), out)
    return out


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("name", NETS)
def test_a_network_is_computed(name: str, instructions: str) -> None:
    """A square, and rectangles in a batch of 3 at mixed levels, one network after the other in the same memory."""
    program, weights, channels, stride = made(name)
    network = compiled(program, weights, channels, 2, instructions=instructions)
    for shape in ((1, 1, 1), (3, 1, 2), (3, 2, 1), *(() if stride > 16 else ((3, 3, 5),))):
        arrays = inputs(name, *shape)
        expected, found = computed(program, weights, *arrays), run(network, *arrays)
        assert np.abs(expected).max() > 0.01
        assert np.abs(found - expected).max() < LIMITS[instructions] * np.abs(expected).max()


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("name", NETS)
def test_threads_and_neighbours_change_no_bit_of_a_network(name: str, instructions: str) -> None:
    program, weights, channels, stride = made(name)
    arrays = inputs(name, 3, *((2, 1) if stride > 16 else (3, 5)))
    expected = run(compiled(program, weights, channels, 1, instructions=instructions), *arrays)
    assert np.isfinite(expected).all()
    for threads in (2, 3, 5):
        network = compiled(program, weights, channels, threads, instructions=instructions)
        assert (run(network, *arrays) == expected).all()
        for i in range(3):
            assert (run(network, *(array[i : i + 1] for array in arrays)) == expected[i : i + 1]).all()


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("name", ["sr3_a", "ddpm_e", "compact"])
def test_large_layers_are_made_picture_by_picture_and_small_ones_together(name: str, instructions: str) -> None:
    """In the bits of each alone, and in less memory than all of them together would take."""
    program, weights, channels, stride = made(name)
    arrays = inputs(name, 3, 80 // stride, 72 // stride)
    network = compiled(program, weights, channels, 1, instructions=instructions)
    assert network.memory(3, 80, 72) < 2.5 * network.memory(1, 80, 72)
    found = run(network, *arrays)
    for i in range(3):
        assert (run(network, *(array[i : i + 1] for array in arrays)) == found[i : i + 1]).all()


# --- the engine alone (tests/native), under sanitizers

EXACT = ("-std=c++20", "-g0", "-fno-math-errno", "-fno-trapping-math")
KERNELS = ("avx2", "avx2_bf16", "wide", "wide_bf16", "avx512", "avx512_bf16")
TILES = ("plain_tiles", "amx_tiles")
SANITIZED = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
NOT_THE_NETWORK = {"bindings.cpp", "network_bindings.cpp", "step.cpp", "kernels.cpp", "tiles.cpp"}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the programs of tests/native; the engine, and what it reads and writes of their memory, under sanitizers."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    folder, source = tmp_path_factory.mktemp("fuzz"), ROOT / "sr3rt" / "native"
    empty = subprocess.run(
        [compiler, *SANITIZED, "-x", "c++", "-", "-o", folder / "empty"], input="int main() {}", text=True, capture_output=True, check=False
    )
    if empty.returncode:
        pytest.skip(f"the C++ compiler has no sanitizers: {empty.stderr.strip().splitlines()[-1]}")
    build_script = (ROOT / "CMakeLists.txt").read_text()
    kinds = re.findall(r"^ *sr3rt_kernels\((\w+) (\d+) (\d) (\d+) ([^)]*)\)", build_script, re.MULTILINE)
    tiles = re.findall(r"^ *sr3rt_tiles\((\w+) ([^)]*)\)", build_script, re.MULTILINE)
    assert (set(KERNELS), set(TILES)) == ({name for name, *_ in kinds}, {name for name, _ in tiles})
    units: dict[str, list[str | Path]] = {
        path.stem: [*SANITIZED, path] for path in source.glob("*.cpp") if path.name not in NOT_THE_NETWORK
    }
    mains = {path.stem: path for path in (ROOT / "tests" / "native").glob("*.cpp")}
    units |= {f"main of {name}": ["-O2", f"-I{source}", path] for name, path in mains.items()}  # the slower half by far
    for name, lanes, word, rows, flags in kinds:
        constants = [f"-DSR3_LANES={lanes}", f"-DSR3_WORD={word}", f"-DSR3_ROWS={rows}", f"-DSR3_KERNELS={name}", f'-DSR3_NAME="{name}"']
        units[name] = [*SANITIZED, "-ffp-contract=fast", *flags.split(), *constants, source / "kernels.cpp"]
    units |= {name: [*SANITIZED, "-O3", *flags.split(), f"-DSR3_TILES={name}", source / "tiles.cpp"] for name, flags in tiles}
    units["dispatch"] += ["-DSR3_AMX"]

    def build(unit: str) -> None:
        subprocess.run([compiler, *EXACT, *units[unit], "-c", "-o", folder / f"{unit}.o"], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(build, units))
    objects = [folder / f"{unit}.o" for unit in units if not unit.startswith("main")]
    for name in mains:
        both = [folder / f"main of {name}.o", *objects]
        subprocess.run([compiler, "-fsanitize=address,undefined", *both, "-pthread", "-o", folder / name], check=True)
    return folder


def test_the_pool_does_every_piece_and_tells_what_one_throws(programs: Path) -> None:
    done = subprocess.run([programs / "pool"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "0 rounds wrong\n"), done.stdout + done.stderr


@pytest.mark.parametrize("kernels", KERNELS)
def test_every_kernel_is_right_alone(programs: Path, kernels: str) -> None:
    done = subprocess.run([programs / "kernels", "check", kernels], capture_output=True, text=True, check=False, timeout=60)
    if kernels.startswith("avx512") and done.returncode == 65:
        pytest.skip(f"this processor has no {kernels}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 15


@pytest.mark.parametrize("tiles", ["plain", "amx"])
def test_tiles_are_right_alone(programs: Path, tiles: str) -> None:
    done = subprocess.run([programs / "tiles", "check", tiles], capture_output=True, text=True, check=False, timeout=60)
    if tiles == "amx" and done.returncode == 65:
        pytest.skip("this processor has no AMX")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 3


@pytest.mark.parametrize("kernels", [*KERNELS, "wide_amx", "amx_bf16"])
def test_random_networks_are_computed_without_a_stray_access(programs: Path, kernels: str) -> None:
    """`wide`: vectors as long as those of AVX-512, and its tiles, on any processor with AVX2."""
    cases, seed = (17, 11) if kernels == "wide_amx" else (40, 1)  # tiles as arrays are slow; the last is large, with blocks cut by an edge
    done = subprocess.run([programs / "fuzz", str(cases), str(seed), kernels], capture_output=True, text=True, check=False, timeout=300)
    if kernels.startswith(("avx512", "amx")) and done.returncode == 2:
        pytest.skip(f"this processor has no {kernels}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kernels}: 0 of {cases} networks wrong" in done.stdout
