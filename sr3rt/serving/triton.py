"""Triton's two models (python backend): `Core` owns the weights and the batcher and tells progress; `Front` answers once.

A decoupled model, which may answer many times, refuses plain HTTP and unary gRPC calls; so `Front`, which is not decoupled, passes
such a call on to `Core`'s process (link.py). All requests so share one batch. Both answer from their own threads, after `execute` has
returned. Importable only in Triton's python stub, which brings `triton_python_backend_utils`.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from sr3rt.decoding import Limits
from sr3rt.errors import Cancelled, DeadlineExceeded, ImageError, OptionError, Overloaded, Stopped
from sr3rt.serving import link
from sr3rt.serving.admission import Admission, Place
from sr3rt.serving.configuration import Configuration
from sr3rt.serving.meters import Meters
from sr3rt.serving.query import Query
from sr3rt.serving.service import Encoded, Handle, Reply, Service
from sr3rt.serving.shared_memory import most_pixels, too_little
from sr3rt.upscaler import load

WATCH = 0.1  # seconds between looks at which requests were cancelled
RESERVED = "triton_"  # how parameters begin that Triton's own clients add

_CODES = (  # by name: the module is whole only when a model is initialised
    (OptionError, "INVALID_ARG"),
    (ImageError, "INVALID_ARG"),
    (Overloaded, "UNAVAILABLE"),
    (DeadlineExceeded, "UNAVAILABLE"),
    (Stopped, "UNAVAILABLE"),
    (Cancelled, "CANCELLED"),
)


class Core:
    """`sr3_stream`: decoupled, a response for each step and one for the result."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle and prove it by a step: a model that becomes ready can upscale."""
        _check_tensors()
        config = Configuration.read(args["model_config"])
        limits = Limits(file_bytes=config.max_file_bytes)
        upscaler = load(
            os.fsdecode(config.bundle.encode()) or None,  # Triton's stub takes names of files for ASCII
            backend=config.backend,
            precision=config.precision,
            device=config.device,
            threads=config.threads,
            limits=limits,
        )
        self._drain = config.drain_s
        if found := too_little(config.max_pixels):
            pb.Logger.log_warn(found)
        settings = replace(config.settings, pixels=most_pixels(config.max_pixels))
        self._service = Service(upscaler, settings)
        self._service.probe()
        self._watch = _Watch()
        self._meters = Meters(args["model_name"], self._service)
        self._link = link.Responder(link.address(args["model_name"]), self._relayed)

    def execute(self, requests: list[Any]) -> None:
        """Take each request on, or refuse it, at once."""
        for request in requests:
            sender = _Sender(request)
            try:
                self._begin(request, sender)
            except Exception as error:
                sender.send(_refusal(error))

    def finalize(self) -> None:
        """Unloading: finish what is in hand."""
        self._link.close()
        self._service.close(drain=self._drain)
        self._meters.close()
        self._watch.close()

    def _begin(self, request: Any, sender: _Sender) -> None:
        parameters = json.loads(request.parameters() or "{}")
        outputs = request.requested_output_names()
        if "probe" in parameters:
            threading.Thread(target=self._probe, args=(sender, outputs), daemon=True).start()
            return

        def reply(outcome: Reply | Exception) -> None:
            if isinstance(outcome, Exception):
                sender.send(_refusal(outcome))
            else:
                sender.send(_response(outcome.info, outcome.image, outputs), last=outcome.final)

        handle = self._submit(_image(request), _query(parameters, outputs, request.timeout()), reply, progress=True)
        self._watch.add(sender, handle.cancel)

    def _relayed(self, message: dict[str, Any], data: bytes, send: link.Send) -> Handle | None:
        """A request of Front's."""

        def reply(outcome: Reply | Exception) -> None:
            if isinstance(outcome, Exception):
                send(dict(zip(("error", "code"), _described(outcome), strict=True)), b"")
            else:
                send({"info": outcome.info, **_packed(outcome.image)}, _bytes(outcome.image))

        try:
            if "probe" in message["parameters"]:
                reply(Reply(self._service.probe(), None, final=True))
                return None
            query = _query(message["parameters"], message["outputs"], message["timeout"])
            return self._submit(_unpacked(message, data), query, reply, progress=False)
        except Exception as error:
            reply(error)
            return None

    def _submit(self, image: Encoded, query: Query, reply: Callable[[Reply | Exception], None], *, progress: bool) -> Handle:
        def counted(outcome: Reply | Exception) -> None:
            if isinstance(outcome, Exception) or outcome.final:
                self._meters.observe(outcome)
            reply(outcome)

        try:
            return self._service.submit(image, query, counted, progress=progress)
        except Exception as error:
            self._meters.observe(error)
            raise

    def _probe(self, sender: _Sender, outputs: list[str]) -> None:
        try:
            sender.send(_response(self._service.probe(), None, outputs))
        except Exception as error:
            sender.send(_refusal(error))


class Front:
    """`sr3`: one answer to each request, over HTTP and unary gRPC; `Core` does the work."""

    def initialize(self, args: dict[str, str]) -> None:
        """Needs nothing but the name of the core."""
        _check_tensors()
        config = Configuration.read(args["model_config"])
        # The core's own limit, so that most of what it would refuse does not get as far.
        self._admission = Admission(requests=config.max_requests, pixels=config.max_pixels)
        self._meters = Meters(args["model_name"])
        self._watch = _Watch()
        self._peer = link.Peer(link.address(config.core))

    def execute(self, requests: list[Any]) -> None:
        """Pass each request on, from a thread of its own."""
        for request in requests:
            sender = _Sender(request)
            parameters = json.loads(request.parameters() or "{}")
            try:
                place = None if "probe" in parameters else self._admission.admit(0)
            except Overloaded as error:
                self._meters.observe(error)
                sender.send(_refusal(error))
                continue
            threading.Thread(target=self._relay, args=(request, sender, parameters, place), daemon=True).start()

    def finalize(self) -> None:
        """Unloading, when Triton has seen every answer."""
        self._meters.close()
        self._watch.close()
        self._peer.close()

    def _relay(self, request: Any, sender: _Sender, parameters: dict[str, Any], place: Place | None) -> None:
        outputs = list(request.requested_output_names())
        try:
            image = None if "probe" in parameters else _image(request)
            message = {"parameters": parameters, "outputs": outputs, "timeout": request.timeout(), **_packed(image)}
            answer, data = self._peer.ask(message, _bytes(image), begun=lambda cancel: self._watch.add(sender, cancel))
            if "error" in answer:
                response = pb.InferenceResponse(error=pb.TritonError(answer["error"], getattr(pb.TritonError, answer["code"])))
            else:
                response = _response(answer["info"], None if "shape" not in answer else _unpacked(answer, data), outputs)
            sender.send(response)
        except Exception as error:
            sender.send(_refusal(error))
        finally:
            if place is not None:
                place.release()


class _Sender:
    """A request's answers. Triton's own sender may not be asked anything once the last is out: the server would crash."""

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        self._lock = threading.Lock()
        self._done = False

    def send(self, response: Any, *, last: bool = True) -> None:
        """The next answer; nothing after the last."""
        with self._lock:
            if self._done:
                return
            self._done = last
            try:
                if last:
                    self._sender.send(response, flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                else:
                    self._sender.send(response)
            except Exception as error:  # the client is gone: nobody to tell
                pb.Logger.log_warn(f"an answer could not be sent: {error}")

    @property
    def done(self) -> bool:
        """Whether the last answer is out."""
        return self._done

    def cancelled(self) -> bool:
        """Whether the client no longer waits."""
        with self._lock:
            return not self._done and bool(self._sender.is_cancelled())


class _Watch:
    """A thread that notices which requests were cancelled; Triton only answers when asked."""

    def __init__(self) -> None:
        self._watched = deque[tuple[_Sender, Callable[[], None]]]()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="sr3rt-watch", daemon=True)
        self._thread.start()

    def add(self, sender: _Sender, cancel: Callable[[], None]) -> None:
        """Call `cancel` once when the request of `sender` is cancelled, until it is answered."""
        self._watched.append((sender, cancel))

    def close(self) -> None:
        """Stop looking."""
        self._closed.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._closed.wait(WATCH):
            for _ in range(len(self._watched)):
                sender, cancel = self._watched.popleft()
                if sender.cancelled():
                    cancel()
                elif not sender.done:
                    self._watched.append((sender, cancel))


def _query(parameters: dict[str, Any], outputs: list[str], timeout: int) -> Query:
    """timeout: Triton's own, microseconds; 0: none."""
    given = {key: value for key, value in parameters.items() if not key.startswith(RESERVED)}
    if "sr3_priority" in given:  # what is called priority is kept by Triton for itself
        given["priority"] = given.pop("sr3_priority")
    if timeout:
        given.setdefault("timeout_ms", timeout / 1000)
    asked = {"image", "pixels"} & set(outputs)
    if len(asked) == 1:
        given.setdefault("format", "pixels" if "pixels" in asked else "png")
    return Query.parse(given)


def _image(request: Any) -> Encoded:
    encoded, pixels = (pb.get_input_tensor_by_name(request, name) for name in ("image", "pixels"))
    if (encoded is None) == (pixels is None):
        raise OptionError(
            "give one input: `image`, the bytes of a picture file, or `pixels`, uint8 (height, width, channels); "
            f"found {'neither' if encoded is None else 'both'}"
        )
    if pixels is not None:
        array: Encoded = np.array(pixels.as_numpy())  # Triton's memory is taken back
        return array
    (data,) = encoded.as_numpy().ravel()
    return bytes(data)


def _packed(image: Encoded | None) -> dict[str, Any]:
    """What a message says of an image whose bytes follow."""
    return {} if image is None else {"shape": None if isinstance(image, bytes) else list(image.shape)}


def _bytes(image: Encoded | None) -> bytes:
    return b"" if image is None else image if isinstance(image, bytes) else image.tobytes()


def _unpacked(message: dict[str, Any], data: bytes) -> Encoded:
    return data if message["shape"] is None else np.frombuffer(data, np.uint8).reshape(message["shape"])


def _response(info: dict[str, Any], image: Encoded | None, outputs: list[str]) -> Any:
    tensors = [pb.Tensor("info", np.array([json.dumps(info).encode()], np.object_))]
    if isinstance(image, bytes):
        tensors.append(pb.Tensor("image", np.array([image], np.object_)))
    elif image is not None:
        tensors.append(pb.Tensor("pixels", np.ascontiguousarray(image)))
    return pb.InferenceResponse([tensor for tensor in tensors if tensor.name() in outputs])


def _refusal(error: Exception) -> Any:
    text, code = _described(error)
    return pb.InferenceResponse(error=pb.TritonError(text, getattr(pb.TritonError, code)))


def _described(error: Exception) -> tuple[str, str]:
    return str(error) or type(error).__name__, next((code for kind, code in _CODES if isinstance(error, kind)), "INTERNAL")


def _check_tensors() -> None:
    """Some of Triton's stubs silently corrupt tensors of a NumPy newer than they know: seen where the data leaves NumPy."""
    array = np.arange(1, 13, dtype=np.uint8).reshape(2, 3, 2)
    if pb.Tensor.from_dlpack("x", pb.Tensor("x", array).to_dlpack()).as_numpy().tolist() != array.tolist():
        raise pb.TritonModelException(
            f"this Triton's python backend corrupts tensors of NumPy {np.__version__}: install numpy==1.26.4 where it runs Python"
        )
