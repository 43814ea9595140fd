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
    """A thread that every `EVERY` seconds tells Triton the outcomes of requests and, where there is a service, its counts."""

    def __init__(self, model: str, service: Service | None = None) -> None:
        self._families: list[Any] = []  # Triton forgets those that nobody holds
        self._labels = {"model": model}
        self._outcomes = self._by_outcome()
        self._ended = deque[Reply | Exception]()
        self._service = service
        if service is not None:
            kinds = pb.MetricFamily
            self._counters = {field: self._metric(name, text, kinds.COUNTER) for name, text, field in _COUNTERS}
            self._gauges = {field: self._metric(name, text, kinds.GAUGE) for name, text, field in _GAUGES}
            self._well = self._metric("sr3rt_alive", "1 while steps can be done, 0 when the batcher is dead", kinds.GAUGE)
            self._queue = self._metric("sr3rt_queue_seconds", "Waited for a slot", kinds.HISTOGRAM, buckets=SECONDS)
            self._total = self._metric("sr3rt_request_seconds", "From arrival to result", kinds.HISTOGRAM, buckets=SECONDS)
            self._before = service.counts()
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

    def _metric(self, name: str, text: str, kind: Any, **options: Any) -> Any:
        family = pb.MetricFamily(name=name, description=text, kind=kind)
        self._families.append(family)
        return family.Metric(labels=self._labels, **options)

    def _by_outcome(self) -> dict[str, Any]:
        family = pb.MetricFamily(name="sr3rt_requests_total", description="Requests by outcome", kind=pb.MetricFamily.COUNTER)
        self._families.append(family)
        names = ["ok", "failed", *dict.fromkeys(name for _, name in _OUTCOMES)]
        return {name: family.Metric(labels={**self._labels, "outcome": name}) for name in names}

    def _report(self) -> None:
        closing = False
        while not closing:
            closing = self._closed.wait(EVERY)
            while self._ended:
                self._count(self._ended.popleft())
            if self._service is not None:
                self._copy(self._service)

    def _count(self, outcome: Reply | Exception) -> None:
        if isinstance(outcome, Reply):
            self._queue.observe(outcome.info["queue_ms"] / 1000)
            self._total.observe(outcome.info["total_ms"] / 1000)
            name = "ok"
        else:
            name = next((name for kind, name in _OUTCOMES if isinstance(outcome, kind)), "failed")
        self._outcomes[name].increment(1)

    def _copy(self, service: Service) -> None:
        counts = service.counts()
        for field, counter in self._counters.items():
            counter.increment(getattr(counts, field) - getattr(self._before, field))
        for field, gauge in self._gauges.items():
            gauge.set(getattr(counts, field))
        self._well.set(float(service.well))
        self._before = counts
