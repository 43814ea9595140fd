"""What a batcher has done and has in hand: the figures that a monitor reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counts:
    """Totals since the start, but for `queued` and `running`, which are of this moment. Batch occupancy is `steps / calls`."""

    submitted: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    queued: int = 0
    running: int = 0
    steps: int = 0
    """Steps of pictures."""
    calls: int = 0
    """Network calls, each of which is a step of one picture or more."""
    pixels: int = 0
    """Of finished results, padding included."""
    queue_seconds: float = 0.0
    """Waited by the requests that have begun."""
    run_seconds: float = 0.0
    """From beginning to end, over the requests that finished."""
    busy_seconds: float = 0.0
    """Spent in steps."""
