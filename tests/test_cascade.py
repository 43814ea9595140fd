"""Models in a row, with networks of a few lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_upscaler import MANIFEST, PHOTO, upscaler

import sr3rt
from sr3rt import Cascade


@pytest.fixture
def photo() -> Image.Image:
    return Image.open(PHOTO).crop((0, 0, 11, 9))


@pytest.fixture
def cascade() -> Cascade:
    return Cascade(upscaler(), upscaler(replace(MANIFEST, scale=2, defaults=replace(MANIFEST.defaults, steps=3, sampler="posterior"))))


def test_each_stage_takes_what_the_one_before_made(cascade: Cascade, photo: Image.Image) -> None:
    (result,) = cascade.run(photo, seed=5)
    first, second = cascade.stages
    middle = first.upscale(photo, seed=5)
    assert cascade.scale == 8 and result.image.size == (88, 72)
    assert (np.asarray(result.image) == np.asarray(second.upscale(middle, seed=6))).all()
    assert result.before is not None and result.before.image == middle and result.before.before is None
    assert (result.steps, result.sampler, result.before.steps, result.before.sampler) == (3, "posterior", 5, "ddim")


def test_a_list_and_every_kind_of_picture(cascade: Cascade, photo: Image.Image) -> None:
    alone = cascade.upscale(photo, seed=2)
    pictures = cascade.upscale([photo, np.asarray(photo), photo.convert("L")], seed=[2, 2, 9])
    assert pictures[0] == alone and (pictures[1] == np.asarray(alone)).all() and pictures[1].dtype == np.uint8
    assert pictures[2].mode == "L" and pictures[2].size == (88, 72)


def test_one_seed_makes_the_whole_of_it_again(cascade: Cascade, photo: Image.Image) -> None:
    (drawn,) = cascade.run(photo)
    assert drawn.before is not None and drawn.before.seed == drawn.seed
    assert cascade.upscale(photo, seed=drawn.seed) == drawn.image
    assert cascade.upscale(photo, seed=2**64 - 1).size == (88, 72)


def test_the_file_tells_of_every_stage(cascade: Cascade, photo: Image.Image) -> None:
    picture = cascade.upscale(photo, seed=3)
    told = {name: text for name, text in picture.info.items() if name.startswith("sr3rt:")}
    assert told["sr3rt:seed"] == told["sr3rt:before:seed"] == "3"
    assert (told["sr3rt:steps"], told["sr3rt:before:steps"]) == ("3", "5")


def test_steps_of_each_stage_or_of_all(cascade: Cascade, photo: Image.Image) -> None:
    for steps, expected in ((4, (4, 4)), ([2, 7], (2, 7)), ((2, None), (2, 3))):
        (result,) = cascade.run(photo, steps=steps)  # type: ignore[arg-type]
        assert result.before is not None and (result.before.steps, result.steps) == expected


def test_progress_counts_over_all_stages(cascade: Cascade, photo: Image.Image) -> None:
    seen: list[tuple[int, int]] = []
    sizes: list[tuple[int, int]] = []

    def on_step(step: int, steps: int, preview: Callable[[], Any]) -> None:
        seen.append((step, steps))
        sizes.append(preview().size)

    cascade.upscale(photo, on_step=on_step)
    assert seen == [(i, 8) for i in range(1, 9)]
    assert sizes == [(44, 36)] * 5 + [(88, 72)] * 3


def test_what_a_later_stage_would_refuse_is_refused_before_any_step(photo: Image.Image) -> None:
    small, coarse = upscaler(limits=sr3rt.Limits(pixels=1000)), upscaler(replace(MANIFEST, stride=32))
    steps: list[int] = []

    def on_step(step: int, steps_: int, preview: Callable[[], Any]) -> None:
        steps.append(step)

    with pytest.raises(sr3rt.ImageTooLarge, match="44×36 = 1584 pixels"):
        Cascade(upscaler(), small).upscale(photo, on_step=on_step)
    with pytest.raises(sr3rt.OptionError, match="a multiple of 32 from 64 on, found 48"):
        Cascade(upscaler(), coarse).upscale(photo, tile=48, on_step=on_step)
    assert steps == []


def test_cancelled_in_the_second_stage(cascade: Cascade, photo: Image.Image) -> None:
    with pytest.raises(sr3rt.Cancelled):
        cascade.upscale(photo, on_step=lambda step, steps, preview: step < 6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": [1, 2, 3]}, "3 numbers of steps for 2 models: give one, or one for each"),
        ({"steps": [1, 0]}, "steps must be between 1 and"),
        ({"sampler": "euler"}, "unknown sampler 'euler'"),
        ({"seed": [1, 2]}, "2 seeds for 1 pictures"),
    ],
)
def test_a_wrong_option_is_told_before_any_step(cascade: Cascade, photo: Image.Image, options: dict[str, Any], words: str) -> None:
    steps: list[int] = []
    with pytest.raises(sr3rt.OptionError, match=words):
        cascade.upscale(photo, on_step=lambda step, *_: steps.append(step), **options)
    assert not steps


def test_what_cannot_be_a_cascade() -> None:
    with pytest.raises(sr3rt.OptionError, match=r"a cascade is of models, found 'b8': give what sr3rt\.load\(…\) returns"):
        sr3rt.Cascade("b8")  # type: ignore[arg-type]
    with pytest.raises(sr3rt.OptionError, match=r"a cascade is of models .*, found no models"):
        Cascade()
    with pytest.raises(sr3rt.OptionError, match="found test has 3, test has 1"):
        Cascade(upscaler(), upscaler(replace(MANIFEST, channels=1)))
