"""`python tied.py PARENT COMMAND…`: becomes the command, which Linux sends SIGTERM when the process PARENT, its parent, ends in any way.

In a process of its own: between fork and exec no Python may run where there are threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h; kept across exec


def main(parent: str, *command: str) -> None:
    """Does not return."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != int(parent):  # it ended before
            sys.exit(1)
    os.execv(command[0], command)  # noqa: S606 # that is what it is for


if __name__ == "__main__":
    main(*sys.argv[1:])
