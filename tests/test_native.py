"""sr3rt's own engine for CPUs: what it takes, what it refuses, and that nothing but its inputs decides its bits.

What it computes is compared with float64 in test_native_nets.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import tiny
from programs import LEVEL, Program, bands, bundle_in, convolution, program, random, run, tensors

import sr3rt
from sr3rt import _native, backends
from sr3rt.backends import Floats, Request, native
from sr3rt.backends.native import compiled
from sr3rt.bundle import Bundle
from sr3rt.errors import BackendError, BundleCorrupt

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))


PHOTO = Path(__file__).parent / "data" / "kodim23_crop.png"


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[..., Bundle]:
    return bundle_in(tmp_path)


@pytest.fixture(scope="module")
def pictures() -> tuple[Floats, Floats, Floats]:
    """x, y and levels of three pictures for the shipped network."""
    return random(3, 3, 40, 24), random(3, 3, 40, 24) * 2, np.array([[0.9], [0.3], [0.01]], np.float32)


# --- what auto takes


def test_auto_takes_it_for_the_shipped_model() -> None:
    assert sr3rt.load().network.backend == "native"


def test_auto_takes_onnxruntime_for_a_bundle_without_a_program(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert sr3rt.load(tiny.write(tmp_path / "b")).network.backend == "onnxruntime"


def test_auto_takes_onnxruntime_on_a_processor_without_avx2(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(_native, "instructions", lambda: None)
    assert sr3rt.load().network.backend == "onnxruntime"


def test_auto_says_of_every_backend_why_it_cannot(shipped: Bundle) -> None:
    with pytest.raises(BackendError, match=r"no backend can do this: tensorrt: .*; native: .* has fp32 and bf16.*; onnxruntime: "):
        backends.load(shipped, Request(precision="fp16", device="cpu"))


# --- what is refused


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"precision": "fp16"}, "has fp32 and bf16, precision 'fp16' was asked for: use auto, fp32 or bf16"),
        ({"device": "cuda"}, "runs on the cpu, device 'cuda' was asked for: use auto or cpu"),
    ],
)
def test_what_it_does_not_have_is_refused(shipped: Bundle, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(BackendError, match=words):
        backends.load(shipped, Request("native", **asked))


def test_a_bundle_without_a_program_is_refused(tmp_path: Path) -> None:
    words = r"b has no network\.json, which the native backend runs: export it again, or use backend='onnxruntime'"
    with pytest.raises(BackendError, match=words):
        sr3rt.load(tiny.write(tmp_path / "b"), backend="native")


def test_a_processor_without_avx2_is_refused(shipped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "instructions", lambda: None)
    with pytest.raises(BackendError, match="needs a processor with AVX2 and FMA: use backend='onnxruntime'"):
        backends.load(shipped, Request("native"))


def test_instructions_that_the_processor_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match="this processor does not have sse9"):
        compiled(program(convolution()), tensors(), 3, 1, instructions="sse9")


def test_a_program_is_run(bundle: Callable[[Program], Bundle]) -> None:
    """The one that the refused ones below are changes of."""
    network = backends.load(bundle(program(convolution())), Request("auto", threads=1))
    assert (network.backend, network.device, network.precision) == ("native", "cpu", "fp32")
    assert np.isfinite(run(network, random(1, 3, 4, 4), random(1, 3, 4, 4), random(1, 1))).all()


FIRST = convolution(to="h")


@pytest.mark.parametrize(
    ("foreign", "words"),
    [
        (program(convolution(), format=2), "format 2, expected 3"),
        ({"format": 3}, "found the keys ['format'], expected"),
        (program(), "KeyError('out')"),
        ([], "TypeError"),
        (program(convolution(do="fold")), "the operation 'fold' with"),
        (program(convolution(dilation=1)), "the operation 'convolution' with"),
        (program({"do": "resample", "from": ["x"], "to": "out"}), "the operation 'resample' with"),
        (program(convolution(weight="none")), "KeyError('none')"),
        (program(FIRST, convolution(**{"from": ["g"]})), "KeyError('g')"),
        (program(convolution(to="x")), "register 'x' is written twice"),
        (program(FIRST, FIRST), "register 'h' is written twice"),
        (program(FIRST, convolution(**{"from": ["h"]})), "a weight for 6 channels, of registers with 3"),
        (program(convolution(bias="f")), "a bias for every output"),
        (program(convolution(weight="b")), "weight must be (outputs, inputs, side, side)"),
        (program(convolution(stride=3)), "of stride 1 or 2"),
        (program(convolution(resample="sideways")), "KeyError('sideways')"),
        (program(convolution(after="tanh")), "KeyError('tanh')"),
        (program(convolution(resample="none")), "KeyError('none')"),
        (program(convolution(gain="1")), "TypeError"),
        (program(convolution(), more=1), "found the keys ['format', 'level', 'more', 'operations']"),
        (program(convolution(), level={"input": "level"}), "found the keys ['input'], expected ['frequencies', "),
        (program(convolution(), level=LEVEL | {"layers": [{"weight": "level"}]}), "found the keys ['weight'], expected"),
        (program(convolution(norm={})), "found the keys [], expected ['bias', 'eps', 'groups', 'weight']"),
        (program(convolution(level={"weight": "level", "bias": "b"})), "found the keys ['bias', 'weight'], expected"),
        (program(convolution(norm={"groups": 4, "eps": 1e-5, "weight": "b", "bias": "b"})), "a norm of 4 groups for 6 channels"),
        (program(convolution(norm={"groups": 0, "eps": 1e-5, "weight": "six", "bias": "six"})), "a norm of 0 groups"),
        (program(convolution(level={"weight": "level", "bias": "b", "kind": "scale_shift"})), "a level of 4 inputs and 3 outputs"),
        (program(convolution(level={"weight": "w6", "bias": "b", "kind": "shift"})), "a level of 6 inputs and 3 outputs, expected 4 and"),
        (program(convolution(level={"weight": "level", "bias": "b", "kind": "gate"})), "KeyError('gate')"),
        (program(FIRST, {"do": "resample", "from": ["h"], "to": "out", "by": None}), "resample goes up or down"),
        (program(FIRST, bands("to", "out", "x", "h", "h")), "to_bands reads x, y and their mean"),
        (program(FIRST, bands("to", "bands", "x", "y", "h"), bands("from", "out", "x", "y")), "not enough values"),
        (program(FIRST, bands("to", "bands", "x", "y", "h"), bands("from", "out", "x", "y", "h", "h", detail=0.5)), "the same detail"),
        (program(FIRST, bands("to", "bands", "x", "y", "h"), bands("from", "out", "x", "y", "h", "h")), "the details 3 times"),
        (program(FIRST, {"do": "unshuffle", "from": ["y"], "to": "out", "by": 2}), "unshuffle reads x"),
        (program(FIRST, {"do": "unshuffle", "from": ["x"], "to": "out", "by": 0}), "unshuffled by 0, expected 1 to 16"),
        (program(FIRST, {"do": "attention", "from": ["h"], "to": "out"}), "the result has not the picture's channels"),
        (program(convolution(), level=LEVEL | {"input": "sigma"}), "a level from 'sigma', expected level or log_sigma"),
    ],
)  # fmt: skip
def test_a_foreign_program_is_refused_before_it_runs(bundle: Callable[[Program], Bundle], foreign: Program, words: str) -> None:
    made = bundle(foreign)
    with pytest.raises(BundleCorrupt, match=rf"network\.json is not a program of format 3: .*{re.escape(words)}.* Export the bundle again"):
        backends.load(made, Request("auto", threads=1))


def test_no_change_of_a_program_is_another_error() -> None:
    """Whatever is put in place of whatever: it runs, or is refused as what a foreign program is."""
    chance, found = Random(0), {True: 0, False: 0}
    good = program(
        FIRST,
        convolution(to="g", norm={"groups": 3, "eps": 1e-5, "weight": "six", "bias": "six"}, silu=True, add="h", **{"from": ["h", "h"]}),
        convolution(level={"weight": "level", "bias": "b", "kind": "shift"}, after="silu", **{"from": ["g", "h"]}),
    )
    others: list[Any] = [
        None,
        -1,
        0,
        1,
        2,
        2**31,
        2**64,
        1e300,
        True,
        "",
        "x",
        "h",
        "g",
        "w",
        "b",
        "up",
        "down",
        [],
        {},
        ["g"],
        ["x"],
        ["h"] * 5,
    ]
    for _ in range(2000):
        changed = json.loads(json.dumps(good))
        part, key = chance.choice(list(parts(changed)))
        part[key] = chance.choice(others)
        try:
            network = compiled(changed, tensors(), 3, 1)
            network.run(random(1, 3, 4, 4), random(1, 3, 4, 4), random(1, 1), random(1, 3, 4, 4))
        except (KeyError, TypeError, ValueError):
            found[False] += 1
        else:
            found[True] += 1
    assert min(found.values()) > 50


def parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in `value` with every key of it."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from parts(value[key])


@pytest.mark.parametrize("size", [(33, 32), (32, 12), (1, 1)])
def test_a_size_that_the_stride_does_not_divide_is_refused(shipped: Bundle, size: tuple[int, int]) -> None:
    network, pixels = backends.load(shipped, Request("native", threads=1)), random(1, 3, *size)
    with pytest.raises(ValueError, match=f"at {size[0]}×{size[1]}: its stride does not divide that"):
        run(network, pixels, pixels, random(1, 1))


def test_a_map_that_halving_leaves_nothing_of_is_refused() -> None:
    halved = convolution(to="h", weight="one", resample="down")
    made = program(halved, convolution(weight="w1", resample="up", **{"from": ["h"]}))
    network = compiled(made, {**tensors(), "one": random(3, 6, 1, 1)}, 3, 1)
    for size in ((8, 1), (1, 8), (1, 1)):
        with pytest.raises(ValueError, match=f"at {size[0]}×{size[1]}: its stride does not divide that"):
            network.memory(1, *size)


def test_what_has_no_channels_or_follows_the_result_is_refused() -> None:
    with pytest.raises(ValueError, match="a weight without channels"):
        compiled(program(convolution()), {**tensors(), "w": np.zeros((0, 6, 3, 3), np.float32)}, 3, 1)
    with pytest.raises(ValueError, match="nothing follows the result"):
        compiled(program(convolution()), tensors(), 3, 1).resampling(0, "up")


def test_arrays_of_another_shape_are_refused() -> None:
    network, pixels = compiled(program(convolution()), tensors(), 3, 1), random(2, 3, 4, 4)
    for arrays, words in (
        ((random(2, 1, 4, 4), pixels, random(2, 1), pixels.copy()), "x must be"),
        ((pixels, random(2, 3, 4, 5), random(2, 1), pixels.copy()), "y and out must have x's shape"),
        ((pixels, pixels, random(2, 1), random(1, 3, 4, 4)), "y and out must have x's shape"),
        ((pixels, pixels, random(1, 1), pixels.copy()), "level must be"),
    ):
        with pytest.raises(ValueError, match=words):
            network.run(*arrays)


@pytest.mark.parametrize("out", [np.zeros((1, 3, 4, 4)), np.zeros((1, 3, 4, 8), np.float32)[..., ::2]], ids=["float64", "strided"])
def test_a_result_that_would_be_lost_is_refused(out: Any) -> None:
    network, pixels = compiled(program(convolution()), tensors(), 3, 1), random(1, 3, 4, 4)
    with pytest.raises(TypeError):
        network.run(pixels, pixels, random(1, 1), out)


def test_memory_that_is_not_there_is_an_error_that_names_the_size() -> None:
    class Full:
        instructions = "avx2"

        def run(self, *arrays: Floats) -> None:
            raise MemoryError

    network = native.NativeNetwork(Full())  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="has not the memory for 1×3×4×4"):
        run(network, random(1, 3, 4, 4), random(1, 3, 4, 4), random(1, 1))


# --- the same bits


def test_threads_and_neighbours_change_no_bit(shipped: Bundle, pictures: tuple[Floats, Floats, Floats]) -> None:
    expected = run(backends.load(shipped, Request("native", threads=1)), *pictures)
    for threads in (2, 3, 5):
        network = backends.load(shipped, Request("native", threads=threads))
        assert (run(network, *pictures) == expected).all()
        for i in range(3):
            assert (run(network, *(array[i : i + 1] for array in pictures)) == expected[i : i + 1]).all()


def test_a_1x1_that_is_only_added_is_made_where_it_is_added_in_the_same_bits(bundle: Callable[[Program], Bundle]) -> None:
    """Whatever shares the batch."""
    first, projected = convolution(to="h"), convolution(**{"from": ["h"]}, to="r", weight="w1", bias="b")
    last = convolution(**{"from": ["x", "y"]}, add="r")
    network = native.load(bundle(program(first, projected, last)), Request("native", threads=2))
    arrays = random(3, 3, 70, 90), random(3, 3, 70, 90), np.array([[0.9], [0.3], [0.01]], np.float32)
    found = run(network, *arrays)
    for i in range(3):
        assert (run(network, *(array[i : i + 1] for array in arrays)) == found[i : i + 1]).all()
    # Read by another too it has to lie somewhere, and the sum is the same but for its rounding.
    again = convolution(**{"from": ["r"]}, to="unread", weight="w1")
    apart = native.load(bundle(program(first, projected, again, last)), Request("native", threads=2))
    assert np.abs(run(apart, *arrays) - found).max() <= 1e-6 * np.abs(found).max()


def test_large_pictures_of_a_batch_take_the_memory_of_one(shipped: Bundle) -> None:
    """They are made one after the other, in the same bits; small ones together. What depends on x alone is kept of each."""
    network = native.load(shipped, Request("native", threads=1))
    assert network.memory(5, 192, 200) < 2 * network.memory(1, 192, 200)
    assert network.memory(5, 64, 64) > 2 * network.memory(1, 64, 64)
    arrays = random(3, 3, 192, 200), random(3, 3, 192, 200) * 2, np.array([[0.9], [0.3], [0.01]], np.float32)
    found = run(network, *arrays)
    for i in range(3):
        assert (run(network, *(array[i : i + 1] for array in arrays)) == found[i : i + 1]).all()


def test_what_a_network_did_before_changes_no_bit(shipped: Bundle, pictures: tuple[Floats, Floats, Floats]) -> None:
    """Its memory is used again, for larger and smaller pictures."""
    network = backends.load(shipped, Request("native", threads=2))
    expected = run(network, *pictures)
    for shape in ((1, 3, 8, 8), (2, 3, 64, 72)):
        run(network, np.full(shape, np.nan, np.float32), random(*shape), random(shape[0], 1))
        assert (run(network, *pictures) == expected).all()


def test_a_call_reads_what_the_arrays_hold_then(shipped: Bundle, pictures: tuple[Floats, Floats, Floats]) -> None:
    network = backends.load(shipped, Request("native", threads=1))
    x, y, level = (array.copy() for array in pictures)
    out = np.empty_like(y)
    again = network.bind(x, y, level, out)
    again()
    first = out.copy()
    x += 1
    again()
    assert (out == run(network, x, y, level)).all()
    assert (out != first).any()


@pytest.mark.parametrize("size", [64, 192], ids=["pictures together", "one by one"])
def test_what_depends_on_x_alone_is_made_anew_where_one_value_is_another(shipped: Bundle, size: int) -> None:
    x, y, level = random(3, 3, size, size), random(3, 3, size, size) * 2, np.array([[0.9], [0.3], [0.01]], np.float32)
    out, network = np.empty_like(y), native.load(shipped, Request("native", threads=2))
    again = network.bind(x, y, level, out)
    held = network.memory(3, size, size)
    again()
    assert network.memory(1, size, size) == 0 < network.memory(3, size, size) < held / 3  # one picture's, where they change places
    first, value = out.copy(), x[1, 2, -1, -1]
    x[1, 2, -1, -1] = value + 1
    again()
    changed = [(out[i] != first[i]).any() for i in range(3)]
    assert changed == [False, True, False]
    assert (out == run(native.load(shipped, Request("native", threads=1)), x, y, level)).all()
    x[1, 2, -1, -1] = value
    y[0] += 1
    again()
    assert (out[1:] == first[1:]).all() and (out[0] != first[0]).any()


@pytest.mark.parametrize("size", [64, 192], ids=["pictures together", "one by one"])
def test_pictures_that_join_leave_and_change_places_change_no_bit(shipped: Bundle, size: int) -> None:
    """As in a running batch: what was made of an x is found wherever it is now, also twice."""
    x, y, level = random(4, 3, size, size), random(4, 3, size, size) * 2, np.array([[0.9], [0.5], [0.3], [0.01]], np.float32)
    network = native.load(shipped, Request("native", threads=2))
    turned = ([0, 1, 2, 3], [1, 2, 3, 0], [0, 1, 3, 2], [3, 0, 2, 2], [2, 0, 3, 1])  # rings of slots, with and without others that hang on
    for rows in ([0, 1], [1, 0, 2], [2], [3, 2, 1, 0], [2, 2, 0], [3, 3, 3, 3], *turned):
        arrays = x[rows], y[: len(rows)], level[: len(rows)]
        assert (run(network, *arrays) == run(native.load(shipped, Request("native", threads=1)), *arrays)).all()


def test_two_threads_at_once_get_what_each_alone_gets(shipped: Bundle, pictures: tuple[Floats, Floats, Floats]) -> None:
    network = backends.load(shipped, Request("native", threads=2))
    jobs = [pictures, tuple(np.ascontiguousarray(array[:1, ..., :16]) for array in pictures)]
    alone = [run(network, *job) for job in jobs]
    wrong: list[int] = []

    def repeat(i: int) -> None:
        wrong.extend(i for _ in range(20) if not (run(network, *jobs[i]) == alone[i]).all())
        done[i] = True

    done = [False, False]
    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == [True, True] and wrong == []


def test_it_needs_neither_torch_nor_onnxruntime() -> None:
    code = (
        "import sys, sr3rt\n"
        f"sr3rt.upscale({str(PHOTO)!r}, steps=1, backend='native')\n"
        "heavy = [m for m in sys.modules if m.split('.')[0] in ('torch', 'onnx', 'onnxruntime', 'safetensors')]\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PHOTO.parent)


def test_the_call_says_nothing_when_python_ends() -> None:
    code = f"import sr3rt; sr3rt.upscale({str(PHOTO)!r}, steps=1, backend='native')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PHOTO.parent)
    assert done.stderr == ""
