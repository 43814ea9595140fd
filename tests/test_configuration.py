"""What an operator sets is checked before anything starts."""

from __future__ import annotations

import errno
import json
import os
import re
from types import SimpleNamespace
from typing import Any

import pytest

from sr3rt.errors import OptionError
from sr3rt.serving import shared_memory
from sr3rt.serving.configuration import Configuration
from sr3rt.serving.server import Address, listening


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"slots": 0}, "slots must be a whole number from 1 on, found 0"),
        ({"slot_pixels": -1}, "slot_pixels must be a whole number from 1 on, found -1"),
        ({"max_requests": 0}, "max_requests must be a whole number from 1 on, found 0"),
        ({"max_pixels": 0}, "max_pixels must be a whole number from 1 on, found 0"),
        ({"max_file_bytes": 0}, "max_file_bytes must be a whole number from 1 on, found 0"),
        ({"drain_s": -1}, "drain_s must be a whole number from 0 on, found -1"),
        ({"drain_s": 0.5}, r"drain_s must be a whole number from 0 on, found 0\.5"),
        ({"threads": -1}, r"threads must be a whole number from 0 \(all\) to 1024, found -1"),
        ({"backend": "tpu"}, "unknown backend 'tpu': expected auto, tensorrt, native"),
        ({"precision": "fp8"}, "unknown precision 'fp8': expected auto, fp32, fp16, bf16"),
        ({"device": "gpu"}, "unknown device 'gpu': expected auto, cpu"),
        ({"joins": "never"}, "joins must be one of step, batch, found 'never'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Configuration(**given)
    text = {name: {"string_value": str(value)} for name, value in given.items()}
    with pytest.raises(OptionError, match=next(iter(given))):
        Configuration.read(json.dumps({"parameters": text}))


def test_the_least_that_can_be_set_is_taken() -> None:
    assert Configuration(slots=1, slot_pixels=1, max_requests=1, max_pixels=1, max_file_bytes=1, drain_s=0)


def test_no_more_is_taken_on_than_answers_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared_memory.most_pixels(1) == 1
    assert shared_memory.too_little(1) is None
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_blocks=2**14, f_frsize=2**12))
    assert shared_memory.most_pixels(2**26) == 2**23
    found = ".* has room for the answers of 8388608 pixels at a time, .* for max_pixels, 67108864, give it 0.5 GiB"
    assert re.match(found, shared_memory.too_little(2**26) or "")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"http": 0}, "the http port must be from 1 to 65535, found 0"),
        ({"grpc": 65536}, "the grpc port must be from 1 to 65535, found 65536"),
        ({"metrics": -1}, "the metrics port must be from 1 to 65535, found -1"),
        ({"grpc": 8000}, "the ports must differ, found http 8000, grpc 8000, metrics 8002"),
    ],
)
def test_ports_that_cannot_be_are_refused(given: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Address(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["a..b", "127.0.0.1/8", "::1%nowhere"])
def test_a_host_that_is_none_is_told_with_its_name(host: str) -> None:
    with pytest.raises(OptionError, match=r"host '.*' is no address \(.+\): give one of this machine's, or 0\.0\.0\.0 for all of them"):
        listening(host, 8000, "http")


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(OptionError, match=rf"\({os.strerror(errno.EADDRNOTAVAIL)}\): give an address of this machine"):
        listening("192.0.2.1", 8000, "http")  # of documentation
