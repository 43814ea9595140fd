"""What is measured. Each experiment starts its own server and returns figures, JSON-ready."""

from __future__ import annotations

import asyncio
import csv
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc

import sr3rt
from benchmarks.serving import load
from benchmarks.serving.load import Answer, Ask
from benchmarks.serving.running import Running, serving
from sr3rt.serving.configuration import Configuration

SAMPLERS = ("sr3", "posterior", "ddim", "dpm++2m")


def mixed(*, requests: int = 200) -> dict[str, Any]:
    """Concurrent requests of mixed sizes, steps and samplers, each compared with what `upscale` gives for its seed."""
    pick = random.Random(1)
    asks = [
        Ask(
            load.pixels(pick.choice((8, 12, 16, 24)), pick.choice((8, 12, 16, 24)), seed),
            {"steps": pick.randint(4, 50), "sampler": pick.choice(SAMPLERS), "seed": seed},
        )
        for seed in range(requests)
    ]
    with serving(Configuration(max_requests=requests)) as server:
        start = time.perf_counter()
        answers = asyncio.run(load.together(server.url, asks))
        seconds = time.perf_counter() - start
    upscaler = sr3rt.load()
    worst = differing = 0
    for ask, answer in zip(asks, answers, strict=True):
        if answer.pixels is None:
            continue
        expected = upscaler.upscale(ask.pixels, **ask.parameters)
        levels = np.abs(answer.pixels.astype(int) - expected)
        worst, differing = max(worst, int(levels.max())), differing + int(np.count_nonzero(levels))
    return {
        "requests": requests,
        "answered": sum(answer.status == 200 for answer in answers),
        "worst_levels": worst,
        "values_off": differing,
        "seconds": seconds,
    }


def overload(*, seconds: float = 120, times: float = 10, side: int = 32, leak: int = 0) -> dict[str, Any]:
    """Saturation by a closed loop; then arrivals at so many times that rate, open loop; then how soon it is itself again.

    Machines drift, so saturation is measured once more afterwards, and goodput is held against the mean of both.
    """
    count, pick = itertools.count(), random.Random(2)

    asks = [Ask(load.pixels(side, side, 0), {"steps": pick.randint(4, 12), "seed": seed}) for seed in range(100)]

    def make() -> Ask:
        return asks[next(count) % len(asks)]

    with serving(Configuration(max_requests=16), leak=leak) as server:
        alone = [answer.seconds for answer in asyncio.run(load.closed(server.url, make, clients=1, seconds=10))]
        saturated = [_rate(asyncio.run(load.closed(server.url, make, clients=8, seconds=min(60, seconds))))]
        memory: list[tuple[float, int]] = []
        stop = threading.Event()
        start = time.perf_counter()

        def watch() -> None:
            while not stop.wait(5):
                memory.append((time.perf_counter() - start, load.held(*server.pids)))

        async def drive() -> tuple[list[Answer], float]:
            arriving = asyncio.create_task(load.poisson(server.url, make, rate=times * saturated[0], seconds=seconds))
            await asyncio.sleep(seconds)
            end = time.perf_counter()
            async with load.Client(server.url) as client:
                while (answer := await client.ask(make())).status != 200 or answer.seconds > 2 * max(alone):
                    await asyncio.sleep(0.1)
                recovered = time.perf_counter() - end
            return await arriving, recovered

        watcher = threading.Thread(target=watch)
        watcher.start()
        used, begun = time.process_time(), time.perf_counter()
        answers, recovered = asyncio.run(drive())
        load_share = (time.process_time() - used) / (time.perf_counter() - begun) / (os.cpu_count() or 1)
        stop.set()
        watcher.join()
        saturated.append(_rate(asyncio.run(load.closed(server.url, make, clients=8, seconds=min(60, seconds)))))
    good = [answer for answer in answers if answer.status == 200]
    refused = [answer.seconds for answer in answers if answer.status == 503]
    growth = _growth(memory)
    return {
        "seconds": seconds,
        "alone_p50_s": percentile(alone, 50),
        "saturated_per_s": statistics.mean(saturated),
        "saturated_before_and_after_per_s": saturated,
        "offered_per_s": len(answers) / seconds,
        "goodput_share": _rate(good) / statistics.mean(saturated),
        "load_share": load_share,
        "refused": len(refused),
        "refusal_p50_ms": 1e3 * percentile(refused, 50),
        "refusal_p99_ms": 1e3 * percentile(refused, 99),
        "other_statuses": sum(answer.status not in (200, 503) for answer in answers),
        "recovered_s": recovered,
        "memory_growth_mib": growth / 2**20,
        "memory_flat": growth < 16 * 2**20,
    }


def percentile(values: list[float], percent: float) -> float:
    """NaN of none."""
    return float(np.percentile(values, percent)) if values else float("nan")


def _rate(answers: list[Answer]) -> float:
    good = [answer for answer in answers if answer.status == 200]
    return len(good) / max(answer.began + answer.seconds for answer in good)


def _growth(memory: list[tuple[float, int]]) -> float:
    """Bytes gained over the second half, by the slope through medians of its quarters (Theil's, which spikes do not move)."""
    half = [(at, size) for at, size in memory if at > memory[-1][0] / 2]
    slopes = [(b - a) / (t - s) for (s, a), (t, b) in itertools.combinations(half, 2) if t > s]
    return statistics.median(slopes) * (half[-1][0] - half[0][0])


def batching(
    *, seconds: float = 30, visits: int = 5, shares: tuple[float, ...] = (0.4, 0.6, 0.8, 0.95), side: int = 16
) -> list[dict[str, Any]]:
    """Step-level, whole-request and no batching under the same arrivals, of mixed steps: throughput and latency.

    Machines drift, so all three servers are there at once and take their turns, in another order at each visit.
    """
    modes = {
        "step by step": Configuration(slots=4, max_requests=512),
        "whole requests": Configuration(slots=4, joins="batch", max_requests=512),
        "one at a time": Configuration(slots=1, joins="batch", max_requests=512),
    }
    order, each = random.Random(4), seconds / visits

    def maker(visit: int) -> Callable[[], Ask]:
        pick, count = random.Random(visit), itertools.count()
        return lambda: Ask(load.pixels(side, side, 0), {"steps": pick.choice((4, 8, 16, 50)), "seed": next(count)})

    def in_turns(visit: int, drive: Callable[[str, Callable[[], Ask]], Coroutine[Any, Any, list[Answer]]]) -> dict[str, list[Answer]]:
        return {name: asyncio.run(drive(servers[name].url, maker(visit))) for name in order.sample([*modes], len(modes))}

    with ExitStack() as running:
        servers = {name: running.enter_context(serving(configuration)) for name, configuration in modes.items()}
        rates: dict[str, list[float]] = {name: [] for name in modes}
        in_turns(0, partial(load.closed, clients=2, seconds=3))
        for visit in range(visits):
            for name, answers in in_turns(visit, partial(load.closed, clients=8, seconds=each)).items():
                rates[name].append(_rate(answers))
        capacity = statistics.median(rates["step by step"])  # one for all, so that all get the same arrivals
        taken: dict[tuple[str, float], list[Answer]] = {(name, share): [] for name in modes for share in shares}
        for share, visit in itertools.product(shares, range(visits)):
            arrivals = partial(load.poisson, rate=share * capacity, seconds=each, seed=int(100 * share) + 1000 * visit)
            for name, answers in in_turns(visit, arrivals).items():
                taken[name, share] += answers
    rows = []
    for (name, share), answers in taken.items():
        times = [answer.seconds for answer in answers if answer.status == 200]
        row = {"mode": name, "side": side, "offered_per_s": share * capacity, "requests": len(answers)}
        row |= {"saturated_per_s": statistics.median(rates[name]), "saturated_by_visit_per_s": rates[name]}
        rows.append(row | {f"p{percent}_s": percentile(times, percent) for percent in (50, 90, 99)})
    return rows


def overhead(*, pairs: int = 20, side: int = 64) -> dict[str, Any]:
    """One client: the server's median over that of `upscale` in this process, in turns, after one of each."""
    ask = Ask(load.pixels(side, side, 0), {"seed": 1})
    upscaler = sr3rt.load()
    server_s, local_s = list[float](), list[float]()

    async def turns(url: str) -> None:
        async with load.Client(url) as client:
            for turn in range(pairs + 1):
                answer = await client.ask(ask)
                start = time.perf_counter()
                upscaler.upscale(ask.pixels, seed=1)
                local = time.perf_counter() - start
                if turn:
                    server_s.append(answer.seconds)
                    local_s.append(local)

    with serving(Configuration()) as server:
        asyncio.run(turns(server.url))
    ratio = percentile(server_s, 50) / percentile(local_s, 50)
    return {"pairs": pairs, "server_p50_s": percentile(server_s, 50), "in_process_p50_s": percentile(local_s, 50), "ratio": ratio}


def guard(*, pairs: int = 500, side: int = 16) -> dict[str, Any]:
    """What the guard adds to a small request, one step: by it and past it, in turns, after twenty of each."""
    ask = Ask(load.pixels(side, side, 0), {"seed": 1, "steps": 1})
    by, past = list[float](), list[float]()

    async def turns(server: Running) -> None:
        async with load.Client(server.url) as guarded, load.Client(server.own_url) as own:
            for turn in range(pairs + 20):
                for client, seconds in ((guarded, by), (own, past)) if turn % 2 else ((own, past), (guarded, by)):
                    answer = await client.ask(ask)
                    assert answer.status == 200, answer.text
                    if turn >= 20:
                        seconds.append(answer.seconds)

    with serving(Configuration()) as server:
        asyncio.run(turns(server))
    differences = [one - other for one, other in zip(by, past, strict=True)]
    return {
        "pairs": pairs,
        "side": side,
        "by_p50_ms": 1e3 * percentile(by, 50),
        "past_p50_ms": 1e3 * percentile(past, 50),
        "added_p50_ms": 1e3 * percentile(differences, 50),
    }


def cancels(*, number: int = 1000) -> dict[str, Any]:
    """Requests that are cancelled at random moments, beside others that are not and whose results must be their own."""
    pick, upscaler = random.Random(4), sr3rt.load()
    picture = load.pixels(12, 16, 0)
    expected = {seed: upscaler.upscale(picture, steps=30, seed=seed) for seed in range(8)}
    outcomes: dict[str, int] = {}
    lock = threading.Lock()

    def tensor() -> Any:
        one = tritonclient.grpc.InferInput("pixels", list(picture.shape), "UINT8")
        one.set_data_from_numpy(picture)
        return one

    with serving(Configuration(max_requests=64)) as server:
        url = f"127.0.0.1:{server.address.grpc}"
        done, worst = threading.Event(), list[int]()

        def neighbour(worker: int) -> None:
            with tritonclient.grpc.InferenceServerClient(url) as client:
                for seed in itertools.cycle(range(worker, 8, 2)):
                    if done.is_set():
                        return
                    found = client.infer("sr3", [tensor()], parameters={"steps": 30, "seed": seed}).as_numpy("pixels")
                    worst.append(int(np.abs(found.astype(int) - expected[seed]).max()))

        def canceller(count: int, seed: int) -> None:
            own = random.Random(seed)
            with tritonclient.grpc.InferenceServerClient(url) as client:
                for _ in range(count):
                    outcome = _cancelled(client, tensor(), steps=own.randint(10, 60), after=own.random() * 0.5)
                    with lock:
                        outcomes[outcome] = outcomes.get(outcome, 0) + 1

        def storm(count: int) -> None:
            done.clear()
            neighbours = [threading.Thread(target=neighbour, args=(i,)) for i in range(2)]
            cancellers = [threading.Thread(target=canceller, args=(count // 10, pick.randrange(2**32))) for _ in range(10)]
            for thread in neighbours + cancellers:
                thread.start()
            for thread in cancellers:
                thread.join()
            done.set()
            for thread in neighbours:
                thread.join()

        storm(200)  # by now the server has seen every batch size, and holds what those need
        before = _settled(server)
        outcomes.clear()
        worst.clear()
        storm(number)
        after = _settled(server)
    return {
        "asked_to_cancel": number,
        "outcomes": outcomes,
        "neighbours": len(worst),
        "worst_levels": max(worst),
        "queued_and_running_after": after["sr3rt_queued"] + after["sr3rt_running"],
        "cancelled_by_server": after["cancelled"] - before["cancelled"],
        "memory_growth_mib": (after["held"] - before["held"]) / 2**20,
    }


def _cancelled(client: Any, tensor: Any, *, steps: int, after: float) -> str:
    """Ask, cancel after so many seconds; how the call ended."""
    ended, outcome = threading.Event(), list[str]()

    def told(result: Any = None, error: Any = None) -> None:
        outcome.append("finished" if error is None else str(error.status()))
        ended.set()

    call = client.async_infer("sr3", [tensor], told, parameters={"steps": steps})
    time.sleep(after)
    call.cancel()
    return outcome[0] if ended.wait(60) else "no answer"


def sweep(*, clients: str = "1:4") -> list[dict[str, Any]]:
    """Triton's own perf_analyzer, which tritonclient brings."""
    libraries = next(path for path in Path(tritonclient.grpc.__file__).parents[2].glob("nvidia_pytriton.libs"))
    with tempfile.TemporaryDirectory() as name, serving(Configuration(max_requests=64)) as server:
        folder = Path(name)
        for pattern, link in (("libb64-*", "libb64.so.0d"), ("libcudart-*", "libcudart.so.12")):
            (folder / link).symlink_to(next(libraries.glob(pattern)))
        picture = load.pixels(16, 16, 0)
        data = {"data": [{"pixels": {"content": picture.ravel().tolist(), "shape": list(picture.shape)}}]}
        (folder / "data.json").write_text(json.dumps(data), encoding="utf-8")
        command = [
            str(Path(sys.executable).with_name("perf_analyzer")),
            *("-m", "sr3", "-i", "grpc", "-u", f"127.0.0.1:{server.address.grpc}", "--concurrency-range", clients),
            *("--measurement-mode", "count_windows", "--measurement-request-count", "50"),
            *("--input-data", str(folder / "data.json"), "--request-parameter", "steps:4:int", "-f", str(folder / "out.csv")),
        ]
        subprocess.run(command, check=True, env={**os.environ, "LD_LIBRARY_PATH": name})
        rows = list(csv.DictReader((folder / "out.csv").open(encoding="utf-8")))
    return [
        {
            "clients": int(row["Concurrency"]),
            "per_s": float(row["Inferences/Second"]),
            **{f"p{percent}_ms": float(row[f"p{percent} latency"]) / 1000 for percent in (50, 90, 99)},
        }
        for row in sorted(rows, key=lambda row: int(row["Concurrency"]))
    ]


def _settled(server: Running) -> dict[str, float]:
    """The server's gauges and memory once it is idle."""
    url = f"http://127.0.0.1:{server.address.metrics}/metrics"
    end = time.monotonic() + 60
    while True:
        time.sleep(1.5)
        with urllib.request.urlopen(url) as reply:
            lines = [line.decode() for line in reply]
        found = {name: _sum(lines, name) for name in ("sr3rt_queued", "sr3rt_running")}
        found["cancelled"] = _sum(lines, 'sr3rt_requests_total{model="sr3_stream",outcome="cancelled"')
        if not found["sr3rt_queued"] + found["sr3rt_running"] or time.monotonic() > end:
            return {**found, "held": float(load.held(*server.pids))}


def _sum(lines: list[str], name: str) -> float:
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))
