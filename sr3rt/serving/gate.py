"""What both guards refuse by, before Triton has any work with it, and how often they did."""

from __future__ import annotations

from sr3rt.errors import ImageTooLarge, OptionError, Overloaded, SR3Error, Stopped
from sr3rt.serving.admission import Admission, Place

_REASONS = (  # the first that fits
    (Overloaded, "full"),
    (Stopped, "away"),
    (ImageTooLarge, "invalid"),
    (OptionError, "invalid"),
)
_NAME = "sr3rt_guard_refused_total"


class Gate:
    """Belongs to one event loop.

    requests: most that ask for one answer and are with Triton at a time, as its models take no more: a refusal costs Triton four times as
    much. Streams are not counted, since a client that reads slowly would keep its place when the work is long done; the models do that.
    """

    def __init__(self, requests: int) -> None:
        self._admission = Admission(requests=requests, pixels=0)
        self._refused = dict.fromkeys((reason for _, reason in _REASONS), 0)

    def place(self, request: bytes, *, probe: bytes) -> Place | None:
        """To be released when the answer is there. None for what contains `probe`: that is answered under overload too.

        Raises Overloaded.
        """
        return None if probe in request else self._admission.admit(0)

    def refused(self, error: SR3Error) -> None:
        """Count it."""
        self._refused[next(reason for kind, reason in _REASONS if isinstance(error, kind))] += 1

    def metrics(self) -> str:
        """In Prometheus's text format: full, away (Triton is being started), invalid."""
        lines = [f"# HELP {_NAME} Requests that the guard refused", f"# TYPE {_NAME} counter"]
        return "".join(f"{line}\n" for line in [*lines, *(f'{_NAME}{{reason="{reason}"}} {n}' for reason, n in self._refused.items())])
