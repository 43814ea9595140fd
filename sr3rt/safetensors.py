"""Files of float32 tensors in the safetensors format: written aligned, and read tensor by tensor, however large the file.

    8 bytes      N, little-endian
    N bytes      JSON, padded with spaces: {"name": {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}, ...}
    the rest     the tensors, C order, little-endian, without a gap; offsets count from here

What is written here starts its tensors at multiples of 64 bytes, but for a few whose own size is none; those come last.
Any reader of the format reads it. Read here is only what the runtime needs: float32, and nothing that the header leaves in doubt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sr3rt.errors import BundleCorrupt

ALIGNMENT = 64  # bytes: a cache line, and the widest vector
_FLOAT = np.dtype("<f4")
_LONGEST = 100_000_000  # bytes of a header: the format's own limit
_DIMENSIONS = 8


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes are in its file, and its shape."""

    offset: int
    length: int
    shape: tuple[int, ...]


class Weights(Mapping[str, NDArray[np.float32]]):
    """The tensors of an open file by name; each is read when it is asked for, and not kept. Not safe between threads.

    The stream stays the caller's. Raises BundleCorrupt for anything but a whole file of float32 tensors.
    """

    def __init__(self, stream: BufferedIOBase) -> None:
        self._stream = stream
        self._places = _places(stream)

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        place = self._places[name]
        values = np.empty(place.shape, _FLOAT)
        self._stream.seek(place.offset)
        if self._stream.readinto(values.reshape(-1).view(np.uint8).data) != place.length:
            raise BundleCorrupt(f"{_name(self._stream)} has become shorter while it was read: copy the bundle again")
        return values

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def place(self, name: str) -> Place:
        """Where that tensor is. Raises KeyError."""
        return self._places[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """That tensor's. Raises KeyError."""
        return self._places[name].shape


def write(path: Path, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """Write `tensors` to a file. The same tensors in the same order give the same bytes, and none of them is copied whole."""
    names = sorted(tensors, key=lambda name: -_alignment(tensors[name].nbytes))
    ends = list(accumulate(tensors[name].nbytes for name in names))
    header = {
        name: {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [end - tensors[name].nbytes, end]}
        for name, end in zip(names, ends, strict=True)
    }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for name in names:
            stream.write(np.ascontiguousarray(tensors[name], _FLOAT).reshape(-1).view(np.uint8).data)


def _alignment(size: int) -> int:
    """The largest power of two up to ALIGNMENT that divides `size`: the alignment that a tensor leaves to the next one."""
    return math.gcd(size, ALIGNMENT)


def _name(stream: BufferedIOBase) -> str:
    return str(getattr(stream, "name", "the file of weights"))


def _places(stream: BufferedIOBase) -> dict[str, Place]:
    """From the header, in the order of the file. Raises BundleCorrupt."""
    try:
        return _parsed(stream)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleCorrupt(
            f"{_name(stream)} is not a safetensors file of float32 tensors: {error}. Copy the bundle again, or export it again"
        ) from None


def _parsed(stream: BufferedIOBase) -> dict[str, Place]:
    size = stream.seek(0, 2)
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    begin = 8 + length
    if begin > size or length > _LONGEST:
        raise ValueError(f"its header should have {length:,} bytes, and the file has {size:,}")
    header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_distinct)
    if not isinstance(header, dict):
        raise TypeError(f"its header is a {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    places = sorted(((name, _place(name, entry, begin)) for name, entry in header.items()), key=lambda item: item[1].offset)
    end = begin
    for name, place in places:
        if place.offset != end:
            raise ValueError(f"{name!r} begins at byte {place.offset:,}, expected {end:,}, where the tensor before it ends")
        end += place.length
    if end != size:
        raise ValueError(f"its tensors end at byte {end:,}, and the file has {size:,}")
    return dict(places)


def _place(name: str, entry: Any, begin: int) -> Place:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"} or entry["dtype"] != "F32":
        raise ValueError(f"{name!r} is {str(entry)[:100]}, expected dtype F32, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for what, numbers, least, most in (("shape", shape, 1, _DIMENSIONS), ("data_offsets", offsets, 0, 2)):
        if not isinstance(numbers, list) or len(numbers) > most or any(type(number) is not int or number < least for number in numbers):
            raise ValueError(f"{name!r} has {what} {str(numbers)[:100]}, expected up to {most} whole numbers from {least} on")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _FLOAT.itemsize:
        raise ValueError(f"{name!r} has shape {shape} and data_offsets {offsets}, which do not agree")
    return Place(begin + offsets[0], offsets[1] - offsets[0], tuple(shape))


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names a tensor twice")
    return found
