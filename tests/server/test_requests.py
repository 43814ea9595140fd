"""What a client sees: every kind of input by every protocol, progress, errors, limits, cancelling."""

from __future__ import annotations

import json
import random
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from asking import WAYS, by_generate, by_grpc, by_http, encoded, events, eventually, inputs, metric, post, settled, status, stream
from tritonclient.utils import InferenceServerException

import sr3rt
from sr3rt import backends
from sr3rt.serving.server import Address

PICTURE = np.random.default_rng(0).integers(0, 256, (10, 14, 3), np.uint8)


def differs(found: Any, expected: Any) -> int:
    assert found.shape == np.asarray(expected).shape
    return int(np.abs(found.astype(int) - np.asarray(expected).astype(int)).max())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "pixels"])
def test_every_input_by_every_protocol_gives_what_upscale_gives(triton: Any, way: Any, kind: str) -> None:
    image = PICTURE if kind == "pixels" else encoded(PICTURE, kind)
    pixels, info = way(triton, image, steps=3, seed=11, sampler="ddim", consistency="off")
    assert differs(pixels, sr3rt.upscale(image, steps=3, seed=11, sampler="ddim", consistency="off")) <= 1
    assert (info["step"], info["steps"], info["seed"], info["sampler"]) == (3, 3, 11, "ddim")


def test_defaults_are_the_bundles(triton: Any) -> None:
    _, info = by_http(triton, PICTURE)
    manifest = sr3rt.load().bundle.manifest
    assert (info["steps"], info["sampler"]) == (manifest.defaults.steps, manifest.defaults.sampler)


def test_concurrent_mixed_requests_each_get_their_own_result(triton: Any) -> None:
    pick = random.Random(5)
    asked = []
    for seed in range(20):
        size = pick.choice([(8, 8), (10, 14), (16, 12)])
        image = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
        asked.append((image, {"steps": pick.randint(1, 8), "sampler": pick.choice(["sr3", "posterior", "ddim", "dpm++2m"]), "seed": seed}))
    with ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda i: WAYS[i % len(WAYS)](triton, asked[i][0], **asked[i][1]), range(len(asked))))
    for (image, parameters), (pixels, _) in zip(asked, found, strict=True):
        assert differs(pixels, sr3rt.upscale(image, **parameters)) <= 1  # type: ignore[arg-type]


@pytest.mark.parametrize("way", [stream, events])
def test_progress_comes_in_order_with_previews_and_then_the_result(triton: Any, way: Any) -> None:
    replies = list(way(triton, encoded(PICTURE), steps=6, previews=2, seed=1))
    assert [info["step"] for _, info in replies] == [1, 2, 3, 4, 5, 6]
    assert replies[0][0] is None
    shapes = {pixels.shape for pixels, _ in replies if pixels is not None}
    assert shapes == {(40, 56, 3)}
    assert differs(replies[-1][0], sr3rt.upscale(encoded(PICTURE), steps=6, seed=1)) <= 1


@pytest.mark.parametrize("outputs", [["image"], ["pixels"], ["info"]])
def test_only_the_outputs_asked_for_come_back(triton: Any, outputs: list[str]) -> None:
    with triton.http() as client:
        for image in (PICTURE, encoded(PICTURE)):
            wanted = [tritonclient.http.InferRequestedOutput(name) for name in outputs]
            result = client.infer("sr3", inputs(tritonclient.http, image), outputs=wanted, parameters={"steps": 1})
            assert [output["name"] for output in result.get_response()["outputs"]] == outputs


# --- errors


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"steps": 0}, "steps must be between 1 and the 1000"),
        ({"stesp": 4}, "unknown parameter 'stesp'"),
        ({"sampler": "euler"}, "unknown sampler 'euler'"),
        ({"seed": "-1"}, "seed must be a whole number"),
        ({"sr3rt": "mine"}, "'sr3rt'"),
    ],
)
def test_a_bad_parameter_is_the_clients_mistake(triton: Any, parameters: dict[str, Any], message: str) -> None:
    body = json.dumps(
        {"inputs": [{"name": "pixels", "shape": [1, 1, 3], "datatype": "UINT8", "data": [1, 2, 3]}], "parameters": parameters}
    )
    code, text = status(f"{triton.url}/v2/models/sr3/infer", body.encode())
    assert code == 400
    assert message in text
    with pytest.raises(InferenceServerException, match=message) as raised:
        by_grpc(triton, PICTURE, **parameters)
    assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"
    with pytest.raises(InferenceServerException, match=message):
        list(stream(triton, PICTURE, **parameters))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "the file is empty"),
        (b"GIF89a", "found a GIF"),
        (encoded(PICTURE)[:60], "damaged"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * (2**20), "damaged|over the limit of 1048576 bytes"),
        (np.zeros((200, 400, 3), np.uint8), "the result would have 1280000 pixels; this server takes on at most 1048576"),
        (np.zeros((2, 2, 7), np.uint8), "channels"),
    ],
)
def test_a_bad_picture_is_the_clients_mistake(triton: Any, image: Any, message: str) -> None:
    with pytest.raises(InferenceServerException, match=message) as raised:
        by_grpc(triton, image)
    assert raised.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_one_picture_is_asked_for(triton: Any) -> None:
    with triton.grpc() as client:
        for given, found in (([], "neither"), ([*inputs(tritonclient.grpc, PICTURE), *inputs(tritonclient.grpc, b"x")], "both")):
            with pytest.raises(InferenceServerException, match=f"give one input.* found {found}"):
                client.infer("sr3", given)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"inputs": 3}', b'{"inputs": [{"name": "image"}]}', b"\xff" * 100])
def test_a_malformed_body_is_refused_and_the_server_lives(triton: Any, body: bytes) -> None:
    code, _ = status(f"{triton.url}/v2/models/sr3/infer", body)
    assert code == 400
    assert triton.server.ill(timeout=20) is None


@pytest.mark.parametrize(
    ("guarded", "counted"),
    [(True, 'sr3rt_guard_refused_total{reason="full"'), (False, 'sr3rt_requests_total{model="sr3",outcome="rejected"')],
)
def test_over_the_limit_the_answer_is_unavailable_at_once_and_the_others_are_served(triton: Any, guarded: bool, counted: str) -> None:
    (before,) = settled(triton, counted)
    server = triton if guarded else replace(triton, address=Address(http=triton.server.ports.http))
    with ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(by_http, server, PICTURE, steps=400, seed=i) for i in range(40)]  # which take longer than the asking
    refused = [error for one in asked if (error := one.exception())]
    assert {(error.status(), error.message()) for error in refused} == {  # type: ignore[attr-defined]
        ("503", "24 requests are unfinished, the limit is 24: try again later")
    }
    assert len(refused) <= 16
    assert settled(triton, counted) == [before + len(refused)]


def test_a_deadline_is_kept_whether_ours_or_tritons(triton: Any) -> None:
    slow = np.zeros((60, 60, 3), np.uint8)
    with pytest.raises(InferenceServerException, match="its 300 ms ran out") as raised:
        by_grpc(triton, slow, steps=500, timeout_ms=300)
    assert raised.value.status() == "StatusCode.UNAVAILABLE"
    with triton.http() as client, pytest.raises(InferenceServerException, match="its 300 ms ran out") as raised:
        client.infer("sr3", inputs(tritonclient.http, slow), parameters={"steps": 500}, timeout=300_000)  # microseconds
    assert raised.value.status() == "503"


def test_priority_has_a_name_that_triton_passes_on(triton: Any) -> None:
    by_http(triton, PICTURE, steps=1, sr3_priority=2)
    by_generate(triton, PICTURE, steps=1, priority=2)
    with pytest.raises(urllib.error.HTTPError):
        by_generate(triton, PICTURE, steps=1, priority="high")


# --- cancelling


def test_a_cancelled_request_stops_and_its_neighbours_are_unharmed(triton: Any) -> None:
    ends = [f'sr3rt_requests_total{{model="sr3_stream",outcome="{outcome}"' for outcome in ("cancelled", "expired")]
    cancelled, expired = settled(triton, *ends)
    slow, ended, clients = np.zeros((60, 60, 3), np.uint8), threading.Event(), list[Any]()
    with triton.grpc() as client:
        call = client.async_infer(
            "sr3", inputs(tritonclient.grpc, slow), lambda result, error: ended.set(), parameters={"steps": 900, "seed": 1}
        )
        eventually(lambda: metric(triton, "sr3rt_running") == 1)
        neighbour = ThreadPoolExecutor(1).submit(by_http, triton, PICTURE, steps=1000, seed=2)
        call.cancel()
        assert ended.wait(20)
    replies = stream(triton, slow, on_client=clients.append, steps=900, seed=1)
    next(replies)
    clients[0].stop_stream(cancel_requests=True)
    replies = events(triton, slow, steps=900, seed=1)
    next(replies)
    replies.close()
    with pytest.raises(TimeoutError):
        post_and_leave(triton, slow)
    pixels, _ = neighbour.result(60)
    assert differs(pixels, sr3rt.upscale(PICTURE, steps=1000, seed=2)) <= 1
    assert settled(triton, *ends) == [cancelled + 3, expired + 1]


def post_and_leave(triton: Any, image: Any) -> None:
    """A plain HTTP client that goes away is not noticed by Triton: a deadline is what protects the server."""
    body = {"inputs": [{"name": "pixels", "shape": list(image.shape), "datatype": "UINT8", "data": image.ravel().tolist()}]}
    body["parameters"] = {"steps": 900, "timeout_ms": 1500}  # type: ignore[assignment]
    request = urllib.request.Request(f"{triton.url}/v2/models/sr3/infer", json.dumps(body).encode())  # noqa: S310
    urllib.request.urlopen(request, timeout=1)  # noqa: S310


# --- watching


def test_a_probe_answers_even_when_nothing_more_is_taken(triton: Any) -> None:
    body = json.dumps({"inputs": [], "parameters": {"probe": True}}).encode()
    answer = post(f"{triton.url}/v2/models/sr3/infer", body)
    info = json.loads(answer["outputs"][0]["data"][0])
    assert info["backend"] == next(name for name in backends.ORDER if backends.why_not(name) is None)
    with ThreadPoolExecutor(24) as pool:
        asked = [pool.submit(by_http, triton, PICTURE, steps=500) for _ in range(24)]
        eventually(lambda: metric(triton, "sr3rt_running") >= 3)
        assert triton.server.ill(timeout=20) is None
        for one in asked:
            one.result(60)


def test_metrics_tell_what_was_done(triton: Any) -> None:
    names = ("sr3rt_steps_total", "sr3rt_calls_total", "sr3rt_queue_seconds_count", "sr3rt_request_seconds_count")
    before = settled(triton, *names)
    by_http(triton, PICTURE, steps=4)
    assert [after - one for after, one in zip(settled(triton, *names), before, strict=True)] == [4, 4, 1, 1]
    assert metric(triton, "sr3rt_alive") == 1
