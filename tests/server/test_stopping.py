"""How a server ends: what is in hand is answered, nobody holds it up, and nothing is left behind."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from asking import eventually, free_address, gone
from tritonclient.grpc import service_pb2, service_pb2_grpc

from sr3rt.errors import OptionError
from sr3rt.serving.scratch import SHARED_MEMORY, Scratch, sweep


@pytest.fixture
def folder() -> Iterator[Path]:
    """A temporary one whose name leaves room for a socket's."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


AS_FROM_A_SHELL = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGHUP):  # tests in the background, or under nohup, ignore these, and what they start would too
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


@contextmanager
def serving(folder: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """`sr3rt serve`, whose temporary files are in `folder / "tmp"`."""
    address = free_address()
    ports = ["--http-port", str(address.http), "--grpc-port", str(address.grpc), "--metrics-port", str(address.metrics)]
    (folder / "tmp").mkdir()
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-c", AS_FROM_A_SHELL, sys.executable, "-m", "sr3rt", "serve", *ports],
            stdout=log,
            stderr=log,
            env={**os.environ, "TMPDIR": str(folder / "tmp"), **environment},
        ) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def children(process: int) -> list[int]:
    """Those that it made and that are there."""
    return [int(child) for task in Path(f"/proc/{process}/task").iterdir() for child in (task / "children").read_text().split()]


def test_an_idle_stream_is_answered_and_then_ended(mortal: Any) -> None:
    request = service_pb2.ModelInferRequest(model_name="sr3_stream", raw_input_contents=[bytes(40 * 40 * 3)])
    request.inputs.add(name="pixels", datatype="UINT8", shape=(40, 40, 3))
    request.parameters["steps"].int64_param = 12
    asked, told = queue.Queue[Any](), list[str]()
    asked.put(request)
    with grpc.insecure_channel(f"{mortal.address.host}:{mortal.address.grpc}") as channel:
        answers = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter(asked.get, None))
        next(answers)
        mortal.guard.triton = None
        mortal.server.stop(patience=30)
        assert mortal.server.ill(timeout=1) == "the server ended with status 0"  # and was not killed
        with pytest.raises(grpc.RpcError) as ended:
            told.extend(str(answer) for answer in answers)
        assert ended.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "the server is shutting down, and has answered what came before" in ended.value.details()
        assert r"\"seed\"" in told[-1]
        asked.put(None)


@pytest.fixture
def loading(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`sr3rt serve` while its Triton, for which a program stands in, loads and does not look at SIGTERM."""
    (folder / "tritonserver").write_text("#!/bin/sh\ntrap '' TERM\nwhile :; do sleep 0.1; done\n")
    (folder / "tritonserver").chmod(0o755)
    with serving(folder, PATH=f"{folder}:{os.environ['PATH']}") as process:
        eventually(lambda: list((folder / "tmp").glob("sr3rt-serve-*/log")) and children(process.pid))
        yield process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_serve_can_be_stopped_while_the_model_loads(loading: subprocess.Popen[bytes], folder: Path, number: int) -> None:
    (triton,) = children(loading.pid)
    loading.send_signal(number)
    assert loading.wait(30) == 0
    assert gone(triton)
    assert list((folder / "tmp").iterdir()) == []


def test_what_is_killed_leaves_no_process_and_the_next_removes_its_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    with serving(folder) as process:
        eventually(lambda: b"Serving." in (folder / "log").read_bytes(), 60)
        (triton,) = children(process.pid)
        models = children(triton)
        assert len(models) == 2
        process.kill()
        for one in (triton, *models):
            eventually(lambda one=one: gone(one), 60)  # type: ignore[misc]
    left = list((folder / "tmp").iterdir())
    assert len(left) == 2  # Triton's and the repository's
    eventually(lambda: (sweep(), list((folder / "tmp").iterdir()))[1] == [])  # type: ignore[func-returns-value]
    assert not [shared for one in left for shared in SHARED_MEMORY.glob(f"{one.name}*")]


def test_what_is_in_use_is_left_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    (folder / "sr3rt-serve-left").mkdir()
    used, other = Scratch(), Scratch()
    with subprocess.Popen(["sleep", "60"], pass_fds=[used.fileno()]) as heir:
        os.close(used._lock)
        sweep()
        assert set(folder.iterdir()) == {used.path, other.path}
        heir.kill()
    other.remove()
    sweep()
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["a b", "grün", "a;b", "a" * 60])
def test_a_temporary_folder_that_triton_cannot_use_is_refused(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder / name))
    with pytest.raises(OptionError, match="set TMPDIR to another"):
        Scratch()
