"""Picture in, picture out: an `Upscaler` is a bundle on a backend."""

from __future__ import annotations

import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Unpack, get_args, overload

import numpy as np

from sr3rt import backends, memory
from sr3rt.backends import Floats, Network, Planned, Request, Sized
from sr3rt.bundle import Bundle, Consistency
from sr3rt.consistency import Projection
from sr3rt.engine import Engines, Job, Noise
from sr3rt.errors import Cancelled, ImageTooLarge, NonFiniteError, OptionError
from sr3rt.images import ImageLike, Limits, Picture, check_size, condition, padded, read, restore
from sr3rt.options import OnStep, Options, Tile, gammas, seeds, whole
from sr3rt.refinement import Item, Plan, Preview, Task
from sr3rt.result import Result
from sr3rt.samplers import Sampler, table
from sr3rt.schedule import Schedule, explicit, named, respace, warn_if_noisy_start_is_wrong
from sr3rt.tiles import SIDES, Window, part, pixels, windows

SHIPPED = Path(__file__).parent / "models" / "photo4x"
"""The bundle that `load()` and `upscale()` use when told nothing: 4×, natural photographs."""

_LOOP = 8  # arrays of a result's size that are there while it is made: x, y, out, x0 and what becomes of them


class Upscaler:
    """A bundle on a backend. Immutable and thread-safe: calls share the network and nothing else."""

    def __init__(
        self,
        bundle: Bundle,
        network: Network,
        *,
        threads: int,
        batch: int = 8,
        limits: Limits | None = None,
        exact: Callable[[], Upscaler] | None = None,
    ) -> None:
        """`load` makes one. threads: for the update between network calls. batch: most pictures in one network call.

        exact: makes another, which does again what overflows in this one.
        """
        batch = whole(batch, "batch")
        if batch < 1:
            raise OptionError(f"batch must be at least 1, found {batch}")
        self.bundle, self.network = bundle, network
        self.threads, self.limits, self._batch = threads, limits or Limits(), batch
        self._engines = Engines(network, threads=threads)
        self._exact = exact and cache(exact)

    @property
    def scale(self) -> int:
        """Times that a picture becomes larger, each way."""
        return self.bundle.manifest.scale

    @overload
    def upscale(self, image: ImageLike, **options: Unpack[Options]) -> Any: ...  # first: a str is a sequence of str
    @overload
    def upscale(self, image: Sequence[ImageLike], **options: Unpack[Options]) -> list[Any]: ...
    def upscale(self, image: ImageLike | Sequence[ImageLike], **options: Unpack[Options]) -> Any:
        """The upscaled picture: PIL for a path, bytes or a PIL image, an array of the same dtype for an array; a list for a list.

        Options and errors are those of `run`; a PIL result carries its provenance in `info`.
        """
        results = self.run(image, **options)
        return [r.image for r in results] if isinstance(image, (list, tuple)) else results[0].image

    def run(
        self,
        image: ImageLike | Sequence[ImageLike],
        *,
        steps: int | None = None,
        sampler: str | None = None,
        schedule: str | Sequence[float] | None = None,
        seed: int | Sequence[int] | None = None,
        consistency: Consistency | None = None,
        tile: Tile = "auto",
        on_step: OnStep | None = None,
        noise: Noise | None = None,
    ) -> list[Result]:
        """Upscale one picture or a list (or tuple) of them, of any sizes; what is not given comes from the bundle.

        steps: 1 … the trained T. sampler: "sr3" (the paper's), "posterior", "ddim", "ddim(ETA)" or "dpm++2m".
        schedule: None, the trained one respaced; "n_timestep", the trained kind made anew with `steps`, as the public implementation's
        option of that name does (warns when it ends far from pure noise); or γ values in (0, 1), which also fix the steps.
        seed: 0 … 2**64−1, or one per picture; None draws them. consistency: "off", "final" or "every" (`sr3rt.consistency`).
        tile: "off", the whole picture at once; a number, windows of that side (of the result, pixels), blended where they overlap, which
        bounds memory; "auto", whole where memory suffices (on TensorRT: where its size was built), else windows. `Result` says which.
        on_step: see `OnStep`. noise: replaces the seeded noise, see `sr3rt.engine.Noise`.

        Raises OptionError, ImageError, ImageTooLarge (also when memory does not suffice), NonFiniteError, Cancelled.
        """
        plan = self.plan(steps=steps, sampler=sampler, schedule=schedule, consistency=consistency, tile=tile)
        if on_step is not None and not callable(on_step):
            raise OptionError(f"on_step is {on_step!r}, expected a function of (step, steps, preview)")
        single = not isinstance(image, (list, tuple))
        images: list[Any] = [image] if single else list(image)  # type: ignore[arg-type]
        drawn = seeds(seed, len(images))
        items = [self._item(read(one, limits=self.limits), plan, seed=own, noise=noise) for one, own in zip(images, drawn, strict=True)]
        try:
            self._refine(items, on_step, single=single)
        except NonFiniteError as error:
            if self._exact is None:
                raise
            warnings.warn(f"{error}. All of it is done again in fp32", RuntimeWarning, stacklevel=2)
            return self._exact().run(
                image,
                steps=steps,
                sampler=sampler,
                schedule=schedule,
                seed=drawn[0] if single else drawn,
                consistency=consistency,
                tile=tile,
                on_step=on_step,
                noise=noise,
            )
        return [item.result for item in items]

    def plan(
        self,
        *,
        steps: int | None = None,
        sampler: str | None = None,
        schedule: str | Sequence[float] | None = None,
        consistency: Consistency | None = None,
        tile: Tile = "auto",
    ) -> Plan:
        """The options of `run` that hold for every picture, checked. Raises OptionError."""
        manifest = self.bundle.manifest
        chosen = Sampler.parse(manifest.defaults.sampler if sampler is None else sampler)
        agree: Consistency = manifest.defaults.consistency if consistency is None else consistency
        if agree not in get_args(Consistency):
            raise OptionError(f"unknown consistency {agree!r}: expected one of {', '.join(get_args(Consistency))}")
        if steps is not None:
            steps = whole(steps, "steps")
        kind = schedule if schedule is None or isinstance(schedule, str) else gammas(schedule)
        rows = table(chosen, self._schedule(steps, kind), prediction=manifest.prediction, level=manifest.level)
        return Plan(rows, str(chosen), kind, agree, self._tile(tile))

    def task(self, image: ImageLike, plan: Plan, *, seed: int) -> Task:
        """The picture read and made ready. Raises ImageError, ImageTooLarge (also when memory does not suffice)."""
        picture = read(image, limits=self.limits)
        return self._ready(picture, plan, self._side(picture.height, picture.width, plan.tile), seed=seed, noise=None)

    def check(self, height: int, width: int, plan: Plan) -> None:
        """Raises ImageTooLarge where a picture of that size is over the limits, or refining it over what memory there is."""
        check_size(height, width, f"a picture for {self.bundle.manifest.name}", self.limits)
        self._side(height, width, plan.tile)

    def needs(self, height: int, width: int) -> int:
        """Bytes of memory that refining a picture of that size whole takes. Raises ImageError for a size that the network cannot do."""
        scale, stride = self.bundle.manifest.scale, self.bundle.manifest.stride
        return self._bytes(*(padded(length, scale=scale, stride=stride) * scale for length in (height, width)))

    def _item(self, picture: Picture, plan: Plan, *, seed: int, noise: Noise | None) -> Item:
        """A picture of a call, which can be done: raises as `task`."""
        side = self._side(picture.height, picture.width, plan.tile)
        (height, width), found = self._cut(picture, side)
        if found:
            height, width = found[0].height, found[0].width
        return Item(
            plan,
            (self.bundle.manifest.channels, height, width),
            max(1, len(found)),
            ready=lambda: self._ready(picture, plan, side, seed=seed, noise=noise),
            show=self.picture,
            finish=self.result,
        )

    def _ready(self, picture: Picture, plan: Plan, side: int | None, *, seed: int, noise: Noise | None) -> Task:
        manifest = self.bundle.manifest
        made = condition(picture, scale=manifest.scale, stride=manifest.stride, minimum=self._minimum(side))
        job = Job(made.x, plan.table, seed, noise)
        if plan.consistency != "off":
            projection = Projection(picture.height, picture.width, manifest.scale)
            lr = made.lr[:, : picture.height, : picture.width]
            job = Job(made.x, plan.table, seed, noise, plan.consistency, lr, projection)
        _, found = self._cut(picture, side)
        if not found:
            return Task(picture, job, plan)
        return Task(picture, job, plan, side, tuple((window, part(job, window, scale=manifest.scale)) for window in found))

    def _cut(self, picture: Picture, side: int | None) -> tuple[tuple[int, int], list[Window]]:
        """Height and width of the padded result, and its windows of that side; none, where it is refined whole."""
        scale, stride, least = self.bundle.manifest.scale, self.bundle.manifest.stride, self._minimum(side)
        height, width = (padded(n, scale=scale, stride=stride, minimum=least) * scale for n in (picture.height, picture.width))
        found = windows(height, width, side=side, unit=math.lcm(scale, stride)) if side else []
        return (height, width), found if len(found) > 1 else []

    def _minimum(self, side: int | None) -> int | None:
        """The least side of the padded result: a window's, where the network can do no other size."""
        return side if self._sizes() else None

    def picture(self, task: Task, y0: Floats) -> Any:
        """A prediction of the task's network, float32 (C, H, W) in [-1, 1], as a picture of the kind that came in."""
        return restore(task.picture, y0, scale=self.bundle.manifest.scale)

    def result(self, task: Task, y0: Floats) -> Result:
        """What `run` gives for a task that is done; a PIL image carries its provenance."""
        plan = task.plan
        result = Result(
            image=self.picture(task, y0),
            seed=task.job.seed,
            steps=len(plan.table),
            sampler=plan.sampler,
            schedule=plan.schedule,
            consistency=plan.consistency,
            tile=task.tile or "off",
            bundle=self.bundle.sha256,
            precision=self.network.precision,
        )
        if hasattr(result.image, "info"):
            result.image.info.update(result.provenance)
        return result

    def _schedule(self, steps: int | None, kind: str | tuple[float, ...] | None) -> Schedule:
        manifest = self.bundle.manifest
        spec, trained = manifest.trained, manifest.trained.schedule()
        count = manifest.defaults.steps if steps is None else steps
        if steps is not None and not 1 <= steps <= len(trained):
            raise OptionError(f"steps must be between 1 and the {len(trained)} that the network was trained with, found {steps}")
        if kind is None:
            own = manifest.defaults.schedule.schedule() if manifest.defaults.schedule else None
            return own if own is not None and steps in (None, len(own)) else respace(trained, count)
        if kind == "n_timestep":
            base = manifest.defaults.schedule or spec
            if base.kind == "gammas":
                raise OptionError(
                    "schedule 'n_timestep' needs a named trained schedule; this bundle's is a list of gammas: use steps alone"
                )
            schedule = named(base.kind, count, base.start, base.end)
        elif isinstance(kind, str):
            raise OptionError(f"unknown schedule {kind!r}: expected None (the trained one respaced), 'n_timestep' or a list of gammas")
        else:
            schedule = explicit(kind, trained)
            if steps not in (None, len(schedule)):
                raise OptionError(f"schedule has {len(schedule)} gammas and steps is {steps}: leave steps out")
        warn_if_noisy_start_is_wrong(schedule, trained)
        return schedule

    def _sizes(self) -> list[tuple[int, int]]:
        """The only sizes that the network can do, (height, width); empty where it can do any."""
        return self.network.sizes() if isinstance(self.network, Sized) else []

    def _tile(self, tile: Tile) -> Tile:
        """Raises OptionError for one that windows cannot have."""
        if tile in ("auto", "off"):
            return tile
        unit = math.lcm(self.bundle.manifest.scale, self.bundle.manifest.stride)
        expected = f"auto, off or a multiple of {unit} from {2 * unit} on"
        side = whole(tile, "tile", expected)
        if side < 2 * unit or side % unit:
            raise OptionError(f"tile must be {expected}, found {side}")
        return side

    def _side(self, rows: int, columns: int, tile: Tile) -> int | None:
        """Side of the windows for a picture of that size, None for the whole. Raises ImageError, ImageTooLarge."""
        scale, stride, available = self.bundle.manifest.scale, self.bundle.manifest.stride, memory.available()
        unit, sizes = math.lcm(scale, stride), self._sizes()
        height, width = (padded(length, scale=scale, stride=stride) * scale for length in (rows, columns))
        sides = [tile] if isinstance(tile, int) else []
        if tile == "auto":  # those that have the least to do come first
            known = sorted({one for one, other in sizes if one == other}, reverse=True) if sizes else SIDES
            sides = sorted((one for one in known if one % unit == 0), key=lambda one: pixels(height, width, side=one, unit=unit))
        choices: list[int | None] = [one for one in sides if sizes or one < max(height, width)]
        if not choices or (not isinstance(tile, int) and (not sizes or (height, width) in sizes)):
            choices.insert(0, None)
        needed = [self._needed(height, width, choice) for choice in choices]
        for choice, size in zip(choices, needed, strict=True):
            if available is None or size <= available:
                return choice
        raise ImageTooLarge(
            f"a {columns * scale}×{rows * scale} result needs about {needed[-1] / 2**30:.1f} GiB with this model, "
            f"{(available or 0) / 2**30:.1f} GiB are available: {'use tile=auto, ' if tile == 'off' else ''}crop the picture, or use a "
            "machine with more memory"
        )

    def _needed(self, height: int, width: int, side: int | None) -> int:
        """Memory for one picture of that padded size, refined whole or in windows. Raises ImageError for a size that cannot be done."""
        if side is None:
            return self._bytes(height, width)
        canvas = _LOOP * self.bundle.manifest.channels * np.dtype(np.float32).itemsize * height * width
        return canvas + (self._bytes(side, side) if self._sizes() else self._bytes(min(side, height), min(side, width)))

    def _bytes(self, height: int, width: int) -> int:
        """Memory for one picture of that padded output size: activations, the loop's arrays, and the scores of the finest attention."""
        manifest, pixels, single = self.bundle.manifest, height * width, np.dtype(np.float32).itemsize
        loop = _LOOP * manifest.channels * single * pixels
        if isinstance(self.network, Planned):
            return loop + self.network.memory(1, height, width)
        tokens = pixels // manifest.attention_stride**2 if manifest.attention_stride else 0
        return loop + pixels * manifest.bytes_per_pixel + 2 * single * tokens**2

    def _refine(self, items: list[Item], on_step: OnStep | None, *, single: bool) -> None:
        """Bring every picture to its end. Jobs of one size share an engine; the next joins when one is done."""
        sizes: dict[tuple[int, int, int], list[Item]] = {}
        for item in items:
            sizes.setdefault(item.shape, []).append(item)
        total, done = sum(item.steps for item in items), 0
        # Of windows, one at a time: they are to save memory.
        batch = 1 if all(item.count > 1 for item in items) and not self._sizes() else self._batch
        for (channels, height, width), waiting in sizes.items():
            fits = max(1, (memory.available() or 2**62) // self._bytes(height, width))
            capacity = min(sum(item.count for item in waiting), batch, fits)
            with self._engines.using(capacity=capacity, channels=channels, height=height, width=width) as engine:
                queue, running, coming = deque[Job](), set[Job](), deque(waiting)
                while True:
                    while engine.free and (queue or coming):
                        if not queue:
                            queue.extend(coming.popleft().begin())
                        job = queue.popleft()
                        engine.join(job)
                        running.add(job)
                    if not engine.busy:
                        break
                    done += engine.busy
                    for ended in engine.step():
                        running.remove(ended.job)
                        for item in waiting:
                            item.take(ended)
                    if on_step is None:
                        continue
                    preview = Preview(items, engine, running, single=single)
                    going = on_step(done, total, preview)
                    preview.end()
                    if isinstance(going, bool | np.bool_) and not going:
                        raise Cancelled(f"cancelled by on_step after {done} of {total} steps")


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    backend: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    threads: int = 0,
    batch: int = 8,
    limits: Limits | None = None,
    rerun: bool = False,
) -> Upscaler:
    """Open a bundle (None: the one that ships) on a backend.

    backend: "auto", "tensorrt" (a GPU, and a bundle with engines), "native" (sr3rt's own engine; needs AVX2), "onnxruntime" (on a GPU:
    onnxruntime-gpu, without engines), or "torch" (a GPU, without engines); "auto" takes these two there only for device="cuda".
    precision: "auto", "fp32", "fp16" (of a GPU; slow on a CPU, by onnxruntime) or "bf16" (torch's, and native's on processors with
    AVX512-BF16, where "auto" takes it if the bundle's own figures for it are within their limits). device: "auto", "cpu", "cuda" or
    "cuda:1", the second GPU.
    threads: 0, one for each core that this process may use. batch: most pictures in one network call. limits: of the pictures taken
    (`sr3rt.images.Limits`). rerun: where a step overflows in less than fp32, do it all again in fp32, with a RuntimeWarning; else, and in
    fp32, that is a NonFiniteError.

    Raises BundleNotFound, BundleCorrupt, BundleIncompatible, EngineRefused, OptionError, BackendError, MissingExtra.
    """
    bundle = Bundle.open(SHIPPED if model is None else model)
    request = Request(backend, precision, device, threads)
    network = backends.load(bundle, request)

    def exact() -> Upscaler:
        return load(model, precision="fp32", device=network.device, threads=threads, batch=batch, limits=limits)

    again = exact if rerun and network.precision != "fp32" else None
    return Upscaler(bundle, network, threads=request.thread_count, batch=batch, limits=limits, exact=again)
