"""What stands first on a connection of HTTP: while the server is full, requests are refused before anything is made of them.

Under ten times too much nearly all requests are refused, on the cores that refine pictures. Refused by aiohttp, as by guard.py, each takes
0.3 ms of them, here a tenth of that.
"""

from __future__ import annotations

import asyncio
import json
import re

from sr3rt.errors import Overloaded
from sr3rt.serving.gate import Gate

PROBE = b'"probe"'
_ASKS = re.compile(rb"POST /v2/models/(?:sr3|sr3_stream)(?:/versions/[0-9]{1,9})?/(?:infer|generate) HTTP/1\.1\r\n")
_OTHERWISE = re.compile(rb"\r\n(?:connection|content-encoding|expect|transfer-encoding|upgrade):")  # for aiohttp to see to
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,12})[ \t]*(?=\r\n)")
_SEEN_EVERY = 20.0  # seconds: aiohttp closes connections on which it has long seen nothing


def refused(why: str, *, fields: str = "") -> bytes:
    """The whole answer. fields: more lines of its head."""
    text = json.dumps({"error": why})
    head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: {len(text)}\r\n{fields}"
    return f"{head}\r\n{text}".encode()


class Front(asyncio.Protocol):
    """Passes on what it does not refuse. It refuses only where the answer to all before has been written, so that none is out of turn."""

    def __init__(self, inner: asyncio.Protocol, gate: Gate) -> None:
        self._inner, self._gate = inner, gate
        self._idle, self._in_turn = True, True  # in_turn: nothing has come before what came before was answered
        self._loop = asyncio.get_running_loop()
        self._seen = self._loop.time()

    def answered(self) -> None:
        """The whole answer to what was passed on last has been written."""
        self._idle = self._in_turn

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._idle and self._loop.time() - self._seen < _SEEN_EVERY and _is_whole(data) and self._is_refused(data):
            return
        self._in_turn, self._idle, self._seen = self._in_turn and self._idle, False, self._loop.time()
        self._inner.data_received(data)

    def _is_refused(self, data: bytes) -> bool:
        try:
            place = self._gate.place(data, probe=PROBE)
        except Overloaded as error:
            self._gate.refused(error)
            self._transport.write(refused(str(error)))
            return True
        if place is not None:
            place.release()
        return False

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()


def _is_whole(data: bytes) -> bool:
    """Whether this is one request for a picture, head and body, and nothing else."""
    end = data.find(b"\r\n\r\n")
    if end < 0 or not _ASKS.match(data):
        return False
    head = data[: end + 2].lower()
    lengths = _LENGTH.findall(head)
    return len(lengths) == 1 and len(data) == end + 4 + int(lengths[0]) and not _OTHERWISE.search(head)
