"""Train the small model that ships, its two parts one after the other:

    python export/train.py mean --images DIR -o A.safetensors
    python export/train.py mean --images DIR -o B.safetensors --start A.safetensors
    python export/train.py average A.safetensors B.safetensors -o MEAN.safetensors
    python export/train.py details --images DIR -o FILE.safetensors --start MEAN.safetensors
    python export/to_onnx.py FILE.safetensors …

Photographs are cropped at random scales, turned and recoloured; the low-resolution picture is made by PIL's bicubic, as the runtime's
condition is. The mean is trained by the logarithm of its squared error, and what samples the details by the mean square of their scaled
error (EDM, arXiv 2206.00364, eq. 8), at a γ drawn as the paper does (section 2.4: t uniform, then γ uniform between its neighbours on the
trained schedule). An exponential moving average of the weights is what is saved. Interrupting is safe: the run
resumes from `FILE.state`. `--start` takes the first weights from a bundle or from another such file.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from cyclopts import App, Parameter
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from sr3rt import _native
from sr3rt.bundle import WEIGHTS, Bundle
from sr3rt.cli import run_command
from sr3rt.errors import MissingExtra, OptionError
from sr3rt.export.nets.compact import DETAIL, SCALE, CompactConfig, CompactUNet, Mean, PlainBlock, bands
from sr3rt.export.nets.turning import Lifted, Lowered, Turned, tie, untie
from sr3rt.safetensors import Weights
from sr3rt.work import READ

TYPICAL = 0.002  # median over crops of the energy of x's details at half resolution
LEAST = 3e-5  # squared error, pictures in [-1, 1], below which a crop is as good as right: 0.7 of 255, squared
WARM = 300  # steps over which the rate rises
LEFT_OUT = 0.15  # share of crops that the mean's last block leaves as they are, the blocks before in proportion
OBLIQUE = 0.7  # share of the mean's crops that are turned by any angle, which softens the finest details a little
Part = Literal["mean", "details"]
Pixels = NDArray[np.uint8]


def path_gammas(steps: int = 1000, middle: float = 0.16) -> NDArray[np.float64]:
    """γ of the straight path from picture to noise (rectified flow, arXiv 2209.03003), shifted so that half of it has σ < `middle`.

    σ_t = middle·t/(1−t) at t = i/(steps+1); γ = 1/(1+σ²). Falls from 1 − 2.6e-8 to 3.9e-5 for the defaults.
    """
    t = np.arange(1, steps + 1, dtype=np.float64) / (steps + 1)
    return 1 / (1 + (middle * t / (1 - t)) ** 2)


def run_gammas(steps: int = 1000, largest: float = 4.05) -> NDArray[np.float64]:
    """γ that runs respace: σ_t = largest·t, t = i/steps, where a start is nearly as good as noise.

    Evenly in σ: few steps then decide what has most energy and leave out the noise that is less than a step, which costs decibels in
    smooth places and shows no texture (measured on Kodak 21 to 24, docs/model.md). The network knows any level on `path_gammas`.
    """
    t = np.arange(1, steps + 1, dtype=np.float64) / steps
    return 1 / (1 + (largest * t) ** 2)


def photographs(folder: Path, hold_out: str) -> list[Pixels]:
    """The folder's pictures but those that `hold_out` (a glob) matches, and the photographs that come with scikit-image's wheel."""
    try:
        from skimage import data
    except ModuleNotFoundError:
        raise MissingExtra("training", "scikit-image", "export,bench") from None

    paths = [path for path in sorted(folder.glob("*")) if path.suffix.lower() in READ and not path.match(hold_out)]
    if not paths:
        raise OptionError(f"{folder} holds nothing to train on: give --images a folder of photographs ({', '.join(READ)})")
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    pictures += [getattr(data, name)() for name in ("astronaut", "cat", "coffee", "rocket")]
    pictures += [np.repeat(getattr(data, name)()[..., None], 3, axis=2) for name in ("brick", "camera", "coins", "grass", "gravel")]
    return [*pictures, data.stereo_motorcycle()[0]]  # type: ignore[no-untyped-call]


def pyramid(picture: Pixels) -> list[Pixels]:
    """The picture at eight scales from 1 to 0.45: smaller ones are sharper, and show structures at other sizes."""
    image = Image.fromarray(picture)
    sizes = [(round(image.width * s), round(image.height * s)) for s in np.geomspace(1.0, 0.45, 8)]
    return [np.asarray(image.resize(size, Image.Resampling.LANCZOS)) for size in sizes]


class Crops(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches of random crops without end: x, y0, uint8 (B, H, W, 3)."""

    def __init__(self, pictures: list[Pixels], *, crop: int, batch: int, seed: tuple[int, ...], oblique: float = 0.0) -> None:
        self.levels = [level for picture in pictures for level in pyramid(picture) if min(level.shape[:2]) >= crop]
        self.weights = _by_side(self.levels)
        self.wholes = [Image.fromarray(picture) for picture in pictures if min(picture.shape[:2]) >= 2.5 * crop]
        self.chances = _by_side([np.asarray(whole) for whole in self.wholes])
        self.crop, self.size, self.seed, self.share = crop, batch, seed, oblique

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng((*self.seed, worker.id if worker else 0))
        while True:
            pairs = [self.pair(rng) for _ in range(self.size)]
            x, y0 = (torch.from_numpy(np.stack(side)) for side in zip(*pairs, strict=True))
            yield x, y0

    def pair(self, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
        """A crop, turned, mirrored, now and then recoloured; and what bicubic makes of its reduction."""
        size = self.crop
        high = self.oblique(rng) if self.wholes and rng.random() < self.share else self.upright(rng)
        high = recoloured(np.ascontiguousarray(high[:, ::-1] if rng.integers(2) else high), rng)
        low = Image.fromarray(high).resize((size // SCALE,) * 2, Image.Resampling.BICUBIC)
        return np.asarray(low.resize((size, size), Image.Resampling.BICUBIC)), high

    def upright(self, rng: np.random.Generator) -> Pixels:
        """Pixels as they are, turned by quarters."""
        source = self.levels[rng.choice(len(self.levels), p=self.weights)]
        top, left = (int(rng.integers(0, n - self.crop + 1)) for n in source.shape[:2])
        return np.rot90(source[top : top + self.crop, left : left + self.crop], k=int(rng.integers(4)))

    def oblique(self, rng: np.random.Generator) -> Pixels:
        """Turned by any angle, narrowed, and made smaller so that it is sharp: edges and shapes that the photographs do not have."""
        source = self.wholes[rng.choice(len(self.wholes), p=self.chances)]
        wide, high = (self.crop / rng.uniform(0.57, 0.95, 2)).round().astype(int)
        angle = rng.uniform(0, 2 * math.pi)
        cos, sin = math.cos(angle), math.sin(angle)
        reach = (abs(cos) * wide + abs(sin) * high) / 2, (abs(sin) * wide + abs(cos) * high) / 2
        x, y = (rng.uniform(r, n - r) for r, n in zip(reach, source.size, strict=True))
        corner = x - (cos * wide - sin * high) / 2, y - (sin * wide + cos * high) / 2
        tilted = source.transform(
            (wide, high), Image.Transform.AFFINE, (cos, -sin, corner[0], sin, cos, corner[1]), Image.Resampling.BICUBIC
        )
        return np.asarray(tilted.resize((self.crop, self.crop), Image.Resampling.LANCZOS))


def _by_side(pictures: list[Pixels]) -> NDArray[np.float64]:
    """Chances in proportion to a side's length."""
    sides = np.sqrt(np.array([picture.shape[0] * picture.shape[1] for picture in pictures], dtype=np.float64))
    chances: NDArray[np.float64] = sides / sides.sum()
    return chances


def recoloured(pixels: Pixels, rng: np.random.Generator) -> Pixels:
    """At times with colours exchanged, paler or stronger, negative, or of another contrast and brightness: few photographs show few."""
    if rng.random() < 0.4:
        pixels = np.ascontiguousarray(pixels[..., rng.permutation(3)])
    if rng.random() < 0.15:
        pixels = 255 - pixels
    if rng.random() < 0.5:
        middle, contrast, brighter = rng.uniform(80, 170), rng.uniform(0.5, 1.15), rng.uniform(-20, 20)
        grey = pixels.mean(axis=2, keepdims=True)
        coloured = grey + (pixels - grey) * rng.uniform(0.0, 1.3)
        pixels = ((coloured - middle) * contrast + middle + brighter).round().clip(0, 255).astype(np.uint8)
    return pixels


def draw_gamma(gammas: NDArray[np.float64], batch: int, rng: np.random.Generator) -> Tensor:
    """(B, 1) float64: t uniform, one from each of B equal parts of [0, T) (the same distribution, a calmer gradient), then γ uniform."""
    edges = np.concatenate([[1.0], gammas])
    t = ((np.arange(batch) + rng.random(batch)) / batch * len(gammas)).astype(np.int64)
    return torch.from_numpy(rng.uniform(edges[t + 1], edges[t]))[:, None].clamp_(max=1 - 1e-7)


def mean_loss(net: CompactUNet, x: Tensor, y0: Tensor) -> Tensor:
    """The logarithm of a crop's squared error: quality is judged by the mean of decibels, in which a picture with little contrast
    counts as much as one with a lot.
    """
    _, mean = net.mean(x)
    errors = (mean - y0).square().mean((1, 2, 3))
    loss: Tensor = (errors + LEAST).log().mean()
    return loss


def details_loss(net: CompactUNet, x: Tensor, y0: Tensor, gamma: Tensor) -> Tensor:
    """The weighed error of what samples. gamma: (B, 1) float64.

    It cannot be judged by its logarithm, as the error is mostly noise that no one foretells: each crop's weight is about the inverse of
    the error that bicubic makes there, as far as `x` tells it: the energy of its details at half resolution, which explains 90 % of the
    logarithm's variance. A weight that knew y0 would bias the prediction.
    """
    with torch.no_grad():
        features, mean = net.mean(x)
    sigma = (1 / gamma - 1).sqrt().to(torch.float32)[:, :, None, None]
    spread = (sigma**2 + DETAIL**2).sqrt()
    _, details = bands(y0 - mean)
    noise = torch.randn_like(details)
    target = (details * sigma - noise * DETAIL**2) / (DETAIL * spread)
    fine = net.inner(mean, (details + sigma * noise) / spread, sigma.flatten(1).log(), features)
    weight = 1 / (bands(bands(x)[0])[1].square().mean((1, 2, 3)) / TYPICAL + 0.2)
    return (weight * (fine - target).square().mean((1, 2, 3))).mean()


def turning(mean: Mean) -> None:
    """From now on the features of `mean` turn and mirror as x does (export/nets/turning.py)."""
    tie(mean.first, Lifted(SCALE))
    for block in mean.blocks:
        assert isinstance(block, PlainBlock)
        tie(block.conv1, Turned())
        tie(block.conv2, Turned())
    tie(mean.last, Lowered(SCALE))


def leaving_out(mean: Mean) -> None:
    """From now on each block of `mean` leaves some pictures as they are, and changes the others by as much more (stochastic depth, Huang et
    al. 2016, arXiv 1603.09382): blocks then do not learn photographs together.
    """
    for i, block in enumerate(mean.blocks):
        block.register_forward_hook(partial(_left_out, share=LEFT_OUT * (i + 1) / len(mean.blocks)))


def _left_out(block: nn.Module, given: tuple[Tensor], made: Tensor, *, share: float) -> Tensor:
    (h,) = given
    changed = torch.rand(len(h), 1, 1, 1, device=h.device) >= share
    return torch.lerp(h, made, changed.to(h.dtype) / (1 - share))


class Run:
    """Everything that a resumed run needs: weights, moving average, optimiser, step. One part of the network is trained."""

    def __init__(self, net: CompactUNet, part: Part, *, rate: float, decay: float, device: str) -> None:
        self.net, self.part = net.to(device=device, memory_format=torch.channels_last), part  # type: ignore[call-overload]
        if part == "mean":
            turning(net.mean)
            leaving_out(net.mean)
        mean = set(net.mean.parameters())
        for parameter in net.parameters():
            parameter.requires_grad_((parameter in mean) is (part == "mean"))
        self.trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        self.average = {name: p.detach().clone() for name, p in self.net.state_dict().items()}
        self.optimiser = torch.optim.AdamW(self.trained, lr=rate, betas=(0.9, 0.99), weight_decay=0.05, fused=True)
        self.decay, self.step, self.seconds = decay, 0, 0.0

    def update(self, loss: Tensor, rate: float) -> None:
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
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
        state = torch.load(path, map_location=next(self.net.parameters()).device, weights_only=True)
        self.net.load_state_dict(state["net"])
        self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds = state["step"], state["seconds"]


def write_weights(run: Run, gammas: NDArray[np.float64], out: Path) -> None:
    """The moving average and the schedule of runs, as safetensors that `export/to_onnx.py` recognises."""
    net = CompactUNet(run.net.config)  # a deep copy would share the classes that parametrizations made
    if run.part == "mean":
        turning(net.mean)
    net.load_state_dict(run.average)
    untie(net)
    tensors = {name: value.cpu().contiguous() for name, value in net.state_dict().items()}
    tensors["gammas"] = torch.from_numpy(gammas.copy())
    metadata = {"config": json.dumps(asdict(run.net.config)), "architecture": "compact", "scale": str(SCALE), "step": str(run.step)}
    temporary = out.with_suffix(".partial")
    save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, out)


def from_file(path: Path) -> CompactUNet:
    """The network of this script's safetensors file, or of the bundle that `export/to_onnx.py` made from one."""
    if path.is_dir():
        with Bundle.open(path).open_file(WEIGHTS) as stream:
            found = {name: torch.from_numpy(values) for name, values in Weights(stream).items()}
    else:
        found = load_file(path)
    net = CompactUNet(CompactConfig())
    missing = sorted(net.state_dict().keys() - found.keys())
    unknown = sorted(found.keys() - {"gammas", *dict(net.named_parameters()), *dict(net.named_buffers())})
    if missing or unknown:
        what = f"it has no tensor {missing[0]}" if missing else f"it has a tensor {unknown[0]}, which that network has not"
        raise OptionError(f"{path} is not of this script's network: {what}")
    net.load_state_dict({name: found[name] for name in net.state_dict()})
    return net


def train(
    part: Part,
    *,
    images: Path,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    hold_out: str = "kodim2[1-4].*",
    start: Path | None = None,
    minutes: float = 60,
    batch: int = 8,
    crop: int = 128,
    rate: float = 1e-3,
    decay: float = 0.999,
    device: str = "cpu",
    threads: int = 2,
    workers: int = 1,
    seed: int = 0,
) -> None:
    """Train the small model.

    Parameters
    ----------
    part
        mean: what is computed once per picture. details: what samples, given the mean of --start.
    images
        Folder of .png photographs.
    output
        Safetensors file to write, every 200 steps and at the end.
    hold_out
        Glob of the pictures never to train on.
    start
        Bundle, or safetensors file of this script, to take the first weights from.
    minutes
        Training time, over all resumed parts; the rate falls to nearly 0 by then.
    batch
        Crops in a step.
    crop
        Side of a crop, pixels.
    rate
        Highest learning rate.
    decay
        Of the moving average.
    device
        cpu or cuda. Products are in bfloat16 on a GPU, and on a CPU that has instructions for it.
    threads
        For the network, on a CPU.
    workers
        Processes that make crops.
    seed
        Of crops, levels and noise.
    """
    if minutes <= 0:
        raise OptionError(f"--minutes must be more than 0, found {minutes:g}")
    if part == "details" and start is None:
        raise OptionError("details are drawn given a mean: give --start FILE, which `train.py mean` wrote, or a bundle")
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError(f"PyTorch {torch.__version__} finds no GPU here: use --device cpu, or a PyTorch that was built for CUDA")
    output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    run = Run(from_file(start) if start else CompactUNet(CompactConfig()), part, rate=rate, decay=decay, device=device)
    state = output.with_suffix(".state")
    if state.exists():
        run.resume(state)
    rng = np.random.default_rng((seed, run.step))
    torch.manual_seed(seed + run.step)
    console = Console()
    pictures = photographs(images, hold_out)
    console.print(f"{len(pictures)} pictures")
    gammas = path_gammas()
    losses: list[Tensor] = []
    limit = minutes * 60
    half = device != "cpu" or bool(_native.bfloat16())
    crops = Crops(pictures, crop=crop, batch=batch, seed=(seed, run.step), oblique=OBLIQUE if part == "mean" else 0.0)
    begin = time.monotonic()
    for pair in DataLoader(crops, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None):
        x, y0 = (side.to(device).permute(0, 3, 1, 2).to(torch.float32).div_(127.5).sub_(1) for side in pair)
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = mean_loss(run.net, x, y0) if part == "mean" else details_loss(run.net, x, y0, draw_gamma(gammas, batch, rng).to(device))
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, run.seconds / limit)))
        run.update(loss, rate * min(1.0, (run.step + 1) / WARM) * max(0.02, fall))
        losses.append(loss.detach())
        now = time.monotonic()
        run.seconds += min(now - begin, 5.0)  # a suspended process is not charged for its sleep
        begin = now
        if run.step % 200 == 0 or run.seconds >= limit:
            mean = torch.stack(losses).mean().item()
            console.print(f"step {run.step}, {run.seconds / 60:.1f} of {minutes:g} minutes, loss {mean:.4f}")
            losses.clear()
            run.save(state)
            write_weights(run, run_gammas(), output)
        if run.seconds >= limit:
            break


def average(first: Path, *others: Path, output: Annotated[Path, Parameter(name=["--output", "-o"])]) -> None:
    """The average of several runs' weights, each of which began where one before it ended (Wortsman et al. 2022, arXiv 2203.05482).

    It predicts photographs that none was trained on better than each.

    Parameters
    ----------
    first
        Safetensors file of this script.
    others
        More of them.
    output
        Safetensors file to write.
    """
    if not others:
        raise OptionError(f"found {first} alone, expected two files or more to average")
    made = load_file(first)
    for count, path in enumerate(others, start=2):
        found = load_file(path)
        if made.keys() != found.keys() or any(made[name].shape != found[name].shape for name in made):
            raise OptionError(f"{first} and {path} are of different networks: expected files of this script with the same tensors")
        made = {name: torch.lerp(made[name], found[name], 1 / count) for name in made}
    with safe_open(first, "pt") as opened:
        metadata = opened.metadata()
    temporary = output.with_suffix(".partial")
    save_file(made, temporary, metadata=metadata)
    os.replace(temporary, output)


if __name__ == "__main__":
    app = App(help=__doc__, help_format="plaintext")
    app.default(train)
    app.command(average)
    run_command(app)
