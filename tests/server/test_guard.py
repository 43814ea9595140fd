"""The guard: what it refuses, that Triton never sees it, and that the rest passes as it was."""

from __future__ import annotations

import base64
import gzip
import http.client
import importlib
import json
import os
import random
import re
import signal
import socket
import sys
import threading
import time
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.http
from asking import by_http, encoded, events, eventually, free_address, inputs, metric, settled, status
from tritonclient.grpc import service_pb2, service_pb2_grpc

from sr3rt.errors import MissingExtra
from sr3rt.serving.configuration import Configuration
from sr3rt.serving.guard import Bounds, Guard
from sr3rt.serving.server import Ports

PICTURE = np.random.default_rng(0).integers(0, 256, (10, 14, 3), np.uint8)
INFER = "/v2/models/sr3/infer"
ENDED = 'sr3rt_requests_total{model="sr3_stream"'
PIXEL = {"name": "pixels", "shape": [1, 1, 3], "datatype": "UINT8", "data": [1, 2, 3]}


def get(url: str, path: str, method: str = "GET") -> tuple[int, bytes]:
    """Of a path that no client library would send as it is."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request(method, path)
    response = connection.getresponse()
    return response.status, response.read()


def said(url: str, *parts: bytes) -> bytes:
    """What is answered to bytes on a connection, until it is closed or the answer is whole."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        for part in parts:
            connection.sendall(part)
        response = http.client.HTTPResponse(connection)
        response.begin()
        return b"%d " % response.status + response.read()


@pytest.fixture
def unharmed(triton: Any) -> Iterator[Any]:
    """The server, which afterwards is the same and well."""
    before = triton.server.pid
    yield triton
    assert triton.server.ill(timeout=20) is None
    assert triton.server.pid == before


# --- paths


@pytest.mark.parametrize(
    "path",
    ["/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/stats", "/v2/models/sr3", "/v2/models/sr3_stream/config",
     "/v2/models/sr3/ready", "/v2/models/sr3/versions/1/ready", "/v2/models/sr3/versions/1", "/v2/models/sr3/stats"],
)  # fmt: skip
def test_what_tells_of_the_server_and_its_models_passes_unchanged(triton: Any, path: str) -> None:
    code, text = get(triton.url, path)
    assert code == 200
    if "stats" not in path:
        assert text == get(triton.own_url, path)[1]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/sr3/unload"),
        ("POST", "/v2/models/sr3/../../repository/index"),
        ("POST", "/v2%2Frepository/index"),
        ("POST", "http://other/v2/repository/index"),
        ("GET", "/v2/systemsharedmemory/status"),
        ("POST", "/v2/systemsharedmemory/region/x/register"),
        ("GET", "/v2/trace/setting"),
        ("POST", "/v2/models/sr3/trace/setting"),
        ("POST", "/v2/logging"),
        ("POST", "/v2/models/other/infer"),
        ("POST", "/v2/models/sr3_stream/generate"),
        ("GET", INFER),
        ("DELETE", INFER),
        ("POST", "/v2"),
        ("GET", "/"),
    ],
)
def test_what_is_not_offered_is_not_found(unharmed: Any, method: str, path: str) -> None:
    code, text = get(unharmed.url, path, method)
    assert code == 404
    assert f"{method} {path} is not offered" in json.loads(text)["error"]


def test_triton_itself_would_answer(triton: Any) -> None:
    assert get(triton.own_url, "/v2/repository/index", "POST")[0] == 200


# --- what Triton does not survive


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": [{**PIXEL, "shape": [1, 2**33, 3], "data": [1]}]}, "claims more values"),
        ({"inputs": [{**PIXEL, "shape": [0, 2**62, 2**62], "data": []}]}, "claims more values"),
        ({"inputs": [PIXEL], "outputs": [{"name": "info", "parameters": {"classification": 1}}]}, "classification"),
        ({"inputs": [{**PIXEL, "data": "NEST"}]}, "nested too deep"),
    ],
)
def test_what_would_end_triton_is_refused(unharmed: Any, body: Any, message: str) -> None:
    nest = "[" * 100_000 + "]" * 100_000
    code, text = status(unharmed.url + INFER, json.dumps(body).replace('"NEST"', nest).encode())
    assert code == 400
    assert message in json.loads(text)["error"]


@pytest.mark.parametrize("model", ["sr3/generate", "sr3_stream/generate_stream"])
def test_nesting_is_refused_where_pictures_are_text(unharmed: Any, model: str) -> None:
    code, text = status(f"{unharmed.url}/v2/models/{model}", b'{"image": ' + b"[" * 100_000)
    assert (code, "nested too deep" in text) == (400, True)


def test_a_body_in_700_000_chunks_is_one_body_for_triton(unharmed: Any) -> None:
    head = b"POST /v2/models/sr3/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = json.dumps({"inputs": [PIXEL], "parameters": {"steps": 1}}).encode() + b" " * 700_000
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    assert said(unharmed.url, head, chunks).startswith(b'200 {"model_name":"sr3"')


# --- bounds


def test_the_bound_of_a_body_follows_from_the_largest_picture() -> None:
    assert Bounds.of(Configuration()).body == 5 * 2**24 + 2**16
    assert Bounds.of(Configuration(max_file_bytes=10)).body == 5 * 4 * 2**26 // 16 + 2**16
    assert Bounds.of(Configuration(max_file_bytes=1000, max_pixels=16)).body == 5 * 1000 + 2**16


def test_who_asks_whether_to_go_on_is_answered(triton: Any) -> None:
    body = json.dumps({"inputs": [PIXEL], "parameters": {"steps": 1}}).encode()
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection((triton.address.host, triton.address.http), timeout=30) as connection:
        connection.sendall(head.encode())
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(body)
        assert connection.recv(100).startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_body_over_the_bound_is_refused_before_it_is_read(unharmed: Any) -> None:
    head = b"POST /v2/models/sr3/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000000\r\n\r\n"
    assert said(unharmed.url, head).startswith(b'413 {"error": "the body has 100000000000 bytes; the limit is 5308416"')


def test_a_body_that_does_not_tell_its_length_is_refused_when_it_passes_the_bound(unharmed: Any) -> None:
    head = b"POST /v2/models/sr3/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = b"10000\r\n" + bytes(65536) + b"\r\n"
    assert said(unharmed.url, head, *[chunk] * 82).startswith(b'413 {"error": "the body has more bytes than the limit of 5308416"')


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_compressed_body_is_unpacked_within_the_bound(unharmed: Any, encoding: str, pack: Any) -> None:
    headers = {"Content-Encoding": encoding}
    body = pack(json.dumps({"inputs": [PIXEL], "parameters": {"steps": 1}}).encode())
    assert status(unharmed.url + INFER, body, headers)[0] == 200
    assert status(unharmed.url + INFER, pack(bytes(2**28)), headers)[0] == 413
    assert status(unharmed.url + INFER, body[:-9], headers) == (400, f'{{"error": "the body ends before its {encoding} does"}}')
    assert status(unharmed.url + INFER, b"{}", headers)[0] == 400
    code, text = status(unharmed.url + INFER, body, {"Content-Encoding": "br"})
    assert (code, "must be gzip or deflate, found 'br'" in text) == (400, True)


@pytest.mark.parametrize("length", ["-1", "", "abc", "1e3", "99999999", "9" * 40])
def test_the_length_of_the_json_is_within_the_body(unharmed: Any, length: str) -> None:
    code, text = status(unharmed.url + INFER, json.dumps({"inputs": [PIXEL]}).encode(), {"Inference-Header-Content-Length": length})
    assert (code, "must be a number of bytes" in text) == (400, True)


def test_one_client_too_many_is_told_so() -> None:
    address = free_address()
    with Guard(address, Bounds(body=100, connections=2, requests=1)):
        url = f"http://{address.host}:{address.http}"
        kept = [socket.create_connection((address.host, address.http)) for _ in range(2)]  # taken in order, the next after them
        assert said(url) == b'503 {"error": "too many connections: try again later"}'
        kept[0].close()
        eventually(lambda: get(url, "/")[0] == 404)
        kept[1].close()


# --- passing on


def test_compression_that_a_client_chose_works_both_ways(triton: Any) -> None:
    with triton.http() as client:
        result = client.infer(
            "sr3",
            inputs(tritonclient.http, PICTURE),
            parameters={"steps": 1},
            request_compression_algorithm="deflate",
            response_compression_algorithm="gzip",
        )
    assert result.as_numpy("pixels").shape == (40, 56, 3)


def test_events_arrive_in_order(triton: Any) -> None:
    """That they do as they happen is seen where one who leaves after the first cancels the rest."""
    assert [info["step"] for _, info in events(triton, np.zeros((48, 48, 3), np.uint8), steps=12, seed=1)] == [*range(1, 13)]


def test_large_bodies_pass_whole(triton: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)  # 16 times as many come back
    large, _ = by_http(triton, pixels, steps=1, seed=3)
    assert large.shape == (1024, 1024, 3)


def test_connections_are_kept_and_many_work_at_a_time(triton: Any) -> None:
    connection = http.client.HTTPConnection(triton.url.removeprefix("http://"), timeout=60)
    for _ in range(3):
        connection.request("GET", "/v2")
        assert connection.getresponse().read().startswith(b'{"name":"triton"')
        kept, connection.auto_open = connection.sock, 0
        assert kept is not None
    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(lambda seed: by_http(triton, PICTURE, steps=3, seed=seed), range(20)))


# --- gRPC


def call(model: str = "sr3", *, shape: tuple[int, ...] = (1, 1, 3), data: bytes = b"abc", kind: str = "UINT8", **output: Any) -> Any:
    """A ModelInferRequest of one step. output: an output's parameters, whole numbers."""
    request = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[data])
    request.inputs.add(name="pixels", datatype=kind, shape=shape)
    request.parameters["steps"].int64_param = 1
    if output:
        parameters = request.outputs.add(name="info").parameters
        for name, value in output.items():
            parameters[name].int64_param = value
    return request


@pytest.fixture
def stub(triton: Any) -> Iterator[Any]:
    address = triton.address
    with grpc.insecure_channel(f"{address.host}:{address.grpc}") as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (call(shape=(2**62, 4, 4)), "input 0: its shape claims more values than the .* bytes of the request can hold"),
        (call(shape=(0, 2**62, 2**62)), "claims more values"),
        (call(shape=(-1, 1, 3)), "shape must be a list of whole numbers from 0 on"),
        (call(classification=1), "output 0: classification is for class scores"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_calls_that_triton_does_not_survive_are_refused(triton: Any, stub: Any, request_: Any, words: str, streamed: bool) -> None:
    with pytest.raises(grpc.RpcError) as told:
        list(stub.ModelStreamInfer(iter([request_]))) if streamed else stub.ModelInfer(request_)
    assert told.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert re.search(words, told.value.details())
    assert stub.ModelInfer(call()).raw_output_contents


def test_who_does_not_read_gets_no_more_requests_done(triton: Any, stub: Any) -> None:
    def ended() -> float:
        time.sleep(1.5)  # in which one more would be done, and told
        return metric(triton, ENDED)

    large, before = call("sr3_stream", shape=(128, 128, 3), data=bytes(128 * 128 * 3)), settled(triton, ENDED)[0]
    answers = stub.ModelStreamInfer(time.sleep(0.05) or large for _ in range(40))
    eventually(lambda: metric(triton, ENDED) > before)
    count, more = before, ended()
    while more > count:
        count, more = more, ended()
    assert before < count < before + 40
    assert len(list(answers)) == 40


def test_only_what_clients_need_is_offered_by_grpc(triton: Any, stub: Any) -> None:
    for refused in (
        lambda: stub.RepositoryModelUnload(service_pb2.RepositoryModelUnloadRequest(model_name="sr3")),
        lambda: stub.SystemSharedMemoryRegister(service_pb2.SystemSharedMemoryRegisterRequest(name="x", key="x", byte_size=1)),
        lambda: stub.LogSettings(service_pb2.LogSettingsRequest()),
    ):
        with pytest.raises(grpc.RpcError) as told:
            refused()
        assert told.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert stub.ServerReady(service_pb2.ServerReadyRequest()).ready
    assert stub.ModelMetadata(service_pb2.ModelMetadataRequest(name="sr3")).name == "sr3"


def test_messages_are_bounded(triton: Any, stub: Any) -> None:
    limit = Bounds.of(Configuration(max_pixels=2**20, max_file_bytes=2**20)).body
    with pytest.raises(grpc.RpcError) as told:
        stub.ModelInfer(call(data=bytes(limit)))
    assert told.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.RpcError) as told:
        stub.ModelInfer(call(data=bytes(limit // 2)), compression=grpc.Compression.Gzip)
    assert told.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_calls_that_nobody_should_send_get_an_error_and_harm_nothing(triton: Any, stub: Any) -> None:
    pick, codes = random.Random(0), set()
    for i in range(int(os.environ.get("SR3RT_MUTATIONS", "150"))):
        shape = tuple(pick.choice([0, 1, 2, 3, -1, 2**20, 2**31, 2**62, 2**63 - 1]) for _ in range(pick.randint(0, 5)))
        request = call(
            pick.choice(["sr3", "sr3_stream", "other", ""]),
            shape=shape,
            data=pick.randbytes(pick.choice([0, 1, 3, 12, 5000])),
            kind=pick.choice(["UINT8", "BYTES", "FP32", "INT64", "BOOL", "NONE", ""]),
            **pick.choice([{}, {"classification": 1}, {"binary_data_size": 2**62}, {"shared_memory_offset": 2**62}]),
        )
        if pick.random() < 0.3:
            mutable = bytearray(request.SerializeToString())
            for _ in range(pick.randint(1, 5)):
                mutable[pick.randrange(len(mutable))] = pick.randrange(256)
            data = bytes(mutable)
        else:
            data = request.SerializeToString()
        address = triton.address
        with grpc.insecure_channel(f"{address.host}:{address.grpc}") as channel:
            try:
                if i % 2:
                    list(channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(iter([data]), timeout=30))
                else:
                    channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(data, timeout=30)
            except grpc.RpcError as error:
                codes.add(error.code())
    assert grpc.StatusCode.INVALID_ARGUMENT in codes
    assert not codes & {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
    assert triton.server.ill(timeout=20) is None
    assert stub.ModelInfer(call()).raw_output_contents


# --- when Triton is not there


def test_without_triton_the_answer_is_unavailable() -> None:
    address = free_address()
    with Guard(address, Bounds(body=100, connections=9, requests=1)) as guard:
        url = f"http://{address.host}:{address.http}"
        for ports in (None, Ports(free_address().http, free_address().grpc, free_address().metrics)):
            guard.triton = ports
            code, text = status(url + INFER, b'{"inputs": []}')
            assert (code, "try again later" in text) == (503, True)
            assert get(url, "/v2/health/ready")[0] == 503
            with grpc.insecure_channel(f"{address.host}:{address.grpc}") as channel, pytest.raises(grpc.RpcError) as told:
                service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerReady(service_pb2.ServerReadyRequest())
            assert told.value.code() == grpc.StatusCode.UNAVAILABLE
    with pytest.raises(OSError, match="refused"):
        get(url, "/v2")


def test_requests_that_triton_dies_with_are_refused_or_cut(mortal: Any) -> None:
    pixel = {"inputs": [{**PIXEL, "shape": [60, 60, 3], "data": [0] * 10800}], "parameters": {"steps": 900}}
    picture = {"image": base64.b64encode(encoded(np.zeros((60, 60, 3), np.uint8))).decode(), "base64": True, "steps": 900}
    stream = f"{mortal.url}/v2/models/sr3_stream/generate_stream"
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(status, mortal.url + INFER, json.dumps(pixel).encode()) for _ in range(2)]
        with urllib.request.urlopen(stream, json.dumps(picture).encode(), timeout=60) as reply:  # noqa: S310
            assert b'"step' in reply.readline()
            eventually(lambda: metric(mortal, "sr3rt_running") == 3)
            os.kill(mortal.server.pid, signal.SIGKILL)
            with pytest.raises((OSError, http.client.IncompleteRead)):
                reply.read()
        for one in asked:
            code, text = one.result(20)
            assert (code, "went away with this request" in text) == (503, True)
    assert status(mortal.url + INFER, b'{"inputs": []}')[0] == 503


def test_closing_waits_for_nobody_who_is_silent() -> None:
    address = free_address()
    guard = Guard(address, Bounds(body=100, connections=9, requests=1))
    with socket.create_connection((address.host, address.http)) as silent:
        silent.sendall(b"POST /v2/models/sr3/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        closing = threading.Thread(target=guard.close)
        closing.start()
        closing.join(10)
        assert not closing.is_alive()


def test_without_aiohttp_the_error_is_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sr3rt.serving.guard")
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(MissingExtra, match=r"aiohttp.*sr3rt\[serve\]"):
        importlib.import_module("sr3rt.serving.guard")
