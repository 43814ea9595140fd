"""Temporary folders of a server. One whose server was killed is removed by the next server that starts.

Whether it is in use is asked of a lock on the folder, which the kernel lets go of when the last process that has it ends, in whatever way.
systemd-tmpfiles, which cleans temporary folders of what is old, leaves locked ones alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from pathlib import Path

from sr3rt.errors import OptionError

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 # where Linux keeps it
MEETING = "SR3RT_MEETING"  # environment variable: where the models of a server meet, `Scratch.meeting`

_PREFIX, _NEW = "sr3rt-serve-", "sr3rt-new-"
_USABLE = re.compile(r"[A-Za-z0-9_./@%+=,-]{1,66}")  # by the shell that starts Triton's models; and a socket's path has 107 bytes at most


class Scratch:
    """A new folder, `path`. What begins with its name in shared memory belongs to it. Raises OptionError where it could not be used.

    fileno: the lock's; a process that inherits it keeps the folder in use.
    """

    def __init__(self) -> None:
        if not _USABLE.fullmatch(tempfile.gettempdir()):
            raise OptionError(
                f"the temporary folder is {tempfile.gettempdir()!r}, and Triton can start its models from one of up to 66 letters, digits "
                "and _./@%+=,- only: set TMPDIR to another"
            )
        sweep()
        new = Path(tempfile.mkdtemp(prefix=_NEW))
        self._lock = _locked(new)
        self.path = new.rename(new.with_name(new.name.replace(_NEW, _PREFIX)))  # locked before anybody looks for it

    @property
    def meeting(self) -> Path:
        """A folder in it that the models make."""
        return self.path / "meeting"

    def fileno(self) -> int:
        return self._lock

    def remove(self) -> None:
        """May be called again."""
        _remove(self.path)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def sweep() -> None:
    """Remove this user's folders that nobody uses."""
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, another user's, or removed by another at this moment
            if path.lstat().st_uid == os.getuid():
                lock = _locked(path)
                _remove(path)
                os.close(lock)


def _locked(folder: Path) -> int:
    """A file descriptor that holds the folder's lock. Raises OSError where another does."""
    found = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(found)
        raise
    return found


def _remove(path: Path) -> None:
    for left in SHARED_MEMORY.glob(f"{path.name}*"):
        left.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
