"""Triton passes tensors through shared memory. An answer that finds no room there is never sent, nor anything in its place (2.51)."""

from __future__ import annotations

import os

from sr3rt.serving.scratch import SHARED_MEMORY

BYTES_A_PIXEL = 8  # an answer's four, and as much for what comes in and what lies between


def most_pixels(limit: int) -> int:
    """Of results that may be taken on at a time, so that there is room for their answers: `limit`, or less."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:  # it is elsewhere
        return limit
    return min(limit, found.f_blocks * found.f_frsize // BYTES_A_PIXEL)


def too_little(limit: int) -> str | None:
    """What to tell an operator where `limit` is more than that, or None."""
    if (most := most_pixels(limit)) == limit:
        return None
    return (
        f"{SHARED_MEMORY} has room for the answers of {most} pixels at a time, and no more are taken on; for max_pixels, {limit}, give it "
        f"{limit * BYTES_A_PIXEL / 2**30:.2g} GiB (a container: --shm-size)"
    )
