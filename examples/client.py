"""Upscale a picture by a server that `sr3rt serve` started, with a progress bar.

pip install "tritonclient[http,grpc]" rich
python examples/client.py photo.png large.png --steps 25                # gRPC stream: progress, and previews with --previews 5
python examples/client.py photo.png large.png --protocol http           # one request, one answer; also: --protocol grpc
"""

from __future__ import annotations

import argparse
import json
import queue
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http
from rich.progress import Progress


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--protocol", choices=["stream", "grpc", "http"], default="stream")
    parser.add_argument("--server", default=None, help="host:port; 127.0.0.1 with Triton's usual port otherwise")
    parser.add_argument("--previews", type=int, default=0, help="write NAME-STEP.png every so many steps (stream only)")
    for name, kind in (("steps", int), ("seed", int), ("timeout-ms", int), ("sampler", str)):
        parser.add_argument(f"--{name}", type=kind)
    options = parser.parse_args()
    given = {name: getattr(options, name) for name in ("steps", "seed", "sampler", "timeout_ms")}
    parameters = {name: value for name, value in given.items() if value is not None}
    if options.protocol == "stream":
        image, info = stream(options, {**parameters, "previews": options.previews})
    else:
        image, info = ask(options, parameters)
    options.output.write_bytes(image)
    seconds, queued = info["total_ms"] / 1000, info["queue_ms"] / 1000
    print(f"{options.output}: seed {info['seed']}, {info['steps']} steps, {seconds:.2f} s of which it waited {queued:.2f} s")


def ask(options: argparse.Namespace, parameters: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """One request, one answer."""
    library, port = (tritonclient.http, 8000) if options.protocol == "http" else (tritonclient.grpc, 8001)
    with library.InferenceServerClient(options.server or f"127.0.0.1:{port}") as client:
        result = client.infer("sr3", [picture(library, options.input)], parameters=parameters)
    return result.as_numpy("image")[0], json.loads(result.as_numpy("info")[0])


def stream(options: argparse.Namespace, parameters: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """One request, an answer for each step; the last, which has a seed, is the result."""
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with Progress() as progress, tritonclient.grpc.InferenceServerClient(options.server or "127.0.0.1:8001") as client:
        task = progress.add_task(options.input.name, total=None)
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("sr3_stream", [picture(tritonclient.grpc, options.input)], parameters=parameters)
        try:
            while True:
                result, error = answers.get()
                if error is not None:
                    raise SystemExit(f"the server refused: {error}")
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
