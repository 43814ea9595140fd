"""Checkpoint -> bundle: `python export/to_onnx.py CKPT [-o BUNDLE]`, or `sr3rt export`.

The network becomes its weights, a program (export/program.py) and an ONNX graph of that (export/graph.py: opset 21; inputs x, y, level;
output out; float32; batch, height and width free). Both are compared with the checkpoint's own network on the same noise, and all is
written with its manifest as one directory that is there whole or not at all.
"""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

try:
    import torch  # noqa: F401
except ModuleNotFoundError:
    if __name__ != "__main__":  # `sr3rt export` says it itself
        raise
    from sr3rt.errors import MissingExtra

    raise SystemExit(str(MissingExtra("export", "torch", "cpu,export"))) from None
from cyclopts import App, Parameter
from torch import nn

from sr3rt import __version__, _native, backends, safetensors
from sr3rt.backends import Network, native, onnxruntime
from sr3rt.backends.torch import TorchNetwork
from sr3rt.bundle import (
    ONCE,
    PROGRAM,
    WEIGHTS,
    Bundle,
    Consistency,
    Defaults,
    Manifest,
    check_target,
    write_manifest,
    writing,
)
from sr3rt.errors import MissingExtra, NonFiniteError, OptionError
from sr3rt.export import checkpoint as checkpoints
from sr3rt.export import footprint, parity, program
from sr3rt.export.progress import Progress, progress_line
from sr3rt.samplers import Sampler
from sr3rt.schedule import ScheduleSpec

PARTS = parity.Limits(net=1e-6, picture=1e-5)
"""What a graph's two parts may differ by from the whole."""

BF16 = parity.Limits(net=2e-2, picture=4 / 255)
"""What bfloat16 may differ by for the runtime to take it without being asked: two levels of 255 in a picture at most."""


def export(
    ckpt: Path,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    config: Path | None = None,
    norm_groups: int | None = None,
    image_size: int | None = None,
    scale: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    consistency: Consistency = "off",
    name: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Turn a trained checkpoint into a verified bundle.

    Parameters
    ----------
    ckpt
        .pth, .pt, .ckpt or .safetensors with the network's weights.
    output
        The bundle, a directory to make; CKPT with the suffix .sr3 when not given.
    config
        The JSON that the network was trained with (the public implementation's; // comments are fine).
    norm_groups
        Groups of the network's GroupNorm layers, which no checkpoint holds; from the config when not given.
    image_size
        Side of the pictures it was trained on, in pixels; from the config when not given.
    scale
        Magnification; from the config when not given.
    steps
        Steps that the bundle uses by default; the config's, else 100.
    sampler
        Sampler that the bundle uses by default: sr3, posterior, ddim, ddim(ETA) or dpm++2m; the one it was trained for when not given.
    consistency
        Correct colours by default so that the result agrees with the input: off (the reference's behaviour), final or every.
    name
        The bundle's name; the file's when not given.
    overwrite
        Replace the output when it is a bundle.
    """
    target = output or ckpt.parent / f"{ckpt.stem}.sr3"
    check_target(target.absolute(), overwrite=overwrite)
    check_packages()
    with progress_line() as progress:
        progress(f"reading {ckpt.name}")
        read = checkpoints.read(ckpt, config=config, norm_groups=norm_groups, image_size=image_size, scale=scale, on_progress=progress)
        manifest = manifest_of(read, name=name or ckpt.stem, steps=steps, sampler=sampler, consistency=consistency)
        write_bundle(target, read.net, manifest, overwrite=overwrite, progress=progress)
    return target


def write_bundle(target: Path, net: checkpoints.Network, manifest: Manifest, *, overwrite: bool, progress: Progress) -> None:
    """The bundle of `net`, whose manifest lacks only what is measured here. Raises ParityError, and then leaves what was there."""
    with writing(target, overwrite=overwrite) as folder:
        progress("writing the network")
        write_network(net, folder)
        write_manifest(folder, manifest)
        figures = _parity(TorchNetwork(net), Bundle.open(folder), manifest, progress)
        progress("measuring memory")
        manifest = replace(manifest, parity=figures, attention_stride=footprint.attention_stride(net))
        manifest = replace(manifest, bytes_per_pixel=footprint.bytes_per_pixel(folder, manifest))
        write_manifest(folder, manifest)


def _parity(reference: TorchNetwork, bundle: Bundle, manifest: Manifest, progress: Progress) -> dict[str, Any]:
    """Figures of the graph, of its parts, where it has them, against it ("parts …"), and, where this processor can run it, of the
    program ("native …") and the program in bfloat16 ("bf16 …").

    Raises ParityError; not for bfloat16, which the runtime takes by itself only where its figures are within their limits.
    """
    whole = onnxruntime.load(bundle, backends.Request(), hoisted=False)
    figures = parity.measure(reference, whole, manifest, progress=progress)
    if ONCE in bundle.manifest.files:
        parts = onnxruntime.load(bundle, backends.Request())
        found = parity.measure(whole, parts, manifest, limits=PARTS, against="the graph in one", progress=progress)
        figures |= {f"parts {name}": figure for name, figure in found.items() if name != "against"}
    if backends.why_not("native") is None:
        exact = backends.load(bundle, backends.Request("native", "fp32"))
        found = parity.measure(reference, exact, manifest, progress=progress)
        figures |= {f"native {name}": figure for name, figure in found.items() if name != "against"}
        figures |= _bf16(exact, bundle, manifest, progress)
    return figures


def _bf16(exact: Network, bundle: Bundle, manifest: Manifest, progress: Progress) -> dict[str, Any]:
    """Figures of bfloat16 against `exact`; none where it overflows, nor of a large network that this processor would take long for."""
    if not _native.bfloat16() and manifest.parameters >= parity.LARGE:
        return {}
    rounded = native.in_bf16(bundle, backends.Request("native"))
    try:
        found = parity.measure(exact, rounded, manifest, limits=BF16, against="native float32", required=False, progress=progress)
    except NonFiniteError:
        return {}
    finite = all(math.isfinite(found[name]["worst"]) for name in ("net", "picture"))
    return {f"bf16 {name}": figure for name, figure in found.items() if name != "against"} if finite else {}


def check_packages() -> None:
    """Raises MissingExtra for what would only be missed minutes later."""
    for package in ("onnx", "onnxruntime"):
        if find_spec(package) is None:
            raise MissingExtra("export", package, "cpu,export")


def write_network(net: nn.Module, folder: Path) -> None:
    """weights.safetensors, network.json and the ONNX graphs of `net(x, y, level)`, one of export/nets."""
    import onnx

    from sr3rt.export.graph import graphs

    tensors = {name: value.detach().numpy() for name, value in (*net.named_parameters(), *net.named_buffers())}
    safetensors.write(folder / WEIGHTS, tensors)
    described = program.describe(net)
    (folder / PROGRAM).write_text(program.dumps(described), encoding="utf-8")
    channels: int = net.config.channels  # type: ignore[union-attr, assignment]
    for name, model in graphs(described, folder / WEIGHTS, channels=channels).items():
        onnx.save(model, folder / name)


def manifest_of(
    read: checkpoints.Checkpoint,
    *,
    name: str,
    steps: int | None = None,
    sampler: str | None = None,
    consistency: Consistency = "off",
) -> Manifest:
    """What a checkpoint tells of its bundle; the options as in `export`. Raises OptionError for steps or a sampler that cannot be."""
    inference = read.inference
    spec = None if inference in (None, read.trained) else inference
    chosen = Sampler.parse(sampler or ("sr3" if read.variance == "paper" else "posterior"))
    if steps is not None and not 1 <= steps <= len(read.gammas):
        raise OptionError(f"steps must be between 1 and the {len(read.gammas)} that the network was trained with, found {steps}")
    count = steps or (inference.steps if inference else min(100, len(read.gammas)))
    return Manifest(
        name=name.encode("utf-8", "replace").decode(),  # a file's name may be any bytes
        architecture=read.architecture,
        parameters=sum(p.numel() for p in read.net.parameters()),
        channels=read.channels,
        scale=read.scale,
        stride=int(read.net.config.stride),
        prediction=read.prediction,
        level=read.level,
        trained=read.trained or ScheduleSpec("gammas", gammas=tuple(read.gammas.tolist())),
        defaults=Defaults(count, str(chosen), consistency, None if steps else spec),
        source=_source(read),
    )


def _source(read: checkpoints.Checkpoint) -> dict[str, Any]:
    """What the bundle was made from and with, as far as it is known. to_trt compares it with what it is told."""
    facts = {
        "checkpoint_sha256": read.sha256,
        "config_sha256": read.config_sha256,
        "norm_groups": getattr(read.net.config, "norm_groups", None),
        "image_size": read.image_size,
    }
    known = {name: value for name, value in facts.items() if value is not None}
    return {**known, "assumptions": list(read.assumptions), "exporter": f"sr3rt {__version__}"}


def command(name: str) -> App:
    """The command line of `export`, under that name."""
    app = App(name=name, help=__doc__, version=__version__)
    app.default(export)
    return app


def main() -> None:
    """Command line of this file."""
    from sr3rt.cli import run_command

    run_command(command("to_onnx"))


if __name__ == "__main__":
    main()
