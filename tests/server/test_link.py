"""What carries requests from one model's process to the other's."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sr3rt.serving import link


def ask(peer: link.Peer, **message: Any) -> dict[str, Any]:
    answer, _ = peer.ask(message, b"", begun=lambda cancel: None)
    return answer


def answering(where: Path, **answer: Any) -> link.Responder:
    return link.Responder(str(where), lambda message, data, send: send(answer, b""))


def test_one_that_was_killed_is_succeeded_by_a_process_with_the_same_number(tmp_path: Path) -> None:
    answering(tmp_path / "model", name="killed")  # its socket stays, as nobody closes it
    peer = link.Peer(str(tmp_path / "model"))
    assert ask(peer) == {"name": "killed"}
    later = answering(tmp_path / "model", name="later")
    assert ask(link.Peer(str(tmp_path / "model"))) == {"name": "later"}
    later.close()


def test_servers_of_one_number_in_two_containers_do_not_meet() -> None:
    if subprocess.run(["unshare", "-rpf", "--mount-proc", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no process namespaces may be made here")
    code = "import os; from sr3rt.serving.link import folder_of; print(os.getpid(), folder_of(os.getpid()))"
    inside = ["unshare", "-rpf", "--mount-proc", sys.executable, "-c", code]
    (one, here), (other, there) = (subprocess.check_output(inside, text=True).split() for _ in range(2))
    assert one == other == "1"
    assert here != there


def test_who_finds_no_free_file_waits_and_is_answered(tmp_path: Path) -> None:
    code = f"""
import resource, sys, threading
from sr3rt.serving.link import Responder

def begin(message, data, send):
    threading.Timer(0.1, send, ({{}}, b"")).start()

Responder({str(tmp_path / "model")!r}, begin)
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
print("listens", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as few:
        assert few.stdout
        assert few.stdout.readline() == b"listens\n"
        peer = link.Peer(str(tmp_path / "model"))
        with ThreadPoolExecutor(60) as pool:
            assert list(pool.map(lambda i: ask(peer, i=i), range(60))) == [{}] * 60
        assert ask(link.Peer(str(tmp_path / "model"))) == {}
        _, errors = few.communicate(b"")
    assert b"a request could not be taken, and waits: [Errno 24] Too many open files" in errors


def test_who_is_not_taken_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "TAKEN", 0.1)
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(tmp_path / "model"))
        deaf.listen()
        with pytest.raises(link.Stopped, match=r"did not take the request within 0\.1 s: try again later"):
            ask(link.Peer(str(tmp_path / "model")))


def test_a_folder_that_others_may_enter_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(link.tempfile, "tempdir", str(tmp_path))
    folder = Path(link.address("model")).parent
    assert folder == link.folder_of(os.getppid())
    folder.chmod(0o755)
    with pytest.raises(link.Stopped, match="is not this user's alone: remove it"):
        link.address("model")
    shutil.rmtree(folder)
