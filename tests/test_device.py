"""The loop on a GPU, where CUDA runs on the host (cuda_on_host.py): it gives the host's loop's bits, and says what goes wrong."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import cuda_on_host
import numpy as np
import pytest
from arithmetic_on_gpu import SHAPE, OnGpu, OnHost, jobs, on_gpu, on_host, picture, rows, run
from cuda_on_host import LASTING, Cuda

from sr3rt import _native
from sr3rt.backends import Floats, cuda, device
from sr3rt.backends.cuda import Gpu, Stream
from sr3rt.backends.device import AHEAD, DeviceEngine, cover
from sr3rt.consistency import Projection
from sr3rt.engine import Engine, Job
from sr3rt.errors import BackendError, NonFiniteError, OptionError
from sr3rt.noise import START, normals

MakeCuda = Callable[..., Cuda]


@pytest.fixture(params=["on the host", "on a GPU"])
def any_gpu(request: pytest.FixtureRequest, gpu: MakeCuda) -> None:
    """CUDA on the host, and CUDA itself where there is a GPU."""
    if request.param == "on the host":
        gpu()
    elif cuda_on_host.absent():
        pytest.skip("there is no GPU here")


@pytest.mark.parametrize(
    ("count", "batches", "calls"),
    [
        (1, (1, 2, 4), [(0, 1)]),
        (3, (1, 2, 4), [(0, 4)]),
        (5, (1, 2, 4), [(0, 4), (4, 1)]),
        (3, (1,), [(0, 1), (1, 1), (2, 1)]),
        (6, (1, 4), [(0, 4), (4, 4)]),
        (1, (8,), [(0, 8)]),
    ],
)
def test_calls_cover_the_busy_slots(count: int, batches: tuple[int, ...], calls: list[tuple[int, int]]) -> None:
    assert cover(count, batches) == calls


@pytest.mark.parametrize("batches", [(1,), (4,), (1, 2, 4), (1, 4), (3,)])
@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.usefixtures("any_gpu")
def test_jobs_together_have_the_bits_of_the_hosts_loop(batches: tuple[int, ...], capture: bool, apart: bool) -> None:
    engine = on_gpu(*batches, capacity=5, capture=capture, apart=apart)
    for found, job in zip(run(engine, *jobs(5)), jobs(5), strict=True):
        assert np.array_equal(found, run(on_host(), job)[0])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.usefixtures("any_gpu")
def test_jobs_that_join_and_leave_at_any_step_do_not_change_others(seed: int) -> None:
    rng = np.random.default_rng(seed)
    engine, running, waiting = on_gpu(1, 2, 4, capacity=4, apart=seed % 2 == 0), dict[Job, int](), jobs(10)
    expected = {job: run(on_host(), job)[0] for job in waiting}
    done = 0
    while running or waiting:
        while waiting and engine.free and rng.random() < 0.6:
            job = waiting.pop()
            engine.join(job)
            running[job] = 0
        if running and rng.random() < 0.15:
            job = list(running)[rng.integers(len(running))]
            before = on_host()
            before.join(job)
            for _ in range(running[job]):
                before.step()
            assert np.array_equal(engine.prediction(job), before.prediction(job))
            if rng.random() < 0.5:
                engine.leave(job)
                del running[job]
        for ended in engine.step():
            assert np.array_equal(ended.picture(), expected[ended.job])
            del running[ended.job]
            done += 1
        running = {job: steps + 1 for job, steps in running.items()}
        assert engine.busy == len(running)
    assert done


def test_one_graph_for_each_batch_size_whoever_comes_and_goes(gpu: MakeCuda) -> None:
    made = gpu()
    engine = on_gpu(1, 2, 4)
    for _ in range(3):
        run(engine, *jobs(4))
    assert made.calls.count("cudaGraphInstantiate") == 3


def test_the_host_waits_for_a_picture_and_not_for_a_step(gpu: MakeCuda) -> None:
    made = gpu()
    engine = on_gpu()
    engine.join(Job(picture(), rows(40), seed=1))
    engine.step()
    made.calls.clear()
    for _ in range(38):
        assert engine.step() == []
        assert made.queued
    assert set(made.calls) == {
        "cudaSetDevice", "cudaEventSynchronize", "cudaEventElapsedTime", "cudaEventRecord", "cudaGraphLaunch"
    }  # fmt: skip
    assert made.calls.count("cudaGraphLaunch") == 38
    assert made.calls.count("cudaEventSynchronize") == 38 + 1 - AHEAD  # of a step before the last, which keeps the GPU busy
    (ended,) = engine.step()
    assert np.array_equal(ended.picture(), run(on_host(), Job(picture(), rows(40), seed=1))[0])
    assert engine.seconds == pytest.approx(40 * 0.002)


def test_pictures_of_many_runs_and_many_tables(gpu: MakeCuda) -> None:
    made = gpu()
    engine = on_gpu(1, capacity=1)
    used = set()
    for steps in range(1, device.TABLES + 10):
        job = Job(picture(), rows(steps, "ddim"), seed=steps)
        assert np.array_equal(run(engine, job)[0], run(on_host(), job)[0])
        used.add(made.used)
    assert max(used) < min(used) + 28 * sum(range(device.TABLES + 10)) + 4096


@pytest.mark.usefixtures("any_gpu")
def test_what_depends_on_x_alone_is_computed_once_for_each_picture() -> None:
    network = OnGpu(1, 2, 4, apart=True)
    engine = on_gpu(network=network)
    run(engine, *jobs(4))
    assert network.known == 4
    assert engine.seconds > 0
    job = Job(picture(), rows(5), seed=3, noise=lambda step: normals(SHAPE, seed=9, step=step))  # stepped on the host
    assert np.array_equal(run(engine, job)[0], run(on_host(), job)[0])
    assert network.known == 5


def test_a_picture_that_could_not_join_is_not_stepped(gpu: MakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu()
    network, one, other = OnGpu(4, apart=True), *jobs(2)
    engine, launch = on_gpu(network=network), network._launch

    def failing(kernel: str, *arguments: Any) -> None:
        if kernel == "known":
            raise BackendError("planted")
        launch(kernel, *arguments)

    engine.join(one)
    with monkeypatch.context() as planted:
        planted.setattr(network, "_launch", failing)
        with pytest.raises(BackendError, match="planted"):
            engine.join(other)
    states = np.empty(4, device.SLOT)
    engine._stream.to_host(states, engine._states.address)
    engine.wait()
    assert engine.busy == 1 and states["rows"].tolist() == [len(one.table), 0, 0, 0]
    (found,), wanted = run(engine, other), run(on_host(2), one, other)
    assert np.array_equal(found, wanted[1])


@pytest.mark.usefixtures("any_gpu")
def test_a_bound_call_sees_that_x_is_another() -> None:
    network, x, y = OnGpu(1, 2, apart=True), *(np.stack([picture(i), picture(i + 1)]) for i in (0, 2))
    level, out, wanted = np.array([[0.9], [0.2]], np.float32), np.empty_like(x), np.empty_like(x)
    call = network.bind(x, y, level, out)
    for calls in (2, 4, 4):
        call()
        OnHost().bind(x, y, level, wanted)()
        assert np.array_equal(out, wanted) and network.known == calls
        if calls == 2:
            x[1, 2, 3, 4] += 1
        y += 1


def test_a_bound_call_that_failed_computes_anew(gpu: MakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu()
    network, x, y = OnGpu(2, apart=True), np.stack([picture(1), picture(2)]), np.stack([picture(3), picture(4)])
    level, out, wanted, before = np.array([[0.9], [0.2]], np.float32), np.empty_like(x), np.empty_like(x), x.copy()
    call, launch = network.bind(x, y, level, out), network._launch
    call()

    def failing(kernel: str, *arguments: Any) -> None:
        if network.known == 4:  # the second picture's, the second time
            raise BackendError("planted")
        launch(kernel, *arguments)

    x *= 0.5
    with monkeypatch.context() as planted:
        planted.setattr(network, "_launch", failing)
        with pytest.raises(BackendError, match="planted"):
            call()
    x[:] = before
    call()
    OnHost().bind(x, y, level, wanted)()
    assert np.array_equal(out, wanted)


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.usefixtures("any_gpu")
def test_noise_of_ones_own_and_projection_at_every_step_run_as_on_the_host(apart: bool) -> None:
    projection = Projection(4, 6, 4)
    lr = picture()[:, :4, :6]

    def replay(step: int) -> Floats:
        return normals(SHAPE, seed=9, step=step if step == START else step + 5)

    mixed = [
        Job(picture(1), rows(), seed=1),
        Job(picture(2), rows(), seed=2, noise=replay),
        Job(picture(3), rows(4), seed=3, consistency="every", lr=lr, projection=projection),
        Job(picture(4), rows(5), seed=4, consistency="final", lr=lr, projection=projection),
    ]
    engine = on_gpu(apart=apart)
    for found, job in zip(run(engine, *mixed), mixed, strict=True):
        assert np.array_equal(found, run(on_host(), job)[0])
    engine.join(mixed[1])
    engine.step()
    host = on_host()
    host.join(mixed[1])
    host.step()
    assert np.array_equal(engine.prediction(mixed[1]), host.prediction(mixed[1]))
    engine.leave(mixed[1])
    assert engine.busy == 0


def test_two_threads_share_a_network(gpu: MakeCuda) -> None:
    gpu()
    network, found = OnGpu(1, 2), dict[int, list[Floats]]()
    lock = threading.Lock()  # CUDA on the host is not thread-safe; the point is that engines share nothing

    def work(i: int) -> None:
        with lock:
            found[i] = run(on_gpu(network=network, capacity=2), *jobs(2))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(a, b) for a, b in zip(found[0], found[1], strict=True))


def in_the_third_step(made: Cuda, do: Callable[[int], object]) -> Callable[[int, int], None]:
    """An `after` that does something to the network's output, when that step runs."""
    calls = itertools.count()  # the first is the call before the capture

    def after(stream: int, out: int) -> None:
        made.enqueue(stream, lambda: do(out) if next(calls) == 3 else None)

    return after


def test_a_job_that_breaks_names_its_step_and_harms_no_other(gpu: MakeCuda) -> None:
    made = gpu()

    def spoil(out: int) -> None:
        made.array(out, (2, *SHAPE))[1, 2, 15, 23] = np.nan

    engine = on_gpu(network=OnGpu(2, after=in_the_third_step(made, spoil)), capacity=2)
    well, ill = Job(picture(1), rows(6), seed=1), Job(picture(2), rows(8), seed=2)
    engine.join(well)
    engine.join(ill)
    ended = [one for _ in range(6) for one in engine.step()]
    outcomes = {one.job: one for one in ended}
    assert np.array_equal(outcomes[well].picture(), run(on_host(), well)[0])
    with pytest.raises(NonFiniteError, match="step 3 of 8 produced NaN or infinity on backend arithmetic in fp32"):
        outcomes[ill].picture()
    assert engine.busy == 0


def test_what_does_not_fit_is_refused(gpu: MakeCuda) -> None:
    gpu()
    engine = on_gpu(capacity=1)
    with pytest.raises(OptionError, match=r"takes x of \(3, 16, 24\) and a table with rows, found \(3, 8, 8\) and 6"):
        engine.join(Job(np.zeros((3, 8, 8), np.float32), rows(), seed=0))
    with pytest.raises(OptionError, match="not in this engine"):
        engine.leave(Job(picture(), rows(), seed=0))
    with pytest.raises(OptionError, match="not in this engine"):
        engine.prediction(Job(picture(), rows(), seed=0))
    engine.join(Job(picture(), rows(), seed=0))
    with pytest.raises(OptionError, match="all 1 slots are busy"):
        engine.join(Job(picture(), rows(), seed=1))


@pytest.mark.usefixtures("any_gpu")
def test_slots_need_not_be_aligned_where_one_call_takes_all() -> None:
    channels, height, width = shape = (3, 8, 10)  # 960 bytes
    xs = np.random.default_rng(5).uniform(-1, 1, (3, *shape)).astype(np.float32)
    engine = DeviceEngine(OnGpu(4, apart=True), capacity=3, channels=channels, height=height, width=width)
    host = Engine(OnHost(), capacity=3, channels=channels, height=height, width=width)
    given = [Job(x, rows(3 + i), seed=i) for i, x in enumerate(xs)]
    assert all(np.array_equal(a, b) for a, b in zip(run(engine, *given), run(host, *given), strict=True))


def test_pictures_that_no_call_can_begin_at(gpu: MakeCuda) -> None:
    gpu()
    network = OnGpu(1)
    with pytest.raises(BackendError, match=r"2 pictures of 4×4 do not fit one engine of arithmetic, and cannot be split .* a batch of 1"):
        DeviceEngine(network, capacity=2, channels=3, height=4, width=4)


@pytest.mark.usefixtures("any_gpu")
def test_the_kernels_have_the_bits_of_the_hosts_step() -> None:
    made, stream, shape = Gpu(), Stream(), (2, 5, 250, 331)
    size = int(np.prod(shape))
    runs = [rows(4, "sr3"), rows(4, "dpm++2m")]
    memory = cuda.Memory(made, 4 * 3 * size, "a test")
    y, net, x0 = (memory.address + 4 * i * size for i in range(3))
    tables, states = [cuda.Memory(made, one.nbytes, "tables") for one in runs], np.zeros(2, device.SLOT)
    for state, table_, one, seed in zip(states, tables, runs, (7, 2**64 - 1), strict=True):
        stream.to_device(table_.address, one)
        state["seed"], state["table"], state["rows"] = seed, table_.address, len(one)
    slots = cuda.Memory(made, states.nbytes, "slots")
    stream.to_device(slots.address, states)
    stream.clear(x0, 4 * size)
    blocks = -(-shape[2] * shape[3] // 128)
    for i in range(2):
        made.launch("sr3_start", (blocks, 1), 128, (y, slots.address, i, *shape[1:]), stream)
    wanted = np.stack([normals(shape[1:], seed=int(state["seed"]), step=START) for state in states])
    before, found = np.zeros(shape, np.float32), np.empty(shape, np.float32)
    for k in range(4):
        stream.to_host(found, y)
        stream.wait()
        assert np.array_equal(found, wanted)
        prediction = np.tanh(wanted)
        stream.to_device(net, prediction)
        made.launch("sr3_step", (blocks, 2), 128, (y, net, x0, slots.address, *shape[1:]), stream)
        made.launch("sr3_next", (1, 1), 128, (slots.address, 2), stream)
        now = np.stack([one[k] for one in runs])
        assert _native.step(wanted, prediction, before, now, states["seed"].copy(), np.array([k, k], np.uint32), clip=True, threads=1)
    stream.to_host(found, x0)
    stream.wait()
    assert np.array_equal(found, before)


# --- what goes wrong on a GPU


def test_too_little_memory_says_what_was_needed_and_what_is_free(gpu: MakeCuda) -> None:
    made = gpu(total=50_000)
    with pytest.raises(BackendError, match=r"a batch of 4 pictures of 24×16 needs 0 MiB on Host GPU, where 0 of 0 are free: use a smaller"):
        on_gpu()
    made.total = 1 << 28
    assert run(on_gpu(), jobs(1)[0])  # and goes on where there is enough
    assert not made.lost


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ("cudaGraphLaunch", "cudaErrorLaunchOutOfResources", "failed starting a graph: cudaErrorLaunchOutOfResources"),
        ("cudaHostAlloc", "cudaErrorMemoryAllocation", r"failed pinning [\d,]+ bytes of the host's memory: cudaErrorMemoryAllocation"),
        ("cudaStreamSynchronize", "cudaErrorUnknown", "failed in the network's first call: cudaErrorUnknown"),
    ],
)
def test_a_call_that_fails_loses_the_run_and_the_next_begins_anew(gpu: MakeCuda, call: str, error: str, words: str) -> None:
    made = gpu()
    made.fail[call] = error
    with pytest.raises(BackendError, match=f"CUDA {words}. What was running on it is lost, the next call begins anew"):
        run(on_gpu(), *jobs(2))
    assert all(np.array_equal(a, run(on_host(), job)[0]) for a, job in zip(run(on_gpu(), *jobs(2)), jobs(2), strict=True))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ("cudaStreamEndCapture", "cudaErrorStreamCaptureInvalidated", "ending a graph's capture: cudaErrorStreamCaptureInvalidated"),
        ("cudaGraphInstantiate", "cudaErrorInvalidValue", "making a graph: cudaErrorInvalidValue"),
        (None, None, "no such algorithm"),
    ],
)
def test_steps_that_cannot_be_captured_are_started_call_by_call(gpu: MakeCuda, call: str | None, error: str, words: str) -> None:
    made, calls = gpu(), itertools.count()

    def after(stream: int, out: int) -> None:
        if call is None and next(calls) == 1:  # the first is not captured
            raise RuntimeError(words)

    if call:
        made.fail[call] = error
    engine = on_gpu(network=OnGpu(1, 2, 4, after=after))
    with pytest.warns(RuntimeWarning, match=f"steps of arithmetic in fp32 cannot be captured .* on Host GPU, .* slower: .*{words}"):
        found = run(engine, *jobs(3))
    assert all(np.array_equal(a, run(on_host(), job)[0]) for a, job in zip(found, jobs(3), strict=True))
    assert "cudaGraphLaunch" not in made.calls
    assert np.array_equal(run(engine, jobs(1)[0])[0], found[0])  # another call, of another size, without another warning


def test_a_failure_in_the_middle_of_a_run_that_ends_the_gpu_says_so(gpu: MakeCuda) -> None:
    made = gpu()
    network = OnGpu(1, after=in_the_third_step(made, lambda out: made.array(8, (1,))))
    words = rf"CUDA failed .*: {LASTING}\. The GPU is lost to this process \({LASTING}\): start the process again"
    with pytest.raises(BackendError, match=words):
        run(on_gpu(network=network, capacity=1), Job(picture(), rows(20), seed=0))
    with pytest.raises(BackendError, match=words):
        on_gpu(network=network, capacity=1)


def test_memory_is_given_back(gpu: MakeCuda) -> None:
    made = gpu()
    network = OnGpu(1, 2, 4)
    for _ in range(3):
        engine = on_gpu(network=network)
        run(engine, *jobs(4))
        assert made.used
        del engine
        assert not made.used


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"driver": 0}, "there is no NVIDIA driver here: install one, or use device='cpu'"),
        ({"driver": 12040}, "the NVIDIA driver serves CUDA 12.4, cuda-bindings need 13.0: upgrade the driver, or use device='cpu'"),
        ({"devices": 0}, r"CUDA finds no GPU \(cudaErrorNoDevice\): look at nvidia-smi and CUDA_VISIBLE_DEVICES, or use device='cpu'"),
    ],
)
def test_no_gpu_says_why(gpu: MakeCuda, options: dict[str, int], words: str) -> None:
    gpu(**options)
    with pytest.raises(BackendError, match=words):
        Gpu()


def test_a_gpu_that_is_not_there(gpu: MakeCuda) -> None:
    gpu(devices=2)
    assert Gpu(1).capability == (9, 0)
    with pytest.raises(BackendError, match="there is no GPU 2: CUDA finds 2, counted from 0"):
        Gpu(2)
