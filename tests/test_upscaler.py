"""Picture in, picture out, with a network of a few lines; the shipped model's own tests are in test_shipped.py."""

from __future__ import annotations

import io
import os
import pickle
import signal
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arithmetic import Arithmetic
from PIL import Image

import sr3rt
from sr3rt import memory
from sr3rt.bundle import Bundle, Defaults, Manifest
from sr3rt.images import Limits
from sr3rt.schedule import ScheduleSpec, ScheduleWarning
from sr3rt.upscaler import Upscaler

PHOTO = Path(__file__).parent / "data" / "kodim23_crop.png"
MANIFEST = Manifest(
    name="test",
    architecture="arithmetic",
    parameters=0,
    channels=3,
    scale=4,
    stride=16,
    prediction="x0",
    level="sqrt_gamma",
    trained=ScheduleSpec("linear", 2000, 1e-6, 1e-2),
    defaults=Defaults(5, "ddim", "final"),
)


def upscaler(manifest: Manifest = MANIFEST, **options: Any) -> Upscaler:
    return Upscaler(Bundle(Path("test"), manifest, "ab" * 32), Arithmetic(), threads=1, **options)


@pytest.fixture
def up() -> Upscaler:
    return upscaler()


@pytest.fixture
def photo() -> Image.Image:
    return Image.open(PHOTO).crop((0, 0, 23, 17))


def test_kinds_of_input_give_the_matching_kind_of_output(up: Upscaler, photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "in.png")
    encoded = (tmp_path / "in.png").read_bytes()
    pixels = np.asarray(photo)
    results = [up.upscale(image, seed=1) for image in (photo, tmp_path / "in.png", str(tmp_path / "in.png"), encoded, pixels)]
    assert all(isinstance(image, Image.Image) for image in results[:4])
    assert isinstance(results[4], np.ndarray)
    assert results[4].dtype == np.uint8
    for image in results:
        assert np.asarray(image).shape == (68, 92, 3)
        assert (np.asarray(image) == results[4]).all()
    assert up.upscale(pixels[..., 0], seed=1).shape == (68, 92)
    assert up.upscale(pixels.astype(np.float32) / 255, seed=1).dtype == np.float32


def test_a_list_of_different_sizes_comes_back_in_order(up: Upscaler, photo: Image.Image) -> None:
    pictures = [photo, photo.resize((8, 8)), photo.resize((23, 17)), photo.resize((1, 1))]
    results = up.upscale(pictures, seed=[3, 4, 5, 6])
    assert [r.size for r in results] == [(92, 68), (32, 32), (92, 68), (4, 4)]
    for picture, seed, result in zip(pictures, (3, 4, 5, 6), results, strict=True):
        assert (np.asarray(up.upscale(picture, seed=seed)) == np.asarray(result)).all()
    assert up.upscale([]) == []


@pytest.mark.parametrize("seed", [np.array(7), np.uint64(7), [7], (7,), range(7, 8), np.array([7])])
def test_seeds_of_every_kind(up: Upscaler, photo: Image.Image, seed: Any) -> None:
    (result,) = up.run(photo, seed=seed)
    assert result.seed == 7 and type(result.seed) is int


def test_a_batch_larger_than_the_slots_is_worked_off(photo: Image.Image) -> None:
    small = upscaler(batch=2)
    results = small.upscale([photo] * 5, seed=[0, 1, 2, 3, 4])
    assert (np.asarray(results[4]) == np.asarray(upscaler().upscale(photo, seed=4))).all()
    assert (np.asarray(results[4]) != np.asarray(results[3])).any()


def test_defaults_come_from_the_bundle_and_the_run_is_recorded(up: Upscaler, photo: Image.Image) -> None:
    (result,) = up.run(photo)
    assert (result.steps, result.sampler, result.consistency) == (5, "ddim", "final")
    again = up.upscale(photo, seed=result.seed)
    assert (np.asarray(again) == np.asarray(result.image)).all()
    assert result.image.info["sr3rt:seed"] == str(result.seed)
    assert result.provenance["sr3rt:bundle"] == "ab" * 32


def test_unseeded_runs_differ(up: Upscaler, photo: Image.Image) -> None:
    first, second = up.run([photo, photo])
    assert first.seed != second.seed


def test_options_change_the_result_and_are_recorded(up: Upscaler, photo: Image.Image) -> None:
    base = np.asarray(up.upscale(photo, seed=0))
    for options in ({"steps": 9}, {"sampler": "sr3"}, {"consistency": "off"}, {"schedule": [0.9, 0.5, 0.01, 1e-4]}):
        (result,) = up.run(photo, seed=0, **options)  # type: ignore[arg-type]
        assert (np.asarray(result.image) != base).any()
    assert result.steps == 4


def test_on_step_sees_every_step_and_a_preview_in_the_callers_kind(up: Upscaler, photo: Image.Image) -> None:
    seen = []

    def on_step(step: int, steps: int, preview: Any) -> None:
        seen.append((step, steps, preview()))

    final = up.upscale(photo, seed=0, on_step=on_step)
    assert [(step, steps) for step, steps, _ in seen] == [(k, 5) for k in range(1, 6)]
    assert all(preview.size == (92, 68) for _, _, preview in seen)
    assert (np.asarray(seen[-1][2]) == np.asarray(final)).all()


def test_previews_of_a_list(photo: Image.Image) -> None:
    seen = []
    upscaler(batch=1).upscale([photo, photo], seed=0, on_step=lambda step, steps, preview: seen.append((step, steps, preview())))  # type: ignore[arg-type, return-value]
    assert [(step, steps) for step, steps, _ in seen] == [(k, 10) for k in range(1, 11)]
    assert seen[0][2][1] is None
    assert all(image is not None for image in seen[-1][2])


def test_a_preview_is_of_its_step_and_cannot_be_had_later(up: Upscaler, photo: Image.Image) -> None:
    kept: list[Any] = []
    up.upscale(photo, on_step=lambda step, steps, preview: kept.append(preview))  # type: ignore[arg-type, return-value]
    with pytest.raises(sr3rt.OptionError, match="call it within on_step"):
        kept[0]()


def test_a_picture_takes_memory_only_while_it_is_refined(photo: Image.Image) -> None:
    """Of a long list, what the network is given of every picture at once would be more than all else."""
    pictures, peaks = [np.asarray(photo.resize((40, 40)))] * 50, []
    for count in (10, 50):
        tracemalloc.start()
        upscaler(batch=2).upscale(pictures[:count], steps=1, on_step=lambda *_: None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    results, condition = 40 * 160 * 160 * 3, 40 * 160 * 160 * 3 * 4
    assert peaks[1] - peaks[0] < results + condition / 4


def test_on_step_false_cancels(up: Upscaler, photo: Image.Image) -> None:
    with pytest.raises(sr3rt.Cancelled, match="after 2 of 5 steps"):
        up.upscale(photo, on_step=lambda step, steps, preview: step < 2)


def test_two_threads_on_one_upscaler_give_what_each_alone_gives(up: Upscaler, photo: Image.Image) -> None:
    alone = [np.asarray(up.upscale(photo, seed=seed, steps=40)) for seed in (0, 1)]
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda s=seed: found.update({s: np.asarray(up.upscale(photo, seed=s, steps=40))})) for seed in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((found[seed] == alone[seed]).all() for seed in (0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be between 1 and the 2000 .* found 0"),
        ({"steps": 2001}, "found 2001"),
        ({"sampler": "euler"}, "unknown sampler 'euler'"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": 2**64}, "seed must be a whole number"),
        ({"seed": [1, 2]}, "2 seeds for 1 pictures"),
        ({"seed": "7"}, "seed must be a whole number, found '7'"),
        ({"steps": 10**10, "schedule": "n_timestep"}, "steps must be between 1 and the 2000 .* found 10000000000"),
        ({"schedule": []}, r"gammas between 0 and 1, at least one, found \[\]"),
        ({"noise": lambda step: np.zeros((3, 68, 92))}, r"noise must give float32 of \(3, 80, 96\), .* found float64 \(3, 68, 92\)"),
        ({"consistency": "sometimes"}, "unknown consistency 'sometimes'"),
        ({"tile": 100}, "tile must be auto, off or a multiple of"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine'"),
        ({"schedule": [0.5, 0.1], "steps": 3}, "2 gammas and steps is 3"),
    ],
)
def test_unusable_options_are_refused(up: Upscaler, photo: Image.Image, options: dict[str, Any], message: str) -> None:
    with pytest.raises(sr3rt.OptionError, match=message):
        up.upscale(photo, **options)


def test_n_timestep_makes_the_named_schedule_anew_and_warns(up: Upscaler, photo: Image.Image) -> None:
    with pytest.warns(ScheduleWarning, match=r"gamma_T = 0\.605"):
        (result,) = up.run(photo, steps=100, schedule="n_timestep", seed=0)
    assert result.steps == 100
    listed = upscaler(Manifest(**{**MANIFEST.__dict__, "trained": ScheduleSpec("gammas", gammas=(0.9, 0.001))}))
    with pytest.raises(sr3rt.OptionError, match="needs a named trained schedule"):
        listed.upscale(photo, steps=2, schedule="n_timestep")


def test_pictures_over_the_limits_are_refused(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(sr3rt.ImageTooLarge, match="100"):
        upscaler(limits=Limits(pixels=100)).upscale(photo)
    monkeypatch.setattr(memory, "available", lambda: 100_000)
    with pytest.raises(sr3rt.ImageTooLarge, match=r"a 92×68 result needs about .* GiB .* available"):
        upscaler().upscale(photo)


def test_attention_counts_towards_memory(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 100 * 2**20)
    upscaler().upscale(photo)
    with pytest.raises(sr3rt.ImageTooLarge):
        upscaler(Manifest(**{**MANIFEST.__dict__, "attention_stride": 1})).upscale(photo)


def test_what_is_no_picture_is_an_image_error(up: Upscaler, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    for bad in (tmp_path / "text.png", tmp_path / "missing.png", b"", 7):
        with pytest.raises(sr3rt.ImageError):
            up.upscale(bad)  # type: ignore[call-overload]


def test_alpha_and_grey_come_through(up: Upscaler, photo: Image.Image) -> None:
    alpha = photo.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(photo.size))
    assert up.upscale(alpha).mode == "RGBA"
    assert up.upscale(photo.convert("L")).mode == "L"
    buffer = io.BytesIO()
    photo.convert("L").save(buffer, "JPEG")
    assert up.upscale(buffer.getvalue()).mode == "L"


def test_unknown_backends_precisions_and_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(sr3rt.BundleNotFound, match="expected a folder"):
        sr3rt.load(tmp_path)
    with pytest.raises(sr3rt.OptionError, match="unknown backend 'magic': expected auto, tensorrt, native, onnxruntime"):
        sr3rt.load(backend="magic")
    with pytest.raises(sr3rt.OptionError, match="unknown precision 'fp8': expected auto, fp32, fp16, bf16"):
        sr3rt.load(precision="fp8")
    with pytest.raises(sr3rt.BackendError, match="precision 'fp8' was asked for"):
        sr3rt.load(backend="native", precision="fp8")
    with pytest.raises(sr3rt.BackendError, match="has no network in fp16: make it with"):
        sr3rt.load(precision="fp16")
    with pytest.raises(sr3rt.BackendError, match="device 'cuda' was asked for"):
        sr3rt.load(device="cuda")


def test_what_is_no_function_is_refused_before_the_first_step() -> None:
    with pytest.raises(sr3rt.OptionError, match=r"on_step is 5, expected a function of \(step, steps, preview\)"):
        sr3rt.upscale(np.zeros((4, 4, 3), np.uint8), on_step=5)  # type: ignore[arg-type]


# --- what callers give


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 2.5}, "steps must be a whole number, found 2.5"),
        ({"steps": "4"}, "steps must be a whole number, found '4'"),
        ({"seed": "7"}, "seed must be a whole number, found '7'"),
        ({"seed": 1.5}, "seed must be a whole number, found 1.5"),
        ({"seed": [None]}, "seed must be a whole number, found None"),
        ({"sampler": 5}, "unknown sampler"),
        ({"schedule": ["a"]}, "schedule must be None, 'n_timestep' or gammas"),
        ({"schedule": 3}, "schedule must be None, 'n_timestep' or gammas"),
        ({"consistency": False}, "unknown consistency False"),
    ],
)
def test_what_is_no_option_is_said(photo: Image.Image, options: dict[str, Any], words: str) -> None:
    with pytest.raises(sr3rt.OptionError, match=words):
        upscaler().upscale(photo, **options)


@pytest.mark.parametrize("values", [(0.9, 0.5, 0.05), np.array([0.9, 0.5, 0.05]), iter([0.9, 0.5, 0.05])])
def test_numbers_of_numpy_and_any_list_are_taken(photo: Image.Image, values: Any) -> None:
    expected = upscaler().upscale([photo], schedule=[0.9, 0.5, 0.05], seed=[3], tile="off")
    assert upscaler().upscale([photo], schedule=values, seed=np.array([3])) == expected
    with pytest.raises(sr3rt.Cancelled):
        upscaler().upscale(photo, steps=np.int64(3), on_step=lambda step, steps, preview: np.False_)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("options", [{}, {"steps": 3}, {"schedule": "n_timestep", "steps": 200}, {"schedule": [0.9, 0.3]}])
def test_a_result_tells_how_to_make_it_again(photo: Image.Image, options: dict[str, Any]) -> None:
    up = sr3rt.load()
    if options.get("schedule") == "n_timestep":
        up = upscaler()
    (first,) = up.run(photo.resize((8, 8)), **options)
    names = ("seed", "steps", "sampler", "schedule", "consistency", "tile")
    (again,) = up.run(photo.resize((8, 8)), **{name: getattr(first, name) for name in names})
    assert again.image == first.image
    assert ("sr3rt:schedule" in first.provenance) == ("schedule" in options)


def test_errors_travel_between_processes() -> None:
    for error in (sr3rt.MissingExtra("this", "that", "extra"), sr3rt.OptionError("no")):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy)) == (type(error), str(error))


def test_the_first_calls_of_many_threads_load_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sr3rt import api as module

    loads = []
    monkeypatch.setattr(module, "load", lambda *of, **options: loads.append(of) or upscaler())
    module._loaded.cache_clear()
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: sr3rt.upscale(np.zeros((8, 8, 3), np.uint8), seed=i, steps=1), range(6)))
    module._loaded.cache_clear()
    assert len(loads) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_forked_while_a_model_is_loaded_can_load_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from sr3rt import api as module

    loading, forked = threading.Event(), threading.Event()

    def load(*of: Any, **options: Any) -> Upscaler:
        loading.set()
        forked.wait(20)
        return upscaler()

    def call() -> None:
        sr3rt.upscale(np.zeros((8, 8, 3), np.uint8), steps=1)

    monkeypatch.setattr(module, "load", load)
    module._loaded.cache_clear()
    first = threading.Thread(target=call)
    first.start()
    loading.wait(20)
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)  # ends it, if it waits for ever
        forked.set()
        try:
            call()
            os._exit(0)
        finally:
            os._exit(1)
    forked.set()
    first.join()
    module._loaded.cache_clear()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:x"])
def test_a_device_that_is_none(device: str) -> None:
    with pytest.raises(sr3rt.OptionError, match=f"unknown device '{device}': expected auto, cpu, cuda, or cuda:1"):
        sr3rt.load(device=device)
