"""A checkpoint file -> its tensors by dotted name. Nothing in a file is ever run; every kind of wrong file has its own error."""

from __future__ import annotations

import json
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from sr3rt.errors import CheckpointError, MissingExtra
from sr3rt.export.averages import says_so

# NumPy's numbers, as a loss beside the weights: what makes them runs nothing. NumPy 2 gave it another name.
_SCALAR = np.float64(0).__reduce__()[0]
NUMBERS: list[Any] = [
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *(type(np.dtype(kind)) for kind in "?bBhHiIlLefd"),
]
OPTIMIZER_KEYS = {"optimizer", "scheduler", "epoch", "iter"}
EXPECTED = "expected a checkpoint that torch.save wrote (.pth, .pt, .ckpt) or a .safetensors file"
# what torch.load raises for damaged files, besides UnpicklingError
PARSING = (
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    struct.error,
)
SIGNATURES = (
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"RIFF", "a WebP picture or another RIFF file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x89HDF", "an HDF5 file"),
    (b"version https://git-lfs", "a Git LFS pointer and not the file itself (git lfs pull fetches it)"),
    (b"<", "a web page or XML: the download probably failed"),
)


@dataclass(frozen=True, eq=False)
class Weights:
    """tensors: every tensor of the file, nested dictionaries joined by dots. metadata: that of a safetensors file, else empty."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def load(path: Path) -> Weights:
    """Reads a checkpoint into CPU memory, dtypes as stored.

    Raises CheckpointError when the file is missing, a folder, empty, truncated, not a checkpoint, an optimizer's state or in need
    of code from outside torch (the code is not run); MissingExtra for a safetensors file without that package.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: {EXPECTED}")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: {EXPECTED}")
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise CheckpointError(f"{path} is empty (0 bytes): {EXPECTED}")
    if len(start) > 8 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < 2**32:
        return load_safetensors(path)
    if start.startswith(b"PK\x03\x04"):
        check_zip(path)
    elif not start.startswith(b"\x80"):
        raise CheckpointError(f"{path} is {described(start)}: {EXPECTED}")
    return load_pickled(path)


def described(start: bytes) -> str:
    """What a file that begins so seems to be."""
    for signature, name in SIGNATURES:
        if start.startswith(signature):
            return name
    return "a text file" if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start) else "not in a format known here"


def load_safetensors(path: Path) -> Weights:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise MissingExtra("reading .safetensors", "safetensors", "export") from None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return Weights({name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {}))  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is a truncated or damaged safetensors file ({error}): copy or download it again") from None


def check_zip(path: Path) -> None:
    """torch.save writes a zip archive with `…/data.pkl` in it."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is truncated: its zip directory is missing at the end. Copy or download it again")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} is damaged ({error}): copy or download it again") from None
    if not any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        raise CheckpointError(f"{path} is a zip archive of {', '.join(names[:3]) or 'nothing'} …, not a checkpoint: {EXPECTED}")
    if any("/code/" in name for name in names):
        raise CheckpointError(f"{path} is a TorchScript archive, which is a program: {EXPECTED} with the network's state_dict")


def load_pickled(path: Path) -> Weights:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on pickle protocols; what cannot be read raises
            with torch.serialization.safe_globals(NUMBERS):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        names = foreign_globals(path)
        if names:
            raise CheckpointError(
                f"{path} holds code as well as tensors: it refers to {', '.join(names[:10])}. It was not run. If you trust the "
                "file, load it where it was made and save the plain tensors: torch.save(net.state_dict(), FILE)"
            ) from None
        raise CheckpointError(f"{path} is a pickle, but damaged or not one of tensors: {EXPECTED}") from None
    except PARSING as error:
        raise CheckpointError(f"{path} is truncated or damaged ({str(error).splitlines()[:1]}): copy or download it again") from None
    if isinstance(content, Tensor) or not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds one {type(content).__name__}, not the named tensors of a network")
    tensors = dict(flattened(content))
    if not tensors:
        raise CheckpointError(not_weights(path, content))
    return Weights(tensors, {})


def flattened(content: Mapping[object, object], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(dotted name, tensor) of nested dictionaries and of lists of averages, but for the optimizer's."""
    for name, value in content.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value.detach()
        elif isinstance(value, Mapping) and not str(name).startswith(("optimizer", "scheduler")):
            yield from flattened(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)) and says_so(str(name)):
            named = all(isinstance(item, tuple) and len(item) == 2 for item in value)  # as named_parameters() gives them
            yield from flattened(dict(value if named else enumerate(value)), f"{prefix}{name}.")


def not_weights(path: Path, content: Mapping[object, object]) -> str:
    keys = [str(key) for key in content]
    if not OPTIMIZER_KEYS & set(keys):
        return f"{path} holds no tensors, only {', '.join(keys[:10]) or 'an empty dictionary'}: {EXPECTED}"
    found = f"{path} holds the optimizer's state ({', '.join(keys[:10])}), not the network's weights"
    beside = path.with_name(path.name.replace("_opt.", "_gen."))
    if beside != path and beside.is_file():
        return f"{found}: give {beside} instead"
    return f"{found}: give the file with the weights, which the public implementation names *_gen.pth"


def foreign_globals(path: Path) -> list[str]:
    """Names that the file's pickles would import, torch's and collections' own left out. The pickles are parsed, never run."""
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                member = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                with archive.open(member) as stream:
                    names = imports(stream)
        except zipfile.BadZipFile:
            return []
    else:
        with path.open("rb") as file:
            names = imports(file)
    return [name for name in dict.fromkeys(names) if name.split(".")[0] not in ("torch", "collections")]


def imports(stream: IO[bytes]) -> list[str]:
    """What the pickles at the beginning of `stream` import, as dotted names. The old format has five, one after another."""
    names: list[str] = []
    strings: list[str] = []
    try:
        for _ in range(5):
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    names.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    except ValueError:  # the end, or a damaged pickle: what came before it is what matters
        pass
    return names


def metadata_json(weights: Weights, key: str, path: Path) -> dict[str, object]:
    """The JSON object under `key` in a safetensors file's metadata."""
    try:
        value = json.loads(weights.metadata[key])
    except (KeyError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} names its architecture but its metadata has no JSON object {key!r}: write the net's config there")
    return value
