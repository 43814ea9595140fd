"""onnxruntime on the CPU: what depends on x alone is computed once for each x, and the result is that of the graph in one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sr3rt.backends import Floats, Network, Request
from sr3rt.bundle import ONCE, STEP, Bundle

pytest.importorskip("onnxruntime")

from sr3rt.backends import onnxruntime as backend

LEVELS = np.array([[0.9], [0.3], [0.01]], np.float32)


class Counted:
    """A session whose calls are counted."""

    def __init__(self, session: Any) -> None:
        self.session, self.calls = session, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run_with_iobinding(self, binding: Any) -> None:
        self.calls += 1
        self.session.run_with_iobinding(binding)


def result(network: Network, x: Floats, y: Floats) -> Floats:
    out = np.full_like(y, np.nan)
    network.bind(x, y, LEVELS[: len(x)], out)()
    return out


def test_the_shipped_model_has_what_depends_on_x_alone_apart(shipped: Bundle) -> None:
    assert {ONCE, STEP} < set(shipped.manifest.files)
    assert shipped.manifest.parity["parts net"]["worst"] <= 1e-6


def test_parts_compute_what_the_whole_does_whenever_x_changes(shipped: Bundle) -> None:
    random = np.random.default_rng(1)
    whole, parts = (backend.load(shipped, Request(threads=2), hoisted=hoisted) for hoisted in (False, True))
    assert isinstance(parts, backend.OrtNetwork)
    step_session, once_session = parts._sessions
    once = Counted(once_session)
    parts._sessions = [step_session, once]  # type: ignore[list-item]
    for shape in ((3, 3, 40, 24), (1, 3, 32, 64)):
        x, y = random.standard_normal((2, *shape)).astype(np.float32)
        out = np.empty_like(y)
        step, before = parts.bind(x, y, LEVELS[: len(x)], out), once.calls
        for calls, change in ((1, 0), (1, 0), (2, 1), (2, 0)):
            x[-1, 2, -1, -1] += change
            y += 0.5
            step()
            assert once.calls - before == calls
            expected = result(whole, x, y)
            assert np.abs(out - expected).max() <= 1e-6 * np.abs(expected).max()


def test_bindings_do_not_see_one_another(shipped: Bundle) -> None:
    network = backend.load(shipped, Request(threads=1))
    x, y = np.random.default_rng(2).standard_normal((2, 2, 3, 32, 32)).astype(np.float32)
    alone = [result(network, x[i : i + 1], y[i : i + 1]) for i in range(2)]
    outs = [np.empty_like(one) for one in alone]
    steps = [network.bind(x[i : i + 1], y[i : i + 1], LEVELS[:1], outs[i]) for i in range(2)]
    for _ in range(2):
        for i in (0, 1):
            steps[i]()
            assert (outs[i] == alone[i]).all()
