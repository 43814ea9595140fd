"""Pictures for many at a time: reading, limits, progress, encoding."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from arithmetic import Arithmetic
from PIL import Image

import sr3rt
from sr3rt import memory
from sr3rt.backends import Floats
from sr3rt.bundle import Bundle
from sr3rt.errors import Cancelled, DeadlineExceeded, ImageError, ImageTooLarge, OptionError, Overloaded, SR3Error, Stopped
from sr3rt.serving.query import Query
from sr3rt.serving.service import Encoded, Reply, Service, Settings
from sr3rt.upscaler import Upscaler

PIXELS = np.random.default_rng(0).integers(0, 256, (10, 14, 3), np.uint8)


def png(pixels: Any = PIXELS, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


class Replies:
    """Waits for the last."""

    def __init__(self) -> None:
        self.all: list[Reply | Exception] = []
        self._last = threading.Event()

    def __call__(self, reply: Reply | Exception) -> None:
        assert not self._last.is_set()
        self.all.append(reply)
        if isinstance(reply, Exception) or reply.final:
            self._last.set()

    def last(self) -> Reply:
        assert self._last.wait(20)
        if isinstance(self.all[-1], Exception):
            raise self.all[-1]
        return self.all[-1]


class Held(Arithmetic):
    """Steps when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def bind(self, x: Floats, y: Floats, level: Floats, out: Floats) -> Callable[[], None]:
        inner = super().bind(x, y, level, out)
        return lambda: (self.go.wait(20), inner())[1]  # type: ignore[func-returns-value]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Upscaler:
    return sr3rt.load(tiny.write(tmp_path_factory.mktemp("bundle") / "tiny"))


@pytest.fixture
def service(up: Upscaler) -> Iterator[Service]:
    one = Service(up)
    yield one
    one.close(drain=20)


@pytest.fixture
def held(up: Upscaler) -> Iterator[tuple[Service, Held]]:
    network = Held()
    one = Service(Upscaler(up.bundle, network, threads=1), Settings(requests=3, pixels=40 * 56 * 2 + 100, slots=1))
    yield one, network
    network.go.set()
    one.close(drain=20)


def ask(service: Service, image: Encoded, **parameters: Any) -> Reply:
    replies = Replies()
    service.submit(image, Query.parse(parameters), replies)
    return replies.last()


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_a_file_gives_the_file_of_what_upscale_gives(service: Service, up: Upscaler, kind: str) -> None:
    reply = ask(service, png(kind=kind), steps=4, sampler="dpm++2m", seed=7, consistency="off")
    expected = up.upscale(png(kind=kind), steps=4, sampler="dpm++2m", seed=7, consistency="off")
    assert isinstance(reply.image, bytes)
    image = Image.open(io.BytesIO(reply.image))
    assert image.format == "PNG"
    assert (np.asarray(image) == np.asarray(expected)).all()
    assert image.info["sr3rt:seed"] == "7"
    assert {key: reply.info[key] for key in ("steps", "seed", "sampler", "consistency")} == {
        "steps": 4, "seed": 7, "sampler": "dpm++2m", "consistency": "off",
    }  # fmt: skip
    assert reply.info["bundle"] == up.bundle.sha256


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pixels_give_pixels(service: Service, up: Upscaler, channels: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (9, 8, channels), np.uint8)
    reply = ask(service, pixels, seed=3)
    assert (reply.image == up.upscale(pixels, seed=3)).all()
    assert reply.image.shape == (36, 32, channels)  # type: ignore[union-attr]


@pytest.mark.parametrize(("format", "head"), [("png", b"\x89PNG"), ("jpeg", b"\xff\xd8\xff"), ("webp", b"RIFF")])
def test_either_input_gives_any_format(service: Service, format: str, head: bytes) -> None:
    for image in (png(), PIXELS, PIXELS[..., :1]):
        reply = ask(service, image, format=format)
        assert isinstance(reply.image, bytes)
        assert reply.image.startswith(head)
    pixels = ask(service, png(PIXELS[..., 0]), format="pixels").image
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (40, 56, 1)


def test_base64_goes_in_and_comes_out(service: Service) -> None:
    plain, text = ask(service, png(), seed=1).image, ask(service, base64.b64encode(png()), seed=1, base64=True).image
    assert isinstance(text, bytes)
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) == np.asarray(Image.open(io.BytesIO(plain)))).all()  # type: ignore[arg-type]


def test_a_request_without_a_seed_tells_the_one_it_drew(service: Service) -> None:
    first = ask(service, PIXELS)
    again = ask(service, PIXELS, seed=first.info["seed"])
    assert (first.image == again.image).all()  # type: ignore[union-attr]
    assert (first.image != ask(service, PIXELS).image).any()  # type: ignore[union-attr]


def test_progress_is_told_in_order_with_previews_when_asked_for(service: Service) -> None:
    replies = Replies()
    service.submit(png(), Query.parse({"steps": 12, "previews": 1}), replies, progress=True)
    replies.last()
    told = [reply for reply in replies.all if isinstance(reply, Reply)]
    assert [reply.info["step"] for reply in told] == list(range(1, 13))
    assert [reply.final for reply in told] == [False] * 11 + [True]
    previews = [reply.image for reply in told[:-1] if reply.image is not None]
    assert previews  # some may be left out
    assert Image.open(io.BytesIO(previews[0])).size == (56, 40)  # type: ignore[arg-type]
    replies = Replies()
    service.submit(png(), Query.parse({"steps": 5}), replies, progress=True)
    replies.last()
    assert [reply.image is None for reply in replies.all if isinstance(reply, Reply)] == [True] * 4 + [False]


# --- refusals


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"stesp": 3}, "unknown parameter 'stesp': expected steps, sampler"),
        ({"steps": 0}, "steps must be between 1 and the 100"),
        ({"steps": "many"}, "steps must be a whole number, found 'many'"),
        ({"steps": 3.5}, "steps must be a whole number"),
        ({"steps": True}, "steps must be a whole number, found True"),
        ({"sampler": "euler"}, "unknown sampler 'euler'"),
        ({"sampler": 3}, "sampler must be text"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": str(2**64)}, "seed must be"),
        ({"consistency": "never"}, "consistency must be one of off, final, every, found 'never'"),
        ({"schedule": "cosine"}, "schedule must be one of n_timestep"),
        ({"format": "gif"}, "format must be one of png, jpeg, webp, pixels"),
        ({"timeout_ms": 0}, "timeout_ms must be positive"),
        ({"timeout_ms": "nan"}, "timeout_ms must be a number"),
        ({"previews": -1}, "previews must be 0"),
        ({"base64": 1.5}, "base64 must be true or false"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_at_once(service: Service, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        service.submit(png(), Query.parse(parameters), Replies())


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "the file is empty"),
        (b"GIF89a", "found a GIF"),
        (b"\x89PNG\r\n\x1a\n", "a damaged PNG file"),
        (np.zeros((4, 4), np.uint8), r"expected uint8 pixels of shape \(height, width, channels\), found uint8 \(4, 4\)"),
        (np.zeros((4, 0, 3), np.uint8), r"found uint8 \(4, 0, 3\)"),
    ],
)
def test_what_is_no_picture_is_refused_before_it_is_queued(service: Service, image: Encoded, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        service.submit(image, Query(), Replies())
    assert service.counts().submitted == 0


def test_a_header_that_promises_too_much_is_refused_before_a_pixel_is_decoded(service: Service) -> None:
    bomb = bytearray(png())
    bomb[16:24] = (30000).to_bytes(4, "big") * 2  # IHDR: width and height, without the checksum that Pillow does not ask for first
    with pytest.raises(ImageError):
        service.submit(bytes(bomb), Query(), Replies())
    large = io.BytesIO()
    Image.new("1", (30000, 30000)).save(large, "PNG")
    started = time.process_time()
    with pytest.raises(ImageTooLarge, match=r"14400000000 pixels; this server takes on at most 67108864"):
        service.submit(large.getvalue(), Query(), Replies())
    assert time.process_time() - started < 1  # decoding takes many


def test_deep_grey_is_given_as_pixels_of_8_bits(service: Service) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    expected = ask(service, png(grey), format="pixels", seed=1).image
    for deep, kind in ((grey.astype(np.uint16) * 257, "PNG"), (grey.astype(np.float32) / 255, "TIFF")):
        found = ask(service, png(deep, kind), format="pixels", seed=1).image
        assert isinstance(found, np.ndarray) and isinstance(expected, np.ndarray)
        assert found.shape == expected.shape == (32, 32, 1)
        assert np.abs(found.astype(int) - expected).max() <= 2  # of 8 bits the bicubic is rounded twice
    with pytest.raises(ImageError, match="png cannot hold a picture of mode F: ask for format pixels"):
        ask(service, png(grey.astype(np.float32) / 255, "TIFF"))


def test_damage_behind_the_header_is_told_later(service: Service) -> None:
    with pytest.raises(ImageError, match="damaged"):
        ask(service, png()[:-40])
    with pytest.raises(ImageError, match="jpeg cannot hold a picture of mode RGBA: ask for format png or webp or pixels"):
        ask(service, png(np.zeros((4, 4, 4), np.uint8)), format="jpeg")
    with pytest.raises(ImageError, match="the 3 bytes given are none"):
        service.submit(b"???", Query.parse({"base64": True}), Replies())


def test_over_the_limit_of_requests_or_pixels_the_answer_is_no_at_once(held: tuple[Service, Held]) -> None:
    service, network = held
    waiting = [Replies() for _ in range(2)]
    for replies in waiting:
        service.submit(PIXELS, Query(), replies)
    with pytest.raises(
        Overloaded, match=r"results and previews of 4480 pixels are unfinished and 2240 more are asked for, the limit is 4580"
    ):
        service.submit(PIXELS, Query(), Replies())
    waiting.append(Replies())
    service.submit(PIXELS[:2, :2], Query(), waiting[-1])
    with pytest.raises(Overloaded, match="3 requests are unfinished, the limit is 3: try again later"):
        service.submit(PIXELS[:1, :1], Query(), Replies())
    with pytest.raises(ImageTooLarge, match="takes on at most 4580 at a time"):
        service.submit(np.zeros((99, 99, 3), np.uint8), Query(), Replies())
    network.go.set()
    for replies in waiting:
        replies.last()
    ask(service, PIXELS)  # there is room again


def test_previews_count_as_results(held: tuple[Service, Held]) -> None:
    service, network = held
    one = Replies()
    service.submit(PIXELS, Query(steps=3, previews=2), one, progress=True)  # two pictures of 2240 pixels, the limit being 4580
    with pytest.raises(Overloaded, match="results and previews of 4480 pixels are unfinished"):
        service.submit(PIXELS, Query(), Replies())
    told = "previews=1 makes 2 pictures beside the result, each of 2240 pixels; this server takes on at most 4580 pixels .*: use a larger"
    with pytest.raises(OptionError, match=told):
        service.submit(PIXELS, Query(steps=3, previews=1), Replies(), progress=True)
    network.go.set()
    one.last()
    ask(service, PIXELS, steps=3, previews=1)  # of which nobody is told


def test_what_only_finds_others_in_its_way_may_come_again(up: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    available = 2**30
    monkeypatch.setattr(memory, "available", lambda: available)
    service = Service(up)
    ask(service, PIXELS)
    available = 2**10
    with pytest.raises(Overloaded, match=r"a 56×40 result needs about 0\.0 GiB, which other requests have now: try again later"):
        ask(service, PIXELS)
    small = Service(up)
    with pytest.raises(ImageTooLarge, match=r"with this model, this server has 0\.0 GiB: crop the picture, or ask another$"):
        ask(small, PIXELS)
    available = 2**30
    ask(service, PIXELS)
    for one in (service, small):
        one.close()


def test_cancelled_and_expired_requests_give_their_place_back(held: tuple[Service, Held]) -> None:
    service, network = held
    running, goes, late = Replies(), Replies(), Replies()
    service.submit(PIXELS, Query(), running)
    handle = service.submit(PIXELS[:2], Query(), goes)
    service.submit(PIXELS[:2], Query(timeout_ms=1), late)
    handle.cancel()
    assert handle.cancelled
    network.go.set()
    with pytest.raises(Cancelled):
        goes.last()
    with pytest.raises(DeadlineExceeded, match="its 1 ms ran out"):
        late.last()
    running.last()
    for _ in range(5):
        ask(service, PIXELS)


# --- well or not


def test_a_probe_does_a_step_when_idle_and_trusts_the_batch_when_busy(service: Service, held: tuple[Service, Held]) -> None:
    assert service.probe()["backend"] == "onnxruntime"
    assert service.counts().finished == 1
    busy, _ = held
    busy.submit(PIXELS, Query(), Replies())
    while not busy.counts().submitted:
        time.sleep(0.01)
    busy.probe()
    assert busy.counts().submitted == 1


def test_a_probe_of_a_dead_service_fails(up: Upscaler) -> None:
    class Broken(Arithmetic):
        def bind(self, x: Floats, y: Floats, level: Floats, out: Floats) -> Callable[[], None]:
            def run() -> None:
                raise SR3Error("the device is gone")

            return run

    service = Service(Upscaler(up.bundle, Broken(), threads=1))
    for _ in range(3):
        with pytest.raises(SR3Error, match="the device is gone"):
            service.probe()
    assert not service.well
    with pytest.raises(Stopped, match="restart the server; the last: the device is gone"):
        service.probe()
    with pytest.raises(Stopped):
        service.submit(PIXELS, Query(), Replies())
    service.close()


def test_closing_finishes_what_is_in_hand(up: Upscaler) -> None:
    service, replies = Service(up), [Replies() for _ in range(20)]
    for one in replies:
        service.submit(png(), Query(), one)
    service.close(drain=20)
    for one in replies:
        one.last()
    with pytest.raises(Stopped, match="shutting down"):
        service.submit(png(), Query(), Replies())


def test_a_bundle_of_another_scale_counts_its_own_pixels(tmp_path: Path) -> None:
    service = Service(sr3rt.load(tiny.write(tmp_path / "b", scale=2)), Settings(pixels=20 * 28))
    assert ask(service, PIXELS).image.shape == (20, 28, 3)  # type: ignore[union-attr]
    with pytest.raises(ImageTooLarge):
        service.submit(np.zeros((11, 14, 3), np.uint8), Query(), Replies())
    service.close()
    assert Bundle.open(tmp_path / "b").manifest.scale == 2
