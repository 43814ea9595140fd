"""TensorRT: the bundle's engines (export/to_trt.py), in the loop of backends/device.py.

`tensorrt` and `tensorrt_rtx` (TensorRT for RTX) have one API, of 10.16 and later and 11; whichever is installed is used.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sr3rt.backends import Request, cuda
from sr3rt.backends.cuda import Gpu, Stream
from sr3rt.backends.device import Enqueue
from sr3rt.backends.kernels import cache_folder
from sr3rt.backends.on_device import OnDevice, gpu_index, no_gpu
from sr3rt.bundle import GOLDEN, GRAPHS, Bundle
from sr3rt.durable import write_atomic
from sr3rt.engines import EngineKey, command
from sr3rt.errors import BackendError, BundleCorrupt, EngineRefused, ImageError, MissingExtra
from sr3rt.golden import difference

FLAVOURS = ("tensorrt", "tensorrt_rtx")
PRECISIONS = ("fp16", "fp32")  # "auto" takes the first that there is
Size = tuple[int, int]  # height, width


def flavour() -> str:
    """The package that is installed, `tensorrt` before `tensorrt_rtx`. Raises MissingExtra."""
    for name in FLAVOURS:
        if find_spec(name):
            return name
    raise MissingExtra("TensorRT", "tensorrt_rtx", "rtx")


class Log:
    """What TensorRT said went wrong, for error messages."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def taken(self) -> str:
        """The lines, once."""
        lines, self.lines[:] = list(self.lines), []
        return "; ".join(lines) or "no reason given"


@functools.cache
def module() -> tuple[Any, Any, Log]:
    """The package, its logger (TensorRT wants one for a process) and what that keeps. Raises MissingExtra."""
    trt, log = importlib.import_module(flavour()), Log()

    class Logger(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                log.lines.append(message)

    return trt, Logger(), log


def why_not() -> str | None:
    """Why this backend cannot run here, or None when it can."""
    if not any(map(find_spec, FLAVOURS)):
        return str(MissingExtra("TensorRT", "tensorrt_rtx", "gpu,rtx"))  # all that it takes to run, which building does not
    return cuda.why_not()


def refusal(bundle: Bundle, request: Request) -> str | None:
    """Why this backend cannot do what is asked with that bundle, or None when it can."""
    if reason := _unknown(request):
        return reason
    if not bundle.manifest.engines:
        return _absent(bundle, request)
    try:
        _fitting(bundle, request, Gpu(gpu_index(request.device)))
    except (BackendError, EngineRefused) as error:
        return str(error)
    return None


def _unknown(request: Request) -> str | None:
    """Why no bundle could do what is asked, or None."""
    if request.precision not in ("auto", *PRECISIONS):
        return f"the tensorrt backend has fp16 and fp32, precision {request.precision!r} was asked for: use auto, fp16 or fp32"
    return no_gpu("tensorrt", request.device)


def load(bundle: Bundle, request: Request) -> TensorRTNetwork:
    """Raises MissingExtra, BackendError (`why_not`, `refusal`, too little memory), EngineRefused or BundleCorrupt."""
    reason = no_gpu("tensorrt", request.device) or why_not() or _unknown(request)
    if reason:
        raise BackendError(reason)
    gpu = Gpu(gpu_index(request.device))
    keys = _fitting(bundle, request, gpu)
    engines, once = dict[Size, dict[int, Engine]](), dict[Size, Engine]()
    for key in keys:
        size, engine = (key.height, key.width), _deserialised(bundle, key, gpu)
        if key.part == "once":
            once[size] = engine
        else:
            engines.setdefault(size, {})[key.batch] = engine
    network = TensorRTNetwork(gpu, engines, once, keys[0].precision)
    _compare(bundle, network, keys)
    return network


def _fitting(bundle: Bundle, request: Request, gpu: Gpu) -> list[EngineKey]:
    """The engines of one precision that may run here: one for each shape, of the whole network or of what is left for each step; with
    these, one for each size, of the rest. Raises BackendError, EngineRefused (why the first may not, and how all that may not are built).
    """
    trt, name = module()[0], flavour()
    refused: EngineRefused | None = None
    for precision in PRECISIONS if request.precision == "auto" else (request.precision,):
        found: dict[tuple[str, Size, int], EngineKey] = {}
        differences: dict[EngineKey, str] = {}
        for key in (key for key in map(EngineKey.of, bundle.manifest.engines.values()) if key.precision == precision):
            digest = bundle.manifest.files.get(GRAPHS.get((precision, key.part), ""), {}).get("sha256", "none")
            capability = ".".join(map(str, gpu.capability))
            here = replace(key, onnx_sha256=digest, flavour=name, version=str(trt.__version__), capability=capability, driver=gpu.driver)
            if difference := key.difference(here):
                differences[key] = difference
            else:
                found[key.part, (key.height, key.width), key.batch] = key
        if fitting := [key for (part, size, batch), key in found.items() if _completed(part, size, batch, found)]:
            return fitting
        refused = refused or _refused(bundle, differences)
    if refused:
        raise refused
    raise BackendError(_absent(bundle, request))


def _refused(bundle: Bundle, differences: Mapping[EngineKey, str]) -> EngineRefused | None:
    """The error that tells the first difference, and what builds every engine that has one."""
    steps = [key for key in differences if key.part != "once"] or [*differences]  # with which what they take is built
    alike = [key for key in steps if key.opt_level == steps[0].opt_level]
    if not alike:
        return None
    each = "it" if len(alike) == 1 else "all such"
    return EngineRefused(f"{differences[alike[0]]}. Build {each} anew with  {command(alike, bundle=bundle.path)}")


def _completed(part: str, size: Size, batch: int, found: Collection[tuple[str, Size, int]]) -> bool:
    """Whether an engine has what it needs beside it, and nothing does its work better."""
    once, steps = ("once", size, 1) in found, {count for kind, sides, count in found if (kind, sides) == ("step", size)}
    return {"once": batch == 1 and bool(steps), "step": once, "whole": not (once and batch in steps)}[part]


def _absent(bundle: Bundle, request: Request) -> str:
    which, option = ("", "") if request.precision == "auto" else (f" in {request.precision}", f" --precision {request.precision}")
    return f"{bundle.path} has no TensorRT engine{which}: build one with  python -m sr3rt.export.to_trt {bundle.path}{option}"


class Engine:
    """An engine on a GPU. kept: the file for what is compiled of it there, by TensorRT for RTX, which takes seconds; None: nothing is."""

    def __init__(self, engine: Any, kept: Path | None = None) -> None:
        self._engine, self._kept = engine, kept
        self.names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an input or an output."""
        return tuple(self._engine.get_tensor_shape(name))

    def context(self) -> tuple[Any, Callable[[], None]]:
        """An execution context, or None; and what is to be called after its first run, to keep what was compiled for the next process."""
        if self._kept is None:
            return self._engine.create_execution_context(), lambda: None
        file, config, found = self._kept, self._engine.create_runtime_config(), b""
        cache = config.create_runtime_cache()
        with suppress(OSError):
            found = file.read_bytes()
        if found:
            cache.deserialize(found)  # of another machine it is refused, and made anew
        config.set_runtime_cache(cache)

        def keep(held: Any = config) -> None:  # the context needs both for as long as it lives
            nonlocal found
            made = bytes(cache.serialize() or b"")
            if made not in (b"", found):
                found = made
                with suppress(OSError):  # then it is compiled each time
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_atomic(file, made)

        return self._engine.create_execution_context(config), keep


def _deserialised(bundle: Bundle, key: EngineKey, gpu: Gpu) -> Engine:
    trt, logger, log = module()
    gpu.use()
    log.lines.clear()
    engine = trt.Runtime(logger).deserialize_cuda_engine(bundle.read(key.name))
    if engine is None:
        raise BackendError(f"{flavour()} {trt.__version__} cannot load {bundle.path / key.name} on {gpu.name}: {log.taken()}")
    if key.flavour != "tensorrt_rtx":
        return Engine(engine)
    digest = bundle.manifest.files[key.name]["sha256"]
    return Engine(engine, cache_folder() / f"rtx-{digest[:16]}-sm_{gpu.capability[0]}{gpu.capability[1]}.cache")


def _compare(bundle: Bundle, network: TensorRTNetwork, keys: list[EngineKey]) -> None:
    """Engines that answer wrongly, and say nothing, exist. Raises EngineRefused, BundleCorrupt."""
    golden = json.loads(bundle.read(GOLDEN)) if GOLDEN in bundle.manifest.files else {}
    once = {(key.height, key.width): f", or {key.name} before it," for key in keys if key.part == "once"}
    for key in (key for key in keys if key.part != "once"):
        if key.name not in golden:
            raise BundleCorrupt(
                f"{bundle.path} does not say what {key.name} should answer: build it again with  {command([key], bundle=bundle.path)}"
            )
        if wrong := difference(network, bundle.manifest, key, golden[key.name]):
            before = once.get((key.height, key.width), "") if key.part == "step" else ""
            raise EngineRefused(
                f"the engine {key.name}{before} answers wrongly on this GPU: {wrong}. Build it again here with  "
                f"{command([key], bundle=bundle.path, rebuild=True)}  or use device='cpu'"
            )


class TensorRTNetwork(OnDevice):
    """A `Network` on a GPU, over one engine for each size and batch. Safe to use from several threads.

    once: engines for one picture, from x to what those of a step take of it.
    """

    backend = "tensorrt"

    def __init__(self, gpu: Gpu, engines: Mapping[Size, Mapping[int, Engine]], once: Mapping[Size, Engine], precision: str) -> None:
        super().__init__(gpu)
        self._engines, self._once, self.precision = engines, once, precision

    def batches(self, height: int, width: int) -> tuple[int, ...]:
        """As `DeviceNetwork.batches`. Raises ImageError for a size that was not built."""
        if (height, width) not in self._engines:
            there = ", ".join(sorted(f"{h}x{w}" for h, w in self._engines))
            raise ImageError(
                f"there is no {self.precision} engine for a result of {height}x{width} (height x width, padded), only for {there}: build "
                f"one with  python -m sr3rt.export.to_trt BUNDLE --size {height}x{width}  or use device='cpu'"
            )
        return tuple(sorted(self._engines[height, width]))

    def sizes(self) -> list[tuple[int, int]]:
        """As `Sized.sizes`."""
        return sorted(self._engines)

    def given(self, height: int, width: int) -> Mapping[str, tuple[int, int, int]]:
        """As `DeviceNetwork.given`."""
        engine = self._once.get((height, width))
        shapes = {} if engine is None else {name: engine.shape(name) for name in engine.names if name != "x"}
        return {name: (channels, rows, columns) for name, (_, channels, rows, columns) in shapes.items()}

    def once(self, height: int, width: int, stream: Stream) -> Enqueue:
        """As `DeviceNetwork.once`."""
        return self._enqueuer(self._once[height, width], f"1×{height}×{width} (batch, height, width)", stream)

    def enqueuer(self, batch: int, height: int, width: int, stream: Stream) -> Enqueue:
        """As `DeviceNetwork.enqueuer`."""
        return self._enqueuer(self._engines[height, width][batch], f"{batch}×{height}×{width} (batch, height, width)", stream)

    def _enqueuer(self, engine: Engine, size: str, stream: Stream) -> Enqueue:
        """Calls of an execution context, whose scratch memory TensorRT takes."""
        log = module()[2]
        log.lines.clear()
        context, keep = engine.context()
        if context is None:
            free, total = (one / 2**30 for one in self.gpu.free())
            raise BackendError(
                f"TensorRT cannot make a context for {size} on {self.gpu.name}, {free:.1f} of {total:.1f} GiB are free: {log.taken()}. "
                "Use a smaller batch, or end what else runs there"
            )
        ran = False

        def enqueue(addresses: Mapping[str, int]) -> None:
            nonlocal ran
            for name in engine.names:
                if not context.set_tensor_address(name, addresses[name]):
                    raise BackendError(f"TensorRT does not take the memory for {name} of {size}: {log.taken()}")
            if not context.execute_async_v3(stream.handle):
                raise BackendError(f"TensorRT cannot run {size}: {log.taken()}")
            if not ran:
                keep()
                ran = True

        return enqueue
