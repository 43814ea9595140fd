"""bfloat16 on CPUs: when it is taken, when it is refused, and what it costs the model that ships."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from programs import bundle_in, convolution, program, random, run

import sr3rt
from sr3rt import _native, backends
from sr3rt.backends import Request, native
from sr3rt.bundle import Bundle
from sr3rt.errors import BackendError

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[..., Bundle]:
    return bundle_in(tmp_path)


def figures(**worst: float) -> dict[str, Any]:
    """A bundle's figures for bfloat16, with limits of 0.02."""
    return {f"bf16 {name}": {"worst": value, "limit": 0.02} for name, value in worst.items()}


@pytest.mark.parametrize(
    ("parity", "taken"),
    [
        (figures(net=0.01, picture=0.02), "bf16"),
        (figures(net=0.03, picture=0.01), "fp32"),
        (figures(net=0.01), "fp32"),
        ({}, "fp32"),
        ({"bf16 net": "good", "bf16 picture": {"worst": "little", "limit": "some"}}, "fp32"),
    ],
    ids=["within", "beyond", "half", "none", "nonsense"],
)
def test_auto_takes_bfloat16_where_the_bundles_figures_are_within_their_limits(
    bundle: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch, parity: dict[str, Any], taken: str
) -> None:
    made = bundle(program(convolution()), parity=parity)
    if _native.has("quick_bf16"):
        assert backends.load(made, Request()).precision == taken
    monkeypatch.setattr(_native, "has", lambda instructions: False)
    assert backends.load(made, Request()).precision == "fp32"


def test_bfloat16_is_refused_without_instructions_for_it(shipped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "bfloat16", lambda: None)
    with pytest.raises(BackendError, match=r"'bf16' needs a processor with AVX512-BF16 \(Intel since .*\): use auto or fp32"):
        backends.load(shipped, Request("native", "bf16"))


def test_the_shipped_model_says_that_bfloat16_suffices(shipped: Bundle) -> None:
    """And so it does: the same run, in float32 and in bfloat16, on any processor."""
    assert native.holds_bf16(shipped.manifest)
    assert shipped.manifest.parity["bf16 picture"]["psnr"] > 60
    networks = [backends.load(shipped, Request("native", "fp32")), native.in_bf16(shipped, Request("native"))]
    assert [network.precision for network in networks] == ["fp32", "bf16"]
    x = random(1, 3, 64, 64).clip(-1, 1)
    exact, rounded = (run(network, x, x * 0.7, np.full((1, 1), 0.7, np.float32)) for network in networks)
    assert 1e-5 < np.abs(rounded - exact).max() < 0.03


def test_what_bfloat16_cannot_hold_is_done_again_in_float32(shipped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rerun` as with float16 on a GPU."""
    half = native.in_bf16(shipped, Request("native"))
    monkeypatch.setattr(half, "bind", lambda x, y, level, out: lambda: out.fill(np.nan))
    loaded = native.load
    monkeypatch.setattr(native, "load", lambda bundle, request: loaded(bundle, request) if request.precision == "fp32" else half)
    small = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(sr3rt.SR3Error, match="step"):
        sr3rt.load(backend="native").upscale(small, steps=2)
    with pytest.warns(RuntimeWarning):
        assert sr3rt.load(backend="native", rerun=True).upscale(small, steps=2).shape == (16, 16, 3)
