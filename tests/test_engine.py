"""The loop: slots, joining and leaving, and that a job's result is its own. The network here is a few lines of NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from arithmetic import Arithmetic

from sr3rt.backends import Floats
from sr3rt.consistency import Projection
from sr3rt.engine import Engine, Job
from sr3rt.errors import NonFiniteError, OptionError
from sr3rt.noise import START, normals
from sr3rt.samplers import LEVEL, Sampler, Table, table
from sr3rt.schedule import named, respace

TRAINED = named("linear", 2000, 1e-6, 1e-2)
SHAPE = (3, 8, 12)


def rows(steps: int = 6, sampler: str = "posterior") -> Table:
    return table(Sampler.parse(sampler), respace(TRAINED, steps), prediction="eps", level="sqrt_gamma")


def picture(i: int = 0) -> Floats:
    return np.random.default_rng(i).uniform(-1, 1, SHAPE).astype(np.float32)


def engine(capacity: int = 1, network: Arithmetic | None = None) -> Engine:
    return Engine(network or Arithmetic(), capacity=capacity, channels=SHAPE[0], height=SHAPE[1], width=SHAPE[2])


def alone(job: Job) -> Floats:
    e = engine()
    e.join(job)
    while not (finished := e.step()):
        pass
    return finished[0].picture()


def by_hand(job: Job, sampler_rows: Table) -> Floats:
    """The five lines of the design, in NumPy float32."""
    f = np.float32
    y = normals(SHAPE, seed=job.seed, step=START)
    before = np.zeros_like(y)
    for k, (level, p, q, a, b, c, s) in enumerate(sampler_rows):
        net = np.tanh(f(0.7) * y - f(0.4) * job.x + level)
        x0 = np.clip(p * y + q * net, f(-1), f(1))
        y = a * y + b * x0 + c * before + s * normals(SHAPE, seed=job.seed, step=k)
        before = x0
    return y


@pytest.mark.parametrize("sampler", ["sr3", "posterior", "ddim", "ddim(0.5)", "dpm++2m"])
def test_the_loop_is_the_designs_two_lines(sampler: str) -> None:
    job = Job(picture(), rows(sampler=sampler), seed=5)
    assert alone(job) == pytest.approx(by_hand(job, job.table), abs=2e-5)


def test_jobs_of_different_lengths_join_and_leave_at_any_step_and_keep_their_results() -> None:
    jobs = [
        Job(picture(i), rows(steps, sampler), seed=i)
        for i, (steps, sampler) in enumerate([(9, "sr3"), (3, "dpm++2m"), (6, "ddim"), (4, "posterior")])
    ]
    expected = {job: alone(job) for job in jobs}
    e, found = engine(capacity=3), {}
    e.join(jobs[0])
    found.update((ended.job, ended.picture()) for ended in e.step())
    e.join(jobs[1])
    e.join(jobs[2])
    waiting = [jobs[3]]
    while e.busy:
        found.update((ended.job, ended.picture()) for ended in e.step())
        if waiting and e.free:
            e.join(waiting.pop())
    assert found.keys() == expected.keys()
    for job, y in expected.items():
        assert (found[job] == y).all()


def test_a_job_that_leaves_early_disturbs_nobody() -> None:
    stays, goes = Job(picture(0), rows(), seed=0), Job(picture(1), rows(), seed=1)
    e = engine(capacity=2)
    e.join(goes)
    e.join(stays)
    e.step()
    e.leave(goes)
    assert (e.busy, e.free) == (1, 1)
    while not (finished := e.step()):
        pass
    assert (finished[0].picture() == alone(stays)).all()
    with pytest.raises(OptionError, match="not in this engine"):
        e.leave(goes)


def test_the_network_runs_on_the_busy_slots_only() -> None:
    network = Arithmetic()
    e = engine(capacity=4, network=network)
    e.join(Job(picture(), rows(2), seed=0))
    e.join(Job(picture(), rows(4), seed=0))
    while e.busy:
        e.step()
    assert network.batches == [2, 2, 1, 1]
    assert e.step() == []


def test_injected_noise_replaces_the_seeded() -> None:
    asked = []

    def noise(step: int) -> Floats:
        asked.append(step)
        return normals(SHAPE, seed=5, step=step)

    assert alone(Job(picture(), rows(), seed=99, noise=noise)) == pytest.approx(alone(Job(picture(), rows(), seed=5)), abs=1e-6)
    assert asked == [START, 0, 1, 2, 3, 4, 5]


def test_each_sample_is_told_its_own_level() -> None:
    seen: list[Floats] = []

    class Levels(Arithmetic):
        def bind(self, x: Floats, y: Floats, level: Floats, out: Floats) -> Callable[[], None]:
            run = super().bind(x, y, level, out)
            return lambda: (seen.append(level.copy()), run())[1]  # type: ignore[func-returns-value]

    e = engine(capacity=2, network=Levels())
    e.join(Job(picture(), rows(4), seed=0))
    e.step()
    e.join(Job(picture(), rows(8), seed=1))
    e.step()
    assert seen[1][:, 0].tolist() == [rows(4)[1, LEVEL], rows(8)[0, LEVEL]]


@pytest.mark.parametrize("consistency", ["final", "every"])
def test_consistency_makes_the_result_agree_with_the_input(consistency: str) -> None:
    lr = np.random.default_rng(3).uniform(-0.5, 0.5, (3, 2, 3)).astype(np.float32)
    projection = Projection(2, 3, 4)
    job = Job(picture(), rows(), 0, consistency=consistency, lr=lr, projection=projection)  # type: ignore[arg-type]
    off = alone(Job(picture(), rows(), 0))
    corrected = alone(job)
    assert np.abs(projection.down(corrected) - lr).mean() < 0.5 * np.abs(projection.down(off) - lr).mean()
    assert np.abs(corrected).max() <= 1


def test_consistency_leaves_the_padding_alone() -> None:
    lr = np.zeros((3, 2, 2), np.float32)  # x is 8×12, of which 8×8 is the picture
    final = alone(Job(picture(), rows(), 0, consistency="final", lr=lr, projection=Projection(2, 2, 4)))
    off = np.clip(alone(Job(picture(), rows(), 0)), -1, 1)
    assert (final[:, :, 8:] == off[:, :, 8:]).all()
    assert (final[:, :, :8] != off[:, :, :8]).any()


@pytest.mark.parametrize("consistency", ["off", "every"])
def test_a_sample_that_breaks_is_an_error_that_names_the_step_and_its_neighbours_go_on(consistency: str) -> None:
    class Breaks(Arithmetic):
        def bind(self, x: Floats, y: Floats, level: Floats, out: Floats) -> Callable[[], None]:
            run, calls = super().bind(x, y, level, out), iter(range(9))

            def broken() -> None:
                run()
                if next(calls) == 2:
                    out[0, 1, 2, 3] = np.nan

            return broken

    lr, projection = np.zeros((3, 2, 3), np.float32), Projection(2, 3, 4)
    agrees = {"consistency": consistency, "lr": lr, "projection": projection}
    breaks, goes_on = Job(picture(), rows(), seed=0, **agrees), Job(picture(1), rows(4), seed=1, **agrees)  # type: ignore[arg-type]
    e = engine(capacity=2, network=Breaks())
    e.join(breaks)
    e.join(goes_on)
    assert e.step() == e.step() == []
    (ended,) = e.step()
    assert ended.job is breaks
    with pytest.raises(NonFiniteError, match=r"step 3 of 6 .* arithmetic in fp32"):
        ended.picture()
    (ended,) = e.step()
    assert ended.job is goes_on
    assert (ended.picture() == alone(goes_on)).all()


def test_what_does_not_fit_is_refused() -> None:
    e = engine()
    with pytest.raises(OptionError, match=r"takes x of \(3, 8, 12\)"):
        e.join(Job(np.zeros((3, 8, 8), np.float32), rows(), seed=0))
    e.join(Job(picture(), rows(), seed=0))
    with pytest.raises(OptionError, match="all 1 slots are busy"):
        e.join(Job(picture(), rows(), seed=0))


def test_predictions_are_there_for_a_preview() -> None:
    e, job = engine(), Job(picture(), rows(), seed=0)
    e.join(job)
    e.step()
    preview = e.prediction(job)
    assert preview.shape == SHAPE
    assert np.abs(preview).max() <= 1
    preview[:] = 7  # a copy: the run does not see this
    while not (finished := e.step()):
        pass
    assert (finished[0].picture() == alone(job)).all()
