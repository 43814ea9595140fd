"""Requests to a running server over HTTP: in a closed loop, or open, as a Poisson process that does not wait for answers."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Answer:
    """status: HTTP's, 0 where the connection failed. began: seconds since the load's start. pixels: of a result."""

    status: int
    began: float
    seconds: float
    pixels: Pixels | None = None
    text: str = ""


@dataclass(frozen=True)
class Ask:
    """One picture and its parameters."""

    pixels: Pixels
    parameters: dict[str, Any]

    @cached_property
    def request(self) -> bytes:
        """The whole HTTP request: JSON, then the bytes (Triton's binary tensor extension)."""
        data = self.pixels.tobytes()
        tensor = {"name": "pixels", "shape": self.pixels.shape, "datatype": "UINT8", "parameters": {"binary_data_size": len(data)}}
        head = json.dumps({"inputs": [tensor], "parameters": {**self.parameters, "binary_data_output": True}}).encode()
        lengths = f"Content-Length: {len(head) + len(data)}\r\nInference-Header-Content-Length: {len(head)}"
        return f"POST /v2/models/sr3/infer HTTP/1.1\r\nHost: triton\r\n{lengths}\r\n\r\n".encode() + head + data


class _Connection(asyncio.Protocol):
    """One request at a time. HTTP by hand: the load must not be a load."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._answer: asyncio.Future[bytes] | None = None

    def ask(self, request: bytes) -> asyncio.Future[bytes]:
        """The whole answer, head and body; ConnectionError."""
        self._received, self._whole = bytearray(), 0
        self._answer = asyncio.get_running_loop().create_future()
        if self._transport.is_closing():
            self.connection_lost(None)
        else:
            self._transport.write(request)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._whole and (end := self._received.find(b"\r\n\r\n")) > 0:
            self._whole = end + 4 + int(_field(bytes(self._received[: end + 2]), b"content-length"))
        if self._whole and len(self._received) >= self._whole and self._answer and not self._answer.done():
            self._answer.set_result(bytes(self._received))

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(error or ConnectionResetError("closed before the whole answer was there"))

    def close(self) -> None:
        self._transport.close()


def _field(head: bytes, name: bytes) -> bytes:
    begin = head.lower().index(b"\r\n" + name + b": ") + len(name) + 4
    return head[begin : head.index(b"\r\n", begin)]


class Client:
    """Asks one server, over as many kept connections as there are requests at a time."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._host, self._port = host, int(port)
        self._idle: list[_Connection] = []

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._idle:
            connection.close()

    async def _connection(self) -> _Connection:
        if self._idle:
            return self._idle.pop()
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port)
        return connection

    async def ask(self, ask: Ask, *, since: float = 0.0, keep: bool = False) -> Answer:
        """Send and wait. keep: with the result's pixels."""
        start = time.perf_counter()
        try:
            connection = await self._connection()
            whole = await connection.ask(ask.request)
        except OSError as error:
            return Answer(0, start - since, time.perf_counter() - start, None, repr(error))
        seconds = time.perf_counter() - start
        self._idle.append(connection)
        status = int(whole[9:12])
        if status == 200 and not keep:
            return Answer(status, start - since, seconds)
        head, _, data = whole.partition(b"\r\n\r\n")
        if status != 200:
            return Answer(status, start - since, seconds, None, data.decode(errors="replace"))
        pixels = _pixels(data, int(_field(head + b"\r\n", b"inference-header-content-length")))
        return Answer(status, start - since, seconds, pixels)


def _pixels(data: bytes, head: int) -> Pixels:
    offset = head
    for output in json.loads(data[:head])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        if output["name"] == "pixels":
            return np.frombuffer(data[offset : offset + size], np.uint8).reshape(output["shape"])
        offset += size
    raise ValueError(f"no pixels in {data[:head]!r}")


async def together(url: str, asks: list[Ask]) -> list[Answer]:
    """All at once; the answers in order."""
    async with Client(url) as client:
        return await asyncio.gather(*(client.ask(ask, keep=True) for ask in asks))


async def closed(url: str, make: Callable[[], Ask], *, clients: int, seconds: float) -> list[Answer]:
    """So many clients, each asking again as soon as it is answered; those that began within `seconds`."""
    start, answers = time.perf_counter(), list[Answer]()

    async def one(client: Client) -> None:
        while time.perf_counter() - start < seconds:
            answers.append(await client.ask(make(), since=start))

    async with Client(url) as client:
        await asyncio.gather(*(one(client) for _ in range(clients)))
    return answers


async def poisson(url: str, make: Callable[[], Ask], *, rate: float, seconds: float, seed: int = 0) -> list[Answer]:
    """`rate` requests a second arrive whether or not others were answered."""
    pick, start, at, tasks = random.Random(seed), time.perf_counter(), 0.0, list[asyncio.Task[Answer]]()
    async with Client(url) as client:
        while (at := at + pick.expovariate(rate)) < seconds:
            await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
            tasks.append(asyncio.create_task(client.ask(make(), since=start)))
        return list(await asyncio.gather(*tasks))


def pixels(height: int, width: int, seed: int) -> Pixels:
    """A picture to ask about."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def held(*pids: int) -> int:
    """Bytes of memory that these processes and their children hold, shared pages once."""
    total = 0
    for pid in [*pids, *(child for parent in pids for child in _children(parent))]:
        try:
            with open(f"/proc/{pid}/smaps_rollup") as file:
                total += sum(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))
        except OSError:
            continue  # it ended meanwhile
    return total


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]
