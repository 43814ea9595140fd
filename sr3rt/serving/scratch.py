"""Temporary folders of a server. One whose server was killed is removed by the next server that starts.

Whether it is in use is asked of a lock, which the kernel lets go of when the last process that has it ends, in whatever way.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 # where Linux keeps it

_PREFIX, _LOCK, _ELSEWHERE = "sr3rt-serve-", "lock", "elsewhere"


class Scratch:
    """A new folder, `path`. What begins with its name in shared memory belongs to it.

    fileno: the lock's; a process that inherits it keeps the folder in use.
    """

    def __init__(self) -> None:
        sweep()
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        new = self.path / f"{_LOCK}.new"
        self._lock = new.open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        new.rename(self.path / _LOCK)  # taken before anybody may try it

    def fileno(self) -> int:
        return self._lock.fileno()

    def owns(self, folder: Path) -> None:
        """Remove that folder too, which need not exist."""
        (self.path / _ELSEWHERE).write_bytes(os.fsencode(folder))

    def remove(self) -> None:
        """May be called again."""
        _remove(self.path)
        self._lock.close()


def sweep() -> None:
    """Remove this user's folders that nobody uses."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, another user's, or removed by another at this moment
            if path.lstat().st_uid == os.getuid():
                with (path / _LOCK).open("rb") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(os.fsdecode((path / _ELSEWHERE).read_bytes()), ignore_errors=True)
    for left in SHARED_MEMORY.glob(f"{path.name}*"):
        left.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
