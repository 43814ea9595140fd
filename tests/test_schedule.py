"""Schedules: the public implementation's formulas, respacing, explicit γ, refusals and the warning."""

from __future__ import annotations

import numpy as np
import pytest

from sr3rt.errors import OptionError
from sr3rt.schedule import Schedule, ScheduleSpec, ScheduleWarning, explicit, named, respace, warn_if_noisy_start_is_wrong

TRAINED = named("linear", 2000, 1e-6, 1e-2)


def test_linear_and_quad_betas_run_from_start_to_end() -> None:
    assert named("linear", 3, 0.1, 0.5).betas == pytest.approx([0.1, 0.3, 0.5])
    assert named("quad", 3, 0.01, 0.25).betas == pytest.approx([0.01, 0.09, 0.25])


@pytest.mark.parametrize(("kind", "warm"), [("warmup10", 10), ("warmup50", 50)])
def test_warmup_rises_then_stays(kind: str, warm: int) -> None:
    betas = named(kind, 100, 1e-4, 0.02).betas
    assert betas[:warm] == pytest.approx(np.linspace(1e-4, 0.02, warm))
    assert betas[warm:] == pytest.approx(np.full(100 - warm, 0.02))


def test_const_is_constant() -> None:
    assert named("const", 5, 0.3, 0.1).betas == pytest.approx(np.full(5, 0.1))


def test_cosine_follows_its_formula_until_beta_is_limited() -> None:
    schedule = named("cosine", 1000, 0, 0)
    t = (np.array([0, 500]) / 1000 + 0.008) / 1.008 * np.pi / 2
    assert schedule.gammas[499] == pytest.approx(np.cos(t[1]) ** 2 / np.cos(t[0]) ** 2)
    assert schedule.betas[-1] == pytest.approx(0.999)


def test_jsd_ends_at_zero_and_is_refused() -> None:
    with pytest.raises(OptionError, match="ends at gamma = 0"):
        named("jsd", 10, 0, 0)


def test_unknown_kind_and_impossible_betas_are_refused() -> None:
    with pytest.raises(OptionError, match=r"unknown schedule .line..*linear"):
        named("line", 10, 0.1, 0.2)
    with pytest.raises(OptionError, match="betas outside"):
        named("linear", 10, 0.1, 2.0)


def test_respacing_keeps_the_noisiest_level_and_only_trained_levels() -> None:
    for steps in (1, 7, 100, 1999, 2000):
        schedule = respace(TRAINED, steps)
        assert len(schedule) == steps
        assert schedule.gammas[-1] == TRAINED.gammas[-1]
        assert np.isin(schedule.gammas, TRAINED.gammas).all()
        assert (TRAINED.gammas[schedule.timesteps.astype(int)] == schedule.gammas).all()
    assert (respace(TRAINED, 2000).gammas == TRAINED.gammas).all()


@pytest.mark.parametrize("steps", [0, -1, 2001])
def test_respacing_beyond_the_trained_steps_is_refused(steps: int) -> None:
    with pytest.raises(OptionError, match="between 1 and the 2000"):
        respace(TRAINED, steps)


def test_explicit_gammas_in_either_order_with_timesteps_read_off_the_trained_schedule() -> None:
    picked = TRAINED.gammas[[100, 700, 1999]]
    for gammas in (picked, picked[::-1]):
        schedule = explicit(gammas.tolist(), TRAINED)
        assert (schedule.gammas == picked).all()
        assert schedule.timesteps == pytest.approx([100, 700, 1999])


@pytest.mark.parametrize("gammas", [[], [0.5, 0.5], [1.0, 0.5], [0.5, 0.0], [0.5, -0.1], [0.5, float("nan")]])
def test_unusable_gammas_are_refused(gammas: list[float]) -> None:
    with pytest.raises(OptionError):
        explicit(gammas)


def test_fewer_steps_of_the_same_betas_warn_with_both_figures() -> None:
    hundred = named("linear", 100, 1e-6, 1e-2)
    assert hundred.gammas[-1] == pytest.approx(0.605, abs=1e-3)
    assert TRAINED.gammas[-1] == pytest.approx(4e-5, rel=0.15)
    with pytest.warns(ScheduleWarning, match="0.605"):
        warn_if_noisy_start_is_wrong(hundred, TRAINED)


def test_a_hundred_steps_that_end_near_pure_noise_do_not_warn(recwarn: pytest.WarningsRecorder) -> None:
    warn_if_noisy_start_is_wrong(named("linear", 100, 1e-6, 0.185), TRAINED)
    warn_if_noisy_start_is_wrong(respace(TRAINED, 10), TRAINED)
    assert not recwarn.list


def test_spec_makes_the_schedule_it_names() -> None:
    assert (ScheduleSpec("linear", 2000, 1e-6, 1e-2).schedule().gammas == TRAINED.gammas).all()
    assert ScheduleSpec("gammas", gammas=(0.9, 0.1)).schedule().gammas.tolist() == [0.9, 0.1]


def test_timesteps_and_gammas_must_have_one_shape() -> None:
    with pytest.raises(OptionError, match="one shape"):
        Schedule(np.array([0.5]), np.array([0.0, 1.0]))
