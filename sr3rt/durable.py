"""Files that are there whole or not at all, whenever their writer is killed or the power fails."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

__all__ = ["sync_file", "sync_folder", "write_atomic"]


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, flush it to the disk, then rename it over `path`. Raises OSError, and then leaves nothing behind.

    A process that is killed meanwhile leaves `path` as it was and at most a hidden `.sr3rt-….tmp` beside it.
    """
    temporary = path.parent / f".sr3rt-{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Flush what was written to the file to the disk. Raises OSError: the file may not be whole."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Flush the folder's names to the disk where that can be done: some network file systems, and Windows, cannot."""
    with suppress(OSError):
        sync_file(path)
