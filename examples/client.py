"""Upscale a picture by a server that `sr3rt serve` started, with a progress bar.

pip install "tritonclient[http,grpc]" rich
python examples/client.py photo.png large.png --steps 25                # gRPC stream: progress, and previews with --previews 5
python examples/client.py photo.png large.jpg --protocol http           # one request, one answer; also: --protocol grpc
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
from http.client import HTTPException
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import tritonclient.grpc
    import tritonclient.http
    from rich.progress import Progress
    from tritonclient.utils import InferenceServerException
except ModuleNotFoundError as error:
    raise SystemExit(f'{error}: run  pip install "tritonclient[http,grpc]" rich') from None

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
SLACK = 5.0  # seconds that the server's own answer, that time ran out, has to arrive


def main() -> None:
    """The command line. Exit status 1 for what went wrong, in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path, help="its suffix says the format: .png, .jpg or .webp")
    parser.add_argument("--protocol", choices=["stream", "grpc", "http"], default="stream")
    parser.add_argument("--server", default=None, help="host:port; 127.0.0.1 with Triton's usual port otherwise")
    parser.add_argument(
        "--previews", type=int, default=0, help="write NAME-STEP, in the format of the result, every so many steps (stream only)"
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds until the answer, waiting included; 600 otherwise")
    for name, kind in (("steps", int), ("seed", str), ("sampler", str)):
        parser.add_argument(f"--{name}", type=kind)
    options = parser.parse_args()
    if options.output.suffix.lower() not in FORMATS:
        parser.error(f"{options.output}: expected a name that ends in {', '.join(FORMATS)}")
    if options.server and "://" in options.server:
        parser.error(f"--server {options.server}: expected host:port, without a scheme")
    if options.previews and options.protocol != "stream":
        parser.error(f"--previews: only a stream has them, and --protocol is {options.protocol}")
    given = {name: getattr(options, name) for name in ("steps", "seed", "sampler")}
    parameters = {name: value for name, value in given.items() if value is not None}
    parameters |= {"format": FORMATS[options.output.suffix.lower()], "timeout_ms": round(1000 * options.timeout)}
    try:
        if options.protocol == "stream":
            image, info = stream(options, {**parameters, "previews": options.previews})
        else:
            image, info = ask(options, parameters)
        options.output.write_bytes(image)
    except (InferenceServerException, OSError, HTTPException) as error:  # the last where something else answers there
        raise SystemExit(f"{parser.prog}: {error}") from None
    seconds, queued = info["total_ms"] / 1000, info["queue_ms"] / 1000
    print(f"{options.output}: seed {info['seed']}, {info['steps']} steps, {seconds:.2f} s of which it waited {queued:.2f} s")


def ask(options: argparse.Namespace, parameters: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """One request, one answer."""
    patience = options.timeout + SLACK
    if options.protocol == "http":
        with tritonclient.http.InferenceServerClient(options.server or "127.0.0.1:8000", network_timeout=patience) as client:
            result = client.infer("sr3", [picture(tritonclient.http, options.input)], parameters=parameters)
    else:
        with tritonclient.grpc.InferenceServerClient(options.server or "127.0.0.1:8001") as client:
            result = client.infer("sr3", [picture(tritonclient.grpc, options.input)], parameters=parameters, client_timeout=patience)
    return result.as_numpy("image")[0], json.loads(result.as_numpy("info")[0])


def stream(options: argparse.Namespace, parameters: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """One request, an answer for each step; the last, which has a seed, is the result."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    inputs = [picture(tritonclient.grpc, options.input)]
    with Progress() as progress, tritonclient.grpc.InferenceServerClient(options.server or "127.0.0.1:8001") as client:
        task = progress.add_task(options.input.name, total=None)
        client.start_stream(lambda result, error: answers.put((result, error)), stream_timeout=options.timeout + SLACK)
        with contextlib.suppress(InferenceServerException):  # of a stream that has failed, whose callback is told why
            client.async_stream_infer("sr3_stream", inputs, parameters=parameters)
        try:
            while True:
                result, error = answers.get()
                if error is not None:
                    raise error
                info, image = json.loads(result.as_numpy("info")[0]), result.as_numpy("image")
                progress.update(task, completed=info["step"], total=info["steps"])
                if "seed" in info:
                    return image[0], info
                if image is not None:
                    options.output.with_stem(f"{options.output.stem}-{info['step']}").write_bytes(image[0])
        except KeyboardInterrupt:
            client.stop_stream(cancel_requests=True)  # the server stops before its next step
            raise


def picture(library: Any, path: Path) -> Any:
    """The file's bytes as the input `image`."""
    tensor = library.InferInput("image", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([path.read_bytes()], np.object_))
    return tensor


if __name__ == "__main__":
    main()
