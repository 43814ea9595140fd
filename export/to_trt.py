"""Checkpoint or bundle -> bundle with TensorRT engines: `python export/to_trt.py CKPT|BUNDLE [--batch 1,4] [--size 128,256]`.

The bundle gets the network in float16 (`network.fp16.onnx`; float32 where it must be), compared with the float32 one at every shape that is
built, and an engine for each batch and size. What of a network depends on the input alone has engines of its own, one for each size.
Building with TensorRT for RTX needs no GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import onnx
except ModuleNotFoundError:
    from sr3rt.errors import MissingExtra

    raise SystemExit(str(MissingExtra("export", "onnx", "cpu,export"))) from None
from cyclopts import App, Parameter

from sr3rt import __version__, backends
from sr3rt.backends.tensorrt import flavour
from sr3rt.bundle import GOLDEN, GRAPHS, WEIGHTS, WEIGHTS_BEFORE, Bundle, Manifest, check_target, write_manifest, writing
from sr3rt.engines import EngineKey
from sr3rt.errors import BackendError, BundleCorrupt, OptionError
from sr3rt.export import builder, parity
from sr3rt.export.precision import half
from sr3rt.export.progress import Progress, progress_line
from sr3rt.export.training_config import read_config
from sr3rt.golden import answer
from sr3rt.program import given_registers

LIMITS = parity.Limits(net=5e-3, picture=5e-2)
SIDE = 128  # of engines of a network that was trained at nobody knows what
Shape = tuple[int, int, int]  # pictures, height, width


def to_trt(
    source: Path,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    batch: str = "1",
    size: str | None = None,
    precision: Literal["fp16", "fp32"] = "fp16",
    opt_level: int | None = None,
    timing_cache: Path | None = None,
    rebuild: bool = False,
    config: Path | None = None,
    norm_groups: int | None = None,
    image_size: int | None = None,
    scale: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Build TensorRT engines into a bundle.

    Parameters
    ----------
    source
        A bundle, or a checkpoint, which is exported first.
    output
        The bundle of a checkpoint; CKPT with the suffix .sr3 when not given. One that is there already is used if it is of this checkpoint
        and was exported with the options below that are given.
    batch
        Batch sizes, as 1,4,8: an engine for each.
    size
        Sides of the result in pixels, as 128,256 or 128x192 (height x width): an engine for each. The side of the pictures that the network
        was trained on when not given; 128, with a warning, where the bundle does not say.
    precision
        fp16, or fp32 (without TF32).
    opt_level
        TensorRT's builder optimisation level, 0 to 5.
    timing_cache
        TensorRT's timing cache, a file to read where it exists and to write; TensorRT for RTX has none.
    rebuild
        Build these engines even if the bundle has them.
    config
        For a checkpoint: the JSON that it was trained with.
    norm_groups
        For a checkpoint: groups of its GroupNorm layers.
    image_size
        For a checkpoint: side of the pictures it was trained on, pixels.
    scale
        For a checkpoint: magnification.
    overwrite
        For a checkpoint: export it anew where its bundle is there already.
    """
    batches, sizes = _numbers(batch), None if size is None else _sizes(size)
    if opt_level not in (None, *range(6)):
        raise OptionError(f"--opt-level must be from 0 to 5, found {opt_level}")
    told: dict[str, Any] = {"config": config, "norm_groups": norm_groups, "image_size": image_size, "scale": scale}
    of_checkpoints = {"output": output, **told, "overwrite": overwrite or None}
    given = [f"--{name.replace('_', '-')}" for name, value in of_checkpoints.items() if value is not None]
    if source.is_dir() and given:
        raise OptionError(f"{source} is a bundle, which engines are built into: {', '.join(given)} can only be told for a checkpoint")
    if timing_cache is not None:
        _check_cache(timing_cache)
    target = source if source.is_dir() else output or source.parent / f"{source.stem}.sr3"
    there = Bundle.open(target).manifest if source.is_dir() or (target.exists() and not overwrite) else None
    check_target(target.absolute(), overwrite=True)
    with progress_line() as progress:
        if there is not None:
            if not source.is_dir():
                _check_origin(target, there, source, told)
            shapes = _shapes(batches, sizes, there)
        else:
            from sr3rt.export import checkpoint, to_onnx  # need torch, which a bundle does not

            to_onnx.check_packages()
            progress(f"reading {source.name}")
            read = checkpoint.read(source, **told, on_progress=progress)
            manifest = to_onnx.manifest_of(read, name=source.stem)
            shapes = _shapes(batches, sizes, manifest)
            to_onnx.write_bundle(target, read.net, manifest, overwrite=overwrite, progress=progress)
        missing = _add_engines(target, shapes, precision, opt_level, timing_cache, rebuild, progress)
    if missing:
        made = f"{target} has the network in {precision}, and no new engine" if precision == "fp16" else f"{target} has no new engine"
        raise BackendError(f"{made}: {missing}")
    return target


def _add_engines(
    target: Path,
    shapes: Sequence[Shape],
    precision: str,
    opt_level: int | None,
    timing_cache: Path | None,
    rebuild: bool,
    progress: Progress,
) -> str | None:
    """The bundle anew, with engines for `shapes` and what they need; without them, and why, where none can be built here."""
    bundle, missing = Bundle.open(target), _why_not()
    with writing(target, overwrite=True) as folder:
        for name in bundle.manifest.files:
            with bundle.open_file(name) as source, (folder / name).open("wb") as copy:
                shutil.copyfileobj(source, copy)
        manifest = _with_half(bundle, folder, shapes, progress) if precision == "fp16" else bundle.manifest
        kept = _kept(manifest, folder)
        keys = _keys(bundle, folder, precision, shapes, opt_level) if missing is None else []
        built = _build(folder, bundle, keys, timing_cache, {} if rebuild else kept, progress)
        engines = kept | built
        _write_golden(bundle, folder, engines, [name for name in engines if engines[name] == kept.get(name)], progress)
        write_manifest(folder, replace(manifest, engines=engines))
    return missing


def _why_not() -> str | None:
    """Why no engine can be built here, or None."""
    try:
        builder.target()
    except BackendError as error:
        return str(error)
    return None


def _check_origin(target: Path, manifest: Manifest, source: Path, told: Mapping[str, Any]) -> None:
    """Raises OptionError when the bundle is of another checkpoint than `source`, or not known to be of the options that were `told`."""
    if manifest.source.get("checkpoint_sha256") != _digest(source):
        raise OptionError(
            f"{target} is the bundle of another checkpoint than {source}: choose another name with --output, or give --overwrite"
        )
    made_with = manifest.source
    pairs = {
        "--config": (told["config"] and read_config(told["config"]).sha256, made_with.get("config_sha256")),
        "--norm-groups": (told["norm_groups"], made_with.get("norm_groups")),
        "--image-size": (told["image_size"], made_with.get("image_size")),
        "--scale": (told["scale"], manifest.scale),
    }
    differing = [
        f"{option} is {_short(value)}, the bundle's is {_short(made)}"
        for option, (value, made) in pairs.items()
        if value not in (None, made)
    ]
    if differing:
        raise OptionError(
            f"{target} is there already and was exported otherwise: {'; '.join(differing)}. To use it as it is leave that out; to export "
            "the checkpoint anew give --overwrite, or --output with another name"
        )


def _with_half(bundle: Bundle, folder: Path, shapes: Sequence[Shape], progress: Progress) -> Manifest:
    """Write the network in float16 to `folder` and compare it with the float32 one. Returns the manifest with the figures."""
    progress("converting the network to float16")
    for part in _parts(bundle):
        model = onnx.load_from_string(bundle.read(GRAPHS["fp32", part]))
        beside = _beside(model, GRAPHS["fp32", part])
        graph = half(model, bundle.read(beside) if beside else b"")
        (folder / GRAPHS["fp16", part]).write_bytes(graph.SerializeToString())
    write_manifest(folder, replace(bundle.manifest, engines={}))
    reference = backends.load(bundle, backends.Request("onnxruntime"))
    converted = backends.load(Bundle.open(folder), backends.Request("onnxruntime", precision="fp16"))
    figures = parity.measure(
        reference, converted, bundle.manifest, limits=LIMITS, shapes=shapes, against="the float32 network", progress=progress
    )
    return replace(bundle.manifest, parity={**bundle.manifest.parity, "fp16 net": figures["net"], "fp16 picture": figures["picture"]})


def _parts(bundle: Bundle) -> list[str]:
    """Those that the bundle's network is in."""
    graphs = bundle.manifest.graphs("fp32")
    return [part for (_, part), file in GRAPHS.items() if file in graphs]


def _beside(model: onnx.ModelProto, name: str) -> str | None:
    """The bundle's file that the weights of graph `name` are in, or None. Raises BundleCorrupt for a file that no bundle has."""
    tensors = (*model.graph.initializer, *(attribute.t for node in model.graph.node for attribute in node.attribute))
    found = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    if len(found) > 1 or found - {WEIGHTS, WEIGHTS_BEFORE}:
        raise BundleCorrupt(f"{name} takes weights from {', '.join(sorted(found))}, expected {WEIGHTS}: export the bundle again")
    return found.pop() if found else None


def _kept(manifest: Manifest, folder: Path) -> dict[str, dict[str, Any]]:
    """The bundle's engines that belong to its networks; files of others are removed."""
    digests = {of: _digest(folder / graph) for of, graph in GRAPHS.items() if (folder / graph).exists()}
    kept = {}
    for name, content in manifest.engines.items():
        key = EngineKey.of(content)
        if digests.get((key.precision, key.part)) == key.onnx_sha256:
            kept[name] = asdict(key)
        else:
            (folder / name).unlink()
    return kept


def _keys(bundle: Bundle, folder: Path, precision: str, shapes: Sequence[Shape], opt_level: int | None) -> list[EngineKey]:
    """Of the engines for `shapes`, of graphs in `folder`."""
    graphs = {part: folder / GRAPHS[precision, part] for part in _parts(bundle)}
    for graph in graphs.values():
        _beside(onnx.load(graph, load_external_data=False), graph.name)
    (capability, driver), package = builder.target(), (flavour(), builder.version())
    keys = []
    for part, graph in graphs.items():
        digest, each = _digest(graph), dict.fromkeys((1, *sides) for _, *sides in shapes)
        for batch, height, width in each if part == "once" else shapes:
            keys.append(EngineKey(digest, precision, batch, height, width, *package, capability, driver, opt_level, part))
    return keys


def _build(
    folder: Path, bundle: Bundle, keys: Sequence[EngineKey], timing_cache: Path | None, kept: Mapping[str, object], progress: Progress
) -> dict[str, dict[str, Any]]:
    """Engines in `folder`, by file name; those that are there already are not built again."""
    given = given_registers(bundle) if any(key.part == "step" for key in keys) else {}
    for i, key in enumerate(keys):
        if kept.get(key.name) != asdict(key):
            progress(f"building the engine {key.batch}×{key.height}×{key.width} ({i + 1} of {len(keys)})")
            plan = builder.build(
                folder / GRAPHS[key.precision, key.part],
                batch=key.batch,
                height=key.height,
                width=key.width,
                given=given,
                tf32=False,
                opt_level=key.opt_level,
                timing_cache=timing_cache,
            )
            (folder / key.name).write_bytes(plan)
    return {key.name: asdict(key) for key in keys}


def _write_golden(bundle: Bundle, folder: Path, engines: Mapping[str, Mapping[str, Any]], kept: Sequence[str], progress: Progress) -> None:
    """golden.json in `folder`: what each engine, with the one that it needs, must answer, by the float32 network on the CPU.

    Of those `kept`, what the bundle says.
    """
    before = json.loads(bundle.read(GOLDEN)) if GOLDEN in bundle.manifest.files else {}
    golden = {name: before[name] for name in kept if name in before}
    new = {name: key for name, key in ((name, EngineKey.of(engines[name])) for name in engines.keys() - golden) if key.part != "once"}
    reference = backends.load(bundle, backends.Request(precision="fp32", device="cpu")) if new else None
    answers: dict[Shape, list[float]] = {}
    for name, key in new.items():
        shape = key.batch, key.height, key.width
        if reference and shape not in answers:
            progress(f"computing what the engine {key.batch}×{key.height}×{key.width} must answer")
            answers[shape] = [float(value) for value in answer(reference, bundle.manifest, *shape)]
        golden[name] = answers[shape]
    (folder / GOLDEN).unlink(missing_ok=True)
    if golden:
        (folder / GOLDEN).write_text(json.dumps(golden, sort_keys=True), encoding="utf-8")


def _numbers(text: str) -> list[int]:
    """1,4,8 -> [1, 4, 8]. Raises OptionError."""
    if not re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", text):
        raise OptionError(f"--batch is {text!r}, expected whole numbers from 1 on with commas between, as 1,4,8")
    return list(dict.fromkeys(map(int, text.split(","))))


def _sizes(text: str) -> list[tuple[int, int]]:
    """128,256x192 -> [(128, 128), (256, 192)]. Raises OptionError."""
    sides = r"[1-9]\d{0,5}(x[1-9]\d{0,5})?"
    if not re.fullmatch(f"{sides}(,{sides})*", text):
        raise OptionError(f"--size is {text!r}, expected sides in pixels with commas between, as 128,256x192 (height x width)")
    found = [[int(side) for side in part.split("x")] for part in text.split(",")]
    return list(dict.fromkeys((part[0], part[-1]) for part in found))


def _shapes(batches: Sequence[int], sizes: Sequence[tuple[int, int]] | None, manifest: Manifest) -> list[Shape]:
    """Of the engines to build; sizes None: the one that the network was trained at. Raises OptionError for what it cannot compute."""
    sizes = sizes or [(_trained_side(manifest),) * 2]
    for height, width in sizes:
        if height % manifest.stride or width % manifest.stride:
            raise OptionError(f"--size has {height}×{width}, expected multiples of {manifest.stride}, which this network needs")
    return [(count, *sides) for count, sides in product(batches, sizes)]


def _trained_side(manifest: Manifest) -> int:
    """Of the pictures in training, pixels. A warning where the bundle does not say."""
    side = manifest.source.get("image_size")
    if type(side) is int and side > 0:
        return side
    warnings.warn(f"the bundle does not say what size the network was trained at: {SIDE}×{SIDE} is taken; give --size", stacklevel=3)
    return SIDE


def _check_cache(path: Path) -> None:
    """Raises OptionError when a timing cache could not be written there, which would only be found once an engine is built."""
    if path.is_dir():
        found = "is a folder"
    elif not path.parent.is_dir():
        found = f"is in {path.parent}, which is no folder"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        found = "may not be written to"
    else:
        return
    raise OptionError(f"--timing-cache {path} {found}: expected a file, to be made or replaced, in a folder that is there")


def _short(value: object) -> str:
    """Of a digest the beginning."""
    return "not known" if value is None else f"of SHA-256 {value[:12]}…" if isinstance(value, str) else str(value)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main() -> None:
    """Command line of this file."""
    from sr3rt.cli import run_command

    app = App(name="to_trt", help=__doc__, version=__version__)
    app.default(to_trt)
    run_command(app)


if __name__ == "__main__":
    main()
