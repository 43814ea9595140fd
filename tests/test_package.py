"""The wheel: what is in it, and that it works in a clean environment, from another folder, without any extra."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from collections import Counter
from email.parser import Parser
from pathlib import Path

import pytest

from sr3rt.backends import native

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", ROOT, "--quiet", "--no-deps", "--wheel-dir", folder, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if ".dist-info/" not in name]


@pytest.fixture(scope="session")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a clean environment that holds the wheel and its base dependencies."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=True)
    interpreter = folder / "bin" / "python"
    run(interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel, cwd=folder)
    return interpreter


def in_repository(folder: str, pattern: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob(pattern) if "__pycache__" not in path.parts}


def test_wheel_holds_every_python_file_once(names: list[str]) -> None:
    assert [name for name, count in Counter(names).items() if count > 1] == []
    runtime = {name for name in in_repository("sr3rt", "*.py") if not name.startswith("sr3rt/export/")}
    exporter = {f"sr3rt/{name}" for name in in_repository("export", "*.py")}
    models = {f"sr3rt/serving/{name}" for name in in_repository("triton_repo", "*.py")}
    assert {name for name in names if name.endswith(".py")} == runtime | exporter | models
    assert {f"sr3rt/serving/triton_repo/{name}/config.pbtxt" for name in ("sr3", "sr3_stream")} <= set(names)


def test_wheel_holds_the_shipped_model_whole(names: list[str]) -> None:
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "sr3rt" / "models").rglob("*") if path.is_file() and path.suffix != ".py"}
    assert any(name.endswith("/sr3.json") for name in shipped)
    assert any(name.endswith(".onnx") for name in shipped)
    assert shipped <= set(names)


def test_wheel_holds_types_the_native_module_and_the_kernels_that_are_compiled_on_the_spot(names: list[str]) -> None:
    assert {"sr3rt/py.typed", "sr3rt/_native.pyi"} <= set(names)
    assert len([name for name in names if name.startswith("sr3rt/_native.") and name.endswith(".so")]) == 1
    native = {Path(name).name for name in names if name.startswith("sr3rt/native/")}
    assert native == {"step.cu", "step.hpp"} | ({"step.fatbin"} if shutil.which("nvcc") else set())
    assert {name.split("/")[0] for name in names} == {"sr3rt"}


def test_metadata_names_the_licence_and_few_dependencies(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
        assert any(entry.endswith("/licenses/LICENSE") for entry in archive.namelist())
    assert metadata["License-Expression"] == "Apache-2.0"
    required = [line.split(";")[0] for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(line.split(">=")[0].strip() for line in required) == ["cyclopts", "filelock", "numpy", "pillow", "rich"]
    assert set(metadata.get_all("Provides-Extra", [])) == {"cpu", "gpu", "rtx", "serve", "export", "bench", "test"}


def test_import_is_light_and_comes_from_the_environment(python: Path, tmp_path: Path) -> None:
    script = "import sys, sr3rt; print(sr3rt.__file__, *sys.modules, sep='\\n')"
    file, *modules = run(python, "-c", script, cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(python.parent.parent)
    heavy = {"torch", "onnx", "onnxruntime", "PIL", "sr3rt.export"}
    assert heavy & set(modules) == set()


def test_native_module_agrees_with_the_oracle_in_the_clean_environment(python: Path, tmp_path: Path) -> None:
    script = (
        "import numpy as np; from sr3rt import _native, noise; z = np.empty((1, 3, 32, 32), np.float32);"
        "_native.normals(z, np.array([7], np.uint64), np.array([8], np.uint32));"
        "print(np.array_equal(z[0], noise.normals((3, 32, 32), seed=7, step=8)))"
    )
    assert run(python, "-c", script, cwd=tmp_path) == "True\n"


def test_a_missing_extra_is_answered_with_the_pip_command(python: Path, tmp_path: Path) -> None:
    script = (
        "import numpy as np, sr3rt\n"
        "try: sr3rt.upscale(np.zeros((8, 8, 3), np.uint8), backend='onnxruntime')\n"
        "except sr3rt.MissingExtra as error: print(error)"
    )
    assert 'pip install "sr3rt[cpu]"' in run(python, "-c", script, cwd=tmp_path)


def test_a_picture_is_upscaled_without_any_extra(python: Path, tmp_path: Path) -> None:
    if why := native.why_not():
        pytest.skip(why)
    script = "import numpy as np, sr3rt; print(sr3rt.upscale(np.zeros((8, 6, 3), np.uint8), steps=1).shape)"
    assert run(python, "-c", script, cwd=tmp_path) == "(32, 24, 3)\n"


def test_the_command_runs_without_any_extra(python: Path, tmp_path: Path) -> None:
    assert "upscale" in run(python.parent / "sr3rt", "--help", cwd=tmp_path)


def test_an_export_measures_memory_by_the_installed_package_though_run_in_a_checkout(python: Path, tmp_path: Path) -> None:
    checkout, script = tmp_path / "checkout", tmp_path / "scripts" / "measure.py"
    for path in (checkout / "sr3rt" / "__init__.py", script):
        path.parent.mkdir(parents=True)
    (checkout / "sr3rt" / "__init__.py").write_text("raise ImportError('nothing was built here')")
    script.write_text(
        "from sr3rt import SR3Error; from sr3rt.bundle import Bundle; from sr3rt.upscaler import SHIPPED\n"
        "from sr3rt.export import footprint\n"
        "try: footprint.bytes_per_pixel(SHIPPED, Bundle.open(SHIPPED).manifest)\n"
        "except SR3Error as error: print(error)"
    )
    assert 'pip install "sr3rt[cpu]"' in run(python, script, cwd=checkout)  # which is as far as it comes in the clean environment
