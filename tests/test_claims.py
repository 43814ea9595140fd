"""What the JSON of a request may claim."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sr3rt.errors import OptionError
from sr3rt.serving.claims import check_infer, check_json


def infer(**changes: Any) -> bytes:
    tensor = {"name": "pixels", "shape": [1, 1, 3], "datatype": "UINT8", "data": [1, 2, 3], **changes}
    return json.dumps({"inputs": [tensor], "outputs": [{"name": "info"}]}).encode()


@pytest.mark.parametrize("shape", [[1, 1, 3], [3], [], [0, 3, 3], [1] * 1000])
def test_a_shape_that_its_body_can_hold_is_believed(shape: list[int]) -> None:
    body = infer(shape=shape)
    check_infer(body, size=len(body))


@pytest.mark.parametrize(
    "shape", [[1, 2**33, 3], [2**63 - 1], [2**32, 2**32], [0, 2**62, 2**62], [2**63, 2, 1], [2**62] * 100_000, [10**4000]]
)
def test_a_shape_that_no_body_holds_is_refused(shape: list[int]) -> None:
    with pytest.raises(OptionError, match=r"input 0: its shape claims more values than the 99 bytes of the request can hold"):
        check_infer(infer(shape=shape), size=99)


def test_the_data_after_the_json_counts() -> None:
    check_infer(infer(shape=[100, 100, 3]), size=40_000)


@pytest.mark.parametrize("shape", [[-1, -1, 3], [1.0], ["1"], [True], [[1]], None, 3, "1", {}])
def test_a_shape_is_a_list_of_whole_numbers(shape: Any) -> None:
    with pytest.raises(OptionError, match="input 0: shape must be a list of whole numbers from 0 on"):
        check_infer(infer(shape=shape), size=1000)


@pytest.mark.parametrize("inputs", [None, 3, {}, "x", [None], [[]]])
def test_inputs_and_outputs_are_lists_of_objects(inputs: Any) -> None:
    with pytest.raises(OptionError, match="inputs must be a list of objects"):
        check_infer(json.dumps({"inputs": inputs}).encode(), size=1000)
    with pytest.raises(OptionError, match="outputs must be a list of objects"):
        check_infer(json.dumps({"inputs": [], "outputs": inputs}).encode(), size=1000)


def test_no_output_is_classified() -> None:
    outputs = [{"name": "info"}, {"name": "image", "parameters": {"binary_data": True, "classification": 1}}]
    with pytest.raises(OptionError, match="output 1: classification is for class scores"):
        check_infer(json.dumps({"inputs": [], "outputs": outputs}).encode(), size=1000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"{}{}", "Extra data"),
        (b'{"a": 1, "\\u0061": 2}', "a name is given twice"),
        (b'{"a": {"b": [{"c": 1, "c": 1}]}}', "a name is given twice"),
        (b'{"a": "\xff"}', "utf-8"),
        ("{}".encode("utf-16"), "utf-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
        (b"[]", "must be an object, found list"),
        (b"null", "must be an object, found NoneType"),
    ],
)
def test_json_that_triton_might_read_otherwise_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        check_json(text)
