"""The report's plots, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

Entry = dict[str, Any]
COLOURS = {"eager": "#8c8c8c", "peer": "#5f5f5f", "half": "#c9a227", "compiled": "#7a5195"}
OURS = ("#00708a", "#2f9e44", "#d9480f")


def colour(name: str, known: Sequence[str]) -> str:
    """Fixed for PyTorch's contenders; ours take the rest in turn."""
    ours = [one for one in known if one not in COLOURS]
    return COLOURS.get(name) or OURS[ours.index(name) % len(OURS)]


def latency(entries: Sequence[Entry]) -> str:
    """Milliseconds a step: median, and a line from the fastest step to the 90th percentile."""
    names = _names(entries)
    figure, axes = plt.subplots(figsize=(7, 0.5 + 0.32 * sum(len(e["contenders"]) + 1 for e in entries)))
    ticks, labels, at = [], [], 0.0
    for entry in entries:
        for row in entry["contenders"]:
            step = row["step"]
            p50, low, high = (1e3 * step[key] for key in ("p50", "minimum", "p90"))
            axes.plot([low, high], [at, at], color=colour(row["name"], names), linewidth=2)
            axes.plot(p50, at, "o", color=colour(row["name"], names))
            axes.annotate(f"  {p50:.0f} ms" if p50 >= 100 else f"  {p50:.3g} ms", (max(high, p50), at), va="center", fontsize=8)
            ticks.append(at)
            labels.append(f"{_short(entry)}: {row['name']}")
            at += 1
        at += 0.7
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds a step: median; fastest to 90th percentile")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.25)
    return _svg(figure, axes)


def over_steps(entry: Entry) -> str:
    """Seconds a picture over its steps; hollow where extrapolated."""
    figure, axes = plt.subplots(figsize=(6, 3.6))
    names = _names([entry])
    for row in entry["contenders"]:
        tint = colour(row["name"], names)
        steps, seconds = [p["steps"] for p in row["pictures"]], [p["seconds"] for p in row["pictures"]]
        axes.plot(steps, seconds, color=tint, label=row["name"], linewidth=1.2)
        for picture in row["pictures"]:
            face = "white" if picture["extrapolated"] else tint
            axes.plot(picture["steps"], picture["seconds"], "o", color=tint, markerfacecolor=face)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("steps (hollow: extrapolated from the median step)")
    axes.set_ylabel("seconds a picture")
    axes.set_title(_short(entry), fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    return _svg(figure, axes)


def over_batch(entries: Sequence[Entry]) -> str:
    """Steps a second, all pictures of the batch together, over the batch size; one line a contender."""
    figure, axes = plt.subplots(figsize=(6, 3.6))
    names = _names(entries)
    for name in names:
        points = [(e["batch"], row["steps_per_s"]) for e in entries for row in e["contenders"] if row["name"] == name]
        axes.plot(*zip(*sorted(points), strict=True), "o-", color=colour(name, names), label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({e["batch"] for e in entries}), [str(b) for b in sorted({e["batch"] for e in entries})])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("pictures in a batch")
    axes.set_ylabel("steps a second, all pictures")
    axes.set_title(entries[0]["title"], fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure, axes)


def roofline(entries: Sequence[Entry]) -> str:
    """Share of the same run's best matrix product."""
    names = _names(entries)
    figure, axes = plt.subplots(figsize=(7, 3.4))
    width = 0.8 / len(names)
    for i, entry in enumerate(entries):
        for row in entry["contenders"]:
            j = names.index(row["name"])
            axes.bar(i + j * width - 0.4 + width / 2, 100 * row["share_of_matmul"], width * 0.92, color=colour(row["name"], names))
    for name in names:
        axes.bar(0, 0, color=colour(name, names), label=name)
    axes.set_xticks(range(len(entries)), [_short(entry).replace(", ", "\n") for entry in entries], fontsize=8)
    axes.set_ylabel("% of the best matrix product")
    axes.legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(names))
    return _svg(figure, axes)


def quality(rows: Sequence[dict[str, Any]]) -> str:
    """PSNR over bicubic and high-frequency energy over steps, one line a sampler."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(5.6, 6.4), sharex=True)
    for sampler in dict.fromkeys(row["sampler"] for row in rows):
        mine = sorted((row for row in rows if row["sampler"] == sampler), key=lambda row: row["steps"])
        steps = [row["steps"] for row in mine]
        top.plot(steps, [row["one"] for row in mine], "o-", label=sampler, markersize=4)
        bottom.plot(steps, [row["high_frequencies"] for row in mine], "o-", label=sampler, markersize=4)
    top.axhline(0, color="black", linewidth=0.8)
    bottom.axhline(1, color="black", linewidth=0.8)
    top.set_ylabel("PSNR of one sample,\ndB over bicubic")
    bottom.set_ylabel("high-frequency energy,\nshare of the original's")
    bottom.set_xlabel("steps")
    bottom.set_xscale("log")
    ticks = sorted({row["steps"] for row in rows})
    bottom.set_xticks(ticks, [str(steps) for steps in ticks])
    bottom.minorticks_off()
    top.legend(fontsize=8, frameon=False)
    _bare(top)
    return _svg(figure, bottom)


def _names(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(row["name"] for entry in entries for row in entry["contenders"]))


def _short(entry: Entry) -> str:
    return f"{entry['title']}, batch {entry['batch']}"


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _svg(figure: Figure, axes: Axes) -> str:
    _bare(axes)
    figure.tight_layout()
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]
