"""HTTP, and by grpc_guard.py gRPC, in front of Triton's: what does not survive strangers listens on this machine only, behind this.

Requests are read whole, within a bound, checked (claims.py) and passed on in one piece; answers pass as they come, event by event. It is a
thread of the process that watches Triton, which has nothing else to do: it outlives Triton, so clients are told 503 while that is started
again, and it needs no watching of its own.

Triton's metrics pass here too, with what was refused here (gate.py) added.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import resource
import socket
import threading
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sr3rt.bundle import Bundle
from sr3rt.errors import ImageTooLarge, MissingExtra, OptionError, Overloaded, SR3Error, Stopped
from sr3rt.serving.admission import Place
from sr3rt.serving.claims import check_infer, check_json
from sr3rt.serving.configuration import Configuration
from sr3rt.serving.front import PROBE, Front, refused
from sr3rt.serving.gate import Gate
from sr3rt.serving.grpc_guard import GrpcGuard, listen
from sr3rt.serving.server import LOOPBACK, Address, Ports, listening
from sr3rt.upscaler import SHIPPED

try:
    import aiohttp
    from aiohttp import web
except ModuleNotFoundError as error:
    raise MissingExtra("serving (in an environment of its own: Triton here wants NumPy 1.26)", "aiohttp", "serve") from error

_MODEL = "/v2/models/(sr3|sr3_stream)(/versions/[0-9]{1,9})?"
OFFERED = {
    "GET": re.compile(f"/v2/?|/v2/health/(live|ready)|/v2/models/stats|{_MODEL}(/(ready|config|stats))?"),
    "POST": re.compile(f"{_MODEL}/(infer|generate_stream)|/v2/models/sr3(/versions/[0-9]{{1,9}})?/generate"),
}
"""Methods and paths; every other, Triton's control of models, shared memory, traces and logs among them, is answered 404. `generate` of
sr3_stream is none: Triton answers 200 to it, with an error."""

HEAD = "Inference-Header-Content-Length"  # Triton's: bytes of JSON before the tensors' own
OVERHEAD = 2**16  # bytes of a body beside the picture
IDLE = 1.0  # seconds that a connection to Triton is kept: Triton, told to stop, waits for those too
AWAY = "the server is being started, or went away with this request: try again later"
SPARE = 100  # files that the process that watches Triton keeps for itself
SCRAPES = 10  # connections to the metrics; however many clients there are
_STATUS = ((ImageTooLarge, 413), (OptionError, 400), (Overloaded, 503), (Stopped, 503))

# Between two ends of one connection, or said anew of the body that is passed on.
_NOT_PASSED = (
    HEAD,
    "Connection",
    "Content-Encoding",
    "Content-Length",
    "Expect",
    "Host",
    "Keep-Alive",
    "TE",
    "Trailer",
    "Transfer-Encoding",
    "Upgrade",
)
_NOT_RETURNED = ("Connection", "Keep-Alive", "Transfer-Encoding")
_NOT_ADDED = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")

log = logging.getLogger(__name__)
_quiet = logging.getLogger(f"{__name__}.http")  # a stranger's broken request is no event: it is answered
_quiet.setLevel(logging.CRITICAL)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """body: most bytes of a request's, unpacked. connections: most clients at a time; of gRPC, most calls. requests: `Gate`'s."""

    body: int
    connections: int
    requests: int

    @classmethod
    def of(cls, configuration: Configuration) -> Bounds:
        """Five bytes for each of the largest picture that is taken, as JSON needs for numbers (`255, `), and `OVERHEAD`.

        Each connection takes two of the files that a process may open. Raises BundleError.
        """
        scale = Bundle.open(configuration.bundle or SHIPPED).manifest.scale
        picture = max(configuration.max_file_bytes, 4 * configuration.max_pixels // scale**2)
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        connections = max(1, (files - SPARE) // 2)
        return cls(body=5 * picture + OVERHEAD, connections=connections, requests=configuration.max_requests)


class Guard:
    """Listens from the first on. Use it in a `with` statement. Raises OptionError where another process listens.

    triton: the ports of this machine that Triton itself listens on; None or not there: clients are told 503 or UNAVAILABLE. With another
    value gRPC streams to the Triton before end, once answered; before Triton is told to stop, that is what it would wait for.
    """

    def __init__(self, address: Address, bounds: Bounds) -> None:
        self._address, self._bounds, self._gate = address, bounds, Gate(bounds.requests)
        self._grpc = GrpcGuard(self._gate)
        self._triton: Ports | None = None
        with contextlib.ExitStack() as opened:
            self._http = opened.enter_context(listening(address.host, address.http, "http"))
            self._metrics = opened.enter_context(listening(address.host, address.metrics, "metrics"))
            listening(address.host, address.grpc, "grpc").close()
            opened.pop_all()
        self._closing = asyncio.Event()
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._thread = threading.Thread(target=self._run, name="sr3rt-guard", daemon=True)
        self._thread.start()

    @property
    def triton(self) -> Ports | None:
        return self._triton

    @triton.setter
    def triton(self, ports: Ports | None) -> None:
        self._triton = ports
        self._loop.call_soon_threadsafe(self._grpc.turn_to, ports and ports.grpc)

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Listen no more; answers that are under way have a few seconds."""
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    # --- the thread

    def _run(self) -> None:
        with self._runner:
            self._runner.run(self._serve())

    async def _serve(self) -> None:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, auto_decompress=False, skip_auto_headers=_NOT_ADDED
        ) as self._session:
            stops = [
                await _listen(self._http, self._answer_in_turn, connections=self._bounds.connections, front=self._front),
                await _listen(self._metrics, self._measured, connections=SCRAPES),
            ]
            calls = await listen(
                self._grpc, self._address.host, self._address.grpc, body=self._bounds.body, connections=self._bounds.connections
            )
            await self._closing.wait()
            await asyncio.gather(calls.stop(5), *(stop() for stop in stops))

    def _front(self, handler: asyncio.Protocol) -> Front:
        return Front(handler, self._gate)

    async def _answer_in_turn(self, request: web.BaseRequest) -> web.StreamResponse:
        response = await self._answer(request)
        await response.prepare(request)
        await response.write_eof()
        front = request.transport and request.transport.get_protocol()
        if isinstance(front, Front):
            front.answered()
        return response

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.raw_path.partition("?")[0]
        offered = OFFERED.get(request.method)
        if offered is None or not offered.fullmatch(path):
            return _refusal(404, f"{request.method} {path[:100]} is not offered: docs/serving.md says what is")
        place: Place | None = None
        try:
            body, head = await self._body(request), None
            if request.method == "POST":
                if not path.endswith("_stream"):
                    place = self._gate.place(body, probe=PROBE)
                head = _checked(path, body, request.headers.get(HEAD))
            return await self._passed_on(request, path, body, head, place)
        except SR3Error as error:
            self._gate.refused(error)
            return _refusal(next(status for kind, status in _STATUS if isinstance(error, kind)), str(error))
        except Exception:  # a mistake of ours
            log.exception("the guard failed")
            raise
        finally:
            if place is not None:
                place.release()

    async def _measured(self, request: web.BaseRequest) -> web.StreamResponse:
        """Triton's metrics and the gate's."""
        if (request.method, request.raw_path) != ("GET", "/metrics"):
            return _refusal(404, "only GET /metrics is offered here")
        if self.triton is None:
            return _refusal(503, AWAY)
        try:
            async with self._session.get(f"http://{LOOPBACK}:{self.triton.metrics}/metrics") as answer:
                text = await answer.text()
        except aiohttp.ClientError:
            return _refusal(503, AWAY)
        return web.Response(status=answer.status, text=text + self._gate.metrics(), content_type=answer.content_type)

    async def _body(self, request: web.BaseRequest) -> bytes:
        """All of it, unpacked. Raises ImageTooLarge as soon as that is known, OptionError."""
        limit = self._bounds.body
        if (request.content_length or 0) > limit:
            raise ImageTooLarge(f"the body has {request.content_length} bytes; the limit is {limit}")
        if request.headers.get("Expect", "").lower() == "100-continue":  # as curl asks before a body of a megabyte, and waits a second
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        body = bytearray()
        try:
            async for part in request.content.iter_any():
                body += part
                if len(body) > limit:
                    raise ImageTooLarge(f"the body has more bytes than the limit of {limit}")
        except web.RequestPayloadError as error:
            raise OptionError(f"the body is not what its headers say: {error}") from None
        return _unpacked(bytes(body), request.headers.get("Content-Encoding", "identity"), limit)

    async def _passed_on(
        self, request: web.BaseRequest, path: str, body: bytes, head: int | None, place: Place | None
    ) -> web.StreamResponse:
        """Raises Stopped."""
        headers = request.headers.copy()
        for name in _NOT_PASSED:
            headers.popall(name, None)
        if head is not None:
            headers[HEAD] = str(head)
        response: web.StreamResponse | None = None
        try:
            if self.triton is None:
                raise aiohttp.ClientError
            url = f"http://{LOOPBACK}:{self.triton.http}{path}"
            async with self._session.request(request.method, url, headers=headers, data=body or None) as answer:
                if place is not None:
                    place.release()  # the work is done; the client may be slow
                response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=answer.headers)
                for name in _NOT_RETURNED:
                    response.headers.popall(name, None)
                await response.prepare(request)
                async for part in answer.content.iter_any():
                    await response.write(part)
                await response.write_eof()
                return response
        except aiohttp.ClientError:
            if response is None:
                raise Stopped(AWAY) from None
            if request.transport is not None:
                request.transport.abort()  # half an answer must not look whole
            return response


async def _listen(
    where: socket.socket,
    answer: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
    *,
    connections: int,
    front: Callable[[asyncio.Protocol], asyncio.Protocol] = lambda handler: handler,
) -> Callable[[], Awaitable[None]]:
    """A server on that socket; what is returned ends it. front: what stands before aiohttp's own on a connection."""
    server = _Counting(answer, access_log=None, logger=_quiet, auto_decompress=False, handler_cancellation=True)
    runner = web.ServerRunner(server, shutdown_timeout=5)
    await runner.setup()

    def connected() -> asyncio.BaseProtocol:
        return _Full() if server.clients >= connections else front(server())

    listener = await asyncio.get_running_loop().create_server(connected, sock=where)

    async def stop() -> None:
        listener.close()
        await runner.cleanup()

    return stop


class _Counting(web.Server):  # type: ignore[misc]
    """Counts clients from when they are accepted, as aiohttp's own count does not: many may be before the first of them is seen."""

    clients = 0

    def __call__(self) -> web.RequestHandler:
        self.clients += 1
        return super().__call__()

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        self.clients -= 1
        super().connection_lost(handler, exc)


class _Full(asyncio.Protocol):
    """For one client too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Answer, and close."""
        assert isinstance(transport, asyncio.Transport)
        transport.write(refused("too many connections: try again later", fields="Connection: close\r\n"))
        transport.close()


def _unpacked(body: bytes, encoding: str, limit: int) -> bytes:
    """Not by aiohttp, which would go on unpacking a bomb after it was refused."""
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "deflate"):
        raise OptionError(f"Content-Encoding must be gzip or deflate, found {encoding[:30]!r}")
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)  # either, by its header
    try:
        unpacked = unpacker.decompress(body, limit + 1)
    except zlib.error as error:
        raise OptionError(f"the body is no {encoding}: {error}") from None
    if len(unpacked) > limit:
        raise ImageTooLarge(f"the body, unpacked, has more bytes than the limit of {limit}")
    if not unpacker.eof:
        raise OptionError(f"the body ends before its {encoding} does")
    return unpacked


def _checked(path: str, body: bytes, head: str | None) -> int | None:
    """The bytes of JSON that Triton is to be told of, None where all of the body is JSON. Raises OptionError."""
    if not path.endswith("/infer"):
        check_json(body)
        return None
    if head is None:
        check_infer(body, size=len(body))
        return None
    if not re.fullmatch("[0-9]{1,18}", head) or int(head) > len(body):
        raise OptionError(f"{HEAD} must be a number of bytes, at most the {len(body)} that were sent; found {head[:30]!r}")
    check_infer(body[: int(head)], size=len(body))
    return int(head)


def _refusal(status: int, why: str) -> web.Response:
    return web.Response(status=status, text=_error(why), content_type="application/json")


def _error(why: str) -> str:
    return json.dumps({"error": why})
