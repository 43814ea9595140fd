"""The report: one JSON, one self-contained HTML page, and the README's table. `python -m benchmarks.report --help`."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

from cyclopts import App

from benchmarks import charts

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
COMMITTED, QUALITY = HERE / "reports" / "cpu.json", HERE / "reports" / "quality.json"
MARK = re.compile(r"(<!-- performance: .*? -->\n).*?(<!-- end of performance -->)", re.DOTALL)
Entry = dict[str, Any]


def write(folder: Path, data: dict[str, Any]) -> None:
    """report.json and report.html in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    quality = json.loads(QUALITY.read_text(encoding="utf-8")) if QUALITY.exists() else []
    (folder / "report.html").write_text(page(data, quality), encoding="utf-8")


def page(data: dict[str, Any], quality: Sequence[dict[str, Any]]) -> str:
    """The whole page. quality: rows of `benchmarks/quality.py`, or none."""
    entries = [entry for entry in data["entries"] if entry["contenders"]]
    plots = [("Time of a step", charts.latency(entries)), ("Share of the machine", charts.roofline(entries))] if entries else []
    plots += [("Time of a picture", charts.over_steps(entry)) for entry in entries if entry["batch"] == 1]
    for name in dict.fromkeys(entry["workload"] for entry in entries):
        mine = [entry for entry in entries if entry["workload"] == name]
        if len(mine) > 1:
            plots.append(("Throughput over batch size", charts.over_batch(mine)))
    if quality:
        plots.append(("Quality over steps", charts.quality(quality)))
    template = Template((HERE / "report.template.html").read_text(encoding="utf-8"))
    return template.substitute(
        environment=_table(["", ""], [[key, _plain(value)] for key, value in data["environment"].items()]),
        summary="".join(f"<p>{html.escape(line)}</p>" for line in _headlines(entries)),
        plots="".join(f"<figure><figcaption>{title}</figcaption>{svg}</figure>" for title, svg in plots),
        tables="".join(_entry(entry) for entry in data["entries"]),
        quality=_quality(quality) if quality else "<p>Not measured with this report.</p>",
    )


def markdown(data: dict[str, Any]) -> str:
    """The README's table: a line for each workload, batch and contender."""
    environment, visits = data["environment"], min(entry["visits"] for entry in data["entries"])
    lines = [
        f"{environment['cpu']}{', ' + environment['gpu'] if environment['gpu'] else ''}, {environment['threads']} threads, "
        f"{environment['date'][:10]}; medians of interleaved turns in {visits} visits, 95 % intervals. "
        "PyTorch's memory is kept from step to step; by default it is slower. "
        "Shares are of the best float32 matrix product, with a convolution's operations as the direct sum has them, of which Winograd's "
        "takes a quarter. Of the shipped model, sr3rt's CPU backends compute the part that depends on the input alone once per picture, "
        "before these steps; the others do so at every step, and it is counted so:",
        "",
        "| workload | contender | a step, p50 | eager ÷ it | best matmul's share | relative error |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_line(entry, row) for entry in data["entries"] for row in entry["contenders"]]
    return "\n".join(lines)


def _line(entry: Entry, row: dict[str, Any]) -> str:
    exact = row["name"] == "eager"
    error = "–" if exact or not row["error"] else f"{row['error']['relative_l2']:.0e}"
    ratio = "–" if exact else _ratio(row["ratio"])
    title = f"{entry['title']}, batch {entry['batch']}{' (busy machine)' if entry['busy'] else ''}"
    return f"| {title} | {row['title']} | {_seconds(row['step']['p50'])} | {ratio} | {row['share_of_matmul']:.0%} | {error} |"


def in_readme(text: str, table: str) -> str:
    """`text` with the table between the README's marks. Raises ValueError when there are none."""
    if not MARK.search(text):
        raise ValueError("the README has no <!-- performance: … --> and <!-- end of performance --> lines to write between")
    return MARK.sub(lambda match: f"{match[1]}{table}\n{match[2]}", text)


def _headlines(entries: Iterable[Entry]) -> list[str]:
    lines = []
    for entry in entries:
        ours = [row for row in entry["contenders"] if row["name"] not in charts.COLOURS and row["ratio"]]
        if ours:
            best = max(ours, key=lambda row: row["ratio"]["value"])
            lines.append(f"{entry['title']}, batch {entry['batch']}: {best['title']} is {_ratio(best['ratio'])} as fast as eager PyTorch.")
    return lines


def _entry(entry: Entry) -> str:
    """A heading, what was dropped and skipped, and the table of one workload at one batch size."""
    text = f"<h3>{html.escape(entry['title'])}, batch {entry['batch']}</h3>"
    if entry["contenders"]:
        busy = " <strong>The machine was busy: disturbed rounds had to be kept.</strong>" if entry["busy"] else ""
        text += (
            f"<p>{entry['parameters']:,} parameters, {entry['flops_per_step'] / 1e9:.1f} GFLOP a step; best matrix product "
            f"{entry['matmul_flops'] / 1e9:.0f} GFLOP/s; {entry['rounds']} rounds in {entry['visits']} visits, "
            f"{entry['dropped']} dropped as disturbed, {entry['foreign_load']:.0%} foreign load.{busy}</p>"
        )
        columns = {row["title"]: _figures(row, entry["batch"]) for row in entry["contenders"]}
        names = next(iter(columns.values()))
        text += _table(["", *columns], [[name, *(column[name] for column in columns.values())] for name in names])
    skipped = [f"<li>{html.escape(name)}: {html.escape(reason)}</li>" for name, reason in entry["skipped"].items()]
    return text + (f"<p>Not measured:</p><ul>{''.join(skipped)}</ul>" if skipped else "")


def _figures(row: dict[str, Any], batch: int) -> dict[str, str]:
    step, cold, error = row["step"], row["cold"], row["error"]
    reference = row["name"] == "eager"
    exact = reference or not error
    pictures = {
        f"pictures/s at {p['steps']} steps{' (extrapolated)' if p['extrapolated'] else ''}": f"{batch / p['seconds']:.3g}"
        for p in row["pictures"]
    }
    return {
        "a step, p50": _seconds(step["p50"]),
        "p90": _seconds(step["p90"]),
        "p99 (from 1000 samples on)": _seconds(step["p99"]),
        "fastest": _seconds(step["minimum"]),
        "spread, samples": f"±{step['spread']:.1%}, {step['n']}",
        "eager ÷ it": "–" if reference else _ratio(row["ratio"]),
        "the same of CPU time, one thread each": "–" if reference else _ratio(row["one_thread_cpu_ratio"]),
        "steps/s": f"{row['steps_per_s']:.3g}",
        **pictures,
        "GFLOP/s": f"{row['flops_per_s'] / 1e9:.0f}",
        "share of the best matrix product": f"{row['share_of_matmul']:.0%}",
        "in the network": _seconds(row["network_s"]),
        "share outside the network": f"{row['outside_network']:.1%}",
        "peak memory": _bytes(row["host_bytes"]),
        "peak memory on the GPU": _bytes(row["device_bytes"]),
        "cold start: import": _seconds(cold["import_s"]),
        "cold start: load": _seconds(cold["load_s"]),
        "cold start: first step": _seconds(cold["first_step_s"]),
        "cold start: all of it, until a picture of 25 steps (extrapolated)": _seconds(sum(cold.values()) + 24 * step["p50"]),
        "relative L2 error of a step": "–" if exact else f"{error['relative_l2']:.1e}",
        "PSNR of a picture against eager's": "–" if exact else f"{error['psnr']:.0f} dB",
    }


def _quality(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        [row["sampler"], str(row["steps"]), f"{row['bicubic'] + row['one']:.2f} dB ({row['one']:+.2f})", f"{row['ssim']:.3f}",
         f"{row['consistency_db']:.1f} dB", f"{row['high_frequencies']:.3f}"]
        for row in rows
    ]  # fmt: skip
    head = ["sampler", "steps", "PSNR of one sample (over bicubic)", "SSIM", "consistency", "high-frequency energy"]
    first = rows[0]
    note = f"{first['crops']} crops; bicubic: {first['bicubic']:.2f} dB, SSIM {first['bicubic_ssim']:.3f}."
    return f"<p>{note}</p>" + _table(head, cells)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    top = line(head, "th") if any(head) else ""
    return f"<div class='wide'><table>{top}{''.join(line(row, 'td') for row in rows)}</table></div>"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item is not None)
    return ", ".join(map(str, value)) if isinstance(value, list) else "–" if value is None else str(value)


def _ratio(value: dict[str, float] | None) -> str:
    return f"{value['value']:.2f}× ({value['low']:.2f} to {value['high']:.2f})" if value else "–"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _bytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**20:,.0f} MiB"


app = App(help=__doc__)


@app.command
def readme(report: Path = COMMITTED) -> None:
    """Write the README's performance section from a report's JSON."""
    table = markdown(json.loads(report.read_text(encoding="utf-8")))
    README.write_text(in_readme(README.read_text(encoding="utf-8"), table), encoding="utf-8")


@app.command
def render(report: Path, output: Path) -> None:
    """Make the page of a report's JSON anew."""
    quality = json.loads(QUALITY.read_text(encoding="utf-8")) if QUALITY.exists() else []
    output.write_text(page(json.loads(report.read_text(encoding="utf-8")), quality), encoding="utf-8")


if __name__ == "__main__":
    app()
