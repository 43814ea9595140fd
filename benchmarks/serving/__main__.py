"""Measure the server and write `benchmarks/reports/serving.json`: `.venv-serve/bin/python -m benchmarks.serving EXPERIMENT`.

mixed       200 concurrent requests of mixed sizes, steps and samplers against `upscale`
overload    arrivals at ten times of what it can do, for two minutes; and whether a planted leak is seen
batching    step-level batching against whole requests and one at a time, the same arrivals
overhead    one client against `upscale` in the same process
guard       what the guard adds to a small request
cancels     a thousand cancelled requests beside others
sweep       Triton's perf_analyzer, with more and more clients
all         all of these, about half an hour on two cores; nothing else should run
table       write docs/serving.md's table from the JSON
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from cyclopts import App

from benchmarks.serving import experiments
from benchmarks.serving.table import DOCUMENT, REPORT, in_document, markdown
from sr3rt.environment import describe


def overload() -> dict[str, Any]:
    """With its negative control: half of the time, with a leak of half a megabyte a request."""
    return {**experiments.overload(), "leaking": experiments.overload(seconds=60, leak=2**19)}


EXPERIMENTS: dict[str, Callable[[], Any]] = {
    "mixed": experiments.mixed,
    "overload": overload,
    "batching": experiments.batching,
    "overhead": experiments.overhead,
    "guard": experiments.guard,
    "cancels": experiments.cancels,
    "sweep": experiments.sweep,
}

app = App(help=__doc__)


@app.default
def measure(*names: str) -> None:
    """Run experiments, print what they found and put it into the report."""
    unknown = ", ".join(name for name in names if name not in (*EXPERIMENTS, "all"))
    if unknown or not names:
        raise SystemExit(f"found {unknown or 'no experiment'}, expected some of {', '.join(EXPERIMENTS)}, or all")
    for name in EXPERIMENTS if "all" in names else names:
        found = EXPERIMENTS[name]()
        print(json.dumps({name: found}, indent=1))
        report = json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.exists() else {}
        report[name] = found
        report.setdefault("environment", {})[name] = describe(threads=0)
        REPORT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


@app.command
def table() -> None:
    """Write the table into the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(in_document(text, markdown(json.loads(REPORT.read_text(encoding="utf-8")))), encoding="utf-8")


if __name__ == "__main__":
    app()
