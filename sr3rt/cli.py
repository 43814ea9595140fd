"""The command line: `sr3rt upscale | info | doctor | bench | serve | export`."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter, Token
from rich.console import Console
from rich.markup import escape

from sr3rt import __version__
from sr3rt.bundle import Consistency
from sr3rt.errors import MissingExtra, OptionError, SR3Error

if TYPE_CHECKING:
    from PIL import Image

    from sr3rt.images import Picture
    from sr3rt.work import Work

EXPORT_PACKAGES = ("torch", "onnx", "safetensors")

app = App(name="sr3rt", help="Runs trained SR3 super-resolution models, without torch.", version=__version__)

errors = Console(stderr=True)


def _named(kind: object, tokens: Sequence[Token]) -> Path:
    """An empty name, as of a shell's variable that is not set, would be the folder that one is in."""
    if not tokens[0].value:
        raise ValueError("the name is empty")
    return Path(tokens[0].value)


@app.command
def upscale(
    *,
    input: Annotated[Path, Parameter(name=["--input", "-i"], converter=_named)],
    output: Annotated[Path, Parameter(name=["--output", "-o"], converter=_named)],
    model: Annotated[list[Path] | None, Parameter(name=["--model", "-m"], negative="")] = None,
    steps: Annotated[list[int] | None, Parameter(name=["--steps", "-n"], negative="")] = None,
    sampler: str | None = None,
    seed: int | None = None,
    consistency: Consistency | None = None,
    tile: Annotated[int | Literal["auto", "off"], Parameter(name=["--tile", "-t"])] = "auto",
    backend: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    threads: int = 0,
    rerun: bool = False,
    overwrite: bool = False,
    compare: bool = False,
    provenance: bool = True,
) -> int:
    """Upscale a picture, or every picture of a folder.

    A picture that cannot be read is reported and the others go on; the exit status is then 1. Outputs appear whole or not at all.

    Parameters
    ----------
    input
        A picture, or a folder of them.
    output
        The picture to write, whose suffix says the format; or a folder, where results become NAME.png.
    model
        A bundle; the small 4× model for photographs that ships when not given. Given again (-m A -m B), a cascade: B upscales what A made.
    steps
        Refinement steps; more are slower. The bundle's own number when not given. Given again, of each model of a cascade.
    sampler
        sr3, posterior, ddim, ddim(ETA) or dpm++2m; the bundle's own when not given.
    seed
        A seed makes the result repeatable; drawn at random for each picture when not given.
    consistency
        Make the result agree with the input: off, final or every; the bundle's own when not given.
    tile
        Side of the windows that a picture is refined in, pixels of the result; off: whole; auto: whole where memory suffices.
    backend
        auto, tensorrt (a GPU, and a bundle with engines), native (needs AVX2), onnxruntime, or torch (a GPU; needs PyTorch).
    precision
        auto, fp32, fp16 or bf16.
    device
        auto, cpu, cuda, or cuda:1 for the second GPU.
    threads
        0: one for each core that this process may use.
    rerun
        Do again in fp32 what overflows in fp16 or bf16, and say so; it is an error otherwise.
    overwrite
        Replace outputs that exist; they are skipped otherwise.
    compare
        Also write NAME-compare.png: input, bicubic and result side by side.
    provenance
        Note bundle, seed, steps, sampler and precision in the output's metadata; --no-provenance leaves them out.
    """
    from sr3rt.cascade import Cascade
    from sr3rt.images import read
    from sr3rt.options import seeds
    from sr3rt.saving import check_target
    from sr3rt.upscaler import load
    from sr3rt.work import make_folder, passed_over, planned

    work = planned(input, output, compare=compare)
    todo = [one for one in work if overwrite or not any(path.exists() for path in one.outputs)]
    if len(todo) < len(work):
        errors.print(f"{len(work) - len(todo)} of {len(work)} outputs exist and are skipped (--overwrite replaces them)")
    if others := passed_over(input):
        errors.print(f"{len(others)} in formats that are not read are passed over: {escape(', '.join(others))}", soft_wrap=True)
    asked: dict[str, Any] = {"backend": backend, "precision": precision, "device": device, "threads": threads, "rerun": rerun}
    upscaler = Cascade(*(load(one, **asked) for one in model or (None,)))
    counts = steps[0] if steps and len(steps) == 1 else steps
    options: dict[str, Any] = {"steps": counts, "sampler": sampler, "consistency": consistency, "tile": tile}
    upscaler.plans(**options)  # a wrong one is told whether there is work or not
    seeds(seed, 1)
    if not todo:
        return 0
    make_folder(todo[0].target.parent)
    failed = 0
    with _bar(len(todo)) as start:
        for one in todo:
            source, target = one.source, one.target
            try:
                picture = read(source, limits=upscaler.limits)
                check_target(picture, target, scale=upscaler.scale)  # before minutes of work
                (result,) = upscaler.run(picture, **options, seed=seed, on_step=start(source.name))
                _write(one, picture, result.image, result.provenance if provenance else {})
            except (SR3Error, OSError, MemoryError) as error:
                if isinstance(error, OptionError):
                    raise
                failed += 1
                _complain(str(error) if str(source) in str(error) else f"{source}: {error}")
                continue
            if errors.is_terminal:
                errors.print(f"{escape(str(target))}  [dim]seed {result.seed}[/dim]", soft_wrap=True)
    if failed and len(todo) > 1:
        _complain(f"{failed} of {len(todo)} pictures failed")
    return 1 if failed else 0


@app.command
def info(bundle: Path | None = None, /) -> None:
    """Show what a bundle is, how it was measured, and check every file's hash.

    Parameters
    ----------
    bundle
        The bundle; the one that ships when not given.
    """
    from sr3rt.report import describe
    from sr3rt.upscaler import SHIPPED

    Console().print(describe(bundle or SHIPPED))


@app.command
def doctor() -> int:
    """Say what is installed, which backends work here, and why the others do not."""
    from sr3rt.report import examine

    table, healthy = examine()
    Console().print(table)
    return 0 if healthy else 1


@app.command
def bench(bundle: Path | None = None, /, *, size: int = 256, batch: int = 1, seconds: float = 10, threads: int = 0) -> int:
    """Time a bundle's steps on every backend that works here; `pytest benchmarks/` in the repository compares with PyTorch.

    Parameters
    ----------
    bundle
        The bundle; the one that ships when not given.
    size
        Side of the result, pixels.
    batch
        Pictures at a time.
    seconds
        How long to measure.
    threads
        0: one for each core that this process may use.
    """
    from sr3rt.bench import measure
    from sr3rt.bundle import Bundle
    from sr3rt.report import timings
    from sr3rt.upscaler import SHIPPED

    opened = Bundle.open(bundle or SHIPPED)
    rows, missing = measure(opened, size=size, batch=batch, seconds=seconds, threads=threads)
    for name, reason in missing.items():
        errors.print(f"{name} is left out: {escape(reason)}")
    if not rows:
        return 1
    Console().print(timings(opened, rows, size=size, batch=batch))
    if not all(row.quiet for row in rows):
        _complain("warning: other processes used more than 8 % of this machine meanwhile; the figures are not to be trusted")
    return 0


@app.command
def serve(
    bundle: Path | None = None,
    /,
    *,
    host: str = "127.0.0.1",
    http_port: int = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    slots: int = 4,
    slot_pixels: int = 2**24,
    max_requests: int = 64,
    max_pixels: int = 2**26,
    max_file_bytes: int = 2**24,
    drain_s: int = 30,
    backend: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    threads: int = 0,
) -> int:
    """Serve a bundle by Triton Inference Server, until interrupted. Restarts it when it no longer answers.

    Needs a tritonserver on PATH, or the one of the `serve` extra. docs/serving.md says how to run it in production.

    Parameters
    ----------
    bundle
        The bundle; the one that ships when not given.
    host
        Address to listen on. Anyone who reaches it can use the server: it asks for no password.
    http_port
        HTTP and SSE.
    grpc_port
        gRPC.
    metrics_port
        Prometheus metrics.
    slots
        Most pictures in one network call.
    slot_pixels
        Most pixels in running pictures together: bounds the memory.
    max_requests
        Requests taken on at a time; the next is refused at once.
    max_pixels
        Pixels of results taken on at a time.
    max_file_bytes
        Of a picture file.
    drain_s
        Seconds to finish in, when the server is stopped.
    backend
        auto, tensorrt (a GPU, and a bundle with engines), native (needs AVX2), onnxruntime, or torch (a GPU; needs PyTorch).
    precision
        auto, fp32, fp16 or bf16.
    device
        auto, cpu, cuda, or cuda:1 for the second GPU.
    threads
        0: one for each core that this process may use.
    """
    from sr3rt.bundle import Bundle
    from sr3rt.serving.configuration import Configuration
    from sr3rt.serving.run import run
    from sr3rt.serving.server import Address

    if bundle is not None:
        Bundle.open(bundle)
    configuration = Configuration(
        bundle=str(bundle or ""),
        backend=backend,
        precision=precision,
        device=device,
        threads=threads,
        slots=slots,
        slot_pixels=slot_pixels,
        max_requests=max_requests,
        max_pixels=max_pixels,
        max_file_bytes=max_file_bytes,
        drain_s=drain_s,
    )
    return run(configuration, Address(host=host, http=http_port, grpc=grpc_port, metrics=metrics_port), say=_say)


@app.command(help_flags=[], version_flags=[])
def export(*arguments: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> None:
    """Turn a trained checkpoint into a verified bundle; needs torch, and with it `sr3rt export --help` says how."""
    from sr3rt.export.to_onnx import command  # only now: nothing else here needs torch

    run_command(command("sr3rt export"), list(arguments))


def run_command(command: App, arguments: list[str] | None = None) -> None:
    """Run a command line and exit: 0, 1 for an error that is printed in one line, 2 for wrong usage, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal has no sign for must not end the work
            stream.reconfigure(errors="replace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _complain(f"warning: {message}")
            status = command(arguments, exit_on_error=False, print_error=True, result_action="return_value")
    except CycloptsError:  # which it has printed
        sys.exit(2)
    except (SR3Error, OSError) as error:
        _complain(str(error))
        sys.exit(1)
    except ModuleNotFoundError as error:
        if error.name not in EXPORT_PACKAGES:
            raise
        _complain(str(MissingExtra("export", error.name, "cpu,export")))
        sys.exit(1)
    except MemoryError as error:
        _complain(f"there is not enough memory{f': {error}' if str(error) else ''}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    if isinstance(status, Path):  # what was written
        print(status)  # as it is, for scripts
    sys.exit(status if isinstance(status, int) else 0)


def main() -> None:
    """Entry point of the `sr3rt` command."""
    run_command(app)


def _say(text: str) -> None:
    errors.print(text, markup=False, highlight=False, soft_wrap=True)


def _complain(text: str) -> None:
    errors.print(f"[red]sr3rt:[/red] {escape(text)}", soft_wrap=True, highlight=False)


def _write(work: Work, picture: Picture, image: Image.Image, provenance: dict[str, str]) -> None:
    from sr3rt.saving import save

    if work.sheet is not None:
        from sr3rt.report import side_by_side

        save(side_by_side(picture, image), work.sheet, provenance={})
    save(image, work.target, provenance=provenance)


@contextmanager
def _bar(files: int) -> Iterator[Callable[[str], Callable[[int, int, object], None]]]:
    """Progress with steps and time left, on a terminal; nothing elsewhere. Gives a function that makes a picture's `on_step`."""
    if not errors.is_terminal:  # where some versions of rich write an empty line
        yield lambda name: lambda step, steps, preview: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("", total=None)
        count = iter(range(1, files + 1))

        def start(name: str) -> Callable[[int, int, object], None]:
            progress.reset(task, description=escape(f"{name} ({next(count)}/{files})" if files > 1 else name))
            return lambda step, steps, preview: progress.update(task, completed=step, total=steps)

        yield start
