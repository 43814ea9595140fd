"""What the guard refuses for Triton, so that it need not; that it counts it; and that nobody keeps a place."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from asking import by_events, by_grpc, by_http, by_stream, eventually, free_address, in_hand, metric, settled, status
from tritonclient.grpc import service_pb2, service_pb2_grpc

from sr3rt.serving.guard import Bounds, Guard
from sr3rt.serving.server import PROBE

INFER = "/v2/models/sr3/infer"
SMALL, LARGE = np.zeros((1, 1, 3), np.uint8), np.zeros((60, 60, 3), np.uint8)
FULL = "1 requests are unfinished, the limit is 1: try again later"


def asked(picture: Any, **parameters: Any) -> bytes:
    tensor = {"name": "pixels", "shape": picture.shape, "datatype": "UINT8", "data": picture.ravel().tolist()}
    return json.dumps({"inputs": [tensor], "parameters": parameters}).encode()


@pytest.fixture
def narrow(triton: Any) -> Iterator[Any]:
    """The same Triton, by a guard of its own that lets one request through at a time."""
    address = free_address()
    with Guard(address, Bounds(body=2**20, connections=99, requests=1)) as guard:
        guard.triton = triton.server.ports
        yield replace(triton, guard=guard, address=address)


@pytest.fixture
def full(narrow: Any) -> Iterator[tuple[Any, Future[Any]]]:
    """It, while that one request is under way; and its answer."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(by_http, narrow, LARGE, steps=300)
        eventually(lambda: in_hand(narrow) == 1)
        yield narrow, answer
        assert answer.result(60)


def test_over_the_limit_the_guard_answers_by_itself(request: pytest.FixtureRequest, narrow: Any) -> None:
    (before,) = settled(narrow, "sr3rt_requests_total")
    _, answer = request.getfixturevalue("full")
    assert status(narrow.url + INFER, asked(SMALL, steps=1)) == (503, json.dumps({"error": FULL}))
    with pytest.raises(Exception, match=FULL) as told:
        by_grpc(narrow, SMALL, steps=1)
    assert told.value.status() == "StatusCode.UNAVAILABLE"  # type: ignore[attr-defined]
    assert metric(narrow, 'sr3rt_guard_refused_total{reason="full"}') == 2
    assert answer.result(60)
    assert settled(narrow, "sr3rt_requests_total") == [before + 1]
    assert by_grpc(narrow, SMALL, steps=1)


def test_what_triton_counts_itself_passes(full: tuple[Any, Future[Any]]) -> None:
    narrow, _ = full
    assert by_stream(narrow, SMALL, steps=1)
    assert by_events(narrow, SMALL, steps=1)
    assert status(narrow.url + "/v2/health/ready", None)[0] == 200  # type: ignore[arg-type]


def test_a_probe_is_answered_however_full_it_is(full: tuple[Any, Future[Any]]) -> None:
    narrow, _ = full
    assert status(narrow.url + INFER, PROBE.encode())[0] == 200
    with grpc.insecure_channel(f"{narrow.address.host}:{narrow.address.grpc}") as channel:
        request = service_pb2.ModelInferRequest(model_name="sr3")
        request.parameters["probe"].bool_param = True
        assert service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request).model_name == "sr3"


@pytest.mark.parametrize("body", [b"{", asked(SMALL, steps=-1), asked(SMALL, steps=1)])
def test_a_place_is_given_back_after_any_answer(narrow: Any, body: bytes) -> None:
    for _ in range(3):
        assert status(narrow.url + INFER, body)[0] in (200, 400)


def test_who_goes_away_gives_the_place_back(narrow: Any) -> None:
    with socket.create_connection((narrow.address.host, narrow.address.http)) as gone:
        body = asked(LARGE, steps=200)
        gone.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (INFER.encode(), len(body), body))
        eventually(lambda: in_hand(narrow) == 1)
        assert status(narrow.url + INFER, asked(SMALL, steps=1))[0] == 503
    eventually(lambda: status(narrow.url + INFER, asked(SMALL, steps=1))[0] == 200)


def test_who_does_not_read_the_answer_keeps_no_place(narrow: Any) -> None:
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((narrow.address.host, narrow.address.http))
        body = asked(np.zeros((200, 200, 3), np.uint8), steps=24)  # 16 times as much is answered, as text
        slow.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (INFER.encode(), len(body), body))
        eventually(lambda: in_hand(narrow) == 1)
        assert status(narrow.url + INFER, asked(SMALL, steps=1))[0] == 503
        eventually(lambda: status(narrow.url + INFER, asked(SMALL, steps=1))[0] == 200)


def test_refusals_are_told_with_tritons_own_metrics(narrow: Any) -> None:
    status(narrow.url + INFER, b"{")
    status(narrow.url + INFER, bytes(2**20 + 1))
    with urllib.request.urlopen(narrow.metrics_url, timeout=10) as reply:  # noqa: S310
        assert reply.headers["Content-Type"].startswith("text/plain")
        text = reply.read().decode()
    assert "# TYPE nv_inference_request_success counter\n" in text
    assert text.endswith(
        "# HELP sr3rt_guard_refused_total Requests that the guard refused\n"
        "# TYPE sr3rt_guard_refused_total counter\n"
        'sr3rt_guard_refused_total{reason="full"} 0\n'
        'sr3rt_guard_refused_total{reason="away"} 0\n'
        'sr3rt_guard_refused_total{reason="invalid"} 2\n'
    )
    assert status(narrow.metrics_url + "/other", b"")[0] == 404
