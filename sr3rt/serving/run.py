"""`sr3rt serve`: a server that is started, watched, and started again when it no longer answers."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from sr3rt.errors import BackendError
from sr3rt.serving.configuration import Configuration
from sr3rt.serving.guard import Bounds, Guard
from sr3rt.serving.scratch import Scratch
from sr3rt.serving.server import Address, Server, write_repository
from sr3rt.serving.shared_memory import too_little

START = 120.0  # seconds for a bundle to load
EVERY = 2.0  # seconds between probes
SILENT = 150.0  # seconds for a probe's answer: longer than a step of a large picture
SLACK = 10  # seconds that Triton has to end in when its requests have, or drain_s is over
AT_ONCE = 1.0  # seconds to stop in for a server that has nothing in hand, or is ill
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RESTARTS, WITHIN = 3, 300.0  # more restarts than that in so many seconds, and it is given up


def run(configuration: Configuration, address: Address, *, say: Callable[[str], None]) -> int:
    """Serve until one of `STOPS` comes: 0. One that is ignored stays so, as nohup wants it.

    Raises OptionError, and BackendError when the server cannot be started, or dies again and again.
    """
    if found := too_little(configuration.max_pixels):
        say(f"warning: {found}")
    scratch = Scratch()
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()

    before = {number: signal.signal(number, stop) for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        repository = write_repository(scratch.path / "models", configuration)
        with Guard(address, Bounds.of(configuration)) as guard:
            deaths: list[float] = []
            while not stopping.is_set():
                with Server(repository, arguments=["--log-info=false", f"--exit-timeout-secs={max(1, configuration.drain_s)}"]) as server:
                    guard.triton = server.ports
                    if not server.ready(within=START, stopping=stopping):
                        server.stop(patience=AT_ONCE)
                        break
                    say(_served(address) if not deaths else "the server is back")
                    why = _watch(server, stopping)
                    guard.triton = None
                    if why is None:
                        server.stop(patience=configuration.drain_s + SLACK)
                        break
                    log = server.log(4000)
                    server.stop(patience=AT_ONCE)  # it would wait for requests that nobody works on
                    deaths = [death for death in deaths if time.monotonic() - death < WITHIN] + [time.monotonic()]
                    if len(deaths) > RESTARTS:
                        raise BackendError(f"the server died {len(deaths)} times in {WITHIN:.0f} s, at last: {why}\n{log}")
                    say(f"the server no longer answers and is started again: {why}")
        return 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        scratch.remove()


def _watch(server: Server, stopping: threading.Event) -> str | None:
    """None when asked to stop, else why the server is no good any more."""
    while not stopping.wait(EVERY):
        if (why := server.ill(timeout=SILENT)) is not None:
            return why
    return None


def _served(address: Address) -> str:
    host = f"[{address.host}]" if ":" in address.host else address.host
    http = f"http://{host}:{address.http}"
    return f"""Serving. Stop with Ctrl-C.
  HTTP     {http}/v2/models/sr3/infer
  SSE      {http}/v2/models/sr3_stream/generate_stream
  gRPC     {host}:{address.grpc}, models sr3 and sr3_stream
  metrics  http://{host}:{address.metrics}/metrics

From a shell:
  (printf '{{"base64": true, "image": "'; base64 -w0 photo.png; printf '"}}') |
    curl -s {http}/v2/models/sr3/generate -d @- |
    python3 -c 'import base64, json, sys; sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)["image"]))' > large.png

From Python, with  pip install "tritonclient[http]" :
  import numpy, tritonclient.http as triton
  picture = triton.InferInput("image", [1], "BYTES")
  picture.set_data_from_numpy(numpy.array([open("photo.png", "rb").read()], object))
  answer = triton.InferenceServerClient("{host}:{address.http}").infer("sr3", [picture], parameters={{"steps": 9}})
  open("large.png", "wb").write(answer.as_numpy("image")[0])
"""
