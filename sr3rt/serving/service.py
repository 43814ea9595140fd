"""Pictures in, pictures out, over a batcher: reading, limits, progress, encoding. Knows nothing of Triton."""

from __future__ import annotations

import base64
import binascii
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sr3rt import memory
from sr3rt.backends import Floats
from sr3rt.decoding import open_header
from sr3rt.errors import Cancelled, ImageError, ImageTooLarge, OptionError, Overloaded, SR3Error, Stopped
from sr3rt.images import Picture, in_8_bits, read
from sr3rt.options import seeds
from sr3rt.refinement import Plan, Task
from sr3rt.saving import encode, holds
from sr3rt.serving.admission import Admission, Place
from sr3rt.serving.batcher import Batcher, Joins
from sr3rt.serving.counts import Counts
from sr3rt.serving.query import Query
from sr3rt.serving.ticket import Ticket
from sr3rt.upscaler import Upscaler

STALLED = 120.0  # seconds without a step, while there is work, after which a service no longer calls itself well

Encoded = bytes | NDArray[np.uint8]
"""A picture as it came: a file's bytes, or (H, W, C) uint8."""


@dataclass(frozen=True)
class Settings:
    """Of a service. slots, slot_pixels: `Batcher`'s. requests, pixels: taken on at a time. joins: "batch" only for comparison."""

    slots: int = 4
    slot_pixels: int = 2**24
    requests: int = 64
    pixels: int = 2**26
    joins: Joins = "step"


@dataclass(frozen=True)
class Reply:
    """A step that was done, or the result. info: step, steps; of a result also seed, sampler, consistency, bundle and times."""

    info: dict[str, Any]
    image: Encoded | None
    final: bool


OnReply = Callable[[Reply | Exception], None]
"""Told each reply, from any thread; the last is a final `Reply` or an exception."""


class Handle:
    """A request that the service has taken on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._ticket: Ticket | None = None

    def cancel(self) -> None:
        """Leave before the next step; the reply is then Cancelled."""
        with self._lock:
            self._cancelled = True
            ticket = self._ticket
        if ticket is not None:
            ticket.cancel()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def end(self) -> None:
        """There is nothing to cancel any more. (Nor a cycle of references, which would keep arrays until the next collection.)"""
        with self._lock:
            self._ticket = None

    def begin(self, ticket: Ticket) -> None:
        """What there is to cancel from now on."""
        with self._lock:
            self._ticket = ticket
            cancelled = self._cancelled
        if cancelled:
            ticket.cancel()


class Service:
    """An `Upscaler` for many at a time. Thread-safe."""

    def __init__(self, upscaler: Upscaler, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._upscaler = upscaler
        self._memory = memory.available() or 0  # of an idle server
        self._admission = Admission(requests=self.settings.requests, pixels=self.settings.pixels)
        self._batcher = Batcher(
            upscaler.network,
            slots=self.settings.slots,
            pixels=self.settings.slot_pixels,
            threads=upscaler.threads,
            joins=self.settings.joins,
        )
        self._pool = ThreadPoolExecutor(max_workers=2 + (os.cpu_count() or 1), thread_name_prefix="sr3rt-pictures")

    def submit(self, image: Encoded, query: Query, on_reply: OnReply, *, progress: bool = False) -> Handle:
        """Take on a request: options, file header and limits are checked before anything is decoded or queued.

        Raises OptionError, ImageError, ImageTooLarge, OptionError, Overloaded, SR3Error, Stopped; what fails later goes to `on_reply`.
        """
        plan = self._upscaler.plan(
            steps=query.steps, sampler=query.sampler, schedule=query.schedule, consistency=query.consistency, tile="off"
        )
        (seed,) = seeds(query.seed, 1)
        if query.base64 and isinstance(image, bytes):
            image = _decoded(image)
        if self._batcher.dead:
            raise Stopped(self._batcher.dead)
        place = self._admission.admit(self._pixels(image, query, len(plan.table), progress=progress))
        try:
            request = _Request(self, image, query, plan, seed, on_reply, place, progress=progress)
            self._pool.submit(request.prepare)
        except RuntimeError:
            place.release()
            raise Stopped("the server is shutting down: ask another") from None
        return request.handle

    def probe(self) -> dict[str, Any]:
        """One step on a small picture where nothing else is done, else whether steps are being done. Raises Stopped, or what failed."""
        if self._batcher.dead:
            raise Stopped(self._batcher.dead)
        still = time.monotonic() - self._batcher.moved
        if self._batcher.busy:
            if still > STALLED:
                raise Stopped(f"no step was done for {still:.0f} s though there is work: restart the server")
        else:
            side = self._upscaler.bundle.manifest.stride
            task = self._upscaler.task(np.zeros((side, side, 3), np.uint8), self._upscaler.plan(steps=1, tile="off"), seed=0)
            self._batcher.submit(task.job).future.result(timeout=STALLED)
        return {"bundle": self._upscaler.bundle.sha256, "backend": self._upscaler.network.backend}

    @property
    def well(self) -> bool:
        """Whether steps can be done."""
        return not self._batcher.dead

    def counts(self) -> Counts:
        """The batcher's figures."""
        return self._batcher.counts()

    def close(self, *, drain: float = 0.0) -> None:
        """Take nothing more; finish what is in hand within `drain` seconds."""
        end = time.monotonic() + drain
        while self._admission.unfinished and time.monotonic() < end and not self._batcher.dead:
            time.sleep(0.01)
        self._batcher.close(drain=max(0.0, end - time.monotonic()))
        self._pool.shutdown()

    def _pixels(self, image: Encoded, query: Query, steps: int, *, progress: bool) -> int:
        """Of the result and of the previews, each of which Triton keeps until the client reads it. Raises ImageError, OptionError."""
        result, limit = self._result_pixels(image), self._admission.pixels
        previews = (steps - 1) // query.previews if progress and query.previews else 0
        if result <= limit < result * (1 + previews):
            raise OptionError(
                f"previews={query.previews} makes {previews} pictures beside the result, each of {result} pixels; this server takes on at "
                f"most {limit} pixels at a time: use a larger number, or 0 for none"
            )
        return result * (1 + previews)

    def _result_pixels(self, image: Encoded) -> int:
        """Of the result, from the header alone. Raises ImageError."""
        if isinstance(image, bytes):
            header = open_header(image, f"the {len(image)} bytes given")
            width, height = header.size
        else:
            if image.ndim != 3 or image.dtype != np.uint8 or 0 in image.shape:
                raise ImageError(f"expected uint8 pixels of shape (height, width, channels), found {image.dtype} {image.shape}")
            height, width, _ = image.shape
        return int(height * width) * self._upscaler.bundle.manifest.scale**2

    def _task(self, image: Encoded, plan: Plan, *, seed: int) -> Task:
        """Raises as `Upscaler.task`; Overloaded where memory would suffice if others had none of it."""
        picture = read(image, limits=self._upscaler.limits)
        try:
            return self._upscaler.task(picture, plan, seed=seed)
        except ImageTooLarge:  # of memory: the limits are passed
            raise self._without_memory(picture) from None

    def _without_memory(self, picture: Picture) -> SR3Error:
        manifest = self._upscaler.bundle.manifest
        needed = self._upscaler.needs(picture.height, picture.width)
        what = f"a {picture.width * manifest.scale}×{picture.height * manifest.scale} result needs about {needed / 2**30:.1f} GiB"
        if needed > self._memory:
            return ImageTooLarge(
                f"{what} with this model, this server has {self._memory / 2**30:.1f} GiB: crop the picture, or ask another"
            )
        return Overloaded(f"{what}, which other requests have now: try again later")


@dataclass(frozen=True, eq=False)
class _Step:
    info: dict[str, Any]
    x0: Floats | None


class _Request:
    """One request on its way: `prepare` on the pool, steps on the batcher's thread, `finish` on the pool."""

    def __init__(
        self, service: Service, image: Encoded, query: Query, plan: Plan, seed: int, on_reply: OnReply, place: Place, *, progress: bool
    ) -> None:
        self.handle = Handle()
        self._service, self._image, self._query, self._plan, self._seed = service, image, query, plan, seed
        self._on_reply, self._place, self._progress = on_reply, place, progress
        self._format = query.format or ("png" if isinstance(image, bytes) else "pixels")
        self._received = time.monotonic()
        self._ticket: Ticket | None = None
        self._told = deque[_Step]()
        self._telling = threading.Lock()  # replies go out one at a time, and none after the last
        self._ended = False

    def prepare(self) -> None:
        """Decode and queue."""
        service, query = self._service, self._query
        try:
            if self.handle.cancelled:
                raise Cancelled("cancelled before it began")
            self._task: Task = service._task(self._image, self._plan, seed=self._seed)
            self._check_format(self._task.picture.mode)
            ticket = service._batcher.submit(
                self._task.job,
                priority=query.priority,
                timeout=None if query.timeout_ms is None else query.timeout_ms / 1000,
                since=self._received,
                on_step=self._on_step if self._progress else None,
            )
        except Exception as error:
            self._end(error)
            return
        self._ticket = ticket
        self.handle.begin(ticket)
        ticket.future.add_done_callback(lambda _: service._pool.submit(self._finish))

    def _check_format(self, mode: str) -> None:
        """Raises ImageError where the answer's format cannot hold a picture of that mode."""
        if self._format != "pixels" and not holds(mode, self._format.upper()):
            fitting = [one for one in ("png", "webp", "jpeg") if holds(mode, one.upper())]
            raise ImageError(f"{self._format} cannot hold a picture of mode {mode}: ask for format {' or '.join([*fitting, 'pixels'])}")

    def _on_step(self, step: int, steps: int, prediction: Callable[[], Floats]) -> None:
        """On the batcher's thread. A preview is left out while the one before has not gone out."""
        wanted = self._query.previews and step % self._query.previews == 0 and all(one.x0 is None for one in list(self._told))
        self._told.append(_Step({"step": step, "steps": steps}, prediction() if wanted else None))
        self._service._pool.submit(self._tell)

    def _tell(self) -> None:
        with self._telling:
            while self._told and not self._ended:
                step = self._told[0]
                image = None if step.x0 is None else self._encoded(self._service._upscaler.picture(self._task, step.x0))
                self._on_reply(Reply(step.info, image, final=False))
                self._told.popleft()

    def _finish(self) -> None:
        ticket = self._ticket
        assert ticket is not None
        try:
            self._tell()
            result = self._service._upscaler.result(self._task, ticket.future.result())
            image = self._encoded(result.image, result.provenance)
        except Exception as error:
            self._end(error.with_traceback(None))  # whose frames hold the ticket, which holds the error
            return
        now = time.monotonic()
        info = {
            "step": result.steps,
            "steps": result.steps,
            "seed": result.seed,
            "sampler": result.sampler,
            "consistency": result.consistency,
            "bundle": result.bundle,
            "queue_ms": round(ticket.waited * 1000, 3),
            "total_ms": round((now - self._received) * 1000, 3),
        }
        self._end(Reply(info, image, final=True))

    def _encoded(self, image: Image.Image | NDArray[np.uint8], provenance: dict[str, str] | None = None) -> Encoded:
        if self._format == "pixels":
            pixels = image if isinstance(image, np.ndarray) else np.asarray(in_8_bits(image))
            return pixels if pixels.ndim == 3 else pixels[..., None]
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        data = encode(image, self._format.upper(), provenance=provenance)
        return base64.b64encode(data) if self._query.base64 else data

    def _end(self, reply: Reply | Exception) -> None:
        self._place.release()
        with self._telling:
            self._ended = True
            self._ticket = None
            self.handle.end()
            self._on_reply(reply)


def _decoded(text: bytes) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"base64 was asked for and the {len(text)} bytes given are none: {error}") from None
