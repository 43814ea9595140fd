"""What a request claims, checked before Triton believes it.

Triton 2.51 ends, or loses a model's process, when a `shape` claims more memory than there is, or has a product that wraps or is 0 with
dimensions that NumPy refuses; when arrays are nested 100,000 deep; and when `classification` is asked of an output that is text or a file.
Its parser takes the first of two equal names, Python's the last: so a name may be given once.
"""

from __future__ import annotations

import json
from collections.abc import Container
from typing import Any

from sr3rt.errors import OptionError


def check_infer(text: bytes, *, size: int) -> None:
    """The JSON of an `infer` request whose body, data included, has `size` bytes. Raises OptionError."""
    request = check_json(text)
    for number, tensor in enumerate(_objects(request, "inputs")):
        check_shape(tensor.get("shape"), f"input {number}", size)
    for number, output in enumerate(_objects(request, "outputs") if "outputs" in request else []):
        parameters = output.get("parameters")
        check_output(parameters if isinstance(parameters, dict) else (), number)


def check_json(text: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8, each of whose names is given once. Raises OptionError."""
    try:
        found = json.loads(text.decode(), object_pairs_hook=_once)
    except RecursionError:  # Triton's own parser has no such bound
        raise OptionError("the request's JSON is nested too deep: expected tensors of three dimensions") from None
    except ValueError as error:
        raise OptionError(f"the request is no JSON that can be used: {error}") from None
    if not isinstance(found, dict):
        raise OptionError(f"the request's JSON must be an object, found {type(found).__name__}")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice in one object")
    return found


def _objects(request: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = request.get(name)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise OptionError(f"{name} must be a list of objects, found {type(found).__name__}")
    return found


def check_output(parameters: Container[str], number: int) -> None:
    """The names of an output's parameters. Raises OptionError."""
    if "classification" in parameters:
        raise OptionError(f"output {number}: classification is for class scores, and no output here has them: leave it out")


def check_shape(shape: Any, what: str, size: int) -> None:
    """Of a tensor in a request of `size` bytes. A value takes a byte of that at least, and eight of Triton's memory at most.

    Raises OptionError.
    """
    if not isinstance(shape, list) or not all(type(length) is int and length >= 0 for length in shape):
        raise OptionError(f"{what}: shape must be a list of whole numbers from 0 on")
    values = 1
    for length in shape:
        values *= max(length, 1)  # [0, 2**62] has no values, and is still refused
        if values > size:
            raise OptionError(f"{what}: its shape claims more values than the {size} bytes of the request can hold")
