"""Samplers as tables. Whatever the method and whatever the network predicts, one refinement step is

    x0 = clip(p·y + q·net)            y ← a·y + b·x0 + c·x0_prev + s·z

so a run is a float32 table with a row `(level, p, q, a, b, c, s)` per step, first row first executed. Coefficients are worked out in
float64 and rounded to float32 once. Below, γ is the current step's, γ' the next (less noisy) one's, 1 after the last step.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sr3rt.errors import OptionError
from sr3rt.schedule import Array, Schedule

Table = NDArray[np.float32]
Prediction = Literal["eps", "x0", "v"]
Level = Literal["sqrt_gamma", "gamma", "timestep"]

LEVEL, P, Q, A, B, C, S = range(7)  # columns of a table

Columns = tuple[Array, Array, Array, Array]  # a, b, c, s


def _ancestral(gamma: Array, after: Array, variance: Callable[[Array, Array], Array]) -> Columns:
    """The posterior's mean q(y_{t−1} | y_t, x0), SR3 eq. 4 (arXiv 2104.07636) = DDPM eq. 7, with a noise variance of choice."""
    alpha = gamma / after
    a = (1 - after) * np.sqrt(alpha) / (1 - gamma)
    b = (1 - alpha) * np.sqrt(after) / (1 - gamma)
    s = np.where(after < 1, np.sqrt(variance(gamma, after)), 0.0)
    return a, b, np.zeros_like(a), s


def sr3(gamma: Array, after: Array) -> Columns:
    """The paper's refinement step (its algorithm 2, with x0 clipped): noise variance 1 − α_t."""
    return _ancestral(gamma, after, lambda g, n: 1 - g / n)


def posterior(gamma: Array, after: Array) -> Columns:
    """The public implementation's: noise variance β_t (1−γ_{t−1})/(1−γ_t), at least 1e-20."""
    return _ancestral(gamma, after, lambda g, n: np.maximum((1 - g / n) * (1 - n) / (1 - g), 1e-20))


def ddim(gamma: Array, after: Array, eta: float = 0.0) -> Columns:
    """DDIM (arXiv 2010.02502, eq. 12 and 16): η = 0 adds no noise after y_T, η = 1 is `posterior`."""
    s = eta * np.sqrt((1 - after) / (1 - gamma) * (1 - gamma / after))
    a = np.sqrt(np.maximum(1 - after - s**2, 0) / (1 - gamma))
    return a, np.sqrt(after) - a * np.sqrt(gamma), np.zeros_like(a), s


def dpmpp_2m(gamma: Array, after: Array) -> Columns:
    """DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2): second order in λ = ln(√γ/√(1−γ)); first and last step first order."""
    with np.errstate(divide="ignore"):
        h = 0.5 * (np.log(after / (1 - after)) - np.log(gamma / (1 - gamma)))  # infinite at the last step
    a = np.sqrt((1 - after) / (1 - gamma))
    weight = -np.sqrt(after) * np.expm1(-h)
    half = np.zeros_like(h)
    half[1:-1] = h[1:-1] / (2 * h[:-2])  # 1/(2r), r = h_last/h
    return a, weight * (1 + half), -weight * half, np.zeros_like(a)


NAMES = ("sr3", "posterior", "ddim", "ddim(ETA)", "dpm++2m")


@dataclass(frozen=True)
class Sampler:
    """A method by name: "sr3", "posterior", "ddim", "dpm++2m"; `eta` (0 to 1) belongs to "ddim"."""

    name: str
    eta: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Sampler:
        """From "sr3", "posterior", "ddim", "ddim(0.5)" or "dpm++2m". Raises OptionError."""
        match = re.fullmatch(r"(sr3|posterior|dpm\+\+2m|ddim(?:\((\d*\.?\d+)\))?)", str(text))
        if match is None or float(match[2] or 0) > 1:
            raise OptionError(f"unknown sampler {text!r}: expected one of {', '.join(NAMES)} with ETA from 0 to 1")
        return cls("ddim", float(match[2] or 0)) if text.startswith("ddim") else cls(text)

    def __str__(self) -> str:
        return f"{self.name}({self.eta:g})" if self.eta else self.name

    def columns(self, gamma: Array, after: Array) -> Columns:
        """a, b, c, s in execution order, each float64 (S,)."""
        if self.name == "ddim":
            return ddim(gamma, after, self.eta)
        return {"sr3": sr3, "posterior": posterior, "dpm++2m": dpmpp_2m}[self.name](gamma, after)


def _to_x0(gamma: Array, prediction: Prediction) -> tuple[Array, Array]:
    """p, q with x0 = p·y + q·net, from y = √γ·x0 + √(1−γ)·ε and v = √γ·ε − √(1−γ)·x0 (arXiv 2202.00512)."""
    match prediction:
        case "eps":
            return np.sqrt(1 / gamma), -np.sqrt(1 / gamma - 1)
        case "x0":
            return np.zeros_like(gamma), np.ones_like(gamma)
        case "v":
            return np.sqrt(gamma), -np.sqrt(1 - gamma)


def levels(schedule: Schedule, level: Level) -> Array:
    """What the network is conditioned on at each of the schedule's steps, least noisy first, float64 (T,)."""
    return {"sqrt_gamma": np.sqrt(schedule.gammas), "gamma": schedule.gammas, "timestep": schedule.timesteps}[level]


def table(sampler: Sampler, schedule: Schedule, *, prediction: Prediction, level: Level) -> Table:
    """The run of `sampler` over `schedule` for a network that predicts `prediction` and is conditioned on `level`.

    Returns float32 (S, 7), columns LEVEL, P, Q, A, B, C, S, in execution order: noisiest first.
    """
    gamma, after = schedule.gammas[::-1], schedule.previous[::-1]
    columns = [levels(schedule, level)[::-1], *_to_x0(gamma, prediction), *sampler.columns(gamma, after)]
    return np.stack(columns, axis=1).astype(np.float32)
