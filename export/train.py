"""Train the small model that ships: `python export/train.py --images DIR --out FILE`.

Photographs are cropped at random scales and flipped; the low-resolution picture is made by PIL's bicubic, as the runtime's condition
is. γ is drawn as the paper does (section 2.4: t uniform, then γ uniform between its neighbours on the trained schedule), the loss is
the mean square of the scaled network's error (EDM, arXiv 2206.00364, eq. 8), and an exponential moving average of the weights is
what is saved. Interrupting is safe: the run resumes from `FILE.state`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from export.nets.compact import SIGMA, CompactConfig, CompactUNet

Pixels = NDArray[np.uint8]


def path_gammas(steps: int = 1000, middle: float = 0.25) -> NDArray[np.float64]:
    """γ of the straight path from picture to noise (rectified flow, arXiv 2209.03003), shifted so that half of it has σ < `middle`.

    σ_t = middle·t/(1−t) at t = i/(steps+1); γ = 1/(1+σ²). Falls from 1 − 6e-8 to 1.6e-5 for the defaults.
    """
    t = np.arange(1, steps + 1, dtype=np.float64) / (steps + 1)
    return 1 / (1 + (middle * t / (1 - t)) ** 2)


def photographs(folder: Path, hold_out: str) -> list[Pixels]:
    """The folder's PNGs but those that `hold_out` (a glob) matches, and the photographs that come with scikit-image's wheel."""
    from skimage import data

    paths = [path for path in sorted(folder.glob("*.png")) if not path.match(hold_out)]
    if not paths:
        raise SystemExit(f"no .png to train on in {folder}: give --images a folder of photographs")
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    pictures += [getattr(data, name)() for name in ("astronaut", "cat", "coffee", "rocket")]
    return [*pictures, data.stereo_motorcycle()[0]]  # type: ignore[no-untyped-call]


def pyramid(picture: Pixels) -> list[Pixels]:
    """The picture at scales 1, 3/4 and 1/2: smaller ones are sharper, and show structures at other sizes."""
    image = Image.fromarray(picture)
    sizes = [(round(image.width * s), round(image.height * s)) for s in (1.0, 0.75, 0.5)]
    return [np.asarray(image.resize(size, Image.Resampling.LANCZOS)) for size in sizes]


class Crops:
    """Random crops: `(x, y0)` pairs, float32 NCHW in [-1, 1]."""

    def __init__(self, pictures: list[Pixels], crop: int, scale: int, rng: np.random.Generator) -> None:
        self.levels = [level for picture in pictures for level in pyramid(picture) if min(level.shape[:2]) >= crop]
        areas = np.array([level.shape[0] * level.shape[1] for level in self.levels], dtype=np.float64)
        self.weights = np.sqrt(areas) / np.sqrt(areas).sum()
        self.crop, self.scale, self.rng = crop, scale, rng

    def one(self) -> tuple[Pixels, Pixels]:
        rng, size = self.rng, self.crop
        source = self.levels[rng.choice(len(self.levels), p=self.weights)]
        top, left = (int(rng.integers(0, n - size + 1)) for n in source.shape[:2])
        high = np.rot90(source[top : top + size, left : left + size], k=int(rng.integers(4)))
        high = np.ascontiguousarray(high[:, ::-1] if rng.integers(2) else high)
        if rng.integers(4) == 0:
            high = np.ascontiguousarray(high[..., rng.permutation(3)])
        image = Image.fromarray(high)
        low = image.resize((size // self.scale,) * 2, Image.Resampling.BICUBIC)
        return np.asarray(low.resize((size, size), Image.Resampling.BICUBIC)), high

    def batches(self, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches without end, the next one made while the last is used."""
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(self.batch, size)
            while True:
                ready, coming = coming.result(), pool.submit(self.batch, size)
                yield ready

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [self.one() for _ in range(size)]
        stacks = (torch.from_numpy(np.stack(side)).permute(0, 3, 1, 2) for side in zip(*pairs, strict=True))
        x, y0 = (stack.to(torch.float32).div_(127.5).sub_(1) for stack in stacks)
        return x, y0


def loss_of(net: CompactUNet, x: torch.Tensor, y0: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Mean square of the scaled network's error, which weighs every noise level alike. gamma: (B, 1) float64."""
    sigma = (1 / gamma - 1).sqrt().to(torch.float32)[:, :, None, None]
    spread = (sigma**2 + SIGMA**2).sqrt()
    noise = torch.randn_like(y0)
    residual = y0 - x
    target = (residual * sigma - noise * SIGMA**2) / (SIGMA * spread)
    return F.mse_loss(net.inner(x, (residual + sigma * noise) / spread, sigma.flatten(1).log()), target)


class Run:
    """Everything that a resumed run needs: weights, moving average, optimiser, step."""

    def __init__(self, config: CompactConfig, rate: float, decay: float) -> None:
        self.net = CompactUNet(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = {name: p.detach().clone() for name, p in self.net.state_dict().items()}
        self.optimiser = torch.optim.AdamW(self.net.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
        self.rate, self.decay, self.step, self.seconds = rate, decay, 0, 0.0

    def update(self, loss: torch.Tensor, rate: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        values = [value.detach() for value in self.net.state_dict().values()]
        torch._foreach_lerp_(list(self.average.values()), values, 1 - decay)

    def save(self, path: Path) -> None:
        state = {"net": self.net.state_dict(), "average": self.average, "optimiser": self.optimiser.state_dict()}
        temporary = path.with_suffix(".partial")
        torch.save({**state, "step": self.step, "seconds": self.seconds}, temporary)
        os.replace(temporary, path)

    def resume(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.net.load_state_dict(state["net"])
        self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds = state["step"], state["seconds"]


def write_weights(run: Run, gammas: NDArray[np.float64], out: Path) -> None:
    """The moving average and the trained schedule, as safetensors that `export/to_onnx.py` recognises."""
    tensors = {name: value.contiguous() for name, value in run.average.items()}
    tensors["gammas"] = torch.from_numpy(gammas.copy())
    metadata = {"config": json.dumps(asdict(run.net.config)), "architecture": "compact", "scale": "4", "step": str(run.step)}
    temporary = out.with_suffix(".partial")
    save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--hold-out", default="kodim2[1-4].png", help="glob of the pictures never to train on")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--minutes", type=float, default=120, help="stop after so much training time; the rate falls to 0 by then")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.999)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = Run(CompactConfig(), args.rate, args.decay)
    state = args.out.with_suffix(".state")
    if state.exists():
        run.resume(state)
    rng = np.random.default_rng((args.seed, run.step))
    torch.manual_seed(args.seed + run.step)
    pictures = photographs(args.images, args.hold_out)
    print(f"{len(pictures)} pictures", flush=True)
    crops = Crops(pictures, args.crop, 4, rng)
    batches = crops.batches(args.batch)
    rng = np.random.default_rng((args.seed, run.step, 1))
    gammas = path_gammas()
    edges = np.concatenate([[1.0], gammas])
    losses: list[float] = []
    limit = args.minutes * 60
    while run.seconds < limit:
        begin = time.monotonic()
        x, y0 = next(batches)
        # one t per stratum of [0, T): the same distribution, less noise in the gradient
        t = ((np.arange(args.batch) + rng.random(args.batch)) / args.batch * len(gammas)).astype(int)
        gamma = torch.from_numpy(rng.uniform(edges[t + 1], edges[t]))[:, None]
        memory = torch.channels_last
        loss = loss_of(run.net, x.contiguous(memory_format=memory), y0.contiguous(memory_format=memory), gamma.clamp_(max=1 - 1e-7))
        warm = min(1.0, (run.step + 1) / 300)
        run.update(loss, args.rate * warm * max(0.02, 0.5 * (1 + math.cos(math.pi * min(1.0, run.seconds / limit)))))
        run.seconds += min(time.monotonic() - begin, 5.0)  # a suspended process is not charged for its sleep
        losses.append(loss.item())
        if run.step % 200 == 0:
            print(f"step {run.step} {run.seconds / 60:.1f} min loss {np.mean(losses):.4f}", flush=True)
            losses.clear()
            run.save(state)
            write_weights(run, gammas, args.out)
    run.save(state)
    write_weights(run, gammas, args.out)


if __name__ == "__main__":
    main()
