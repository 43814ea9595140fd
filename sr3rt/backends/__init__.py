"""Backends: what runs the network. Each is asked for by name, or chosen by "auto" in the order of `ORDER`.

A backend gives a `Network`; the loop (`sr3rt.engine`) knows nothing else of it.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sr3rt import cgroup
from sr3rt.bundle import Bundle
from sr3rt.errors import BackendError, EngineRefused, OptionError

Floats = NDArray[np.float32]


class Network(Protocol):
    """A loaded network. Immutable and safe to use from several threads; all state is in the arrays that are bound."""

    backend: str
    device: str
    precision: str

    def bind(self, x: Floats, y: Floats, level: Floats, out: Floats) -> Callable[[], None]:
        """A call that runs the network from x, y (N, C, H, W) and level (N, 1) into out (N, C, H, W), all float32, C-contiguous.

        The arrays stay the caller's: each call reads what they hold then.
        """
        ...


@runtime_checkable
class Planned(Protocol):
    """A network that knows beforehand what memory it takes."""

    def memory(self, count: int, height: int, width: int) -> int:
        """Bytes that a call for so many pictures of that size takes beyond what the network holds already."""
        ...


@runtime_checkable
class Sized(Protocol):
    """A network that can do some sizes only."""

    def sizes(self) -> list[tuple[int, int]]:
        """They, (height, width) of the result in pixels."""
        ...


@dataclass(frozen=True)
class Request:
    """What the user asked for; "auto" leaves it to the backend. `threads` 0: all that this process may use. Raises OptionError.

    What precisions there are differs from backend to backend, which says so when it is loaded.
    """

    backend: str = "auto"
    precision: str = "auto"
    device: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        if self.backend not in ("auto", *MODULES):
            raise OptionError(f"unknown backend {self.backend!r}: expected auto, {', '.join(MODULES)}")
        if type(self.threads) is not int or not 0 <= self.threads <= _MOST_THREADS:
            raise OptionError(f"threads must be a whole number from 0 (all) to {_MOST_THREADS}, found {self.threads!r}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(self.device)):
            raise OptionError(f"unknown device {self.device!r}: expected auto, cpu, cuda, or cuda:1 for the second GPU")

    @property
    def thread_count(self) -> int:
        """Threads to use: as asked, or one for each core that this process may keep busy."""
        affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        return self.threads or min(cores, math.ceil(cgroup.processors() or cores))


MODULES = {
    "tensorrt": "sr3rt.backends.tensorrt",
    "native": "sr3rt.backends.native",
    "onnxruntime": "sr3rt.backends.onnxruntime",
    "torch": "sr3rt.backends.pytorch",
}
"""Each module has `load(bundle, request) -> Network`, `why_not() -> str | None`, which says why it cannot run here, and
`refusal(bundle, request) -> str | None`, which says why it cannot do what is asked with that bundle."""

PRECISIONS = ("auto", "fp32", "fp16", "bf16")
"""Those that one backend or another has."""

_MOST_THREADS = 1024

ORDER = ("tensorrt", "native", "onnxruntime", "torch")
"""What "auto" tries, best first; torch, which is on a GPU, where the others are not for that device."""


def why_not(name: str) -> str | None:
    """Why backend `name` cannot run here, or None when it can."""
    reason: str | None = importlib.import_module(MODULES[name]).why_not()
    return reason


def load(bundle: Bundle, request: Request) -> Network:
    """The network of `bundle` on the backend asked for; by "auto", the first of `ORDER` that does it. One that was expected to and fails is
    told in a RuntimeWarning. Raises OptionError, BackendError, EngineRefused, MissingExtra or BundleCorrupt.
    """
    if request.backend != "auto":
        return _loaded(request.backend, bundle, request)
    if request.precision not in PRECISIONS:
        raise OptionError(f"unknown precision {request.precision!r}: expected {', '.join(PRECISIONS)}")
    reasons = {}
    for name in ORDER:
        module = importlib.import_module(MODULES[name])
        reasons[name] = module.why_not() or module.refusal(bundle, request)
        if reasons[name] is None:
            try:
                return _loaded(name, bundle, request)
            except (BackendError, EngineRefused) as error:  # an engine that answers wrongly, too little memory
                warnings.warn(f"backend {name} should have worked and is left out: {error}", RuntimeWarning, stacklevel=3)
                reasons[name] = str(error)
    raise BackendError("no backend can do this: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))


def _loaded(name: str, bundle: Bundle, request: Request) -> Network:
    network: Network = importlib.import_module(MODULES[name]).load(bundle, request)
    return network
