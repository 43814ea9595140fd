"""examples/client.py: what it writes, and what it says when it cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import encoded, free_address, opened
from PIL import Image

import sr3rt

CLIENT = Path(__file__).parents[2] / "examples" / "client.py"
PICTURE = np.random.default_rng(0).integers(0, 256, (10, 14, 3), np.uint8)
PROTOCOLS = pytest.mark.parametrize("protocol", ["stream", "grpc", "http"])


def run(folder: Path, port: int, protocol: str, *options: str, output: str = "out.png") -> subprocess.CompletedProcess[str]:
    (folder / "in.png").write_bytes(encoded(PICTURE))
    command = [sys.executable, CLIENT, "in.png", output, "--protocol", protocol, "--server", f"127.0.0.1:{port}", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def port(triton: Any, protocol: str) -> int:
    found: int = triton.address.http if protocol == "http" else triton.address.grpc
    return found


@PROTOCOLS
def test_the_example_client_upscales(triton: Any, tmp_path: Path, protocol: str) -> None:
    previews = ("--previews", "1") if protocol == "stream" else ()
    done = run(tmp_path, port(triton, protocol), protocol, "--steps", "4", "--seed", "5", *previews)
    assert done.returncode == 0, done.stderr
    assert "seed 5, 4 steps" in done.stdout
    expected = np.asarray(sr3rt.upscale(encoded(PICTURE), steps=4, seed=5))
    assert np.abs(opened((tmp_path / "out.png").read_bytes()).astype(int) - expected).max() <= 1
    assert (tmp_path / "out-1.png").exists() == (protocol == "stream")


@PROTOCOLS
@pytest.mark.parametrize(("name", "format"), [("large.jpg", "JPEG"), ("large.WEBP", "WEBP")])
def test_the_suffix_says_the_format(triton: Any, tmp_path: Path, protocol: str, name: str, format: str) -> None:
    done = run(tmp_path, port(triton, protocol), protocol, "--steps", "1", output=name)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / name).format == format


def test_a_suffix_of_no_format_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    done = run(tmp_path, 1, "http", output="large.bmp")
    assert (done.returncode, "large.bmp: expected a name that ends in .png, .jpg" in done.stderr) == (2, True)


def test_options_that_do_nothing_are_refused(tmp_path: Path) -> None:
    for options, message in (
        (("--server", "http://127.0.0.1:8000"), "expected host:port, without a scheme"),
        (("--previews", "5"), "--previews: only a stream has them"),
    ):
        done = run(tmp_path, 1, "http", *options)
        assert (done.returncode, message in done.stderr) == (2, True)


@PROTOCOLS
def test_what_goes_wrong_is_told_in_one_line(triton: Any, tmp_path: Path, protocol: str) -> None:
    taken = port(triton, protocol)
    for done, message in (
        (run(tmp_path, taken, protocol, "--steps", "0"), "steps must be between 1 and"),
        (run(tmp_path, taken, protocol, "--steps", "1000", "--timeout", "0.05"), "its 50 ms ran out"),
        (run(tmp_path, free_address().http, protocol), "refused"),
        (run(tmp_path, taken, protocol, output="nowhere/out.png"), "No such file or directory: 'nowhere/out.png'"),
    ):
        assert done.returncode == 1
        assert message in done.stderr
        assert done.stderr.startswith("client.py: ")
        assert done.stderr.count("\n") == 1
