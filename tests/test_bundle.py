"""Bundles: what was written is read back, whatever was touched since is refused, and a bundle is there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from filelock import FileLock

import sr3rt
from sr3rt.backends import Request, load
from sr3rt.bundle import MANIFEST, Bundle, write_manifest, writing
from sr3rt.errors import BundleCorrupt, BundleError, BundleIncompatible, BundleNotFound, OptionError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "tiny")


@pytest.fixture
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when anything gets as far as onnxruntime."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("onnxruntime was given a network that was not checked")

    monkeypatch.setattr("onnxruntime.InferenceSession", refuse)


def sign(folder: Path, content: Any) -> None:
    """Write `content` as a manifest that states its own right hash, as a forger would."""
    zeros = "0" * 64
    text = json.dumps({**content, "sha256": zeros})
    head, _, tail = text.rpartition(zeros)
    (folder / MANIFEST).write_text(f"{head}{hashlib.sha256(text.encode()).hexdigest()}{tail}")


def content_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return content


def only_child(folder: Path) -> str:
    (entry,) = folder.iterdir()
    return entry.name


# --- reading


def test_manifest_comes_back_as_it_was_written(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    data = tiny.NETWORK.read_bytes()
    files = {"network.onnx": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    assert opened.manifest == replace(tiny.manifest(), files=files)
    assert opened.read("network.onnx") == data
    assert opened.sha256 == content_of(bundle)["sha256"]
    opened.verify()


def test_any_text_may_be_in_a_name(tmp_path: Path) -> None:
    name = 'Ω "quoted" \\ \n ' + "0" * 64
    assert Bundle.open(tiny.write(tmp_path / "b", name=name)).manifest.name == name


def test_the_network_of_a_good_bundle_runs(bundle: Path) -> None:
    x, y, level = np.full((2, 3, 8, 16), 0.5, np.float32), np.full((2, 3, 8, 16), -1, np.float32), np.array([[0], [1]], np.float32)
    out = np.empty_like(y)
    load(Bundle.open(bundle), Request()).bind(x, y, level, out)()
    assert out[0] == pytest.approx(-0.05, abs=1e-6)
    assert out[1] == pytest.approx(0.05, abs=1e-6)


@pytest.mark.usefixtures("no_session")
def test_a_flipped_bit_in_any_byte_of_the_manifest_is_refused(bundle: Path) -> None:
    good, rng = (bundle / MANIFEST).read_bytes(), random.Random(0)
    for i in range(len(good)):
        (bundle / MANIFEST).write_bytes(good[:i] + bytes([good[i] ^ 1 << rng.randrange(8)]) + good[i + 1 :])
        with pytest.raises(BundleError):
            sr3rt.load(bundle)


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("name", ["network.onnx", "weights.safetensors", "network.onnx.data", "notes.txt"])
def test_a_flipped_bit_of_any_file_is_refused_before_onnxruntime_sees_it(tmp_path: Path, name: str) -> None:
    rng = random.Random(name)
    with writing(tmp_path / "b") as target:
        shutil.copy(tiny.NETWORK, target / "network.onnx")
        for weights in ("weights.safetensors", "network.onnx.data"):
            (target / weights).write_bytes(rng.randbytes(5000))
        (target / "notes.txt").write_bytes(b"hello")
        write_manifest(target, tiny.manifest())
    path = tmp_path / "b" / name
    good = path.read_bytes()
    for i in {0, len(good) - 1, *(rng.randrange(len(good)) for _ in range(100))}:
        path.write_bytes(good[:i] + bytes([good[i] ^ 1 << rng.randrange(8)]) + good[i + 1 :])
        with pytest.raises(BundleCorrupt, match=f"{name} is damaged"):
            Bundle.open(tmp_path / "b").verify()
        if name != "notes.txt":  # which nothing loads
            with pytest.raises(BundleCorrupt):
                sr3rt.load(tmp_path / "b")


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""])
@pytest.mark.usefixtures("no_session")
def test_a_file_of_another_length_is_refused(bundle: Path, change: Callable[[bytes], bytes]) -> None:
    path = bundle / "network.onnx"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BundleCorrupt, match=r"it has [\d,]+ bytes, sr3.json says 442"):
        sr3rt.load(bundle)


@pytest.mark.parametrize("name", ["more.txt", "folder"])
def test_what_is_not_listed_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).mkdir() if name == "folder" else (bundle / name).touch()
    with pytest.raises(BundleCorrupt, match=f"{name}.*does not list"):
        Bundle.open(bundle)


def test_what_systems_put_into_folders_is_passed_over(bundle: Path) -> None:
    (bundle / ".DS_Store").touch()
    (bundle / "lost+found").mkdir()
    Bundle.open(bundle).verify()


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("name", ["network.onnx", MANIFEST])
def test_a_symbolic_link_is_refused_even_to_the_right_bytes(bundle: Path, tmp_path: Path, name: str) -> None:
    shutil.move(bundle / name, tmp_path / "elsewhere")
    (bundle / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleCorrupt, match=f"{name} is a symbolic link"):
        sr3rt.load(bundle)


def test_a_missing_file_and_a_folder_in_its_place_are_refused(bundle: Path) -> None:
    (bundle / "network.onnx").unlink()
    with pytest.raises(BundleCorrupt, match=r"network\.onnx is missing"):
        Bundle.open(bundle).verify()
    (bundle / "network.onnx").mkdir()
    with pytest.raises(BundleCorrupt, match=r"network\.onnx is not a file"):
        Bundle.open(bundle).verify()


@pytest.mark.parametrize("name", ["../tiny.onnx", "..", ".", "/etc/hostname", "a/b", "a\\b", "", ".hidden", "a\n"])
def test_a_manifest_cannot_name_a_file_outside(bundle: Path, name: str) -> None:
    content = content_of(bundle)
    content["files"][name] = content["files"]["network.onnx"]
    sign(bundle, content)
    with pytest.raises(BundleCorrupt, match="files lists"):
        Bundle.open(bundle)


def test_a_file_that_is_not_listed_is_not_read(bundle: Path) -> None:
    with pytest.raises(BundleCorrupt, match=r"lists no '\.\./x': it has network.onnx"):
        Bundle.open(bundle).read("../x")


def test_an_opened_file_was_checked_and_stays_the_one_that_was_checked(bundle: Path) -> None:
    path = bundle / "network.onnx"
    good = path.read_bytes()
    with Bundle.open(bundle).open_file("network.onnx") as stream:
        path.unlink()
        path.write_bytes(b"other")
        assert stream.read() == good
    opened = Bundle.open(bundle)
    for data, words in ((b"other", "it has 5 bytes"), (bytes(len(good)), "its SHA-256 is")):
        path.write_bytes(data)
        with pytest.raises(BundleCorrupt, match=words):
            opened.open_file("network.onnx")
    with pytest.raises(BundleCorrupt, match="lists no"):
        opened.open_file("../x")


def test_a_newer_format_is_told_from_damage(bundle: Path) -> None:
    sign(bundle, {**content_of(bundle), "format": 2, "unknown": "field"})
    with pytest.raises(BundleIncompatible, match="format 2, this sr3rt reads up to 1: upgrade"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe\xfd", b"[]", b"null", b"1", b'"text"', b"{}", b'{"format": 1}', b"[" * 200_000, b'{"format": 1, "sha256": 5}',
     b'{"format": 1, "sha256": ""}', b'{"format": 1, "sha256": "\\ud800"}', b'{"format": {}, "sha256": []}', b"PK\x03\x04", b"1" * 5000],
    ids=lambda data: repr(data[:24]),
)  # fmt: skip
def test_what_is_no_manifest_is_one_error(bundle: Path, data: bytes) -> None:
    (bundle / MANIFEST).write_bytes(data)
    with pytest.raises(BundleCorrupt, match=r"sr3\.json is"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("channels", "3"), ("channels", 0), ("channels", -1), ("channels", 3.0), ("channels", True), ("scale", 0), ("stride", None),
        ("parameters", -1), ("bytes_per_pixel", "many"), ("format", 0), ("format", "1"), ("format", None), ("name", 5),
        ("prediction", "noise"), ("level", 3), ("level", []), ("trained", None), ("trained", []), ("parity", []), ("source", "x"),
        ("trained.kind", "spiral"), ("trained.kind", []), ("trained.steps", "2000"), ("trained.steps", 10**12), ("trained.steps", True),
        ("trained.steps", 10**40), ("trained.start", "x"), ("trained.end", 7.0), ("trained.gammas", 5), ("trained.more", 1),
        ("trained", {"kind": "gammas", "gammas": []}), ("trained", {"kind": "gammas", "gammas": ["x"]}),
        ("trained", {"kind": "gammas", "gammas": [0.5, 0.5]}), ("trained", {"kind": "gammas", "gammas": [10**400]}),
        ("defaults", None), ("defaults.steps", 0), ("defaults.steps", "3"), ("defaults.sampler", "euler"), ("defaults.sampler", None),
        ("defaults.consistency", "sometimes"), ("defaults.schedule", "linear"), ("defaults.schedule.gammas", [2.0]),
        ("files", []), ("files", {"network.onnx": None}), ("files", {"network.onnx": {"sha256": "ab" * 32}}),
        ("files", {"network.onnx": {"bytes": 442, "sha256": "AB" * 32}}), ("files", {"network.onnx": {"bytes": 442, "sha256": None}}),
        ("surprise", 1),
    ],
)  # fmt: skip
def test_a_manifest_of_wrong_types_is_one_error_though_its_hash_is_right(bundle: Path, place: str, value: object) -> None:
    content = content_of(bundle)
    *outer, last = place.split(".")
    inner = content
    for key in outer:
        inner = inner[key]
    inner[last] = value
    sign(bundle, content)
    with pytest.raises(BundleCorrupt, match="not a manifest of format 1"):
        Bundle.open(bundle)


@pytest.mark.parametrize("field", ["name", "channels", "trained", "defaults"])
def test_a_missing_field_is_one_error(bundle: Path, field: str) -> None:
    content = content_of(bundle)
    del content[field]
    sign(bundle, content)
    with pytest.raises(BundleCorrupt, match=field):
        Bundle.open(bundle)


def test_what_is_no_bundle_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFound, match="found nothing, expected a folder with sr3"):
        Bundle.open(tmp_path / "absent")
    with pytest.raises(BundleNotFound, match="found a folder without sr3"):
        Bundle.open(tmp_path)
    (tmp_path / "model.pth").touch()
    with pytest.raises(BundleNotFound, match=r"found a file, .*sr3rt export"):
        Bundle.open(tmp_path / "model.pth")


def test_a_folder_that_the_system_does_not_show_is_an_error_of_the_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cannot be read: File name too long|no bundle at"):
        Bundle.open(tmp_path / ("n" * 300))
    (tmp_path / "b").mkdir(mode=0o000)
    if os.getuid() != 0:
        with pytest.raises(BundleError, match="cannot be read: Permission denied"):
            Bundle.open(tmp_path / "b")


# --- writing


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with writing(tmp_path / "b") as folder:
            (folder / "network.onnx").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_at_the_target_until_the_end_and_nothing_beside_it_after(tmp_path: Path) -> None:
    with writing(tmp_path / "new" / "b") as folder:
        assert folder.parent == tmp_path / "new"
        assert not (tmp_path / "new" / "b").exists()
        write_manifest(folder, tiny.manifest())
    assert only_child(tmp_path / "new") == "b"
    Bundle.open(tmp_path / "new" / "b").verify()


def test_a_bundle_is_replaced_only_when_told_to(bundle: Path) -> None:
    with pytest.raises(OptionError, match=r"tiny exists: .*--overwrite"):
        tiny.write(bundle, name="other")
    assert Bundle.open(bundle).manifest.name == "tiny"
    tiny.write(bundle, name="other", overwrite=True)
    assert Bundle.open(bundle).manifest.name == "other"
    assert only_child(bundle.parent) == "tiny"


def test_a_failed_replacement_leaves_the_old_bundle(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no"):
        tiny.write(bundle, name="other", overwrite=True)
    assert Bundle.open(bundle).manifest.name == "tiny"
    assert only_child(bundle.parent) == "tiny"


def test_a_place_that_cannot_be_written_to_is_told_with_what_to_do(tmp_path: Path, read_only: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for folder, found in ((read_only, "may not be written to"), (tmp_path / "file", "is no folder")):
        for target in (folder / "b", folder / "new" / "b"):
            with pytest.raises(OptionError, match=rf"/b cannot be made, {folder} {found}: give -o a name elsewhere"), writing(target):
                pass


def test_what_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    (tmp_path / "file").touch()
    for name in ("photos", "file"):
        for overwrite in (False, True):
            with pytest.raises(OptionError, match="not a bundle"):
                tiny.write(tmp_path / name, overwrite=overwrite)
    tiny.write(tmp_path / "b")
    (tmp_path / "link").symlink_to("b")
    with pytest.raises(OptionError, match="link is a symbolic link"):
        tiny.write(tmp_path / "link", overwrite=True)
    assert (tmp_path / "photos" / "a.png").exists()
    assert (tmp_path / "file").exists()


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".b.partial").mkdir()
    (tmp_path / ".b.partial" / "network.onnx").touch()
    (tmp_path / ".b.lock").touch()
    (tmp_path / ".c.partial").mkdir()  # another target's
    tiny.write(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".c.partial", "b"]


def test_a_bundle_that_a_killed_writer_had_moved_away_comes_back(bundle: Path) -> None:
    bundle.rename(bundle.with_name(".tiny.old"))
    with pytest.raises(OptionError, match="exists"):
        tiny.write(bundle, name="other")
    assert Bundle.open(bundle).manifest.name == "tiny"
    assert only_child(bundle.parent) == "tiny"


def test_two_writers_exclude_each_other(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".b.lock"), pytest.raises(OptionError, match="being written by another process"):
        tiny.write(tmp_path / "b")
    tiny.write(tmp_path / "b")
    Bundle.open(tmp_path / "b").verify()


def test_a_killed_writer_leaves_a_whole_bundle_or_none(tmp_path: Path) -> None:
    """kill -9 at random moments of writing and replacing, without a pause; SR3RT_KILLS sets how many."""
    code = "import sys, itertools; from pathlib import Path; import tiny; print('.', flush=True)\n"
    code += "for i in itertools.count(): tiny.write(Path(sys.argv[1]), name=str(i), overwrite=True)"
    target = tmp_path / "b"
    for seed in range(int(os.environ.get("SR3RT_KILLS", "6"))):
        with subprocess.Popen([sys.executable, "-c", code, target], cwd=Path(__file__).parent, stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.read(1) == b"."
            time.sleep(random.Random(seed).uniform(0, 0.1))
            writer.kill()
        if target.exists():
            Bundle.open(target).verify()
        tiny.write(target, name="after", overwrite=True)
        assert Bundle.open(target).manifest.name == "after"
        assert only_child(tmp_path) == "b"
