"""The server as a process: repositories, unloading, models that die, `sr3rt serve`, and bodies that nobody should send."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import by_http, eventually, free_address, gone, in_hand, metric, post, status
from mutations import mutated

import sr3rt
from sr3rt.errors import BackendError, OptionError
from sr3rt.serving.configuration import Configuration
from sr3rt.serving.guard import Bounds, Guard
from sr3rt.serving.server import Server, write_repository
from sr3rt.upscaler import SHIPPED

PICTURE = np.random.default_rng(0).integers(0, 256, (10, 14, 3), np.uint8)
LARGE = np.zeros((60, 60, 3), np.uint8)


def stub(server_pid: int, model: str) -> int:
    """The process of a model."""
    children = Path(f"/proc/{server_pid}/task/{server_pid}/children").read_text().split()
    (found,) = [int(child) for child in children if f"/{model}/1/model.py" in Path(f"/proc/{child}/cmdline").read_text()]
    return found


def reload(triton: Any, *models: str) -> None:
    for action in ("unload", "load"):
        for model in models:
            post(f"{triton.own_url}/v2/repository/models/{model}/{action}", b"{}")
    triton.server.ready(within=30)


def test_unloading_finishes_the_requests_in_hand(mortal: Any) -> None:
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(by_http, mortal, PICTURE, steps=1000, seed=i) for i in range(8)]
        eventually(lambda: in_hand(mortal) == 8)
        time.sleep(0.3)  # Triton has them by then, and they are not done
        post(f"{mortal.own_url}/v2/repository/models/sr3/unload", b"{}")
        for seed, one in enumerate(asked):
            pixels, _ = one.result(60)
            assert np.abs(pixels.astype(int) - sr3rt.upscale(PICTURE, steps=1000, seed=seed)).max() <= 1
    assert "HTTP 404" in str(mortal.server.ill(timeout=20))
    post(f"{mortal.own_url}/v2/repository/models/sr3/load", b"{}")
    assert by_http(mortal, PICTURE, steps=1)


@pytest.mark.parametrize("model", ["sr3_stream", "sr3"])
def test_a_model_that_is_killed_can_be_brought_back(mortal: Any, model: str) -> None:
    """With sr3_stream the requests in hand end; what is with sr3 itself is never answered by Triton."""
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda seed: by_http(mortal, PICTURE, steps=1, seed=seed), range(4)))
        asked = [pool.submit(by_http, mortal, LARGE, steps=1000, seed=i) for i in range(4 if model == "sr3_stream" else 0)]
        eventually(lambda: metric(mortal, "sr3rt_running") + metric(mortal, "sr3rt_queued") == len(asked))
        process = stub(mortal.server.pid, model)
        os.kill(process, signal.SIGKILL)
        eventually(lambda: gone(process))
        for one in asked:
            assert "restart the server" in str(one.exception(30))
    assert re.search("not healthy|restart the server", str(mortal.server.ill(timeout=20)))
    reload(mortal, "sr3_stream", "sr3")
    pixels, _ = by_http(mortal, PICTURE, steps=2, seed=1)
    assert np.abs(pixels.astype(int) - sr3rt.upscale(PICTURE, steps=2, seed=1)).max() <= 1


def test_bodies_that_nobody_should_send_get_an_error_and_harm_nothing(triton: Any) -> None:
    pick = random.Random(0)
    for i in range(int(os.environ.get("SR3RT_MUTATIONS", "150"))):
        path, body, headers = mutated(pick, i)
        code, text = status(triton.url + path, body, headers)
        assert code == 200 or re.search(r'"error":\s*".+', text), (i, code, text[:200])
    assert triton.server.ill(timeout=20) is None
    assert by_http(triton, PICTURE, steps=1)


# --- sr3rt serve


def test_serve_starts_a_server_restarts_it_when_it_dies_and_stops_it(tmp_path: Path) -> None:
    address = free_address()
    ports = ["--http-port", str(address.http), "--grpc-port", str(address.grpc), "--metrics-port", str(address.metrics)]
    log = (tmp_path / "log").open("w+")
    serving = subprocess.Popen(
        [sys.executable, "-c", "from sr3rt.cli import main; main()", "serve", *ports], stderr=log, stdout=log, cwd=tmp_path
    )

    def said(text: str) -> bool:
        end = time.monotonic() + 60
        while text not in (tmp_path / "log").read_text():
            assert serving.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.1)
        return True

    try:
        assert said(f"http://127.0.0.1:{address.http}/v2/models/sr3/infer")
        assert said('numpy.array([open("photo.png", "rb").read()], object)')
        (server,) = Path(f"/proc/{serving.pid}/task/{serving.pid}/children").read_text().split()
        os.kill(stub(int(server), "sr3_stream"), signal.SIGKILL)
        assert said("the server no longer answers and is started again")
        assert status(f"http://127.0.0.1:{address.http}/v2/models/sr3/infer", b'{"inputs": []}')[0] == 503
        assert said("the server is back")
    finally:
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(60) == 0
    with pytest.raises(OSError, match="refused"):
        post(f"http://127.0.0.1:{address.http}/v2/models/sr3/infer", b"{}")
    assert list(tmp_path.iterdir()) == [tmp_path / "log"]


@pytest.mark.parametrize("kind", ["http", "grpc", "metrics"])
def test_serve_refuses_a_port_that_is_taken(triton: Any, kind: str) -> None:
    address = replace(free_address(), **{kind: getattr(triton.address, kind)})
    with pytest.raises(OptionError, match=rf"cannot be listened on \(Address already in use\): choose another {kind} port"):
        Guard(address, Bounds(body=1, connections=1, requests=1))


def test_a_repository_names_what_differs_from_the_default(tmp_path: Path) -> None:
    bundle = tmp_path / r"odd \ name"
    folder = write_repository(tmp_path / "models", Configuration(bundle=str(bundle), max_requests=5, slots=2))
    core, front = ((folder / name / "config.pbtxt").read_text() for name in ("sr3_stream", "sr3"))
    assert f'key: "bundle" value: {{ string_value: {json.dumps(str(bundle))} }}' in core
    assert 'key: "slots" value: { string_value: "2" }' in core
    assert 'key: "threads" value: { string_value: "" }' in core
    assert 'key: "max_requests" value: { string_value: "5" }' in front
    with pytest.raises(OptionError, match="exists: give a folder that does not"):
        write_repository(tmp_path / "models", Configuration())


def test_a_bundle_may_have_any_name(tmp_path: Path) -> None:
    bundle = shutil.copytree(SHIPPED, tmp_path / "grün 日本 'x'")
    with Server(write_repository(tmp_path / "models", Configuration(bundle=str(bundle)))) as server:
        assert server.ready(within=60)


@pytest.mark.parametrize(("name", "value", "message"), [("bundle", "/nowhere", "/nowhere"), ("backend", "tpu", "unknown backend 'tpu'")])
def test_a_server_that_cannot_start_says_why(tmp_path: Path, name: str, value: str, message: str) -> None:
    repository = write_repository(tmp_path / "models", Configuration())
    written = repository / "sr3_stream" / "config.pbtxt"  # by hand, as `Configuration` would not take all of them
    setting = f'key: "{name}" value: {{ string_value: "'
    written.write_text(written.read_text().replace(setting, setting + value))
    with Server(repository) as server, pytest.raises(BackendError, match=f"did not become ready: .*{message}"):
        server.ready(within=60)


def test_a_configuration_is_checked() -> None:
    given = {"parameters": {"slots": {"string_value": "4"}, "bundle": {"string_value": ""}}}
    assert Configuration.read(json.dumps(given)) == Configuration(slots=4)
    with pytest.raises(OptionError, match="unknown parameter 'slot': expected bundle"):
        Configuration.read(json.dumps({"parameters": {"slot": {"string_value": "4"}}}))
    with pytest.raises(OptionError, match="slots must be a whole number, found 'four'"):
        Configuration.read(json.dumps({"parameters": {"slots": {"string_value": "four"}}}))
