"""Networks in a process that was forked, which has neither their threads nor the one that may have been in a call."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from programs import random, run

from sr3rt import backends
from sr3rt.backends import Floats, Request, native
from sr3rt.bundle import Bundle

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]

NATIVE = pytest.mark.skipif(native.why_not() is not None, reason=str(native.why_not()))
TASKS = Path("/proc/self/task")  # this process's threads


@pytest.fixture(scope="module")
def pictures() -> tuple[Floats, Floats, Floats]:
    """x, y and levels of three pictures for the shipped network."""
    return random(3, 3, 40, 24), random(3, 3, 40, 24) * 2, np.array([[0.9], [0.3], [0.01]], np.float32)


@pytest.fixture(params=["native", "onnxruntime"])
def asked(request: pytest.FixtureRequest) -> Request:
    if reason := backends.why_not(request.param):
        pytest.skip(reason)
    return Request(request.param, threads=3)


def status_of_child(work: Callable[[], bool], seconds: float = 20) -> int:
    """The exit status of a forked child that does `work`: 0 when it is true, -9 when it took too long."""
    pid = os.fork()
    if pid == 0:
        status = 2
        try:
            gc.freeze()  # what other tests left is not this child's to let go of
            status = 0 if work() else 1
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_child_forked_during_a_call_can_make_its_own(asked: Request, shipped: Bundle, pictures: tuple[Floats, Floats, Floats]) -> None:
    network = backends.load(shipped, asked)
    expected = run(network, *pictures)
    ending = threading.Event()

    def keep_busy() -> None:
        while not ending.is_set():
            run(network, *pictures)

    busy = threading.Thread(target=keep_busy)
    busy.start()
    try:
        for _ in range(5):
            assert status_of_child(lambda: bool((run(network, *pictures) == expected).all())) == 0
    finally:
        ending.set()
        busy.join()


def test_a_forked_child_runs_its_parents_network_and_its_own(
    asked: Request, shipped: Bundle, pictures: tuple[Floats, Floats, Floats]
) -> None:
    """The parent's threads do not exist there."""
    network = backends.load(shipped, asked)
    expected = run(network, *pictures)
    assert status_of_child(lambda: bool((run(network, *pictures) == expected).all())) == 0
    assert status_of_child(lambda: bool((run(backends.load(shipped, asked), *pictures) == expected).all())) == 0
    assert (run(network, *pictures) == expected).all()


def test_a_call_that_its_parent_bound_runs_in_a_forked_child(
    asked: Request, shipped: Bundle, pictures: tuple[Floats, Floats, Floats]
) -> None:
    network, out = backends.load(shipped, asked), np.empty_like(pictures[0])
    step = network.bind(*pictures, out)
    step()
    expected = out.copy()

    def repeated() -> bool:
        for _ in range(2):
            out[:] = np.nan
            step()
        return bool((out == expected).all())

    assert status_of_child(repeated) == 0
    assert (run(network, *pictures) == expected).all()


@NATIVE
@pytest.mark.skipif(not TASKS.is_dir(), reason="threads are counted in Linux's /proc")
def test_in_a_forked_child_a_network_has_threads_again(shipped: Bundle, pictures: tuple[Floats, Floats, Floats]) -> None:
    network = backends.load(shipped, Request("native", threads=3))

    def threads_started() -> bool:
        before = len(list(TASKS.iterdir()))
        run(network, *pictures)
        return len(list(TASKS.iterdir())) == before + 2

    assert status_of_child(threads_started) == 0


@pytest.mark.parametrize("first", ["its own", "its parent's"])
def test_a_forked_child_lets_go_of_networks(first: str, asked: Request, shipped: Bundle, pictures: tuple[Floats, Floats, Floats]) -> None:
    networks = {"its parent's": backends.load(shipped, asked)}
    run(networks["its parent's"], *pictures)

    def let_go() -> bool:
        networks["its own"] = backends.load(shipped, asked)
        run(networks["its own"], *pictures)
        del networks[first]
        gc.collect()
        networks.clear()
        return True

    assert status_of_child(let_go, seconds=10) == 0
