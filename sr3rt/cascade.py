"""Models in a row: 64→256→1024 by a 64→256 and a 256→1024 one, as SR3's authors go to large pictures (arXiv 2104.07636)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Unpack, overload

from sr3rt.bundle import Consistency
from sr3rt.errors import OptionError
from sr3rt.images import ImageLike, Limits, read
from sr3rt.options import CascadeOptions, Method, OnStep, Tile, seeds
from sr3rt.refinement import Plan
from sr3rt.result import Result
from sr3rt.upscaler import Upscaler


class Cascade:
    """Upscalers in a row, each taking the picture that the one before made; used as one is. Immutable and thread-safe.

    up = sr3rt.Cascade(sr3rt.load("64to256/"), sr3rt.load("256to1024/"))
    """

    def __init__(self, *stages: Upscaler) -> None:
        """Raises OptionError where there are none, or others than models, or their pictures have different numbers of channels."""
        for stage in stages:
            if not isinstance(stage, Upscaler):
                raise OptionError(f"a cascade is of models, found {stage!r}: give what sr3rt.load(…) returns")
        if len({stage.bundle.manifest.channels for stage in stages}) != 1:
            found = ", ".join(f"{stage.bundle.path} has {stage.bundle.manifest.channels}" for stage in stages) or "no models"
            raise OptionError(f"a cascade is of models whose pictures have as many channels, found {found}")
        self.stages = stages

    @property
    def scale(self) -> int:
        """Times that a picture becomes larger, each way."""
        return prod(stage.scale for stage in self.stages)

    @property
    def limits(self) -> Limits:
        """Of the pictures taken."""
        return self.stages[0].limits

    @overload
    def upscale(self, image: ImageLike, **options: Unpack[CascadeOptions]) -> Any: ...  # first: a str is a sequence of str
    @overload
    def upscale(self, image: Sequence[ImageLike], **options: Unpack[CascadeOptions]) -> list[Any]: ...
    def upscale(self, image: ImageLike | Sequence[ImageLike], **options: Unpack[CascadeOptions]) -> Any:
        """As `Upscaler.upscale`; options and errors are those of `run`."""
        results = self.run(image, **options)
        return [r.image for r in results] if isinstance(image, (list, tuple)) else results[0].image

    def run(
        self,
        image: ImageLike | Sequence[ImageLike],
        *,
        steps: int | Sequence[int | None] | None = None,
        sampler: str | None = None,
        schedule: str | Sequence[float] | None = None,
        seed: int | Sequence[int] | None = None,
        consistency: Consistency | None = None,
        tile: Tile = "auto",
        on_step: OnStep | None = None,
    ) -> list[Result]:
        """As `Upscaler.run`, through every stage; what an option says holds for all of them, what is not given comes from each bundle.

        steps: one number, or one for each stage. seed: stage k, from 0, draws its noise from seed + k, as stages must not share it.
        on_step: over all stages; the steps of one that is refined in windows are known when it begins. `preview()` is the stage's.
        `Result` is the last stage's, and its `before` the one before.

        Raises what `Upscaler.run` does; of every stage, what can be known of options and sizes is checked before any step.
        """
        method: Method = {"sampler": sampler, "schedule": schedule, "consistency": consistency}
        each, plans = self._each(steps), self.plans(steps=steps, **method, tile=tile)
        single = not isinstance(image, (list, tuple))
        drawn = seeds(seed, 1 if single else len(image))  # type: ignore[arg-type]
        images: list[Any] = [image] if single else list(image)  # type: ignore[arg-type]
        pictures = [read(one, limits=self.limits) for one in images]
        for picture in pictures:
            height, width = picture.height, picture.width
            for stage, plan in zip(self.stages, plans, strict=True):
                stage.check(height, width, plan)
                height, width = height * stage.scale, width * stage.scale
        progress = _Progress(on_step, [len(plan.table) * len(drawn) for plan in plans])
        given: Any = pictures[0] if single else pictures
        results: list[Result] = []
        for k, (stage, count) in enumerate(zip(self.stages, each, strict=True)):
            own = [(one + k) % 2**64 for one in drawn]
            made = stage.run(given, steps=count, **method, seed=own[0] if single else own, tile=tile, on_step=progress.stage(k))
            before: list[Any] = results or [None] * len(made)
            results = [replace(one, seed=first, before=last) for one, first, last in zip(made, drawn, before, strict=True)]
            given = results[0].image if single else [one.image for one in results]
        for result in results:
            if hasattr(result.image, "info"):
                result.image.info.update(result.provenance)
        return results

    def plans(
        self,
        *,
        steps: int | Sequence[int | None] | None = None,
        sampler: str | None = None,
        schedule: str | Sequence[float] | None = None,
        consistency: Consistency | None = None,
        tile: Tile = "auto",
    ) -> list[Plan]:
        """The options of `run` that hold for every picture, checked, for each stage. Raises OptionError."""
        method: Method = {"sampler": sampler, "schedule": schedule, "consistency": consistency}
        return [stage.plan(steps=count, **method, tile=tile) for stage, count in zip(self.stages, self._each(steps), strict=True)]

    def _each(self, steps: int | Sequence[int | None] | None) -> list[int | None]:
        """Each stage's."""
        each: list[int | None] = list(steps) if isinstance(steps, Sequence) else [steps] * len(self.stages)
        if len(each) != len(self.stages):
            raise OptionError(f"{len(each)} numbers of steps for {len(self.stages)} models: give one, or one for each")
        return each


class _Progress:
    """Of all stages together. steps: how many each is expected to have."""

    def __init__(self, on_step: OnStep | None, steps: list[int]) -> None:
        self._on_step, self._steps = on_step, steps

    def stage(self, k: int) -> OnStep | None:
        """For that stage's run."""
        if self._on_step is None:
            return None

        on_step, all_steps = self._on_step, self._steps

        def told(step: int, steps: int, preview: Callable[[], Any]) -> bool | None:
            all_steps[k] = steps
            return on_step(sum(all_steps[:k]) + step, sum(all_steps), preview)

        return told
