"""A server to measure: Triton on the model that ships, and the guard in front of it."""

from __future__ import annotations

import multiprocessing
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sr3rt.serving.configuration import Configuration
from sr3rt.serving.guard import Bounds, Guard
from sr3rt.serving.server import Address, Ports, Server, probe, write_repository

LEAK = """
from sr3rt.serving.triton import Core

class TritonPythonModel(Core):
    kept = []

    def _submit(self, *request, **options):
        self.kept.append(bytearray(b"x" * {size}))
        return super()._submit(*request, **options)
"""


@dataclass(frozen=True)
class Running:
    """A server that is up. url: the guard's. own_url: Triton's own. pids: of both."""

    url: str
    own_url: str
    address: Address
    pids: tuple[int, int]


@contextmanager
def serving(configuration: Configuration, *, leak: int = 0) -> Iterator[Running]:
    """A server of the model that ships. leak: bytes that it keeps of every request that its core gets, on purpose."""
    with tempfile.TemporaryDirectory() as folder:
        repository = write_repository(Path(folder) / "models", configuration)
        if leak:
            (repository / "sr3_stream" / "1" / "model.py").write_text(LEAK.format(size=leak), encoding="utf-8")
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
        http, grpc, metrics = (one.getsockname()[1] for one in sockets)
        for one in sockets:
            one.close()
        address = Address(http=http, grpc=grpc, metrics=metrics)
        with Server(repository) as server:
            server.ready(within=120)
            # Not in this process, as the load is: they would share Python's lock.
            spawn = multiprocessing.get_context("spawn")
            guard = spawn.Process(target=_guarding, args=(address, Bounds.of(configuration), server.ports), daemon=True)
            guard.start()
            while probe(address.http, timeout=60) is not None:
                assert guard.is_alive()
                time.sleep(0.1)
            assert guard.pid is not None
            try:
                yield Running(f"http://127.0.0.1:{http}", f"http://127.0.0.1:{server.ports.http}", address, (server.pid, guard.pid))
            finally:
                guard.terminate()


def _guarding(address: Address, bounds: Bounds, triton: Ports) -> None:
    with Guard(address, bounds) as guard:
        guard.triton = triton
        signal.pause()
