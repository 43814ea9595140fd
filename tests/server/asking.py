"""Requests to a server, in every way that there is."""

from __future__ import annotations

import base64
import io
import json
import queue
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from numpy.typing import NDArray
from PIL import Image

from sr3rt.serving.server import Address

Given = bytes | NDArray[np.uint8]


def free_address() -> Address:
    """Three ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    http, grpc, metrics = (one.getsockname()[1] for one in sockets)
    for one in sockets:
        one.close()
    return Address(http=http, grpc=grpc, metrics=metrics)


def encoded(pixels: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def inputs(library: Any, image: Given) -> list[Any]:
    """For tritonclient.http or .grpc."""
    if isinstance(image, bytes):
        tensor = library.InferInput("image", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([image], np.object_))
    else:
        tensor = library.InferInput("pixels", list(image.shape), "UINT8")
        tensor.set_data_from_numpy(image)
    return [tensor]


def answer(result: Any) -> tuple[NDArray[np.uint8] | None, dict[str, Any]]:
    """Pixels, whatever they came as, and info."""
    info = json.loads(result.as_numpy("info")[0])
    pixels, image = result.as_numpy("pixels"), result.as_numpy("image")
    if image is not None:
        return opened(image[0]), info
    return pixels, info


def opened(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)))


def by_http(triton: Any, image: Given, **parameters: Any) -> tuple[Any, dict[str, Any]]:
    with triton.http() as client:
        return answer(client.infer("sr3", inputs(tritonclient.http, image), parameters=parameters))


def by_grpc(triton: Any, image: Given, **parameters: Any) -> tuple[Any, dict[str, Any]]:
    with triton.grpc() as client:
        return answer(client.infer("sr3", inputs(tritonclient.grpc, image), parameters=parameters))


def by_generate(triton: Any, image: Given, **parameters: Any) -> tuple[Any, dict[str, Any]]:
    """Plain JSON with Base64, as curl sends it."""
    body = json.dumps({"image": base64.b64encode(_file(image)).decode(), "base64": True, **parameters}).encode()
    reply = post(f"{triton.url}/v2/models/sr3/generate", body)
    return opened(base64.b64decode(reply["image"])), json.loads(reply["info"])


def by_stream(triton: Any, image: Given, **parameters: Any) -> tuple[Any, dict[str, Any]]:
    *_, last = stream(triton, image, **parameters)
    return last


def by_events(triton: Any, image: Given, **parameters: Any) -> tuple[Any, dict[str, Any]]:
    *_, last = events(triton, image, **parameters)
    return last


WAYS: tuple[Callable[..., tuple[Any, dict[str, Any]]], ...] = (by_http, by_grpc, by_generate, by_stream, by_events)


def stream(triton: Any, image: Given, *, on_client: Callable[[Any], None] | None = None, **parameters: Any) -> Iterator[Any]:
    """Every response over gRPC streaming."""
    replies: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with triton.grpc() as client:
        client.start_stream(lambda result, error: replies.put((result, error)))
        if on_client:
            on_client(client)
        client.async_stream_infer("sr3_stream", inputs(tritonclient.grpc, image), parameters=parameters, enable_empty_final_response=True)
        while True:
            result, error = replies.get(timeout=60)
            if error is not None:
                raise error
            response = result.get_response()
            if response.outputs:
                yield answer(result)
            if response.parameters["triton_final_response"].bool_param:
                break


def events(triton: Any, image: Given, **parameters: Any) -> Iterator[Any]:
    """Every server-sent event."""
    body = json.dumps({"image": base64.b64encode(_file(image)).decode(), "base64": True, **parameters}).encode()
    request = urllib.request.Request(f"{triton.url}/v2/models/sr3_stream/generate_stream", body)  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
        for line in reply:
            if line.startswith(b"data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"])
                image_text = event.get("image")
                yield opened(base64.b64decode(image_text)) if image_text else None, json.loads(event["info"])


def post(url: str, body: bytes, headers: dict[str, str] | None = None) -> Any:
    """The JSON that is answered; urllib.error.HTTPError otherwise."""
    request = urllib.request.Request(url, body, headers or {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
        return json.loads(reply.read() or b"{}")


def status(url: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, str]:
    """HTTP status and text."""
    request = urllib.request.Request(url, body, headers or {"Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:  # noqa: S310
            return 200, reply.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def metric(triton: Any, name: str) -> float:
    """Sum over the labels."""
    with urllib.request.urlopen(triton.metrics_url, timeout=10) as reply:  # noqa: S310
        lines = [line.decode() for line in reply]
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def settled(triton: Any, *names: str) -> list[float]:
    """Figures once all that was asked for has ended, those given up too, and is told, which takes half a second."""
    time.sleep(0.7)
    eventually(lambda: metric(triton, "sr3rt_running") == metric(triton, "sr3rt_queued") == 0)
    time.sleep(0.7)
    return [metric(triton, name) for name in names]


def in_hand(triton: Any) -> int:
    """Requests for one answer that the guard has let through and that are not answered, at this moment."""
    found: int = triton.guard._gate._admission.unfinished
    return found


def gone(process: int) -> bool:
    """Whether it ended; one that nobody waited for has ended too."""
    try:
        return ") Z " in Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def eventually(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def _file(image: Given) -> bytes:
    return image if isinstance(image, bytes) else encoded(image)
