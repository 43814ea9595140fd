"""Requests that are wrong in many ways, the same for the same seed."""

from __future__ import annotations

import base64
import gzip
import io
import json
import random
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

Body = tuple[str, bytes, dict[str, str]]

INFER = ("/v2/models/sr3/infer", "/v2/models/sr3_stream/infer")
JSON = {"Content-Type": "application/json"}
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, -(2**70), 1e309, 0.5, "", "x" * 3000, "\u0000", "ddim(nan)", [], {}, [[1]], "NaN", "１２",
)  # fmt: skip
BOMB = zlib.compress(bytes(100 * 2**20))


def mutated(pick: random.Random, i: int) -> Body:
    """The i-th: each kind takes its turn."""
    return KINDS[i % len(KINDS)](pick)


def _file(pick: random.Random) -> bytes:
    pixels = np.random.default_rng(pick.randrange(2**32)).integers(0, 256, (pick.randint(1, 12), pick.randint(1, 12), 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, pick.choice(["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM"]))
    return out.getvalue()


def _binary(data: bytes, pick: random.Random, **parameters: Any) -> Body:
    """A file as Triton's binary extension has it: a JSON head, then the length and the bytes."""
    tensor = struct.pack("<I", len(data)) + data
    inputs = [{"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(tensor)}}]
    head = json.dumps({"inputs": inputs, "parameters": {"steps": 1, **parameters}}).encode()
    return (
        pick.choice(INFER[:1]),
        head + tensor,
        {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"},
    )


def _flipped(pick: random.Random) -> Body:
    data = bytearray(_file(pick))
    for _ in range(pick.randint(1, 30)):
        data[pick.randrange(len(data))] = pick.randrange(256)
    return _binary(bytes(data), pick)


def _truncated(pick: random.Random) -> Body:
    data = _file(pick)
    return _binary(data[: pick.randrange(len(data))], pick)


def _padded(pick: random.Random) -> Body:
    return _binary(_file(pick) + pick.randbytes(pick.choice([1, 1000, 2**20, 3 * 2**20])), pick)


def _bomb(pick: random.Random) -> Body:
    """A small PNG of a huge picture."""
    side = pick.choice([20_000, 65_535, 2**31 - 1])

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(b"\0" * 1_000_000)
    kind = pick.choice([0, 2, 3, 6])
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, kind, 0, 0, 0))]
    if pick.random() < 0.5:
        parts.append(chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 50_000_000)))
    return _binary(b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IDAT", rows) + chunk(b"IEND", b""), pick)


def _lying_lengths(pick: random.Random) -> Body:
    path, body, headers = _binary(_file(pick), pick)
    if pick.random() < 0.5:
        headers["Inference-Header-Content-Length"] = str(pick.choice([0, 1, -1, len(body), len(body) + 1, 2**40]))
    else:
        body = body[: pick.randrange(len(body))]
    return path, body, headers


def _values(pick: random.Random) -> Body:
    """Wrong values of known and unknown parameters."""
    names = ["steps", "sampler", "schedule", "consistency", "seed", "priority", "timeout_ms", "format", "base64", "previews", "probe",
             "sr3rt", "sr3rt_cancel", "id", "sr3_priority", "triton_x", "other", ""]  # fmt: skip
    parameters = {name: pick.choice(VALUES) for name in pick.sample(names, pick.randint(1, 3))}
    return _binary(_file(pick), pick, **parameters)


def _tensors(pick: random.Random) -> Body:
    """Wrong shapes, types and names; of half, only the shape, and that claims more memory than there is, or all of it and none."""
    lengths = [0, 1, 2, 3, 4, 7, -1, 2**20, 2**63 - 1, 2**64, 2**70, 1.5, "3", None]
    tensor: dict[str, Any] = {
        "name": pick.choice(["pixels", "image", "other", ""]),
        "shape": [pick.choice(lengths) for _ in range(pick.randint(0, 4))],
        "datatype": pick.choice(["UINT8", "BYTES", "FP32", "INT64", "BOOL", "NONE"]),
        "data": pick.choice([[], [1] * 12, [[[1, 2, 3]]], ["text"], [300], [-1], [None], "text", {}]),
    }
    if pick.random() < 0.5:
        claimed = [pick.choice([0, 1, 3]), pick.choice([2**33, 2**40, 2**62]), pick.choice([1, 3, 2**33])]
        tensor = {"name": "pixels", "shape": claimed, "datatype": "UINT8", "data": pick.choice([[], [1]])}
    elif pick.random() < 0.3:
        del tensor[pick.choice(list(tensor))]
    body = {"inputs": [tensor] * pick.choice([0, 1, 1, 1, 2]), "parameters": {"steps": 1}}
    return pick.choice(INFER), json.dumps(body).encode(), JSON


def _outputs(pick: random.Random) -> Body:
    """Outputs asked for in ways that nobody means."""
    names = ["classification", "binary_data", "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset", "other"]
    output = {
        "name": pick.choice(["pixels", "image", "info", "other", "", None]),
        "parameters": pick.choice(
            [{"classification": 1}, {name: pick.choice(VALUES) for name in pick.sample(names, pick.randint(0, 2))}, None, [], 3]
        ),
    }
    pixel = {"name": "pixels", "shape": [1, 1, 3], "datatype": "UINT8", "data": [1, 2, 3]}
    body = {"inputs": [pixel], "parameters": {"steps": 1}, "outputs": [output] * pick.choice([1, 1, 2, 1000])}
    return pick.choice(INFER[:1]), json.dumps(body).encode(), JSON


def _nested(pick: random.Random) -> Body:
    """Arrays or objects in each other, closed or not, at any place."""
    depth = pick.choice([10, 900, 5000, 100_000])
    opening, closing = pick.choice([("[", "]"), ('{"a":', "}")])
    nest = opening * depth + "1" + closing * pick.choice([depth, depth, 0])
    tensor = {"name": "pixels", "shape": [1, 1, 1], "datatype": "UINT8", "data": [1]}
    path, body = pick.choice(
        [
            (pick.choice(INFER), "nest"),
            (pick.choice(INFER), {"inputs": [{**tensor, pick.choice(["shape", "data", "parameters"]): "nest"}]}),
            (pick.choice(INFER), {"inputs": [], "parameters": {"steps": "nest"}}),
            ("/v2/models/sr3/generate", {"image": "nest"}),
            ("/v2/models/sr3_stream/generate_stream", {"pixels": "nest"}),
        ]
    )
    return path, json.dumps(body).replace('"nest"', nest).encode(), JSON


def _compressed(pick: random.Random) -> Body:
    """Bombs, and what is not what its header says."""
    path, body, headers = _values(pick)
    encoding = pick.choice(["gzip", "deflate", "br", "gzip, gzip", ""])
    packed = [gzip.compress(body), zlib.compress(body), gzip.compress(body)[: pick.randrange(40)], body, BOMB]
    return path, pick.choice(packed), {**headers, "Content-Encoding": encoding}


def _oversized(pick: random.Random) -> Body:
    path, body, headers = _binary(_file(pick), pick)
    return path, body + bytes(pick.choice([2**20, 6 * 2**20, 20 * 2**20])), headers


def _broken_json(pick: random.Random) -> Body:
    text = bytearray(json.dumps({"inputs": [{"name": "pixels", "shape": [1, 1, 3], "datatype": "UINT8", "data": [1, 2, 3]}]}).encode())
    for _ in range(pick.randint(1, 4)):
        at = pick.randrange(len(text))
        text[at : at + pick.randint(0, 3)] = pick.randbytes(pick.randint(0, 3))
    return pick.choice(INFER), bytes(text), JSON


def _generate(pick: random.Random) -> Body:
    """The generate endpoint, with text that is Base64 of something else, or not Base64."""
    data = pick.choice([_file(pick)[:50], pick.randbytes(40), b""])
    text = pick.choice([base64.b64encode(data).decode(), data.decode("latin-1"), "===", "A" * 5])
    body = {"image": text, "base64": pick.choice([True, False, "true", 3]), "steps": pick.choice([1, *VALUES])}
    return "/v2/models/sr3/generate", json.dumps(body).encode(), JSON


KINDS = (
    _flipped,
    _truncated,
    _padded,
    _bomb,
    _lying_lengths,
    _values,
    _tensors,
    _outputs,
    _nested,
    _compressed,
    _oversized,
    _broken_json,
    _generate,
)
