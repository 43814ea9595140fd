"""One real Triton Inference Server for all tests here, with the model that ships."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import tritonclient.grpc
import tritonclient.http
from asking import free_address

from sr3rt.serving.configuration import Configuration
from sr3rt.serving.guard import Bounds, Guard
from sr3rt.serving.server import Address, Server, write_repository


@dataclass(frozen=True)
class Triton:
    """A server, and clients of it."""

    server: Server
    guard: Guard
    address: Address

    @property
    def url(self) -> str:
        """The guard's, which users have."""
        return f"http://{self.address.host}:{self.address.http}"

    @property
    def own_url(self) -> str:
        """Triton's own HTTP."""
        return f"http://127.0.0.1:{self.server.ports.http}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self.address.host}:{self.address.metrics}/metrics"

    def http(self) -> tritonclient.http.InferenceServerClient:
        """A new one: they are not thread-safe."""
        return tritonclient.http.InferenceServerClient(self.url.removeprefix("http://"), network_timeout=60, connection_timeout=60)

    def grpc(self) -> tritonclient.grpc.InferenceServerClient:
        return tritonclient.grpc.InferenceServerClient(f"{self.address.host}:{self.address.grpc}")


@contextmanager
def running(folder: Path, *, patience: float) -> Iterator[Triton]:
    configuration = Configuration(slots=3, max_requests=24, max_pixels=2**20, max_file_bytes=2**20)
    repository = write_repository(folder / "models", configuration)
    address = free_address()
    arguments = ["--model-control-mode=explicit", "--load-model=*"]
    with Guard(address, Bounds.of(configuration)) as guard, Server(repository, arguments=arguments) as server:
        guard.triton = server.ports
        server.ready(within=60)
        yield Triton(server, guard, address)
        server.stop(patience=patience)


@pytest.fixture(scope="session")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """Fails, and is not skipped, where no server can be started."""
    with running(tmp_path_factory.mktemp("serve"), patience=60) as server:
        yield server


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[Triton]:
    """A server of one's own, whose models may be killed."""
    with running(tmp_path, patience=1) as server:
        yield server
