"""Noise schedules: how much of the picture, γ, each refinement step still holds. Everything is float64.

A schedule is γ_t for t = 0 (nearly the picture) to T−1 (nearly pure noise), with γ_t = Π(1−β_i) over i ≤ t, as in the SR3 paper
(arXiv 2104.07636, section 2) and in the public PyTorch implementation, whose named schedules `named()` makes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sr3rt.errors import OptionError

Array = NDArray[np.float64]


class ScheduleWarning(UserWarning):
    """The run starts from pure noise where the schedule says that much of the picture should still be there."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """γ_t, float64 (T,), strictly falling from below 1 to above 0, and the training timestep that each stands for.

    `timesteps`, float64 (T,), is what a network conditioned on integer timesteps is given; others never see it.
    """

    gammas: Array
    timesteps: Array

    def __post_init__(self) -> None:
        gammas, timesteps = self.gammas, self.timesteps
        if gammas.ndim != 1 or not len(gammas) or gammas.shape != timesteps.shape:
            raise OptionError(f"a schedule needs gammas and timesteps of one shape (T,), found {gammas.shape} and {timesteps.shape}")
        if not np.isfinite(gammas).all() or gammas[0] >= 1 or (np.diff(gammas) >= 0).any() or gammas[-1] < 0:
            raise OptionError(f"gammas must fall strictly from below 1 to above 0, found {gammas[0]:.6g} … {gammas[-1]:.6g}")
        if gammas[-1] == 0:
            raise OptionError("the schedule ends at gamma = 0, where √(1/γ) is infinite: use one that ends above 0 (jsd does not)")

    def __len__(self) -> int:
        return len(self.gammas)

    @property
    def betas(self) -> Array:
        """β_t = 1 − γ_t/γ_{t−1}, float64 (T,)."""
        return 1 - self.gammas / self.previous

    @property
    def previous(self) -> Array:
        """γ_{t−1}, float64 (T,); 1 before the first."""
        return np.concatenate([[1.0], self.gammas[:-1]])


def _warmup(fraction: float) -> Callable[[int, float, float], Array]:
    def betas(steps: int, start: float, end: float) -> Array:
        warm = int(steps * fraction)
        return np.concatenate([np.linspace(start, end, warm, dtype=np.float64), np.full(steps - warm, end, dtype=np.float64)])

    return betas


def _cosine(steps: int, start: float, end: float) -> Array:
    """arXiv 2102.09672, eq. 17, s = 0.008; β is limited to 0.999. `start` and `end` have no meaning here."""
    t = np.arange(steps + 1) / steps + 8e-3
    gammas: Array = np.cos(t / (1 + 8e-3) * np.pi / 2) ** 2
    return np.minimum(1 - gammas[1:] / gammas[:-1], 0.999)


NAMED: dict[str, Callable[[int, float, float], Array]] = {
    "linear": lambda steps, start, end: np.linspace(start, end, steps),
    "quad": lambda steps, start, end: np.linspace(start**0.5, end**0.5, steps) ** 2,
    "warmup10": _warmup(0.1),
    "warmup50": _warmup(0.5),
    "const": lambda steps, start, end: np.full(steps, end),
    "jsd": lambda steps, start, end: 1 / np.linspace(steps, 1, steps),
    "cosine": _cosine,
}
"""β of the public implementation's schedules, by its own names: `(steps, linear_start, linear_end) -> float64 (steps,)`."""


def named(kind: str, steps: int, start: float, end: float) -> Schedule:
    """The public implementation's schedule `kind` with `steps` steps, β from `start` to `end`; timesteps count 0 … steps−1.

    With another `steps` than in training this is what that implementation does when its `n_timestep` is changed: the betas keep
    their ends, so γ_T changes (linear, 1e-6 to 1e-2: 4e-5 at 2000 steps, 0.605 at 100). `respace` is nearly always what is wanted.

    Raises OptionError for an unknown kind, or when γ reaches 0 (jsd).
    """
    if kind not in NAMED:
        raise OptionError(f"unknown schedule {kind!r}: expected one of {', '.join(NAMED)}")
    if steps < 1:
        raise OptionError(f"a schedule needs at least one step, found {steps}")
    betas = NAMED[kind](steps, start, end)
    if not ((betas > 0) & (betas <= 1)).all():
        raise OptionError(f"schedule {kind!r} has betas outside (0, 1]: {betas.min():.3g} to {betas.max():.3g}; change its ends")
    return Schedule(np.cumprod(1 - betas, dtype=np.float64), np.arange(steps, dtype=np.float64))


@dataclass(frozen=True)
class ScheduleSpec:
    """A schedule by name: the arguments of `named`; or, with `kind` "gammas", an explicit list of γ, noisiest last."""

    kind: str
    steps: int = 0
    start: float = 0.0
    end: float = 0.0
    gammas: tuple[float, ...] = ()

    def __str__(self) -> str:
        if self.kind == "gammas":
            return f"{len(self.gammas)} gammas from {self.gammas[0]:.4g} to {self.gammas[-1]:.4g}"
        return f"{self.kind}, {self.steps} steps, beta {self.start:g} to {self.end:g}"

    def schedule(self) -> Schedule:
        """Raises OptionError when it is not a usable schedule."""
        return explicit(self.gammas) if self.kind == "gammas" else named(self.kind, self.steps, self.start, self.end)


def explicit(gammas: Sequence[float] | Array, trained: Schedule | None = None) -> Schedule:
    """A schedule from γ values in either order. Timesteps are read off `trained` (linear in ln(γ/(1−γ))), or count from 0."""
    values = np.sort(np.asarray(gammas, dtype=np.float64).ravel())[::-1].copy()
    if trained is None:
        return Schedule(values, np.arange(len(values), dtype=np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        snr, trained_snr = np.log(values / (1 - values)), np.log(trained.gammas / (1 - trained.gammas))
    return Schedule(values, np.interp(-snr, -trained_snr, trained.timesteps))


def respace(trained: Schedule, steps: int) -> Schedule:
    """`steps` of the trained schedule's own levels, evenly spaced and always with its noisiest (arXiv 2305.08891, "trailing").

    Raises OptionError when `steps` is not in 1 … T.
    """
    total = len(trained)
    if not 1 <= steps <= total:
        raise OptionError(f"steps must be between 1 and the {total} that the network was trained with, found {steps}")
    chosen = np.rint(np.arange(1, steps + 1) * total / steps).astype(np.int64) - 1
    return Schedule(trained.gammas[chosen], trained.timesteps[chosen])


def warn_if_noisy_start_is_wrong(schedule: Schedule, trained: Schedule) -> None:
    """ScheduleWarning when √γ_T lies 0.05 or more above the trained one: y_T is pure noise, but the network is told otherwise."""
    gamma, expected = float(schedule.gammas[-1]), float(trained.gammas[-1])
    if gamma**0.5 - expected**0.5 >= 0.05:
        warnings.warn(
            f"this schedule ends at gamma_T = {gamma:.3g}, the trained one at {expected:.3g}: the run starts from pure noise at a level "
            "where the network expects part of the picture. Use the trained schedule respaced, or a larger linear_end "
            "(about 0.185 for 100 linear steps).",
            ScheduleWarning,
            stacklevel=2,
        )
