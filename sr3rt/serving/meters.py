"""A service's figures on Triton's own metrics endpoint.

Triton's python backend takes metrics from one thread only: from several at a time, the server crashes (seen with 2.51).
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import triton_python_backend_utils as pb

from sr3rt.errors import Cancelled, DeadlineExceeded, ImageError, OptionError, Overloaded, Stopped
from sr3rt.serving.service import Reply, Service

EVERY = 0.5  # seconds
SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]

# Name, help, field of Counts.
_COUNTERS = (
    ("sr3rt_steps_total", "Steps of pictures", "steps"),
    ("sr3rt_calls_total", "Network calls; steps divided by calls is the batch occupancy", "calls"),
    ("sr3rt_pixels_total", "Pixels of finished results", "pixels"),
    ("sr3rt_busy_seconds_total", "Time spent in steps", "busy_seconds"),
)
_GAUGES = (("sr3rt_queued", "Requests that wait for a slot", "queued"), ("sr3rt_running", "Requests in a batch", "running"))
_OUTCOMES = (
    (Overloaded, "rejected"),
    (Stopped, "stopped"),
    (DeadlineExceeded, "expired"),
    (Cancelled, "cancelled"),
    (OptionError, "invalid"),
    (ImageError, "invalid"),
)


class Meters:
    """A thread that every `EVERY` seconds tells Triton the service's counts and the outcomes of requests."""

    def __init__(self, service: Service, model: str) -> None:
        self._service, labels = service, {"model": model}
        kinds = pb.MetricFamily
        self._families: list[Any] = []

        def metric(name: str, text: str, kind: Any, labels: dict[str, str], **options: Any) -> Any:
            family = kinds(name=name, description=text, kind=kind)
            self._families.append(family)
            return family.Metric(labels=labels, **options)

        self._counters = {field: metric(name, text, kinds.COUNTER, labels) for name, text, field in _COUNTERS}
        self._gauges = {field: metric(name, text, kinds.GAUGE, labels) for name, text, field in _GAUGES}
        self._well = metric("sr3rt_alive", "1 while steps can be done, 0 when the batcher is dead", kinds.GAUGE, labels)
        self._queue = metric("sr3rt_queue_seconds", "Waited for a slot", kinds.HISTOGRAM, labels, buckets=SECONDS)
        self._total = metric("sr3rt_request_seconds", "From arrival to result", kinds.HISTOGRAM, labels, buckets=SECONDS)
        family = kinds(name="sr3rt_requests_total", description="Requests by outcome", kind=kinds.COUNTER)
        self._families.append(family)
        names = ["ok", "failed", *dict.fromkeys(name for _, name in _OUTCOMES)]
        self._outcomes = {name: family.Metric(labels={**labels, "outcome": name}) for name in names}
        self._before = service.counts()
        self._ended = deque[Reply | Exception]()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._report, name="sr3rt-meters", daemon=True)
        self._thread.start()

    def observe(self, outcome: Reply | Exception) -> None:
        """A request ended."""
        self._ended.append(outcome)

    def close(self) -> None:
        """Tell a last time."""
        self._closed.set()
        self._thread.join()

    def _report(self) -> None:
        closing = False
        while not closing:
            closing = self._closed.wait(EVERY)
            while self._ended:
                self._count(self._ended.popleft())
            counts = self._service.counts()
            for field, counter in self._counters.items():
                counter.increment(getattr(counts, field) - getattr(self._before, field))
            for field, gauge in self._gauges.items():
                gauge.set(getattr(counts, field))
            self._well.set(float(self._service.well))
            self._before = counts

    def _count(self, outcome: Reply | Exception) -> None:
        if isinstance(outcome, Reply):
            self._queue.observe(outcome.info["queue_ms"] / 1000)
            self._total.observe(outcome.info["total_ms"] / 1000)
            name = "ok"
        else:
            name = next((name for kind, name in _OUTCOMES if isinstance(outcome, kind)), "failed")
        self._outcomes[name].increment(1)
