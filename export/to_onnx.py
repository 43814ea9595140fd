"""Checkpoint -> bundle: `python export/to_onnx.py CKPT [-o BUNDLE]`, or `sr3rt export`.

The network becomes its weights, a program (export/program.py) and an ONNX graph (opset 21; inputs x, y, level; output out; float32; batch,
height and width free). The graph is compared with the checkpoint's own network on the same noise, and all is written with its manifest as
one directory that is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

try:
    import torch
except ModuleNotFoundError:
    if __name__ != "__main__":  # `sr3rt export` says it itself
        raise
    from sr3rt.errors import MissingExtra

    raise SystemExit(str(MissingExtra("export", "torch", "cpu,export"))) from None
import numpy as np
from cyclopts import App, Parameter
from torch import Tensor, nn

from sr3rt import __version__, backends, safetensors
from sr3rt.backends.torch import TorchNetwork
from sr3rt.bundle import (
    NETWORK,
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
from sr3rt.errors import MissingExtra, OptionError
from sr3rt.export import checkpoint as checkpoints
from sr3rt.export import footprint, parity, program
from sr3rt.export.progress import progress_line
from sr3rt.samplers import Sampler
from sr3rt.schedule import ScheduleSpec

if TYPE_CHECKING:
    import onnx_ir

OPSET = 21
INSIDE = 1024  # bytes below which the graph keeps its own copy of a weight


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
    _check_packages()
    with progress_line() as progress:
        progress(f"reading {ckpt.name}")
        read = checkpoints.read(ckpt, config=config, norm_groups=norm_groups, image_size=image_size, scale=scale, on_progress=progress)
        manifest = _manifest(read, name or ckpt.stem, steps, sampler, consistency)
        with writing(target, overwrite=overwrite) as folder:
            progress("tracing the network")
            write_network(read.net, folder)
            write_manifest(folder, manifest)
            figures = _parity(TorchNetwork(read.net), Bundle.open(folder), manifest, progress)
            progress("measuring memory")
            manifest = replace(manifest, parity=figures, attention_stride=footprint.attention_stride(read.net))
            manifest = replace(manifest, bytes_per_pixel=footprint.bytes_per_pixel(folder, manifest))
            write_manifest(folder, manifest)
    return target


def _parity(reference: TorchNetwork, bundle: Bundle, manifest: Manifest, progress: Callable[[str], None]) -> dict[str, Any]:
    """Figures of the graph, and of the program under "native …" where this processor can run it. Raises ParityError."""
    figures = parity.measure(reference, backends.load(bundle, backends.Request("onnxruntime")), manifest, progress=progress)
    if backends.why_not("native") is None:
        network = backends.load(bundle, backends.Request("native"))
        program = parity.measure(reference, network, manifest, progress=progress)
        figures |= {f"native {name}": figure for name, figure in program.items() if name != "against"}
    return figures


def _check_packages() -> None:
    """Raises MissingExtra for what would only be missed minutes later."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise MissingExtra("export", package, "cpu,export")


def write_network(net: nn.Module, folder: Path) -> None:
    """weights.safetensors, network.json and network.onnx of `net(x, y, level)`, one of export/nets."""
    import onnx_ir

    tensors = {name: value.detach() for name, value in (*net.named_parameters(), *net.named_buffers())}
    safetensors.write(folder / WEIGHTS, {name: value.numpy() for name, value in tensors.items()})
    (folder / PROGRAM).write_text(program.dumps(program.describe(net)), encoding="utf-8")
    model = _traced(net)
    _share_weights(model, tensors, folder / WEIGHTS)
    onnx_ir.save(model, folder / NETWORK)


def _traced(net: nn.Module) -> onnx_ir.Model:
    """The graph, with free batch, height and width."""
    stride, channels = net.config.stride, net.config.channels  # type: ignore[union-attr]
    side = int(2 * stride)  # type: ignore[operator]
    x, y = (torch.randn(2, int(channels), side, 2 * side) for _ in range(2))  # type: ignore[arg-type]
    picture = {0: "batch", 2: "height", 3: "width"}
    # the exporter prints to stdout and logs what torchvision operators it lacks
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")
        traced = torch.onnx.export(
            net.eval(),
            (x, y, torch.rand(2, 1)),
            dynamo=True,
            opset_version=OPSET,
            input_names=["x", "y", "level"],
            output_names=["out"],
            dynamic_shapes=(picture, picture, {0: "batch"}),
        )
    assert traced is not None
    for node in traced.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with paths of the machine that exported
    return traced.model


def _share_weights(model: onnx_ir.Model, tensors: Mapping[str, Tensor], path: Path) -> None:
    """The graph's large weights become places in the file at `path`, which holds `tensors`; what it folded or changed stays inside.

    The file's SHA-256 is put into the graph, whose own then stands for both.
    """
    import onnx_ir

    with path.open("rb") as stream:
        digest, weights = hashlib.file_digest(stream, "sha256").hexdigest(), safetensors.Weights(stream)
    for name, value in model.graph.initializers.items():
        inside = value.const_value
        if inside is None or inside.nbytes < INSIDE or name not in weights or not np.array_equal(inside.numpy(), tensors[name].numpy()):
            continue
        place = weights.place(name)
        shape = onnx_ir.Shape(place.shape)
        value.const_value = onnx_ir.ExternalTensor(
            path.name, place.offset, place.length, onnx_ir.DataType.FLOAT, shape=shape, name=name, base_dir=path.parent
        )
    model.metadata_props["weights_sha256"] = digest


def _manifest(read: checkpoints.Checkpoint, name: str, steps: int | None, sampler: str | None, consistency: Consistency) -> Manifest:
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
        source={"checkpoint_sha256": read.sha256, "assumptions": list(read.assumptions), "exporter": f"sr3rt {__version__}"},
    )


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


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
