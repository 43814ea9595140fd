"""How good are the pictures? `python benchmarks/quality.py --images DIR` measures a bundle on photographs it never saw.

Each photograph gives six 128×128 crops (the middles of a 3×2 grid), each crop is shrunk by PIL's bicubic and upscaled again by the
bundle with several seeds. Reported, against the crop itself:

- PSNR over RGB of 8-bit pictures, mean over crops of the dB, minus bicubic's: of one sample (mean over seeds), and of the mean of
  all samples;
- SSIM (Wang et al. 2004, scikit-image's with the paper's Gaussian window), one sample;
- high frequencies: energy of the spectrum above half of Nyquist's frequency (radially; mean removed, Hann window against the
  borders), summed over the crops, as a share of the originals';
- consistency: PSNR between the result shrunk again and the input (the paper's section 4), one sample.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from cyclopts import App, Parameter
from numpy.typing import NDArray
from PIL import Image

import sr3rt
from sr3rt.bundle import Consistency
from sr3rt.cli import run_command
from sr3rt.consistency import consistency_psnr
from sr3rt.errors import MissingExtra, OptionError

try:
    from skimage.metrics import structural_similarity
except ModuleNotFoundError:
    raise SystemExit(str(MissingExtra("measuring quality", "scikit-image", "bench"))) from None

CROP = 128
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Quality:
    """PSNR in dB (`one` and `mean` are gains over `bicubic`), energies as shares of the originals'."""

    crops: int
    samples: int
    steps: int
    sampler: str
    consistency: str
    bicubic: float
    one: float
    mean: float
    ssim: float
    bicubic_ssim: float
    high_frequencies: float
    bicubic_high_frequencies: float
    consistency_db: float

    def __str__(self) -> str:
        """A line of the table that `main` prints."""
        return (
            f"| {self.sampler} | {self.steps} | {self.consistency} | {self.one:+.2f} dB | {self.mean:+.2f} dB ({self.samples}) | "
            f"{self.ssim:.3f} | {self.high_frequencies:.3f} | {self.consistency_db:.1f} dB |"
        )


def photographs(folder: Path, names: str) -> list[Image.Image]:
    """Those of the folder that the glob names. Raises OptionError for none, or one that is smaller than a crop."""
    paths = sorted(path for path in folder.glob(names) if path.is_file())
    if not paths:
        raise OptionError(f"{folder} holds no {names}: give --images a folder of photographs, and --names '*.jpg' or what theirs are")
    found = [Image.open(path).convert("RGB") for path in paths]
    for path, picture in zip(paths, found, strict=True):
        if min(picture.size) < CROP:
            raise OptionError(f"{path} is {picture.width}×{picture.height}: expected {CROP}×{CROP} at least, which is what a crop takes")
    return found


def crops(picture: Image.Image) -> list[Image.Image]:
    """The middles of a 3×2 grid (2×3 for an upright picture), 128×128 each; of small ones they overlap."""
    columns, rows = (3, 2) if picture.width >= picture.height else (2, 3)
    corners = [(_corner(picture.width, c, columns), _corner(picture.height, r, rows)) for r in range(rows) for c in range(columns)]
    return [picture.crop((left, top, left + CROP, top + CROP)) for left, top in corners]


def _corner(length: int, k: int, parts: int) -> int:
    """Where the crop in the middle of part k begins, moved so that all of it is inside."""
    return min(max(0, round((k + 0.5) * length / parts - CROP / 2)), length - CROP)


def psnr(picture: NDArray[np.generic], original: Pixels) -> float:
    """dB, of pictures on the scale 0…255."""
    error = np.mean((picture.astype(np.float64) - original.astype(np.float64)) ** 2)
    return float(20 * np.log10(255) - 10 * np.log10(max(float(error), 1e-9)))


def ssim(picture: Pixels, original: Pixels) -> float:
    """Structural similarity over RGB, 1 for equal pictures."""
    return float(
        structural_similarity(original, picture, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)  # type: ignore[no-untyped-call]
    )


def high_frequency_energy(picture: NDArray[np.generic]) -> float:
    """Energy above 1/4 cycle a pixel, in any direction, of an (H, W, 3) picture without its mean, under a Hann window."""
    values = picture.astype(np.float64)
    values -= values.mean(axis=(0, 1))
    height, width = values.shape[:2]
    window = np.hanning(height)[:, None] * np.hanning(width)[None]
    power = np.abs(np.fft.fft2(values * window[..., None], axes=(0, 1))) ** 2
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    return float(power[radius > 0.25].sum())


def measure(
    upscaler: sr3rt.Upscaler,
    originals: list[Image.Image],
    *,
    samples: int = 8,
    steps: int | None = None,
    sampler: str | None = None,
    consistency: Consistency | None = None,
) -> Quality:
    """Upscale every crop with seeds 0 … samples−1 and compare."""
    scale = upscaler.bundle.manifest.scale
    truth = [np.asarray(original) for original in originals]
    small = [original.resize((CROP // scale, CROP // scale), Image.Resampling.BICUBIC) for original in originals]
    bicubic = [np.asarray(low.resize((CROP, CROP), Image.Resampling.BICUBIC)) for low in small]
    base = float(np.mean([psnr(b, t) for b, t in zip(bicubic, truth, strict=True)]))
    runs = [
        upscaler.run(small, seed=[seed * len(small) + i for i in range(len(small))], steps=steps, sampler=sampler, consistency=consistency)
        for seed in range(samples)
    ]
    pictures = np.stack([[np.asarray(result.image) for result in run] for run in runs])  # (samples, crops, H, W, 3)
    one = np.mean([psnr(p, t) for run in pictures for p, t in zip(run, truth, strict=True)])
    mean = np.mean([psnr(p, t) for p, t in zip(pictures.mean(axis=0, dtype=np.float64), truth, strict=True)])
    energy = sum(high_frequency_energy(t) for t in truth)
    agreement = [consistency_psnr(signed(p), signed(np.asarray(low)), scale) for p, low in zip(pictures[0], small, strict=True)]
    first = runs[0][0]
    return Quality(
        crops=len(truth),
        samples=samples,
        steps=first.steps,
        sampler=first.sampler,
        consistency=first.consistency,
        bicubic=base,
        one=float(one) - base,
        mean=float(mean) - base,
        ssim=float(np.mean([ssim(p, t) for p, t in zip(pictures[0], truth, strict=True)])),
        bicubic_ssim=float(np.mean([ssim(b, t) for b, t in zip(bicubic, truth, strict=True)])),
        high_frequencies=float(np.mean([sum(high_frequency_energy(p) for p in run) for run in pictures])) / energy,
        bicubic_high_frequencies=sum(high_frequency_energy(b) for b in bicubic) / energy,
        consistency_db=float(np.mean(agreement)),
    )


def signed(picture: NDArray[np.generic]) -> NDArray[np.float32]:
    """(H, W, 3) of 0…255 to (3, H, W) in [-1, 1]."""
    return np.ascontiguousarray(picture.transpose(2, 0, 1), np.float32) / np.float32(127.5) - np.float32(1)


def main(
    *,
    images: Path,
    names: str = "kodim2[1-4].png",
    model: Annotated[Path | None, Parameter(name=["--model", "-m"])] = None,
    steps: Annotated[list[int] | None, Parameter(name=["--steps", "-n"], consume_multiple=True)] = None,
    sampler: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    consistency: Consistency | None = None,
    samples: int = 8,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
) -> None:
    """Measure a bundle's pictures against photographs.

    Parameters
    ----------
    images
        Folder of photographs.
    names
        Which of them, as a glob; the default is what the shipped model was never trained on.
    model
        A bundle; the one that ships when not given.
    steps
        One or more step counts; the bundle's own when not given.
    sampler
        One or more samplers; the bundle's own when not given.
    consistency
        off, final or every; the bundle's own when not given.
    samples
        Seeds for each crop.
    output
        JSON file for the figures.
    """
    if samples < 1:
        raise OptionError(f"--samples must be 1 or more, found {samples}")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)  # or it is told now that it cannot be, and not after hours
    upscaler = sr3rt.load(model)
    originals = [crop for picture in photographs(images, names) for crop in crops(picture)]
    rows = []
    head = ("sampler", "steps", "consistency", "one sample", "mean of samples", "SSIM", "high frequencies", "consistency")
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for method in sampler or (None,):
        for count in steps or (None,):
            quality = measure(upscaler, originals, samples=samples, steps=count, sampler=method, consistency=consistency)
            rows.append(asdict(quality))
            print(quality, flush=True)
    q = rows[0]
    print(
        f"\nover {q['crops']} crops; bicubic: {q['bicubic']:.2f} dB, SSIM {q['bicubic_ssim']:.3f}, high frequencies "
        f"{q['bicubic_high_frequencies']:.4f}"
    )
    if output:
        output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app = App(help=__doc__)
    app.default(main)
    run_command(app)
