"""What carries requests from one model's process to the other's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sr3rt.serving import link


def ask(peer: link.Peer, **message: Any) -> dict[str, Any]:
    answer, _ = peer.ask(message, b"", begun=lambda cancel: None)
    return answer


def answering(where: Path, **answer: Any) -> link.Server:
    return link.Server(str(where), lambda message, data, send: send(answer, b""))


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


def test_a_folder_that_others_may_enter_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(link.tempfile, "tempdir", str(tmp_path))
    folder = Path(link.address("model")).parent
    assert folder == link.folder_of(os.getppid())
    folder.chmod(0o755)
    with pytest.raises(link.Stopped, match="is not this user's alone: remove it"):
        link.address("model")
    shutil.rmtree(folder)
