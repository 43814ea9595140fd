"""What `sr3rt info` and `sr3rt doctor` say, and the picture that `--compare` writes."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.markup import escape
from rich.table import Table

from sr3rt import __version__, _native, backends, environment
from sr3rt.bench import Row
from sr3rt.bundle import Bundle
from sr3rt.engines import EngineKey
from sr3rt.errors import SR3Error
from sr3rt.images import Picture, condition, in_8_bits, restore


def describe(path: Path) -> Table:
    """A table of a bundle's facts, after every hash was checked. Raises BundleError."""
    bundle = Bundle.open(path)
    bundle.verify()
    manifest, run = bundle.manifest, bundle.manifest.defaults
    table = _table(escape(f"{manifest.name} ({path})"))
    table.add_row("network", escape(f"{manifest.architecture}, {manifest.parameters:,} parameters, {manifest.channels} channels"))
    table.add_row("scale", f"{manifest.scale}×, sides padded to a multiple of {manifest.stride}")
    table.add_row("predicts", f"{manifest.prediction}, given {manifest.level}")
    table.add_row("trained on", escape(str(manifest.trained)))
    at = run.schedule or "the trained schedule respaced"
    table.add_row("by default", escape(f"{run.steps} steps, sampler {run.sampler}, consistency {run.consistency}, {at}"))
    for name, figure in manifest.parity.items():
        if isinstance(figure, Mapping):
            worst, limit = (_short(figure.get(key)) for key in ("worst", "limit"))
            table.add_row(escape(f"parity: {name}"), escape(f"{worst} (limit {limit}; {figure.get('unit')})"))
    for name, content in manifest.engines.items():
        key = EngineKey.of(content)
        table.add_row("engine", escape(f"{name}: {key.flavour} {key.version}, {key.capability}"))
    for name, value in manifest.source.items():
        lines = [str(item) for item in value] if isinstance(value, list) else [str(value)]
        table.add_row(escape(name.replace("_", " ")), escape("\n".join(lines)) or "none")
    for name, entry in manifest.files.items():
        table.add_row(name, f"{entry['bytes']:,} bytes, SHA-256 {entry['sha256']} [green]verified[/green]")
    table.add_row("bundle", f"SHA-256 {bundle.sha256}")
    return table


def examine() -> tuple[Table, bool]:
    """A table of versions and backends, and whether at least one backend works."""
    table = _table("sr3rt doctor")
    table.add_row("sr3rt", __version__)
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores")
    for name, version in environment.packages().items():
        table.add_row(name, version or "[dim]not installed[/dim]")
    instructions = [name for name in (_native.instructions(), _native.bfloat16()) if name]
    table.add_row("instructions", ", ".join(instructions) or "neither AVX2 nor AVX-512")
    healthy = False
    for name in backends.MODULES:
        reason = backends.why_not(name) or _try(name)
        healthy |= reason is None
        table.add_row(f"backend {name}", "[green]works[/green]" if reason is None else f"[red]cannot run[/red]: {escape(reason)}")
    return table, healthy


def timings(bundle: Bundle, rows: Sequence[Row], *, size: int, batch: int) -> Table:
    """A table of `sr3rt bench`, a column for each backend and precision, with the versions that matter."""
    manifest = bundle.manifest
    facts = environment.describe(threads=0)
    versions = ", ".join(f"{name} {version}" for name, version in environment.packages().items() if version)
    table = Table(title=escape(f"{manifest.name}, {size}×{size}, batch {batch}"), caption=escape(f"{facts['cpu']}; {versions}"))
    table.add_column("backend")
    for row in rows:
        table.add_column(f"{row.backend}, {row.precision}")
    figures: dict[str, Callable[[Row], str]] = {
        "load": lambda row: f"{row.load:.2f} s",
        "step, p50": lambda row: f"{1e3 * row.step.p50:.1f} ms",
        "step, p90": lambda row: f"{1e3 * row.step.p90:.1f} ms",
        "spread, steps": lambda row: f"±{row.step.spread:.1%}, {row.step.n}",
        "outside the network": lambda row: f"{row.outside:.1%}",
        "steps/s": lambda row: f"{batch / row.step.p50:.2f}",
        f"pictures/s at {manifest.defaults.steps} steps": lambda row: f"{batch / row.step.p50 / manifest.defaults.steps:.3f}",
    }
    for name, figure in figures.items():
        table.add_row(name, *map(figure, rows))
    return table


def side_by_side(picture: Picture, result: Image.Image) -> Image.Image:
    """Input (nearest neighbour), bicubic and result, at the result's size, 4 px apart on white."""
    small = restore(picture, condition(picture, scale=1, stride=1).x, scale=1)
    small = _rgb(small)
    parts = [small.resize(result.size, Image.Resampling.NEAREST), small.resize(result.size, Image.Resampling.BICUBIC)]
    parts.append(_rgb(result))
    width, height = result.size
    sheet = Image.new("RGB", (3 * width + 8, height), "white")
    for i, part in enumerate(parts):
        sheet.paste(part, (i * (width + 4), 0))
    return sheet


def _rgb(image: Any) -> Image.Image:
    """8 bits per channel, without alpha."""
    assert isinstance(image, Image.Image)
    return in_8_bits(image).convert("RGB")


def _short(value: object) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _try(name: str) -> str | None:
    """Why backend `name` does not load the bundle that ships, or None."""
    from sr3rt.upscaler import SHIPPED

    try:
        backends.load(Bundle.open(SHIPPED), backends.Request(name))
    except SR3Error as error:
        return str(error)
    return None


def _table(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table
