"""A bundle: a directory that holds a network and everything needed to run it, and proves itself.

    bundle/
      sr3.json             the manifest: what the network is, how it was trained, what it was measured at, SHA-256 of every other file
      weights.safetensors  every parameter of the network, float32, by its name in the checkpoint (sr3rt/safetensors.py)
      network.json         what to compute with them: a program of a few operations, which docs/program.md specifies
      network.onnx         the same as a graph: inputs x, y (B, C, H, W) and level (B, 1), output out (B, C, H, W), all float32. Its
                           large initialisers are external data in weights.safetensors, whose SHA-256 it states as `weights_sha256`
      network.once.onnx    of networks that compute something of x alone: that, from x to tensors named after the program's registers; and
      network.step.onnx    the rest, with those tensors as further inputs. The two together compute what network.onnx does
      network.fp16.onnx    the graph in float16, strongly typed, with float32 inputs and output and its own weights (export/precision.py);
                           of networks that are in two, network.once.fp16.onnx and network.step.fp16.onnx in its place
      *.plan               TensorRT engines of these graphs (export/to_trt.py); `engines` in the manifest says where each may run
      golden.json          what each engine must answer when it is loaded (sr3rt/golden.py)

Bundles from before have no network.json; their weights are in network.onnx or, when large, in network.onnx.data. onnxruntime runs them.

`sr3.json` is UTF-8 JSON whose own `sha256` field is the digest of the file's bytes with that field filled with 64 zeros. A name in
`files` is a plain file name: no folder, no link, nothing in the directory that is not listed. Files are handed out as the bytes
whose hash was checked, or open, once it was. A bundle is written to a hidden folder beside its target, synced, and renamed: it is there
whole or not at all, whenever its writer is killed, and the next writer to that target removes what the killed one left.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal, get_args

from sr3rt.durable import sync_file, sync_folder
from sr3rt.engines import EngineKey
from sr3rt.errors import BundleCorrupt, BundleIncompatible, BundleNotFound, OptionError
from sr3rt.samplers import Level, Prediction, Sampler
from sr3rt.schedule import ScheduleSpec

FORMAT = 1
MANIFEST, WEIGHTS, PROGRAM = "sr3.json", "weights.safetensors", "network.json"
NETWORK, ONCE, STEP = "network.onnx", "network.once.onnx", "network.step.onnx"
HALF, HALF_ONCE, HALF_STEP = "network.fp16.onnx", "network.once.fp16.onnx", "network.step.fp16.onnx"
GRAPHS = {
    ("fp32", "whole"): NETWORK, ("fp32", "once"): ONCE, ("fp32", "step"): STEP,
    ("fp16", "whole"): HALF, ("fp16", "once"): HALF_ONCE, ("fp16", "step"): HALF_STEP,
}  # fmt: skip
"""The file of each part of the network, by precision: the whole, or what depends on x alone and what is left for each step."""
WEIGHTS_BEFORE = "network.onnx.data"  # of bundles without WEIGHTS
GOLDEN = "golden.json"
MOST_STEPS = 1_000_000  # of a schedule that a file tells of: 500 times what networks are trained with
Consistency = Literal["off", "final", "every"]
_ZEROS = "0" * 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PLATFORM = re.compile(r"\..*|lost\+found")  # what systems put into folders; it is never read
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Defaults:
    """What a run uses when it is told nothing. `schedule` None: the trained one respaced to `steps`."""

    steps: int
    sampler: str
    consistency: Consistency = "off"
    schedule: ScheduleSpec | None = None


@dataclass(frozen=True)
class Manifest:
    """The contents of sr3.json.

    `bytes_per_pixel`: memory the network was seen to use for each output pixel. `attention_stride`: how much coarser than the output
    its finest self-attention works, 0 for none. `parity`, `source` and `files` are maps that the exporter
    fills and readers may show; `source` has, where they are known, `norm_groups` and `image_size`, the side of the pictures in training.
    `engines` has a key (sr3rt/engines.py) for each file that is an engine.
    """

    name: str
    architecture: str
    parameters: int
    channels: int
    scale: int
    stride: int
    prediction: Prediction
    level: Level
    trained: ScheduleSpec
    defaults: Defaults
    bytes_per_pixel: int = 0
    attention_stride: int = 0
    parity: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    engines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    format: int = FORMAT

    def graphs(self, precision: str, *, hoisted: bool = True) -> tuple[str, ...]:
        """The files that compute the network at that precision: what every step runs, and, where it is in two and `hoisted`, what is run
        once for each x. Empty where the bundle does not have it.
        """
        for parts in (("step", "once"), ("whole",))[not hoisted :]:
            files = tuple(GRAPHS[precision, part] for part in parts)
            if {*files} <= self.files.keys():
                return files
        return ()


class Bundle:
    """An opened bundle: `manifest` was checked, `read` checks each file before it hands it out. Immutable."""

    def __init__(self, path: Path, manifest: Manifest, sha256: str) -> None:
        self.path, self.manifest, self.sha256 = path, manifest, sha256

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read and check the manifest and the directory's names; file contents are checked when they are read.

        Raises BundleNotFound, BundleCorrupt or BundleIncompatible.
        """
        folder = Path(path)
        with _told(folder):
            there = (folder / MANIFEST).is_file()
        if not there:
            found = "a file" if folder.is_file() else "a folder without sr3.json" if folder.is_dir() else "nothing"
            hint = "; make one from a checkpoint with  sr3rt export" if folder.is_file() else ""
            raise BundleNotFound(f"no bundle at {folder}: found {found}, expected a folder with sr3.json{hint}")
        manifest, digest = _parse(_read_plain(folder, MANIFEST), folder)
        listed = {MANIFEST, *manifest.files}
        with _told(folder):
            names = sorted(entry.name for entry in folder.iterdir())
        unlisted = [name for name in names if not (name in listed or _PLATFORM.fullmatch(name))]
        if unlisted:
            raise BundleCorrupt(f"{folder} holds {unlisted[0]!r}, which sr3.json does not list: remove it, or export the bundle again")
        return cls(folder, manifest, digest)

    def read(self, name: str) -> bytes:
        """The file's bytes, whose SHA-256 is the one in the manifest. Raises BundleCorrupt."""
        data = _read_plain(self.path, name, self._listed(name)["bytes"])
        self._check(name, hashlib.sha256(data).hexdigest())
        return data

    def open_file(self, name: str) -> BufferedReader:
        """The file, open at its beginning, once its SHA-256 has been found to be the one in the manifest. Raises BundleCorrupt.

        For what is better not held at once: what is read is of the same open file, and not checked again.
        """
        stream = _open_plain(self.path, name, self._listed(name)["bytes"])
        try:
            with _told(self.path / name):
                self._check(name, hashlib.file_digest(stream, "sha256").hexdigest())
                stream.seek(0)
        except BaseException:
            stream.close()
            raise
        return stream

    def verify(self) -> None:
        """Read and check every file. Raises BundleCorrupt."""
        for name in self.manifest.files:
            self.open_file(name).close()

    def _listed(self, name: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] | None = self.manifest.files.get(name)
        if found is None:
            raise BundleCorrupt(f"{self.path} lists no {name!r}: it has {', '.join(sorted(self.manifest.files)) or 'no files'}")
        return found

    def _check(self, name: str, digest: str) -> None:
        expected = self._listed(name)["sha256"]
        if digest != expected:
            raise BundleCorrupt(
                f"{self.path / name} is damaged: its SHA-256 is {digest[:16]}…, sr3.json says {expected[:16]}…. "
                "Copy the bundle again, or export it again"
            )


@contextmanager
def writing(target: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes it when the block ends, and vanishes when the block fails.

    Raises OptionError when the target exists and `overwrite` is not set, is not a bundle, or is being written by another process.
    """
    from filelock import FileLock, Timeout

    final = Path(target).absolute()
    check_target(final, overwrite=overwrite)
    final.parent.mkdir(parents=True, exist_ok=True)
    partial, old, lock = (final.with_name(f".{final.name}.{kind}") for kind in ("partial", "old", "lock"))
    alone = FileLock(lock)
    try:
        alone.acquire(timeout=0)
    except Timeout:
        raise OptionError(f"{final} is being written by another process: wait for it, or choose another name") from None
    try:
        _tidy(final, partial, old)  # after a writer that was killed
        check_target(final, overwrite=overwrite)
        partial.mkdir()
        yield partial
        for path in partial.iterdir():
            sync_file(path)
        sync_folder(partial)
        if final.exists():
            final.rename(old)
        partial.rename(final)
        sync_folder(final.parent)
    finally:
        _tidy(final, partial, old)
        lock.unlink(missing_ok=True)
        alone.release()


def _tidy(final: Path, partial: Path, old: Path) -> None:
    """Remove what a writer left, done or not; a bundle that it moved away and did not replace goes back to its place."""
    if old.exists() and not final.exists():
        old.rename(final)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raises OptionError when a bundle cannot be written to `target`: it exists, or is something that is not a bundle."""
    if target.is_symlink():
        raise OptionError(f"{target} is a symbolic link and will not be replaced: name the folder that it points to, or another")
    if target.exists() and not (target / MANIFEST).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise OptionError(f"{target} is not a bundle (it has no sr3.json) and will not be replaced: choose another name")
    if target.exists() and not overwrite:
        raise OptionError(f"{target} exists: choose another name, or overwrite it with --overwrite")
    folder = next(one for one in target.absolute().parents if os.access(one, os.F_OK))
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        found = "may not be written to" if folder.is_dir() else "is no folder"
        raise OptionError(f"{target} cannot be made, {folder} {found}: give -o a name elsewhere, or copy the bundle elsewhere first")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Hash every other file in `folder` into `manifest.files` and write sr3.json there."""
    files = {}
    for path in sorted(set(folder.iterdir()) - {folder / MANIFEST}):
        with path.open("rb") as stream:
            files[path.name] = {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
    text = json.dumps({**asdict(manifest), "files": files, "sha256": _ZEROS}, indent=1, ensure_ascii=False, allow_nan=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    head, _, tail = text.rpartition(_ZEROS)  # sha256 is last; a name may be zeros too
    (folder / MANIFEST).write_text(f"{head}{digest}{tail}", encoding="utf-8")


def _read_plain(folder: Path, name: str, size: int | None = None) -> bytes:
    """The bytes of a plain file, `size` of them where that is known."""
    with _open_plain(folder, name, size) as stream, _told(folder / name):
        return stream.read()


def _open_plain(folder: Path, name: str, size: int | None) -> BufferedReader:
    """A plain file, of `size` bytes where that is known, open for reading. Raises BundleCorrupt."""
    if not _NAME.fullmatch(name):
        raise BundleCorrupt(f"{folder}/sr3.json names {name!r}: expected a plain file name of letters, digits, '.', '_' and '-'")
    path = folder / name
    if path.is_symlink() or not path.is_file():
        found = "a symbolic link" if path.is_symlink() else "not a file" if path.exists() else "missing"
        raise BundleCorrupt(f"{path} is {found}: expected a plain file. Copy the bundle again, or export it again")
    with _told(path):
        stream = open(path, "rb", opener=lambda place, flags: os.open(place, flags | getattr(os, "O_NOFOLLOW", 0)))  # noqa: SIM115
        found_size = os.fstat(stream.fileno()).st_size
    if size not in (None, found_size):
        stream.close()
        raise BundleCorrupt(
            f"{path} is damaged: it has {found_size:,} bytes, sr3.json says {size:,}. Copy the bundle again, or export it again"
        )
    return stream


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """The system's errors become BundleCorrupt."""
    try:
        yield
    except OSError as error:
        raise BundleCorrupt(f"{path} cannot be read: {error.strerror or error}") from error


def _parse(data: bytes, folder: Path) -> tuple[Manifest, str]:
    where = folder / MANIFEST
    try:
        content = json.loads(data)
        version, digest = content["format"], content["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleCorrupt(f"{where} is not a manifest ({error}): copy the bundle again, or export it again") from None
    if isinstance(version, int) and version > FORMAT:
        raise BundleIncompatible(f"{where} has format {version}, this sr3rt reads up to {FORMAT}: upgrade sr3rt")
    stated = str(digest)
    if not _DIGEST.fullmatch(stated) or hashlib.sha256(data.replace(stated.encode(), _ZEROS.encode())).hexdigest() != stated:
        raise BundleCorrupt(f"{where} is damaged: its contents do not have the SHA-256 that it states. Copy the bundle again")
    del content["sha256"]
    try:
        manifest = _manifest(content)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise BundleCorrupt(f"{where} is not a manifest of format {FORMAT}: {error}") from None
    return manifest, stated


_KINDS: dict[str, tuple[type, str]] = {"int": (int, "a whole number"), "str": (str, "a text"), "Mapping": (dict, "an object")}


def _manifest(content: dict[str, Any]) -> Manifest:
    """From JSON, with every type and range checked. Raises nearly anything."""

    def spec(value: dict[str, Any]) -> ScheduleSpec:
        made = ScheduleSpec(**{**value, "gammas": tuple(value["gammas"])})
        if type(made.steps) is not int or not max(made.steps, len(made.gammas)) <= MOST_STEPS:
            raise ValueError(f"a schedule has {made.steps!r} steps, expected at most {MOST_STEPS}")
        made.schedule()
        return made

    defaults = content["defaults"]
    run = Defaults(**{**defaults, "schedule": defaults["schedule"] and spec(defaults["schedule"])})
    manifest = Manifest(**{**content, "trained": spec(content["trained"]), "defaults": run})
    for holder, name, allowed in ((manifest, "prediction", Prediction), (manifest, "level", Level), (run, "consistency", Consistency)):
        if getattr(holder, name) not in get_args(allowed):
            raise ValueError(f"{name} is {getattr(holder, name)!r}, expected one of {', '.join(get_args(allowed))}")
    for item in fields(manifest):
        kind, expected = _KINDS.get(str(item.type).partition("[")[0], (object, ""))
        value: Any = getattr(manifest, item.name)
        if not isinstance(value, kind) or isinstance(value, bool) or (type(value) is int and value < 0):
            raise ValueError(f"{item.name} is {value!r}, expected {expected}")
    Sampler.parse(run.sampler)
    if min(manifest.channels, manifest.scale, manifest.stride, manifest.format) < 1 or type(run.steps) is not int or run.steps < 1:
        raise ValueError("channels, scale, stride, format and the default steps must be whole numbers from 1 on")
    for name, entry in manifest.files.items():
        if not _NAME.fullmatch(name) or not _DIGEST.fullmatch(str(entry["sha256"])) or type(entry["bytes"]) is not int:
            raise ValueError(f"files lists {name!r} as {entry!r}")
    for name, key in manifest.engines.items():
        if name not in manifest.files:
            raise ValueError(f"engines lists {name!r}, and files does not")
        EngineKey.of(key)
    return manifest
