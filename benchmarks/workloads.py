"""What is timed: networks, at the size of the picture that they make; and what of it a contender is given.

All but the shipped one have random weights, on which speed does not depend.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import sr3rt
from sr3rt import memory
from sr3rt.backends import Floats
from sr3rt.bundle import Bundle, Defaults, Manifest, write_manifest
from sr3rt.engines import EngineKey
from sr3rt.samplers import Sampler, Table, table
from sr3rt.schedule import Schedule, ScheduleSpec, respace
from sr3rt.upscaler import SHIPPED

if TYPE_CHECKING:
    from torch import nn

CACHE = Path(__file__).parent / ".cache"
TRAINED = ScheduleSpec("linear", 2000, 1e-6, 1e-2)
SAMPLER = Sampler("posterior")  # what the public implementation runs


@dataclass(frozen=True)
class Workload:
    """A network at one picture size. side: of the picture it makes. Imports torch only when it must."""

    name: str
    title: str
    side: int

    def network(self) -> nn.Module:
        """The architecture, with whatever weights PyTorch gives it (the shipped model: its own)."""
        from sr3rt.export.nets.janspiry import JanspiryConfig, JanspiryUNet
        from sr3rt.export.nets.paper import PRESETS, PaperUNet

        match self.name.split("-"):
            case ["shipped"]:
                from sr3rt.export.train import from_file

                return from_file(SHIPPED)
            case ["public", "128"]:
                return JanspiryUNet(JanspiryConfig())
            case ["public", "512"]:
                return JanspiryUNet(JanspiryConfig(multipliers=(1, 2, 4, 8, 16), blocks=1, attention=(), norm_groups=16))
            case _:
                return PaperUNet(PRESETS[PAPER[self.name]])

    def eager(self) -> nn.Module:
        """The network in PyTorch, float32, the same weights in every process."""
        import torch

        torch.manual_seed(0)
        return self.network().eval()

    def bundle(self) -> Bundle:
        """Ours, with the same weights; what has to be exported is kept under benchmarks/.cache."""
        if self.name == "shipped":
            return Bundle.open(SHIPPED)
        target = CACHE / f"{self.name}-{_digest()}"
        if not target.exists():
            partial = CACHE / f"{self.name}.{os.getpid()}"
            from sr3rt.export.to_onnx import write_network

            partial.mkdir(parents=True)
            net = self.eager()
            write_network(net, partial)
            parameters, stride = sum(p.numel() for p in net.parameters()), net.config.stride
            write_manifest(
                partial,
                Manifest(self.name, "sr3", parameters, 3, 8, stride, "eps", "sqrt_gamma", TRAINED, Defaults(100, "posterior")),  # type: ignore[arg-type]
            )
            for old in CACHE.glob(f"{self.name}-*"):  # with engines, too
                shutil.rmtree(old)
            partial.replace(target)
        return Bundle.open(target)

    def bundle_with_engine(self, batch: int) -> Bundle:
        """The same with a TensorRT engine in float16 for this size and batch, built here and kept beside it."""
        from sr3rt.export.to_trt import to_trt

        plain = self.bundle()
        target = CACHE / f"{self.name}-tensorrt-{plain.sha256[:12]}"
        if not target.exists():
            shutil.copytree(plain.path, target)
        there = map(EngineKey.of, Bundle.open(target).manifest.engines.values())
        if any((key.precision, key.batch, key.height, key.width) == ("fp16", batch, self.side, self.side) for key in there):
            return Bundle.open(target)
        return Bundle.open(to_trt(target, batch=str(batch), size=str(self.side)))

    def parameters(self) -> int:
        """Number of weights, without making them."""
        if self.name == "shipped":
            return self.bundle().manifest.parameters
        import torch

        with torch.device("meta"):
            return sum(p.numel() for p in self.network().parameters())

    def operations(self, batch: int) -> int:
        """Floating-point operations of a step."""
        import torch

        from benchmarks import flops

        with torch.device("cpu" if self.name == "shipped" else "meta"):  # the shipped one is read with its weights
            net = self.network()
        return flops.count(net, batch=batch, side=self.side)

    def why_not(self, contenders: int) -> str | None:
        """Why this workload does not fit this machine with so many contenders loaded, or None when it does."""
        needed = self.parameters() * 4 * (2 * contenders + 1) + contenders * 2**29
        available = memory.available()
        if available is not None and needed > available:
            return f"needs about {needed / 2**30:.0f} GiB with {contenders} contenders, {available / 2**30:.0f} GiB are available"
        return None


@dataclass(frozen=True)
class Task:
    """What a contender is given. steps: of a picture. plant: share of a step's time that ours wastes, to see whether that is noticed."""

    workload: Workload
    batch: int
    steps: int
    threads: int
    device: str
    plant: float | None = None

    def schedule(self) -> Schedule:
        trained = TRAINED if self.workload.name != "shipped" else self.workload.bundle().manifest.trained
        return respace(trained.schedule(), self.steps)

    def rows(self) -> Table:
        manifest = self.workload.bundle().manifest
        return table(SAMPLER, self.schedule(), prediction=manifest.prediction, level=manifest.level)

    def condition(self) -> Floats:
        """x, the same in every process: smooth, as an upsampled picture is."""
        rng, side = np.random.default_rng(0), self.workload.side
        coarse = rng.uniform(-1, 1, (self.batch, 3, side // 8, side // 8)).astype(np.float32)
        return np.ascontiguousarray(coarse.repeat(8, axis=2).repeat(8, axis=3))


def _digest() -> str:
    """Of the exporter's sources, which decide what an exported network is."""
    sources = sorted((Path(sr3rt.__file__).parent / "export").rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


PAPER = {"paper-128": "16-128", "paper-256": "64-256", "paper-1024": "256-1024"}
WORKLOADS = {
    one.name: one
    for one in (
        Workload("shipped", "shipped model, 64→256", 256),
        Workload("public-128", "public 16→128, 97.8M", 128),
        Workload("public-512", "public 64→512, 155M", 512),
        Workload("paper-128", "paper's 16→128, 561M", 128),
        Workload("paper-256", "paper's 64→256, 617M", 256),
        Workload("paper-1024", "paper's 256→1024, 149M", 1024),
    )
}
