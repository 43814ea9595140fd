"""sr3rt's own engine for CPUs: the bundle's program (docs/program.md), run by native/network.cpp. It needs nothing but numpy."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

from sr3rt import _native
from sr3rt.backends import Floats, Request
from sr3rt.bundle import PROGRAM, Bundle, Manifest
from sr3rt.errors import BackendError
from sr3rt.program import Program, Tensors, check, opened


def why_not() -> str | None:
    """Why this backend cannot run here, or None when it can."""
    return None if _native.instructions() else "the native backend needs a processor with AVX2 and FMA: use backend='onnxruntime'"


def refusal(bundle: Bundle, request: Request) -> str | None:
    """Why this backend cannot do what is asked with that bundle, or None when it can."""
    if request.precision not in ("auto", "fp32", "bf16"):
        return f"the native backend has fp32 and bf16, precision {request.precision!r} was asked for: use auto, fp32 or bf16"
    if request.precision == "bf16" and not _native.bfloat16():
        return "precision 'bf16' needs a processor with AVX512-BF16 (Intel since Cooper Lake, AMD since Zen 4): use auto or fp32"
    if request.device not in ("auto", "cpu"):
        return f"the native backend runs on the cpu, device {request.device!r} was asked for: use auto or cpu"
    if PROGRAM not in bundle.manifest.files:
        return f"{bundle.path} has no {PROGRAM}, which the native backend runs: export it again, or use backend='onnxruntime'"
    return None


def load(bundle: Bundle, request: Request) -> NativeNetwork:
    """Raises BackendError (`why_not`, `refusal`) or BundleCorrupt."""
    reason = why_not() or refusal(bundle, request)
    if reason:
        raise BackendError(reason)
    chosen = request.precision
    if chosen == "auto":
        chosen = "bf16" if _native.has("quick_bf16") and holds_bf16(bundle.manifest) else "fp32"
    return _network(bundle, request, "auto" if chosen == "fp32" else "bf16")


def holds_bf16(manifest: Manifest) -> bool:
    """Whether the bundle's own figures for bfloat16 are within their limits; False where it has none."""
    return all(_within(manifest.parity.get(f"bf16 {name}")) for name in ("net", "picture"))


def _within(figure: Any) -> bool:
    if not isinstance(figure, Mapping):
        return False
    worst, limit = figure.get("worst"), figure.get("limit")
    return isinstance(worst, float) and isinstance(limit, float) and worst <= limit


def in_bf16(bundle: Bundle, request: Request) -> NativeNetwork:
    """The network in bfloat16 on any processor with AVX2, slowly on those without instructions for it: for the exporter to measure.

    Rounded as coarsely as anywhere: a processor with tiles (AMX) would sum without Winograd's transforms. Raises as `load`.
    """
    return _network(bundle, request, "avx512_bf16" if _native.has("avx512_bf16") else "avx2_bf16")


def _network(bundle: Bundle, request: Request, instructions: str) -> NativeNetwork:
    with opened(bundle) as (program, tensors):
        return NativeNetwork(compiled(program, tensors, bundle.manifest.channels, request.thread_count, instructions=instructions))


_NETWORKS = WeakSet["NativeNetwork"]()


def _forked() -> None:
    for network in _NETWORKS:
        network.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class NativeNetwork:
    """A `Network` over native/network.hpp. Calls from several threads take turns, each with all of the network's threads."""

    backend, device = "native", "cpu"

    def __init__(self, network: _native.Network) -> None:
        self._network = network
        self.precision = "bf16" if network.instructions.endswith("bf16") else "fp32"
        _NETWORKS.add(self)

    def forked(self) -> None:
        """In a new process, whose parent may have been in the middle of a call."""
        self._network.forked()

    def bind(self, x: Floats, y: Floats, level: Floats, out: Floats) -> Callable[[], None]:
        """As `Network.bind`. A call raises BackendError when memory runs out."""

        def run() -> None:
            try:
                self._network.run(x, y, level, out)
            except MemoryError:
                size = "×".join(map(str, x.shape))
                raise BackendError(f"the native backend has not the memory for {size} (batch, channels, height, width)") from None

        return run

    def memory(self, count: int, height: int, width: int) -> int:
        """As `Planned.memory`."""
        return self._network.memory(count, height, width)


_RESAMPLE = {None: "none", "up": "up", "down": "down"}


def compiled(program: Program, tensors: Tensors, channels: int, threads: int, *, instructions: str = "auto") -> _native.Network:
    """The program with its weights packed. instructions: as `_native.Network` takes them.

    Raises KeyError, TypeError or ValueError for what is not a program.
    """
    check(program)
    level = program["level"]
    layers = [_linear(layer, tensors) for layer in level["layers"]]
    encoding = (level["input"] == "log_sigma", level["scale"], tensors[level["frequencies"]], layers, level["silu"])
    network = _native.Network(instructions, threads, channels, encoding)
    build = _Build(network, tensors)
    for operation in program["operations"]:
        build.add(operation)
    build.finish()
    return network


def _linear(layer: Mapping[str, str], tensors: Tensors) -> tuple[Floats, Floats]:
    return tensors[layer["weight"]], tensors[layer["bias"]]


class _Build:
    """Adds operations to a network, naming the registers as the program does."""

    def __init__(self, network: _native.Network, tensors: Tensors) -> None:
        self._network, self._tensors = network, tensors
        self._registers = dict[str, int]()
        self._weights = dict[str, int]()  # what the first convolution of each wrote
        self._joined: int | None = None  # x and y in one register
        self._bands = ("", "", 0.0)  # the register that to_bands wrote, the mean that it read, its detail

    def add(self, operation: Mapping[str, Any]) -> None:
        made: int | None = getattr(self, f"_{operation['do']}")(operation)
        self._registers[operation["to"]] = -1 if made is None else made

    def finish(self) -> None:
        """Tell the network which register is the result; from_bands has done so."""
        if self._registers["out"] >= 0:
            self._network.result(self._registers["out"])

    def _source(self, name: str) -> int:
        if self._registers[name] < 0:
            raise ValueError("nothing reads what from_bands wrote")
        return self._registers[name]

    def _sources(self, names: list[str]) -> list[int]:
        if names != ["x", "y"]:
            return [self._source(name) for name in names]
        if self._joined is None:
            self._joined = self._network.joined_planes()
        return [self._joined]

    def _convolution(self, one: Mapping[str, Any]) -> int:
        norm, level, tensors = one["norm"], one["level"], self._tensors
        made = self._network.convolution(
            self._sources(one["from"]),
            tensors[one["weight"]],
            None if one["bias"] is None else tensors[one["bias"]],
            stride=one["stride"],
            norm=norm and (norm["groups"], norm["eps"], tensors[norm["weight"]], tensors[norm["bias"]]),
            silu=one["silu"],
            resample=_RESAMPLE[one["resample"]],
            level=level and _linear(level, tensors),
            scaled=bool(level) and {"shift": False, "scale_shift": True}[level["kind"]],
            after={None: False, "silu": True}[one["after"]],
            add=-1 if one["add"] is None else self._source(one["add"]),
            gain=one["gain"],
            like=self._weights.get(one["weight"], -1),
        )
        self._weights.setdefault(one["weight"], made)
        return made

    def _resample(self, one: Mapping[str, Any]) -> int:
        (source,) = one["from"]
        if one["by"] is None:
            raise ValueError("resample goes up or down")
        return self._network.resampling(self._source(source), _RESAMPLE[one["by"]])

    def _attention(self, one: Mapping[str, Any]) -> int:
        (source,) = one["from"]
        return self._network.attention(self._source(source))

    def _unshuffle(self, one: Mapping[str, Any]) -> int:
        if list(one["from"]) != ["x"]:
            raise ValueError("unshuffle reads x")
        return self._network.unshuffled(one["by"])

    def _to_bands(self, one: Mapping[str, Any]) -> int:
        x, y, mean = one["from"]
        if (x, y) != ("x", "y"):
            raise ValueError("to_bands reads x, y and their mean")
        self._bands = one["to"], mean, one["detail"]
        return self._network.to_bands(self._source(mean), one["detail"])

    def _from_bands(self, one: Mapping[str, Any]) -> None:
        x, y, mean, fine = one["from"]
        bands, *same = self._bands
        if (x, y, one["to"], mean, one["detail"]) != ("x", "y", "out", *same):
            raise ValueError("from_bands reads x, y, their mean and what was made of their bands of the same detail, and writes out")
        self._network.from_bands(self._source(bands), self._source(mean), self._source(fine), one["detail"])
