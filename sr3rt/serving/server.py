"""Triton Inference Server as a process: find one, write it a model repository, start it, ask whether it lives, stop it."""

from __future__ import annotations

import contextlib
import errno
import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sr3rt.errors import BackendError, MissingExtra, OptionError
from sr3rt.serving.configuration import Configuration
from sr3rt.serving.scratch import MEETING, Scratch

REPOSITORY = Path(__file__).parent / "triton_repo"
"""The model repository that comes with sr3rt: `triton_repo/`."""

PROBE = json.dumps({"inputs": [], "parameters": {"probe": True}})
"""Body of a request to model sr3 that answers 200 while steps can be done; see docs/serving.md."""

LOOPBACK = "127.0.0.1"

TIED = Path(__file__).parent / "tied.py"


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where clients reach the guard (guard.py). Raises OptionError for ports that cannot be."""

    host: str = LOOPBACK
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    def __post_init__(self) -> None:
        ports = {"http": self.http, "grpc": self.grpc, "metrics": self.metrics}
        for kind, port in ports.items():
            if not 1 <= port <= 65535:
                raise OptionError(f"the {kind} port must be from 1 to 65535, found {port}")
        if len(set(ports.values())) < len(ports):
            raise OptionError(f"the ports must differ, found {', '.join(f'{kind} {port}' for kind, port in ports.items())}")


class Ports(NamedTuple):
    """Of Triton's own servers."""

    http: int
    grpc: int
    metrics: int


def listening(host: str, port: int, kind: str) -> socket.socket:
    """A socket that listens. Raises OptionError where another process does: its answers would be taken for ours."""
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise OptionError(f"host {host!r} is no address ({why}): give one of this machine's, or 0.0.0.0 for all of them") from None
    try:
        return socket.create_server(where, family=family, backlog=1024)
    except OSError as error:
        advice = "give an address of this machine" if error.errno == errno.EADDRNOTAVAIL else f"choose another {kind} port"
        raise OptionError(f"{host}:{port} cannot be listened on ({os.strerror(error.errno or 0)}): {advice}") from None


def write_repository(target: Path, configuration: Configuration) -> Path:
    """Copy the model repository to `target`, which must not exist, with the configuration's values that are not the default.

    Raises OptionError.
    """
    if target.exists():
        raise OptionError(f"{target} exists: give a folder that does not, or edit the config.pbtxt files there")
    defaults = asdict(Configuration())
    given = {key: str(value) for key, value in asdict(configuration).items() if value != defaults[key]}
    if "bundle" in given:
        given["bundle"] = str(Path(given["bundle"]).absolute())
    shutil.copytree(REPOSITORY, target, ignore=shutil.ignore_patterns("__pycache__"))
    for path in target.glob("*/config.pbtxt"):
        text = path.read_text(encoding="utf-8")
        for key, value in given.items():
            setting = f'key: "{key}" value: {{ string_value: {json.dumps(value)} }}'
            text = re.sub(rf'key: "{key}" value: \{{ string_value: ".*?" \}}', setting.replace("\\", r"\\"), text)
        path.write_text(text, encoding="utf-8")
    return target


class Server:
    """A tritonserver on a repository. Use it in a `with` statement: it is stopped at the end, and when the thread that made it ends.

    ports: of Triton's own, which only this machine reaches: clients come to the guard.

    The server on PATH is taken where there is one, else the one of the `serve` extra, which has Triton's python backend and no other.
    Raises MissingExtra, BackendError.
    """

    def __init__(self, repository: Path, *, arguments: Sequence[str] = ()) -> None:
        self.ports = Ports(*_free_ports(3))
        ports = self.ports._asdict().items()
        listen = [argument for kind, port in ports for argument in (f"--{kind}-address={LOOPBACK}", f"--{kind}-port={port}")]
        self._scratch = Scratch()
        folder = self._scratch.path
        try:
            command, environment = _installed(folder)
            shared = [f"--backend-config=python,shm-region-prefix-name={folder.name}"]
            self._log = (folder / "log").open("wb")
            tie = [sys.executable, "-IS", str(TIED), str(os.getpid())]
            self._process = subprocess.Popen(
                [*tie, *command, f"--model-repository={repository}", *listen, *shared, *arguments],
                env={**environment, MEETING: str(self._scratch.meeting)},
                stdout=self._log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[self._scratch.fileno()],  # it may outlive this process, and needs the folder
            )
        except BaseException:
            self._scratch.remove()
            raise

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of tritonserver; the models' processes are its children."""
        return self._process.pid

    def ready(self, *, within: float, stopping: threading.Event | None = None) -> bool:
        """Wait for a real answer; False where `stopping` is set before. Raises BackendError, with the end of its log, when none comes."""
        stopping = stopping or threading.Event()
        end = time.monotonic() + within
        while (why := self.ill(timeout=within)) is not None:
            if stopping.wait(0.1):
                return False
            if self._process.poll() is not None or time.monotonic() > end:
                log = self.log(4000)
                raise BackendError(f"Triton Inference Server did not become ready: {_of_model(log) or why}\n{log}")
        return True

    def ill(self, *, timeout: float) -> str | None:
        """Why it does not serve, None while it does: asks the model itself, as Triton calls models ready whose process is gone."""
        status = self._process.poll()
        if status is not None:
            return f"the server ended with status {status}"
        return probe(self.ports.http, timeout=timeout)

    def log(self, characters: int) -> str:
        """The end of the server's warnings and errors, and of what the models printed."""
        self._log.flush()
        try:
            lines = (self._scratch.path / "log").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            return f"its log cannot be read: {error}"
        return "\n".join(line for line in lines if not re.match(r"[|+]|I\d{4} |$", line))[-characters:]

    def stop(self, *, patience: float = 60.0) -> None:
        """SIGTERM, which lets requests finish; SIGKILL when that takes longer than `patience` seconds. May be called again."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # models outlive a server that was killed
        self._log.close()
        self._scratch.remove()


def probe(port: int, *, timeout: float) -> str | None:
    """Why the Triton there does no step, None when it does one."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=timeout)
    try:
        connection.request("POST", "/v2/models/sr3/infer", PROBE, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    return None if response.status == 200 else f"HTTP {response.status}: {text}"


def _of_model(log: str) -> str | None:
    """What a model said that could not be loaded, if one did."""
    found = re.search(r"failed to load '\w+' version \d+: \w+: (.+?)(\\n\\nAt:|\"?$)", log, re.MULTILINE)
    return found and found[1].replace('\\"', '"')


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as opened:
        return [opened.enter_context(socket.create_server((LOOPBACK, 0))).getsockname()[1] for _ in range(number)]


def _installed(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Command and environment of the server that is there."""
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])  # the models' Python
    if found := shutil.which("tritonserver"):
        return [found], environment
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(
            "a Triton Inference Server (none is on PATH; here it wants an environment of its own, with NumPy 1.26)",
            "nvidia-pytriton",
            "serve",
        )
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        raise BackendError(
            f"this Triton Inference Server corrupts tensors of NumPy 2, and NumPy {np.__version__} is installed: "
            'make an environment of its own and there run  pip install "sr3rt[serve]"'
        )
    triton = Path(spec.submodule_search_locations[0]) / "tritonserver"
    stub = triton / "python_backend_stubs" / sysconfig.get_python_version() / "triton_python_backend_stub"
    if not stub.exists():
        versions = ", ".join(sorted(path.name for path in stub.parents[1].iterdir()))
        raise BackendError(f"this Triton Inference Server runs Python {versions}; this is Python {sysconfig.get_python_version()}")
    backend = folder / "backends" / "python"  # the stub of this Python version must lie beside the backend
    backend.mkdir(parents=True)
    for source in (*(triton / "backends" / "python").glob("*.*"), stub):
        (backend / source.name).symlink_to(source)
    libraries = [sysconfig.get_config_var("LIBDIR") or "", environment.get("LD_LIBRARY_PATH", "")]  # libpython of this interpreter
    environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    flags = [f"--backend-directory={folder / 'backends'}", f"--cache-directory={triton / 'caches'}", "--disable-auto-complete-config"]
    return [str(triton / "bin" / "tritonserver"), *flags], environment
