"""Tables: each sampler against its own textbook update, worked out here in another form, in float64."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from sr3rt.errors import OptionError
from sr3rt.samplers import LEVEL, A, B, C, P, Q, S, Sampler, Table, table
from sr3rt.schedule import named, respace

TRAINED = named("linear", 2000, 1e-6, 1e-2)
SCHEDULE = respace(TRAINED, 12)
GAMMA = SCHEDULE.gammas[::-1]  # execution order
AFTER = np.append(GAMMA[1:], 1.0)
RNG = np.random.default_rng(0)
Y, X0, BEFORE, EPS = RNG.standard_normal((4, 50))


def rows(name: str) -> Table:
    return table(Sampler.parse(name), SCHEDULE, prediction="eps", level="sqrt_gamma")


def update(row: NDArray[np.float32], y: NDArray[np.float64], x0: NDArray[np.float64], before: NDArray[np.float64]) -> NDArray[np.float64]:
    """Without noise."""
    return row[A] * y + row[B] * x0 + row[C] * before


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_every_prediction_gives_back_the_picture_it_was_made_from(prediction: str) -> None:
    run = table(Sampler("ddim"), SCHEDULE, prediction=prediction, level="sqrt_gamma")  # type: ignore[arg-type]
    for row, gamma in zip(run, GAMMA, strict=True):
        y = np.sqrt(gamma) * X0 + np.sqrt(1 - gamma) * EPS
        net = {"eps": EPS, "x0": X0, "v": np.sqrt(gamma) * EPS - np.sqrt(1 - gamma) * X0}[prediction]
        assert row[P] * y + row[Q] * net == pytest.approx(X0, abs=1e-4)


@pytest.mark.parametrize("name", ["sr3", "posterior"])
def test_ancestral_mean_is_the_papers_refinement_step(name: str) -> None:
    """Algorithm 2 of the paper: (y − (1−α)/√(1−γ)·ε)/√α, with the ε that x0 implies."""
    for row, gamma, after in zip(rows(name), GAMMA, AFTER, strict=True):
        alpha = gamma / after
        eps = (Y - np.sqrt(gamma) * X0) / np.sqrt(1 - gamma)
        expected = (Y - (1 - alpha) / np.sqrt(1 - gamma) * eps) / np.sqrt(alpha)
        assert update(row, Y, X0, BEFORE) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_variances() -> None:
    alpha = GAMMA / AFTER
    assert rows("sr3")[:-1, S] == pytest.approx(np.sqrt(1 - alpha)[:-1])
    assert rows("posterior")[:-1, S] == pytest.approx(np.sqrt((1 - alpha) * (1 - AFTER) / (1 - GAMMA))[:-1])
    assert rows("ddim(1)")[:-1, [A, B, S]] == pytest.approx(rows("posterior")[:-1, [A, B, S]], rel=1e-5)
    assert not rows("ddim")[:, S].any()
    assert not rows("dpm++2m")[:, S].any()


def test_ddim_keeps_the_noise_it_sees() -> None:
    for row, gamma, after in zip(rows("ddim"), GAMMA, AFTER, strict=True):
        y = np.sqrt(gamma) * X0 + np.sqrt(1 - gamma) * EPS
        assert update(row, y, X0, BEFORE) == pytest.approx(np.sqrt(after) * X0 + np.sqrt(1 - after) * EPS, abs=1e-5)


def test_dpm_solver_follows_its_algorithm() -> None:
    """arXiv 2211.01095, algorithm 2, with D = (1 + 1/2r)·x0 − 1/2r·x0_prev; first and last step with D = x0."""
    run = rows("dpm++2m")
    lam = np.log(np.sqrt(GAMMA) / np.sqrt(1 - GAMMA))
    for k in range(1, len(run) - 1):
        h, before = lam[k + 1] - lam[k], lam[k] - lam[k - 1]
        r = before / h
        d = (1 + 1 / (2 * r)) * X0 - 1 / (2 * r) * BEFORE
        sigma, sigma_next = np.sqrt(1 - GAMMA[k]), np.sqrt(1 - AFTER[k])
        expected = sigma_next / sigma * Y - np.sqrt(AFTER[k]) * (np.exp(-h) - 1) * d
        assert update(run[k], Y, X0, BEFORE) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert run[0, C] == run[-1, C] == 0


def test_dpm_solver_converges_at_second_order_where_ddim_does_at_first() -> None:
    """On a Gaussian picture of deviation 0.5 the exact answer is known: the flow scales y by its deviation."""

    def end(name: str, steps: int) -> float:
        schedule = respace(TRAINED, steps)
        y, before = 1.0, 0.0
        for row, gamma in zip(
            table(Sampler.parse(name), schedule, prediction="x0", level="sqrt_gamma").astype(float), schedule.gammas[::-1], strict=True
        ):
            x0 = np.sqrt(gamma) * 0.25 / (gamma * 0.25 + 1 - gamma) * y
            y, before = row[A] * y + row[B] * x0 + row[C] * before, x0
        return abs(float(y) - 0.5)

    assert end("ddim", 80) < end("ddim", 20) / 2.5
    assert end("dpm++2m", 40) < end("ddim", 40) / 3


@pytest.mark.parametrize("name", ["sr3", "posterior", "ddim", "ddim(0.5)", "dpm++2m"])
def test_the_last_step_gives_the_prediction_itself(name: str) -> None:
    a, b, c, s = rows(name)[-1, [A, B, C, S]]
    assert (a, c, s) == (0, 0, 0)
    assert b == pytest.approx(1, abs=1e-6)


def test_levels() -> None:
    for level, expected in (("sqrt_gamma", np.sqrt(GAMMA)), ("gamma", GAMMA), ("timestep", SCHEDULE.timesteps[::-1])):
        run = table(Sampler("ddim"), SCHEDULE, prediction="eps", level=level)  # type: ignore[arg-type]
        assert run.dtype == np.float32
        assert run.shape == (12, 7)
        assert (run[:, LEVEL] == expected.astype(np.float32)).all()


def test_one_step_runs() -> None:
    for name in ("sr3", "posterior", "ddim", "dpm++2m"):
        run = table(Sampler.parse(name), respace(TRAINED, 1), prediction="eps", level="sqrt_gamma")
        assert np.isfinite(run).all()
        assert run[0, [A, C, S]].tolist() == [0, 0, 0]
        assert run[0, Q] < 0


@pytest.mark.parametrize("text", ["euler", "ddim(2)", "ddim()", "DDIM", "sr3(1)", ""])
def test_unknown_samplers_are_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(OptionError, match=r"expected one of sr3, posterior, ddim, ddim\(ETA\), dpm\+\+2m"):
        Sampler.parse(text)


@pytest.mark.parametrize("text", ["sr3", "posterior", "ddim", "ddim(0.5)", "dpm++2m"])
def test_names_round_trip(text: str) -> None:
    assert str(Sampler.parse(text)) == text
