"""The CUDA kernels of a step (native/step.cu): a fat binary that was built with the package, else compiled here and kept."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from sr3rt.durable import write_atomic
from sr3rt.errors import BackendError, MissingExtra

NATIVE = Path(__file__).parents[1] / "native"
BUILT = NATIVE / "step.fatbin"
"""Machine code for compute capabilities 8.0 and 9.0 and PTX for later ones, where a CUDA compiler was there."""

OPTIONS = ("--std=c++20", "--fmad=false")
"""For nvcc and NVRTC: nothing is fused, so that the noise has the host's bits."""


def load(capability: tuple[int, int]) -> bytes:
    """What `cuLibraryLoadData` takes, for a GPU of that compute capability: a fat binary or a cubin.

    A compiled one is kept in `cache_folder`. Raises MissingExtra, BackendError.
    """
    if BUILT.exists() and capability >= (8, 0):
        return BUILT.read_bytes()
    kept = cache_folder() / f"step-{_source_digest()}-sm_{capability[0]}{capability[1]}.cubin"
    with suppress(OSError):  # there is none yet, or the folder is out of reach
        return kept.read_bytes()
    cubin = compiled(capability)
    with suppress(OSError):  # a cache that cannot be written costs a second each time
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, cubin)
    return cubin


def compiled(capability: tuple[int, int]) -> bytes:
    """The cubin for one compute capability, by NVRTC; needs no GPU. Raises MissingExtra, BackendError with the compiler's words."""
    if find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        raise MissingExtra("the CUDA kernels", "cuda-bindings", "gpu")
    from cuda.bindings import nvrtc

    ok = nvrtc.nvrtcResult.NVRTC_SUCCESS
    source, header = ((NATIVE / name).read_bytes() for name in ("step.cu", "step.hpp"))
    try:
        status, program = nvrtc.nvrtcCreateProgram(source, b"step.cu", 1, [header], [b"step.hpp"])
    except RuntimeError as error:  # the bindings are there, the library is not
        raise MissingExtra("the CUDA kernels", "nvidia-cuda-nvrtc", "gpu") from error
    if status != ok:
        raise BackendError(f"NVRTC cannot begin: {status.name}")
    options = [option.encode() for option in (*OPTIONS, f"--gpu-architecture=sm_{capability[0]}{capability[1]}")]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status != ok:
        raise BackendError(f"NVRTC cannot compile step.cu for compute capability {capability}: {status.name}\n{_log(program)}")
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    cubin = bytearray(size)
    (status,) = nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    if status != ok or not cubin.startswith(b"\x7fELF"):
        raise BackendError(f"NVRTC gave no machine code for compute capability {capability}: {status.name}")
    return bytes(cubin)


def _log(program: object) -> str:
    from cuda.bindings import nvrtc

    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytearray(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.rstrip(b"\0\n").decode(errors="replace")


def _source_digest() -> str:
    texts = [(NATIVE / name).read_bytes() for name in ("step.cu", "step.hpp")]
    return hashlib.sha256(b"\0".join([*texts, " ".join(OPTIONS).encode()])).hexdigest()[:16]


def cache_folder() -> Path:
    """Where what was compiled for a GPU is kept, which may be deleted at any time: `SR3RT_CACHE`, else one of the user's."""
    if chosen := os.environ.get("SR3RT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sr3rt"
