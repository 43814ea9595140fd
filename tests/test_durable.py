"""What is written is flushed to the disk, as far as the file system can do that."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from sr3rt.bundle import Bundle
from sr3rt.durable import write_atomic

Refusing = Callable[[Callable[[int], bool], int], None]


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Refusing:
    """`refusing(stat.S_ISDIR, errno.EINVAL)`: fsync fails so for folders."""
    fsync = os.fsync

    def replace(kind: Callable[[int], bool], number: int) -> None:
        def refuse(descriptor: int) -> None:
            if kind(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", refuse)

    return replace


def test_a_file_system_that_cannot_flush_folders_is_written_to(tmp_path: Path, refusing: Refusing) -> None:
    refusing(stat.S_ISDIR, errno.EINVAL)
    write_atomic(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
    Bundle.open(tiny.write(tmp_path / "bundle")).verify()


def test_a_file_that_cannot_be_flushed_is_an_error_and_leaves_nothing(tmp_path: Path, refusing: Refusing) -> None:
    refusing(stat.S_ISREG, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left on device"):
        write_atomic(tmp_path / "file", b"whole")
    with pytest.raises(OSError, match="No space left on device"):
        tiny.write(tmp_path / "bundle")
    assert not list(tmp_path.iterdir())
