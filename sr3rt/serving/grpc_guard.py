"""gRPC in front of Triton's, as guard.py is HTTP: what Triton does not survive is refused, every other call passes as the bytes it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from sr3rt.errors import MissingExtra, OptionError, Overloaded, SR3Error, Stopped
from sr3rt.serving.claims import check_output, check_shape
from sr3rt.serving.gate import Gate
from sr3rt.serving.server import LOOPBACK

try:
    import grpc
    from google.protobuf.message import DecodeError
    from tritonclient.grpc import service_pb2
except ModuleNotFoundError as error:
    raise MissingExtra("serving (in an environment of its own: Triton here wants NumPy 1.26)", "tritonclient", "serve") from error

_SERVICE = "/inference.GRPCInferenceService/"
INFER, STREAM = f"{_SERVICE}ModelInfer", f"{_SERVICE}ModelStreamInfer"
_ASKED = ("ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics")
OFFERED = {INFER, "/grpc.health.v1.Health/Check", *(_SERVICE + name for name in _ASKED)}
"""Calls with one answer; of the others only `STREAM` is offered."""

_UNBOUNDED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


class GrpcGuard(grpc.GenericRpcHandler):  # type: ignore[misc]
    """All of it belongs to one event loop, the gate's."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._port: int | None = None
        self._left = asyncio.Event()
        self._channel: tuple[int | None, Any] = (None, None)

    def turn_to(self, port: int | None) -> None:
        """The port of this machine that Triton's own gRPC listens on from now on; None: UNAVAILABLE.

        Streams to the Triton before end as soon as it has answered what they asked: it waits for them to, when it is told to stop.
        """
        self._left.set()
        self._port, self._left = port, asyncio.Event()

    def service(self, call: Any) -> Any:
        """What answers that call; None: it is not offered."""
        if call.method == STREAM:
            return grpc.stream_stream_rpc_method_handler(self._stream)
        return grpc.unary_unary_rpc_method_handler(partial(self._unary, call.method)) if call.method in OFFERED else None

    async def _unary(self, method: str, request: bytes, context: Any) -> bytes:
        place = None
        try:
            if method == INFER:
                place = self._gate.place(request, probe=b"\n\x05probe")  # a parameter's name, as protobuf writes it
                _check(request)
            call = (await self._triton()).unary_unary(method)
            return bytes(await call(request, metadata=_metadata(context), timeout=context.time_remaining()))
        except SR3Error as error:
            await self._refuse(context, error)
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details())
        finally:
            if place is not None:
                place.release()
        raise AssertionError("abort does not return")

    async def _stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        left = asyncio.create_task(self._left.wait())
        try:
            channel = await self._triton()
        except Stopped as error:
            left.cancel()
            await self._refuse(context, error)
        call = channel.stream_stream(STREAM)(metadata=_metadata(context), timeout=context.time_remaining())
        refused: list[SR3Error] = []
        read = asyncio.Event()  # whether the client has: Triton keeps what is not, and so is asked for no more meanwhile
        read.set()

        async def pass_on() -> None:
            try:
                while (request := await _next(requests, left)) is not None:
                    _check(request)
                    await call.write(request)
                    await read.wait()
                if left.done():
                    refused.append(Stopped("the server is shutting down, and has answered what came before: ask another"))
                await call.done_writing()
            except OptionError as error:
                refused.append(error)
                call.cancel()
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass  # the call has ended, which its answers tell

        passing = asyncio.create_task(pass_on())
        try:
            async for answer in call:
                read.clear()
                yield answer
                read.set()
            if refused:
                await self._refuse(context, refused[0])
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details())
        except asyncio.CancelledError:
            if not refused:
                raise
            await self._refuse(context, refused[0])
        finally:
            passing.cancel()
            left.cancel()
            call.cancel()

    async def _refuse(self, context: Any, error: SR3Error) -> None:
        self._gate.refused(error)
        code = grpc.StatusCode.UNAVAILABLE if isinstance(error, Overloaded | Stopped) else grpc.StatusCode.INVALID_ARGUMENT
        await context.abort(code, str(error))

    async def _triton(self) -> Any:
        """A channel to it. Raises Stopped."""
        port, channel = self._channel
        if self._port is None:
            raise Stopped("the server is being started, or is stopping: try again later")
        if self._port != port:
            if channel is not None:
                await channel.close()
            channel = grpc.aio.insecure_channel(f"{LOOPBACK}:{self._port}", options=_UNBOUNDED)
            self._channel = self._port, channel
        return channel


async def listen(guard: GrpcGuard, host: str, port: int, *, body: int, connections: int) -> Any:
    """A server of it that runs; `stop` ends it. body: most bytes of a message. connections: most calls at a time.

    Compression is not taken: a message is bounded as it was sent, and a small one can be huge.
    """
    options = [
        ("grpc.max_receive_message_length", body),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),
        ("grpc.compression_enabled_algorithms_bitset", 1),
    ]
    server = grpc.aio.server(handlers=[guard], options=options, maximum_concurrent_rpcs=connections)
    server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    await server.start()
    return server


async def _next(requests: AsyncIterator[bytes], over: asyncio.Task[Any]) -> bytes | None:
    """None where none comes any more, or `over` is done first."""
    coming = asyncio.ensure_future(anext(requests, None))
    try:
        await asyncio.wait((coming, over), return_when=asyncio.FIRST_COMPLETED)
        return await coming if coming.done() else None
    finally:
        coming.cancel()


def _check(request: bytes) -> None:
    """A ModelInferRequest. Raises OptionError."""
    try:
        message = service_pb2.ModelInferRequest.FromString(request)
    except DecodeError as error:
        raise OptionError(f"the message is no ModelInferRequest: {error}") from None
    for number, tensor in enumerate(message.inputs):
        check_shape(list(tensor.shape), f"input {number}", len(request))
    for number, output in enumerate(message.outputs):
        check_output(output.parameters, number)


def _metadata(context: Any) -> Sequence[tuple[str, str | bytes]]:
    """The client's own, without what gRPC adds on each way."""
    return [(key, value) for key, value in context.invocation_metadata() or () if key != "user-agent" and not key.startswith("grpc-")]
