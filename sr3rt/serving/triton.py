"""Triton's two models (python backend): `Core` owns the weights and the batcher and tells progress; `Front` answers once.

A decoupled model, which may answer many times, refuses plain HTTP and unary gRPC calls; so `Front`, which is not decoupled, passes
such a call on to `Core` inside the server. All requests so share one batch. Both answer from their own threads, after `execute` has
returned. Importable only in Triton's python stub, which brings `triton_python_backend_utils`.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from sr3rt.decoding import Limits
from sr3rt.errors import Cancelled, DeadlineExceeded, ImageError, OptionError, Overloaded, Stopped
from sr3rt.serving.admission import Admission, Place
from sr3rt.serving.configuration import Configuration
from sr3rt.serving.meters import Meters
from sr3rt.serving.query import Query
from sr3rt.serving.service import Encoded, Handle, Reply, Service
from sr3rt.upscaler import load

HEARTBEAT = 1.0  # seconds between questions whether the core lives
WATCH = 0.05  # seconds between looks at which requests were cancelled
RELAYED = "sr3rt"  # parameter in which Front passes on everything: a call inside the server takes no floats and no timeout
CANCEL = "sr3rt_cancel"
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
            config.bundle or None,
            backend=config.backend,
            precision=config.precision,
            device=config.device,
            threads=config.threads,
            limits=limits,
        )
        self._drain = config.drain_s
        self._service = Service(upscaler, config.settings)
        self._service.probe()
        self._running: dict[str, Handle] = {}
        self._watch = _Watch()
        self._meters = Meters(args["model_name"], self._service)

    def execute(self, requests: list[Any]) -> None:
        """Take each request on, or refuse it, at once."""
        for request in requests:
            sender = _Sender(request)
            try:
                self._begin(request, sender)
            except Exception as error:
                sender.send(_refusal(error, request))

    def finalize(self) -> None:
        """Unloading: finish what is in hand."""
        self._service.close(drain=self._drain)
        self._meters.close()
        self._watch.close()

    def _begin(self, request: Any, sender: _Sender) -> None:
        parameters = json.loads(request.parameters() or "{}")
        relayed = RELAYED in parameters
        if relayed:
            parameters = json.loads(parameters[RELAYED])
        if CANCEL in parameters:
            if handle := self._running.get(parameters[CANCEL]):
                handle.cancel()
            sender.send(_response({}, None, request))
            return
        if "probe" in parameters:
            threading.Thread(target=self._probe, args=(request, sender), daemon=True).start()
            return
        name = parameters.pop("id", "") if relayed else ""
        parameters = {key: value for key, value in parameters.items() if not key.startswith(RESERVED)}
        if "sr3_priority" in parameters:  # what is called priority is kept by Triton for itself
            parameters["priority"] = parameters.pop("sr3_priority")
        if request.timeout():
            parameters.setdefault("timeout_ms", request.timeout() / 1000)
        asked = {"image", "pixels"} & set(request.requested_output_names())
        if len(asked) == 1:
            parameters.setdefault("format", "pixels" if "pixels" in asked else "png")
        name = name or secrets.token_hex(16)

        def reply(outcome: Reply | Exception) -> None:
            last = isinstance(outcome, Exception) or outcome.final
            if last:
                self._watch.discard(name)
                self._running.pop(name, None)
                self._meters.observe(outcome)
            if isinstance(outcome, Exception):
                sender.send(_refusal(outcome, request))
            else:
                sender.send(_response(outcome.info, outcome.image, request), last=last)

        try:
            handle = self._service.submit(_image(request), Query.parse(parameters), reply, progress=not relayed)
        except Exception as error:
            self._meters.observe(error)
            raise
        self._running[name] = handle
        if not relayed:  # Front watches those, and says so
            self._watch.add(name, sender, handle.cancel)
        if handle.done:
            self._watch.discard(name)
            self._running.pop(name, None)

    def _probe(self, request: Any, sender: _Sender) -> None:
        try:
            sender.send(_response(self._service.probe(), None, request))
        except Exception as error:
            sender.send(_refusal(error, request))


class Front:
    """`sr3`: one answer to each request, over HTTP and unary gRPC; `Core` does the work."""

    def initialize(self, args: dict[str, str]) -> None:
        """Needs nothing but the name of the core."""
        _check_tensors()
        config = Configuration.read(args["model_config"])
        self._core = config.core
        # The core's own limit, so that most of what it would refuse does not get as far.
        self._admission = Admission(requests=config.max_requests, pixels=config.max_pixels)
        self._meters = Meters(args["model_name"])
        self._watch = _Watch()
        self._relayed: dict[str, tuple[_Sender, Any]] = {}
        self._closed = threading.Event()
        self._heart = threading.Thread(target=self._listen, name="sr3rt-heart", daemon=True)
        self._heart.start()

    def execute(self, requests: list[Any]) -> None:
        """Pass each request on, from a thread of its own."""
        for request in requests:
            sender = _Sender(request)
            parameters = json.loads(request.parameters() or "{}")
            try:
                place = None if "probe" in parameters else self._admission.admit(0)
            except Overloaded as error:
                self._meters.observe(error)
                sender.send(_refusal(error, request))
                continue
            # Not of a pool: a call whose core dies never returns, and only daemon threads may be left behind.
            threading.Thread(target=self._relay, args=(request, sender, parameters, place), daemon=True).start()

    def finalize(self) -> None:
        """Unloading, when Triton has seen every answer."""
        self._closed.set()
        self._heart.join()
        self._meters.close()
        self._watch.close()

    def _relay(self, request: Any, sender: _Sender, parameters: dict[str, Any], place: Place | None) -> None:
        name = secrets.token_hex(16)
        try:
            parameters["id"] = name
            if request.timeout():
                parameters.setdefault("timeout_ms", request.timeout() / 1000)
            wanted = sorted({*request.requested_output_names(), "info"})
            call = self._call(parameters, request.inputs(), wanted)
            self._watch.add(name, sender, lambda: self._cancel(name))
            self._relayed[name] = sender, request
            answer = None
            for response in call.exec(decoupled=True):
                if response.has_error() or response.output_tensors():
                    answer = response
            if answer is None:
                raise Stopped(f"the model {self._core} gave no answer: restart the server")
            self._watch.discard(name)
            sender.send(_answer(answer))
        except Exception as error:
            self._watch.discard(name)
            sender.send(_refusal(Stopped(f"the model {self._core} cannot be reached: {error}"), request))
        finally:
            self._relayed.pop(name, None)
            if place is not None:
                place.release()

    def _listen(self) -> None:
        """Every `HEARTBEAT` ask the core for a word while requests are with it: of a process that dies, those would never end."""
        while not self._closed.wait(HEARTBEAT):
            waiting = dict(self._relayed)
            if waiting and (why := self._silent()):
                for name, (sender, request) in waiting.items():
                    self._watch.discard(name)
                    sender.send(_refusal(Stopped(f"the model {self._core} is gone, restart the server: {why}"), request))

    def _silent(self) -> str:
        try:
            errors = [
                response.error().message()
                for response in self._call({CANCEL: ""}, [], ["info"]).exec(decoupled=True)
                if response.has_error()
            ]
        except Exception as error:
            return str(error)
        return errors[0] if errors else ""

    def _call(self, parameters: dict[str, Any], inputs: list[Any], outputs: list[str]) -> Any:
        return pb.InferenceRequest(
            model_name=self._core, requested_output_names=outputs, inputs=inputs, parameters={RELAYED: json.dumps(parameters)}
        )

    def _cancel(self, name: str) -> None:
        for _ in self._call({CANCEL: name}, [], ["info"]).exec(decoupled=True):
            pass


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

    def cancelled(self) -> bool:
        """Whether the client no longer waits."""
        with self._lock:
            return not self._done and bool(self._sender.is_cancelled())


class _Watch:
    """A thread that notices which requests were cancelled; Triton only answers when asked."""

    def __init__(self) -> None:
        self._watched: dict[str, tuple[_Sender, Callable[[], None]]] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="sr3rt-watch", daemon=True)
        self._thread.start()

    def add(self, name: str, sender: _Sender, cancel: Callable[[], None]) -> None:
        """Call `cancel` once when the request of `sender` is cancelled."""
        self._watched[name] = sender, cancel

    def discard(self, name: str) -> None:
        """It is answered."""
        self._watched.pop(name, None)

    def close(self) -> None:
        """Stop looking."""
        self._closed.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._closed.wait(WATCH):
            for name, (sender, cancel) in list(self._watched.items()):
                if sender.cancelled():
                    self.discard(name)
                    cancel()


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


def _response(info: dict[str, Any], image: Encoded | None, request: Any) -> Any:
    tensors = [pb.Tensor("info", np.array([json.dumps(info).encode()], np.object_))]
    if isinstance(image, bytes):
        tensors.append(pb.Tensor("image", np.array([image], np.object_)))
    elif image is not None:
        tensors.append(pb.Tensor("pixels", np.ascontiguousarray(image)))
    wanted = request.requested_output_names()
    return pb.InferenceResponse([tensor for tensor in tensors if tensor.name() in wanted])


def _refusal(error: Exception, request: Any) -> Any:
    """`error` as the answer to `request`. Front gets it as JSON: on a call inside the server, Triton forgets the code of an error."""
    text, code = _described(error)
    if RELAYED in (request.parameters() or ""):
        return _response({"error": text, "code": code}, None, request)
    return pb.InferenceResponse(error=pb.TritonError(text, getattr(pb.TritonError, code)))


def _answer(response: Any) -> Any:
    """What Front answers, from the core's last response."""
    if response.has_error():  # Triton's own, as the core's are in `info`
        text = f"the model that holds the weights cannot be reached, restart the server: {response.error().message()}"
        return pb.InferenceResponse(error=pb.TritonError(text, pb.TritonError.UNAVAILABLE))
    tensors = response.output_tensors()
    (info,) = (json.loads(tensor.as_numpy()[0]) for tensor in tensors if tensor.name() == "info")
    if "error" in info:
        return pb.InferenceResponse(error=pb.TritonError(info["error"], getattr(pb.TritonError, info["code"])))
    return pb.InferenceResponse(tensors)


def _described(error: Exception) -> tuple[str, str]:
    return str(error) or type(error).__name__, next((code for kind, code in _CODES if isinstance(error, kind)), "INTERNAL")


def _check_tensors() -> None:
    """Some of Triton's stubs silently corrupt tensors of a NumPy newer than they know: seen where the data leaves NumPy."""
    array = np.arange(1, 13, dtype=np.uint8).reshape(2, 3, 2)
    if pb.Tensor.from_dlpack("x", pb.Tensor("x", array).to_dlpack()).as_numpy().tolist() != array.tolist():
        raise pb.TritonModelException(
            f"this Triton's python backend corrupts tensors of NumPy {np.__version__}: install numpy==1.26.4 where it runs Python"
        )
