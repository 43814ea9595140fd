"""What a GPU has to show, as one command: `python -m benchmarks.gpu -o FILE`. (Speed against PyTorch: `pytest benchmarks/ --device cuda`.)

    noise     the step's kernels make the processor's noise, in every bit
    copy      the step's kernel takes little longer than the GPU does to copy as many bytes as it reads and writes
    pictures  one seed gives the processor's picture, alone and in a batch
    capture   captured steps have the bits of others; a run takes hardly longer than its kernels do together

The last two are of each backend and precision, in a process of its own: what one of them does to it, a crash even, leaves the rest. FILE is
written after each, so what was measured is kept whatever comes later. Ends with status 1 unless all that could be tried holds.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, cast

import numpy as np
from cyclopts import App, Parameter

import sr3rt
from benchmarks.quality import psnr
from benchmarks.workloads import WORKLOADS, Task, Workload
from sr3rt import backends, images
from sr3rt.backends import Floats, cuda
from sr3rt.backends.cuda import Event, Gpu, Graph, Memory, Stream
from sr3rt.backends.device import SLOT, THREADS, TOGETHER, DeviceEngine, DeviceNetwork
from sr3rt.bundle import Bundle
from sr3rt.durable import write_atomic
from sr3rt.engine import Job
from sr3rt.environment import describe
from sr3rt.errors import SR3Error
from sr3rt.noise import START, normals
from sr3rt.samplers import Sampler, table
from sr3rt.schedule import Schedule, respace
from sr3rt.timing import ratio

Report = dict[str, Any]

WAYS = (("torch", "fp16"), ("torch", "fp32"), ("torch", "bf16"), ("onnxruntime", "fp32"), ("tensorrt", "fp16"), ("tensorrt", "fp32"))
COMPILED = "torch-compiled"
LEAST = {"fp32": 60.0, "fp16": 40.0, "bf16": 30.0}
"""PSNR, dB, of a picture of the shipped model against the processor's in float32."""
LOOP, COPY = 1.03, 1.3
"""At most: a run's time over its kernels', and the step's kernel over a copy."""

app = App(name="python -m benchmarks.gpu", help=__doc__)


@app.default
def measure(
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("gpu.json"),
    workload: Annotated[list[str] | None, Parameter(negative=())] = None,
    compiled: bool = False,
    seconds: float = 300,
) -> bool:
    """Measure everything.

    Parameters
    ----------
    output
        The report, JSON.
    workload
        Networks of benchmarks/workloads.py; the one that ships when not given.
    compiled
        Also PyTorch's compiled network, which takes minutes.
    seconds
        For each backend and precision, at most.
    """
    if reason := cuda.why_not():
        sys.exit(reason)
    found: Report = {"environment": describe(threads=0)}

    def keep(name: str, result: Report) -> None:
        found[name] = result
        print(f"{name}: {json.dumps(result)}", flush=True)
        write_atomic(output, json.dumps(found, indent=1).encode())

    keep("noise", _tried(noise))
    keep("copy", _tried(copy))
    for one in workload or ["shipped"]:
        for backend, precision in (*WAYS, *([(COMPILED, "fp16")] if compiled else [])):
            keep(f"{one}, {backend} {precision}", _apart(one, backend, precision, seconds))
    return all(result.get("holds", True) for result in found.values())


@app.command
def way(workload: str, backend: str, precision: str, /, *, steps: int = 100) -> None:
    """Of one backend at a precision: print, as JSON, what it shows.

    Parameters
    ----------
    workload
        A network.
    backend
        As in sr3rt.load, or torch-compiled.
    precision
        As in sr3rt.load.
    steps
        Of the runs that are timed.
    """
    chosen, found = WORKLOADS[workload], Report()
    with tempfile.TemporaryDirectory() as folder:
        try:
            bundle = _with_engines(chosen, precision, Path(folder)) if backend == "tensorrt" else chosen.bundle()
            network = _network(bundle, backend, precision)
        except SR3Error as error:
            print(json.dumps({"not here": str(error)}))
            return
        if chosen.name == "shipped" and backend != COMPILED:
            found["pictures"] = _tried(partial(compare, bundle, backend, precision))
        found["capture"] = _tried(partial(capture, network, Task(chosen, 1, steps, 0, "cuda")))
    print(json.dumps({**found, "holds": all(part["holds"] for part in found.values())}), flush=True)


def _apart(workload: str, backend: str, precision: str, seconds: float) -> Report:
    """What `way` prints, in a process of its own; and how that ended, if badly."""
    command = [sys.executable, "-m", "benchmarks.gpu", "way", workload, backend, precision]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as words:
        try:
            done = subprocess.run(command, check=False, stdout=said, stderr=words, timeout=seconds, cwd=Path(__file__).parent.parent)
            ended = f"status {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            ended = f"not done after {seconds:.0f} s"
        said.seek(0)
        words.seek(0)
        lines, last = said.read().splitlines(), " | ".join(words.read().strip().splitlines()[-5:])
    result: Report = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return {**result, "failed": f"{ended}: {last}", "holds": False} if ended else result


def _tried(section: Callable[[], Report]) -> Report:
    """Whatever goes wrong in it is what it found."""
    try:
        return section()
    except Exception as error:  # PyTorch's and others', too
        return {"failed": f"{type(error).__name__}: {error}", "holds": False}


def _network(bundle: Bundle, backend: str, precision: str) -> DeviceNetwork:
    network = backends.load(bundle, backends.Request(backend.removesuffix("-compiled"), precision, "cuda"))
    return cast("DeviceNetwork", cast("Any", network).compiled() if backend == COMPILED else network)


def _with_engines(workload: Workload, precision: str, folder: Path) -> Bundle:
    """The bundle with engines for one picture and four, built here."""
    from sr3rt.export.to_trt import to_trt

    target = folder / "bundle"
    shutil.copytree(workload.bundle().path, target)
    return Bundle.open(to_trt(target, batch="1,4", size=str(workload.side), precision=precision))  # type: ignore[arg-type]


def noise(*, side: int = 256) -> Report:
    """values: how many were made, with several seeds, sizes and numbers of channels; differing: those with other bits than NumPy's."""
    gpu, stream, values, differing = Gpu(), Stream(), 0, 0
    for shape in ((3, side, side), (1, 17, 31), (6, side // 2, side // 4)):
        found, slot = np.empty(shape, np.float32), np.zeros(1, SLOT)
        memory, states = Memory(gpu, found.nbytes, "noise"), Memory(gpu, slot.nbytes, "a slot")
        for seed in (0, 2**63 + 5):
            slot[["seed", "top", "left"]] = (seed, 3, 2**31 + 5)
            stream.to_device(states.address, slot)
            blocks = -(-shape[1] * shape[2] // (THREADS * TOGETHER)), 1
            gpu.launch("sr3_start", blocks, THREADS, (memory.address, states.address, 0, *shape), stream)
            stream.to_host(found, memory.address)
            stream.wait()
            expected = normals(shape, seed=seed, step=START, row=3, column=2**31 + 5)
            values += expected.size
            differing += int(np.count_nonzero(found.view(np.uint32) != expected.view(np.uint32)))
    return {"values": values, "differing": differing, "holds": not differing}


def copy(*, shape: tuple[int, int, int, int] = (16, 3, 256, 256), rounds: int = 30, launches: int = 8) -> Report:
    """Of samplers with noise and with a history: microseconds of a step's kernel and of a copy of the same bytes, in turns.

    Each of several sets of arrays has its turn, so that none is in a cache. kernel_over_copy: its ratio of medians, and a 95 % interval.
    """
    gpu, stream, size = Gpu(), Stream(), 4 * int(np.prod(shape))
    sets = [Memory(gpu, 5 * size, "states") for _ in range(4)]
    for memory in sets:
        stream.clear(memory.address, memory.size)
    blocks, found = -(-shape[2] * shape[3] // (THREADS * TOGETHER)), Report()
    for name, arrays in (("posterior", 4), ("dpm++2m", 5)):  # y, net and x0 in, where it is read; y and x0 out
        rows = np.ascontiguousarray(table(Sampler.parse(name), _schedule(), prediction="eps", level="sqrt_gamma"), np.float32)
        slots = np.zeros(shape[0], SLOT)
        lent = Memory(gpu, rows.nbytes, "a table"), Memory(gpu, slots.nbytes, "slots")
        slots["seed"], slots["table"], slots["rows"], slots["row"] = np.arange(shape[0]), lent[0].address, len(rows), len(rows) // 2
        for memory, values in zip(lent, (rows, slots), strict=True):
            stream.to_device(memory.address, values)

        def step(memory: Memory, states: int = lent[1].address) -> None:
            y, net, x0 = (memory.address + i * size for i in range(3))
            gpu.launch("sr3_step", (blocks, shape[0]), THREADS, (y, net, x0, states, *shape[1:]), stream)

        def same(memory: Memory, half: int = arrays * size // 2) -> None:
            stream.move(memory.address + half, memory.address, half)

        timed: dict[str, list[float]] = {"kernel": [], "copy": []}
        graphs = {"kernel": _often(stream, step, sets, launches), "copy": _often(stream, same, sets, launches)}
        for _ in range(rounds + 1):
            for kind, graph in graphs.items():
                timed[kind].append(_seconds(stream, graph) / (launches * len(sets)))
        times = {kind: seconds[1:] for kind, seconds in timed.items()}
        over = ratio([times["kernel"]], [times["copy"]])
        found[name] = {f"{kind}_us": 1e6 * median(seconds) for kind, seconds in times.items()}
        found[name] |= {"bytes": arrays * size, "kernel_over_copy": [over.value, over.low, over.high], "holds": over.value <= COPY}
    return {**found, "holds": all(one["holds"] for one in found.values())}


def _schedule() -> Schedule:
    return respace(WORKLOADS["shipped"].bundle().manifest.trained.schedule(), 100)


def _often(stream: Stream, work: Callable[[Memory], None], sets: list[Memory], launches: int) -> Graph:
    def record() -> None:
        for _ in range(launches):
            for memory in sets:
                work(memory)

    record()
    stream.wait()
    return Graph(stream, record)


def _seconds(stream: Stream, graph: Graph) -> float:
    begin, end = Event(), Event()
    begin.record(stream)
    graph.launch(stream)
    end.record(stream)
    stream.wait()
    return end.since(begin)


def compare(bundle: Bundle, backend: str, precision: str, *, side: int = 64) -> Report:
    """PSNR against the processor's pictures, dB, the least of four: alone, and in a batch; and whether the two are equal."""
    photo = images.read(Path(__file__).parents[1] / "examples" / "photo.png").colour
    crops = [np.ascontiguousarray(photo[:side, left : left + side]) for left in (0, 40, 80, 120)]
    wanted = sr3rt.load(bundle.path, backend="native", precision="fp32").upscale(crops, seed=[0, 1, 2, 3])
    up = sr3rt.load(bundle.path, backend=backend, precision=precision, device="cuda")
    alone = [up.upscale(crop, seed=seed) for seed, crop in enumerate(crops)]
    together = up.upscale(crops, seed=[0, 1, 2, 3])
    decibels = [min(psnr(a, b) for a, b in zip(some, wanted, strict=True)) for some in (alone, together)]
    equal = all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
    return {"alone_db": decibels[0], "batch_db": decibels[1], "equal": equal, "holds": min(decibels) >= LEAST[precision]}


def capture(network: DeviceNetwork, task: Task, *, runs: int = 5) -> Report:
    """Of one picture: captured: whether that can be done, with warnings; equal: whether captured steps have the bits of others. Seconds of
    a whole run, from x to the picture, of either kind, medians; what the GPU's clock says of such a captured run; what its kernels took
    together, by the profiler; the run over both; and the twelve kernels that took most.
    """
    x, rows = task.condition(), task.rows()

    def engine(captured: bool) -> DeviceEngine:
        _, channels, height, width = x.shape
        return DeviceEngine(network, capacity=1, channels=channels, height=height, width=width, capture=captured)

    def picture(engine: DeviceEngine) -> Floats:
        engine.join(Job(x[0], rows, seed=1))
        while not (ended := engine.step()):
            pass
        return ended[0].picture()

    captured, plain = engine(True), engine(False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        equal = np.array_equal(picture(captured), picture(plain))
    seconds: dict[str, list[float]] = {"captured": [], "plain": []}
    before = captured.seconds
    for _ in range(runs):
        for name, one in (("captured", captured), ("plain", plain)):
            begin = time.perf_counter()
            picture(one)
            seconds[name].append(time.perf_counter() - begin)
    on_gpu = (captured.seconds - before) / runs
    kernels = _kernels(partial(picture, captured))
    found: Report = {f"{name}_s": median(times) for name, times in seconds.items()}
    together, most = sum(kernels.values()), sorted(kernels.items(), key=lambda one: -one[1])[:12]
    over = found["captured_s"] / together if together else None
    found |= {"gpu_s": on_gpu, "over_gpu": found["captured_s"] / on_gpu, "kernels_s": together, "over_kernels": over}
    holds = captured.capture and equal and over is not None and over <= LOOP
    facts = {"steps": len(rows), "captured": captured.capture, "warnings": [str(one.message) for one in said], "equal": equal}
    return {**facts, **found, "most": dict(most), "holds": holds}


def _kernels(run: Callable[[], object]) -> dict[str, float]:
    """Seconds of each kernel, by name, as PyTorch's profiler has them, which sees those of others too. No copies."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
    found: dict[str, float] = {}
    for event in profiled.events() or ():
        if event.device_type.name == "CUDA" and not event.name.startswith(("Memcpy", "Memset")):
            found[event.name] = found.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e6
    return found


if __name__ == "__main__":
    sys.exit(0 if app() is not False else 1)
