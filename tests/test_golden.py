"""Our exported bundles against what the public PyTorch implementation itself computed (tests/data/peer_golden/README.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import NAMES
from numpy.typing import NDArray
from PIL import Image

from sr3rt.backends import Floats, Request, load
from sr3rt.bundle import Bundle
from sr3rt.engine import Engine, Job
from sr3rt.images import condition, read, restore
from sr3rt.noise import START
from sr3rt.samplers import LEVEL, A, B, P, Q, S, Sampler, table

pytest.importorskip("torch")

Golden = Callable[[str], dict[str, NDArray[Any]]]
Exported = Callable[[str], Path]
BACKENDS = ("native", "onnxruntime")


def level(values: NDArray[Any]) -> Floats:
    return np.ascontiguousarray(values.reshape(-1, 1), np.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_epsilon_through_the_exported_bundle(name: str, backend: str, golden: Golden, exported: Exported) -> None:
    data, network = golden(name), load(Bundle.open(exported(name)), Request(backend, "fp32"))

    def run(x: Floats, y: Floats, at: NDArray[Any]) -> Floats:
        out = np.full_like(y, np.nan)
        network.bind(np.ascontiguousarray(x), np.ascontiguousarray(y), level(at), out)()
        return out

    for k in range(len(data["eps_t"])):
        assert run(data["x"], data["eps_y"][k], data["eps_level"][k]) == pytest.approx(data["eps_out"][k], abs=1e-4)
    for kind in ("mix", "rect"):
        out = run(data[f"{kind}_x"], data[f"{kind}_y"], data[f"{kind}_level"])
        assert out == pytest.approx(data[f"{kind}_out"], abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_step_table_is_the_recorded_schedule(name: str, golden: Golden, exported: Exported) -> None:
    data, manifest = golden(name), Bundle.open(exported(name)).manifest
    assert manifest.defaults.schedule is not None  # the config's val schedule
    schedule = manifest.defaults.schedule.schedule()
    rows = table(Sampler.parse(manifest.defaults.sampler), schedule, prediction=manifest.prediction, level=manifest.level)[::-1]

    def same(ours: NDArray[Any], theirs: NDArray[Any]) -> None:
        np.testing.assert_allclose(ours, theirs, rtol=2.5e-7, atol=1e-12)  # float32 rounding

    same(schedule.betas, data["sched_betas"])
    same(schedule.gammas, data["sched_alphas_cumprod"])
    same(schedule.previous, data["sched_alphas_cumprod_prev"])
    same(rows[:, P], data["sched_sqrt_recip_alphas_cumprod"])
    same(-rows[:, Q], data["sched_sqrt_recipm1_alphas_cumprod"])
    same(rows[:, B], data["sched_posterior_mean_coef1"])
    same(rows[:, A], data["sched_posterior_mean_coef2"])
    same(rows[1:, S], np.exp(0.5 * data["sched_posterior_log_variance_clipped"][1:]))
    assert rows[0, S] == 0
    assert (rows[::-1, LEVEL] == data["level_traj"][:, 0].ravel().astype(np.float32)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_recorded_run_is_replayed(name: str, backend: str, golden: Golden, exported: Exported) -> None:
    """Same y_T and z: every state within 1e-4, and the same picture but for at most two codes."""
    data, bundle = golden(name), Bundle.open(exported(name))
    manifest = bundle.manifest
    assert manifest.defaults.schedule is not None
    rows = table(
        Sampler.parse(manifest.defaults.sampler),
        manifest.defaults.schedule.schedule(),
        prediction=manifest.prediction,
        level=manifest.level,
    )
    batch, channels, height, width = data["x"].shape

    class Recording:
        def __init__(self, i: int) -> None:
            self.i = i

        def __call__(self, step: int) -> Floats:
            z: Floats = data["y_T"][self.i] if step == START else data["z"][len(rows) - 1 - step, self.i]
            return z

    engine = Engine(load(bundle, Request(backend, "fp32")), capacity=batch, channels=channels, height=height, width=width)
    for i in range(batch):
        engine.join(Job(data["x"][i], rows, seed=0, noise=Recording(i)))
    for k in range(len(rows)):
        finished = engine.step()
        if k + 1 < len(rows):
            assert engine._y[:batch] == pytest.approx(data["y_traj"][k], abs=1e-4)
    final = np.stack([ended.picture() for ended in finished])
    assert final == pytest.approx(data["y_0"], abs=1e-4)
    picture = read(Image.fromarray(data["lr_u8"][0]))
    codes = np.stack([np.asarray(restore(picture, y, scale=manifest.scale)) for y in final])
    assert np.count_nonzero(codes != data["y_0_uint8"]) <= 2


@pytest.mark.parametrize("name", NAMES)
def test_condition_is_the_recorded_one(name: str, golden: Golden) -> None:
    data = golden(name)
    for lr, x in zip(data["lr_u8"], data["x"], strict=True):
        assert (condition(read(Image.fromarray(lr)), scale=4, stride=8).x == x).all()
