"""What the command line is to do: which pictures, and where their results go."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sr3rt.errors import OptionError
from sr3rt.saving import SUFFIXES as WRITTEN

READ = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
OTHERS = (  # pictures that are not read
    ".apng", ".arw", ".avif", ".cr2", ".cr3", ".dds", ".dng", ".eps", ".exr", ".gif", ".hdr", ".heic", ".heif", ".icns", ".ico", ".j2k",
    ".jfif", ".jp2", ".jpe", ".jxl", ".nef", ".orf", ".pam", ".pcx", ".pfm", ".psd", ".qoi", ".raf", ".rw2", ".svg", ".tga", ".wdp", ".xcf",
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """A picture, where its result goes, and where the sheet of --compare does."""

    source: Path
    target: Path
    sheet: Path | None

    @property
    def outputs(self) -> list[Path]:
        return [self.target] if self.sheet is None else [self.target, self.sheet]


def planned(source: Path, output: Path, *, compare: bool) -> list[Work]:
    """What is to be done. Raises OptionError where something would be written over a picture, or two things to one name."""
    try:
        return _planned(source, output, compare=compare)
    except OSError as error:
        raise OptionError(f"{error.filename} cannot be used ({error.strerror}): give another name") from error


def passed_over(source: Path) -> list[str]:
    """Names of a folder's pictures that are not read."""
    return sorted(path.name for path in source.iterdir() if path.suffix.lower() in OTHERS and _seen(path)) if source.is_dir() else []


def make_folder(path: Path) -> None:
    """Raises OptionError where there cannot be one."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"the folder {path} cannot be made ({error.strerror}): give -o another name") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise OptionError(f"the folder {path} may not be written to: give -o another")


def _seen(path: Path) -> bool:
    """Whether a folder's file is looked at: hidden ones are systems' own, as ._a.png beside a.png."""
    return path.is_file() and not path.name.startswith(".")


def _planned(source: Path, output: Path, *, compare: bool) -> list[Work]:
    if not source.exists():
        raise OptionError(f"there is no {source}: give -i a picture or a folder of pictures")
    if not source.is_file() and not source.is_dir():
        raise OptionError(f"{source} is neither a picture file nor a folder of pictures")
    pairs = _pair(source, output) if source.is_file() else _pairs(source, output)
    work = [Work(one, target, target.with_name(f"{target.stem}-compare.png") if compare else None) for one, target in pairs]
    sources = {_file(one.source) for one in work}
    first: dict[Path, Path] = {}
    for one in work:
        for path in one.outputs:
            if path.exists() and _file(path) in sources:
                raise OptionError(f"{path} is the picture itself: give -o another name")
            if path in first:
                raise OptionError(f"{first[path]} and {one.source} would both become {path}: rename one")
            first[path] = one.source
    return work


def _file(path: Path) -> tuple[int, int]:
    """The same for every name of a file."""
    found = path.stat()
    return found.st_dev, found.st_ino


def _pair(source: Path, output: Path) -> list[tuple[Path, Path]]:
    target = output / f"{source.stem}.png" if output.is_dir() else output
    if target.suffix.lower() not in WRITTEN:
        raise OptionError(f"{target} is no folder and its suffix names no format: give -o a folder that exists, or NAME.png")
    return [(source, target)]


def _pairs(source: Path, output: Path) -> list[tuple[Path, Path]]:
    """Of a folder. Two pictures that differ only by suffix keep theirs: a.jpg.png."""
    pictures = sorted(path for path in source.iterdir() if path.suffix.lower() in READ and _seen(path))
    if not pictures:
        raise OptionError(f"{source} holds no pictures: expected files ending in {', '.join(READ)}")
    if output.exists() and not output.is_dir():
        raise OptionError(f"{source} is a folder and {output} is a file: give -o a folder")
    if not output.exists() and output.suffix.lower() in WRITTEN:
        raise OptionError(f"{source} is a folder and {output} a picture's name: give -o a folder")
    if output.exists() and output.samefile(source):
        raise OptionError(f"{output} is the folder with the pictures: give -o another, so that no picture is taken for a result")
    stems = [path.stem for path in pictures]
    return [(p, output / f"{p.stem if stems.count(p.stem) == 1 else p.name}.png") for p in pictures]
