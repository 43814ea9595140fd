"""onnxruntime on the CPU: what depends on x alone is computed once for each x, and the result is that of the graph in one."""

from __future__ import annotations

import subprocess
import sys
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("hoisted", [False, True])
def test_no_later_call_takes_more_memory_than_the_first(hoisted: bool, shipped: Bundle) -> None:
    """In a process of its own, since one's peak is that of all before."""
    code = f"""
import sys; from pathlib import Path; import numpy as np
from sr3rt.backends import Request, onnxruntime; from sr3rt.bundle import Bundle

def status(name):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(name))

x = np.zeros((1, 3, 384, 384), np.float32)
network = onnxruntime.load(Bundle.open({str(shipped.path)!r}), Request(threads=2), hoisted={hoisted})
run = network.bind(x, x + 1, np.ones((1, 1), "f4"), x.copy())
before = status("VmRSS")
for i in range(3):
    run()
    x += 0.1
    print(status("VmHWM") - before)
"""
    first, _, last = map(float, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert 20 < first <= last < 1.25 * first


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
