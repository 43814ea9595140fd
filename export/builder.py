"""TensorRT's builder, whichever package of it is there: `tensorrt`, or `tensorrt_rtx` (TensorRT for RTX), which needs no GPU to build.

TensorRT wants one logger and one builder in a process.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sr3rt.backends import cuda
from sr3rt.backends.cuda import Gpu
from sr3rt.backends.tensorrt import flavour, module
from sr3rt.engines import PORTABLE
from sr3rt.errors import BackendError
from sr3rt.program import Register


def version() -> str:
    """TensorRT's. Raises MissingExtra."""
    return str(module()[0].__version__)


def target() -> tuple[str, int | None]:
    """Compute capability and driver's major version that engines are built for. Raises MissingExtra, or BackendError without a GPU."""
    if flavour() == "tensorrt_rtx":
        return PORTABLE, None
    if reason := cuda.why_not():
        raise BackendError(f"tensorrt builds on the GPU that it builds for (pip install tensorrt-rtx-cu13 builds without): {reason}")
    gpu = Gpu()
    return ".".join(map(str, gpu.capability)), gpu.driver


def build(
    model: bytes | Path,
    *,
    batch: int,
    height: int,
    width: int,
    given: Mapping[str, Register] | None = None,
    tf32: bool,
    opt_level: int | None = None,
    timing_cache: Path | None = None,
) -> bytes:
    """A serialised engine for exactly this shape. model: an ONNX file's bytes, or its path where weights lie beside it.

    given: inputs that are not of the picture's size. tf32: whether float32 products may be rounded to TF32. timing_cache: read where it
    exists, and written. A warning where that fails, or where it would do nothing. Raises BackendError with what TensorRT said.
    """
    trt, logger, log = module()
    log.lines.clear()
    builder = _builder()
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 knows nothing else
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not (parser.parse_from_file(str(model)) if isinstance(model, Path) else parser.parse(model)):
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise BackendError(f"{flavour()} {version()} cannot read the network: {'; '.join(reasons) or log.taken()}")
    config = builder.create_builder_config()
    for i in range(network.num_inputs):
        value = network.get_input(i)
        sides = given[value.name].shape(height, width)[1:] if given and value.name in given else (height, width)
        value.shape = (batch, value.shape[1], *sides)[: len(value.shape)]  # fixed: nothing is left to be chosen at run time
    if (capturable := getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)) is not None:
        config.set_flag(capturable)  # TensorRT for RTX wants it of engines whose calls are captured
    if not tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if opt_level is not None:
        config.builder_optimization_level = opt_level
    if timing_cache is not None and flavour() == "tensorrt_rtx":  # whose calls for it would need a GPU, and do nothing
        warnings.warn("TensorRT for RTX measures nothing when it builds: the timing cache is neither read nor written", stacklevel=2)
        timing_cache = None
    if timing_cache is not None:
        config.set_timing_cache(config.create_timing_cache(timing_cache.read_bytes() if timing_cache.exists() else b""), False)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BackendError(f"{flavour()} {version()} cannot build the engine {batch}×{height}×{width}: {log.taken()}")
    if timing_cache is not None:
        _keep(timing_cache, bytes(config.get_timing_cache().serialize()))
    return bytes(engine)


def _keep(path: Path, cache: bytes) -> None:
    """Replaces the file. That it cannot be costs the next build time, not this one its engine: a warning."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(cache)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        warnings.warn(f"the timing cache {path} was not written ({error.strerror}): the next build measures again", stacklevel=3)


@functools.cache
def _builder() -> Any:
    trt, logger, _ = module()
    return trt.Builder(logger)
