"""What stands first on a connection refuses at once while the server is full, in turn, and passes on all else."""

from __future__ import annotations

import asyncio
import json

import pytest

from sr3rt.serving.front import Front
from sr3rt.serving.gate import Gate


class Inner(asyncio.Protocol):
    def __init__(self) -> None:
        self.data = b""

    def data_received(self, data: bytes) -> None:
        self.data += data


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: object) -> None:
        assert isinstance(data, bytes)
        self.written += data


def request(body: bytes = b'{"inputs": []}', *, path: str = "sr3/infer", fields: str = "", length: int | None = None) -> bytes:
    head = f"POST /v2/models/{path} HTTP/1.1\r\nHost: a\r\n{fields}Content-Length: {len(body) if length is None else length}\r\n\r\n"
    return head.encode() + body


def sent(*parts: bytes, full: bool, answer: bool = True) -> tuple[bytes, bytes, Gate]:
    """What reached the inner protocol, what was written, and the gate. answer: whether each part passed on is answered at once."""

    async def run() -> tuple[bytes, bytes, Gate]:
        gate, inner, transport = Gate(1), Inner(), Transport()
        place = gate.place(b"", probe=b"x") if full else None
        front = Front(inner, gate)
        front.connection_made(transport)
        for part in parts:
            before = inner.data
            front.data_received(part)
            if answer and inner.data != before:
                front.answered()
        assert place is None or gate._admission.unfinished == 1
        return inner.data, transport.written, gate

    return asyncio.run(run())


@pytest.mark.parametrize("path", ["sr3/infer", "sr3_stream/infer", "sr3/versions/1/infer", "sr3/generate"])
def test_a_full_server_refuses_at_once_and_counts_it(path: str) -> None:
    passed, written, gate = sent(request(path=path), request(path=path), full=True)
    assert passed == b""
    head, _, body = written[: len(written) // 2].partition(b"\r\n\r\n")
    assert written == 2 * written[: len(written) // 2]
    assert head.startswith(b"HTTP/1.1 503 ") and f"Content-Length: {len(body)}".encode() in head
    assert "the limit is 1: try again later" in json.loads(body)["error"]
    assert 'sr3rt_guard_refused_total{reason="full"} 2' in gate.metrics()


def test_a_server_that_is_not_full_gets_everything_and_keeps_its_places() -> None:
    passed, written, gate = sent(request(), request(), full=False)
    assert (passed, written) == (2 * request(), b"")
    assert gate._admission.unfinished == 0


@pytest.mark.parametrize(
    "data",
    [
        request(b'{"parameters": {"probe": true}}'),
        request(path="sr3_stream/generate_stream"),
        request(path="sr3/ready"),
        request().replace(b"POST", b"GET"),
        request(length=100),
        request() + b"POST ",
        request(fields="Transfer-Encoding: chunked\r\n"),
        request(fields="Expect: 100-continue\r\n"),
        request(fields="Content-Encoding: gzip\r\n"),
        request(fields="Connection: close\r\n"),
        request(fields="Content-Length: 14\r\n"),
        request()[:20],
    ],
)
def test_what_is_not_one_whole_request_for_a_picture_is_passed_on(data: bytes) -> None:
    assert sent(data, full=True)[:2] == (data, b"")


def test_no_answer_is_written_before_its_turn() -> None:
    """Whoever sends before an answer is there is answered by aiohttp alone, from then on."""
    first = request(b'{"parameters": {"probe": true}}')
    assert sent(first, request(), request(), full=True, answer=False)[:2] == (first + 2 * request(), b"")
    assert sent(first, request(), full=True)[0] == first


def test_what_the_inner_protocol_is_told_is_what_the_transport_says() -> None:
    told: list[object] = []

    class Noting(Inner):
        def connection_made(self, transport: object) -> None:
            told.append(transport)

        def eof_received(self) -> bool:
            told.append("eof")
            return True

        def connection_lost(self, exc: Exception | None) -> None:
            told.append(exc)

        def pause_writing(self) -> None:
            told.append("pause")

        def resume_writing(self) -> None:
            told.append("resume")

    async def run() -> None:
        front, transport, error = Front(Noting(), Gate(1)), Transport(), OSError()
        front.connection_made(transport)
        assert front.eof_received() is True
        front.pause_writing()
        front.resume_writing()
        front.connection_lost(error)
        assert told == [transport, "eof", "pause", "resume", error]

    asyncio.run(run())
