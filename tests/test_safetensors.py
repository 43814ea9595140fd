"""Files of weights: written aligned, read tensor by tensor, and anything that is in doubt is refused."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sr3rt import safetensors
from sr3rt.errors import BundleCorrupt
from sr3rt.safetensors import Weights

rng = np.random.default_rng(0)
TENSORS = {
    "short": rng.standard_normal(3).astype(np.float32),
    "scalar": np.array(2.5, np.float32),
    "transposed": rng.standard_normal((5, 32)).astype(np.float32).T,
    "Ω": rng.standard_normal((4, 8, 3, 3)).astype(np.float32),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    safetensors.write(tmp_path / "weights.safetensors", TENSORS)
    return tmp_path / "weights.safetensors"


def made(header: Any, data: bytes = b"") -> io.BytesIO:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return io.BytesIO(len(text).to_bytes(8, "little") + text + data)


def entry(begin: int = 0, end: int = 8, shape: Any = (2,), dtype: str = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def test_tensors_come_back_as_they_were_written(path: Path) -> None:
    with path.open("rb") as stream:
        weights = Weights(stream)
        assert set(weights) == set(TENSORS)
        assert len(weights) == 4
        for name, values in TENSORS.items():
            assert weights.shape(name) == weights[name].shape == values.shape
            assert weights[name].dtype == np.float32
            assert np.array_equal(weights[name], values)
        assert "long" not in weights
        with pytest.raises(KeyError, match="long"):
            weights["long"]


def test_tensors_are_aligned_but_for_the_short_ones_which_come_last(path: Path) -> None:
    with path.open("rb") as stream:
        weights = Weights(stream)
        assert list(weights) == ["transposed", "Ω", "short", "scalar"]
        assert [weights.place(name).offset % 64 for name in weights] == [0, 0, 0, 12]
        assert weights.place("scalar").offset + 4 == path.stat().st_size


def test_only_what_is_asked_for_is_read(path: Path) -> None:
    class Counting(io.BytesIO):
        bytes_read = 0

        def readinto(self, buffer: Any) -> int:
            self.bytes_read += len(buffer)
            return super().readinto(buffer)

    stream = Counting(path.read_bytes())
    assert "Ω" in (weights := Weights(stream))
    assert stream.bytes_read == 0
    assert weights["short"].nbytes == stream.bytes_read == 12


def test_other_readers_and_writers_agree(path: Path, tmp_path: Path) -> None:
    other = pytest.importorskip("safetensors.numpy")
    found = other.load_file(path)
    assert found.keys() == TENSORS.keys()
    assert all(np.array_equal(found[name], values) for name, values in TENSORS.items())
    contiguous = {name: values.copy() for name, values in TENSORS.items()}
    other.save_file(contiguous, tmp_path / "theirs", {"format": "np"})
    with (tmp_path / "theirs").open("rb") as stream:
        weights = Weights(stream)
        assert all(np.array_equal(weights[name], values) for name, values in TENSORS.items())


def test_a_file_without_tensors_is_one() -> None:
    assert dict(Weights(made({}))) == {}


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: data[:200], lambda data: data[:5]])
def test_a_file_of_another_length_is_refused(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))
    with path.open("rb") as stream, pytest.raises(BundleCorrupt, match=r"weights\.safetensors is not a safetensors file"):
        Weights(stream)


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (io.BytesIO(), "header should have 0 bytes, and the file has 0"),
        (io.BytesIO(b"\xff" * 8 + b"{}"), "header should have 18,446,744,073,709,551,615 bytes"),
        (made(b""), "Expecting value"),
        (made(b"\xff{}"), "utf-8"),
        (made(b"[" * 100_000), "recursion"),
        (made([]), "header is a list, expected an object"),
        (made({"a": entry(), "b": entry()}, bytes(8)), "'b' begins at byte .*, expected .*, where the tensor before it ends"),
        (made({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "'b' begins at"),
        (made({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)), "'b' begins at"),
        (made({"a": entry(4, 12)}, bytes(12)), "'a' begins at"),
        (made({"a": entry()}, bytes(12)), "its tensors end at"),
        (made({"a": entry()}, bytes(4)), "its tensors end at"),
        (made({"a": entry(8, 0)}, bytes(8)), "do not agree"),
        (made({"a": entry(shape=[3])}, bytes(8)), r"'a' has shape \[3\] and data_offsets \[0, 8\], which do not agree"),
        (made({"a": entry(dtype="F16")}, bytes(8)), "expected dtype F32"),
        (made({"a": entry(more=1)}, bytes(8)), "expected dtype F32, shape and data_offsets"),
        (made({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), "expected dtype F32, shape and data_offsets"),
        (made({"a": None}), "expected dtype F32"),
        (made({"a": {**entry(), "data_offsets": [8]}}, bytes(8)), "do not agree"),
        (made({"a": {**entry(), "data_offsets": [0, 8, 8]}}, bytes(8)), "whole numbers from 0 on"),
        (made({"a": entry(-8, 0)}, bytes(8)), "whole numbers from 0 on"),
        (made({"a": entry(0, 8.0)}, bytes(8)), "whole numbers from 0 on"),  # type: ignore[arg-type]
        (made({"a": entry(shape=[True, 2])}, bytes(8)), "whole numbers from 1 on"),
        (made({"a": entry(0, 0, shape=[0])}), "whole numbers from 1 on"),
        (made({"a": entry(shape=[1] * 64 + [2])}, bytes(8)), "up to 8 whole numbers"),
        (made({"a": entry(shape="2")}, bytes(8)), "whole numbers"),
        (made(b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)), "names a tensor twice"),
    ],
)  # fmt: skip
def test_a_header_that_leaves_doubt_is_refused(stream: io.BytesIO, words: str) -> None:
    with pytest.raises(BundleCorrupt, match=words):
        Weights(stream)


def test_no_damage_of_a_header_is_another_error(path: Path) -> None:
    good, chance = path.read_bytes(), random.Random(0)
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(400)] = chance.randrange(256)
        try:
            weights = Weights(io.BytesIO(data))
        except BundleCorrupt:
            continue
        assert sum(values.nbytes for values in weights.values()) == sum(values.nbytes for values in TENSORS.values())


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.write(path, {"long": np.zeros(100_000, np.float32)})
    with path.open("rb") as stream:
        weights = Weights(stream)
        with path.open("r+b") as other:
            other.truncate(200_000)
        with pytest.raises(BundleCorrupt, match=r"weights\.safetensors has become shorter"):
            weights["long"]
