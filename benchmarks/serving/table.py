"""The figures of docs/serving.md, from the report's JSON."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
REPORT, DOCUMENT = ROOT / "benchmarks" / "reports" / "serving.json", ROOT / "docs" / "serving.md"
MARK = re.compile(r"(<!-- figures: .*? -->\n).*?(<!-- end of figures -->)", re.DOTALL)


def in_document(text: str, figures: str) -> str:
    """`text` with the figures between its marks. Raises ValueError when there are none."""
    if not MARK.search(text):
        raise ValueError(f"{DOCUMENT} has no marks for the figures")
    return MARK.sub(lambda match: f"{match[1]}{figures}\n{match[2]}", text)


def markdown(report: dict[str, Any]) -> str:
    """Lines of what was found, and a table of batching and of the sweep."""
    return "\n".join([*_facts(report), "", *_batching(report["batching"]), "", *_sweep(report["sweep"])])


def _facts(report: dict[str, Any]) -> list[str]:
    mixed, over, alone, guard, cancels = (report[name] for name in ("mixed", "overload", "overhead", "guard", "cancels"))
    leak = over["leaking"]
    return [
        f"With the model that ships, {_where(report['environment'])}:",
        "",
        f"- {mixed['requests']} concurrent requests of mixed sizes, steps (4 to 50) and samplers: {mixed['answered']} answered, each "
        f"within {mixed['worst_levels']} of 255 levels of what `upscale` gives for its seed.",
        f"- Ten times too much for {over['seconds']:.0f} s ({over['offered_per_s']:.0f} requests a second, 32×32 → 128×128, where "
        f"{over['saturated_per_s']:.1f} can be done, measured before and after): {100 * over['goodput_share']:.0f} % as many pictures as "
        f"without the excess, of the cores that made the load too ({100 * over['load_share']:.0f} % of them); {over['refused']} requests "
        f"refused, in {over['refusal_p50_ms']:.1f} ms (p50) and "
        f"{over['refusal_p99_ms']:.1f} ms (p99). "
        f"Itself again {over['recovered_s']:.1f} s after. Memory {over['memory_growth_mib']:+.1f} MiB over the last minute; with a leak of "
        f"½ MiB a request planted, {leak['memory_growth_mib']:+.0f} MiB over half a minute by the same check.",
        f"- One client, 64×64 → 256×256: {1e3 * alone['server_p50_s']:.0f} ms through the server, {alone['ratio']:.2f}× of `upscale` "
        f"in the process (medians of {alone['pairs']} pairs, in turns).",
        f"- The guard adds {guard['added_p50_ms']:.1f} ms to a request of one step, {guard['side']}×{guard['side']} → {4 * guard['side']}×"
        f"{4 * guard['side']}: {guard['by_p50_ms']:.1f} ms by it, {guard['past_p50_ms']:.1f} ms past it (medians of {guard['pairs']} "
        "pairs, in turns).",
        f"- {cancels['asked_to_cancel']} requests cancelled at random moments: {cancels['cancelled_by_server']:.0f} left unfinished, "
        f"{cancels['neighbours']} neighbours' results within {cancels['worst_levels']} levels of their own, "
        f"{cancels['queued_and_running_after']:.0f} left running, memory {cancels['memory_growth_mib']:+.0f} MiB.",
    ]


def _where(environments: dict[str, dict[str, Any]]) -> str:
    """Where and when; of each experiment, where they were not all measured on one machine and day."""
    found: dict[str, list[str]] = {}
    for name, one in environments.items():
        found.setdefault(f"on {one['cores']} cores of an {one['cpu']}, {one['date'][:10]}", []).append(name)
    return "; ".join(place if len(found) == 1 else f"{', '.join(names)} {place}" for place, names in found.items())


def _batching(rows: list[dict[str, Any]]) -> list[str]:
    side = rows[0]["side"]
    lines = [
        f"{side}×{side} → {4 * side}×{4 * side}, steps drawn from 4, 8, 16 and 50, the same Poisson arrivals for each way of batching, in "
        "turns:",
        "",
        "| batching | saturated, pictures/s | offered, pictures/s | requests | p50 | p90 | p99 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = " | ".join(f"{row[name]:.2f} s" for name in ("p50_s", "p90_s", "p99_s"))
        lines.append(f"| {row['mode']} | {row['saturated_per_s']:.2f} | {row['offered_per_s']:.2f} | {row['requests']} | {times} |")
    lines += ["", f"Saturated, visit by visit: {_saturated(rows)}."]
    return [*lines, "", "Pictures a second at an equal p99, between these loads:", "", *(_at_equal_p99(rows, load) for load in (1, 2))]


def _saturated(rows: list[dict[str, Any]]) -> str:
    """How each way of batching stands to the first: median, least and most of the visits."""
    first, *others = {row["mode"]: row["saturated_by_visit_per_s"] for row in rows}.items()
    ratios = {name: np.divide(first[1], rates) for name, rates in others}
    return "; ".join(f"{first[0]} ÷ {name} {np.median(one):.2f} ({one.min():.2f} to {one.max():.2f})" for name, one in ratios.items())


def _at_equal_p99(rows: list[dict[str, Any]], load: int) -> str:
    """What each way of batching carries at the p99 that whole requests have at that load, between its own loads."""
    by_mode: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_mode.setdefault(row["mode"], []).append(row)
    limit = by_mode["whole requests"][load]["p99_s"]
    carried = []
    for mode, loads in by_mode.items():
        times, rates = [row["p99_s"] for row in loads], [row["offered_per_s"] for row in loads]
        bound = "less than " if limit < times[0] else "more than " if limit > times[-1] else ""
        carried.append(f"{mode} {bound}{np.interp(limit, times, rates):.1f}")
    return f"- {limit:.2f} s: {', '.join(carried)}"


def _sweep(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["`perf_analyzer` (gRPC), 16×16 → 64×64, 4 steps:", "", "| clients | pictures/s | p50 | p90 | p99 |", "|---|---|---|---|---|"]
    for row in rows:
        times = " | ".join(f"{row[name]:.0f} ms" for name in ("p50_ms", "p90_ms", "p99_ms"))
        lines.append(f"| {row['clients']} | {row['per_s']:.1f} | {times} |")
    return lines
