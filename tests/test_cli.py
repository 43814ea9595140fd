"""The command line, with a bundle whose network takes no time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from sr3rt import cli, upscaler
from sr3rt.bundle import Bundle

ROOT = Path(__file__).resolve().parents[1]

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("bundle") / "tiny [4x]")


@pytest.fixture
def sr3rt(capsys: pytest.CaptureFixture[str]) -> Command:
    """`sr3rt("info", path)` runs a command line in this process: exit status, stdout, stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.run_command(cli.app, [str(argument) for argument in arguments])
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def upscale(sr3rt: Command, bundle: Path) -> Command:
    return lambda *arguments: sr3rt("upscale", "-m", bundle, *arguments)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with a.png (10×6), b.jpg (7×9), a file that is no picture, and one that only looks like one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 10, 3), np.uint8)
    Image.fromarray(pixels[:6]).save(folder / "a.png")
    Image.fromarray(pixels[:, :7]).save(folder / "b.jpg")
    (folder / "notes.txt").write_text("hello")
    return folder


def one_line(text: str) -> bool:
    return text.count("\n") == 1 and text.startswith("sr3rt: ") and "Traceback" not in text


# --- upscale


def test_a_picture_is_upscaled_without_a_word(upscale: Command, photos: Path, tmp_path: Path) -> None:
    """stderr is no terminal here."""
    assert upscale("-i", photos / "a.png", "-o", tmp_path / "new" / "folder" / "out.png", "--seed", "1") == (0, "", "")
    assert Image.open(tmp_path / "new" / "folder" / "out.png").size == (40, 24)
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["out.png"]


def test_the_result_is_that_of_the_call(upscale: Command, bundle: Path, photos: Path, tmp_path: Path) -> None:
    options = ("--steps", "4", "--sampler", "ddim", "--seed", "7", "--consistency", "every", "--threads", "1")
    assert upscale("-i", photos / "a.png", "-o", tmp_path / "out.png", *options)[0] == 0
    expected = upscaler.load(bundle).upscale(photos / "a.png", steps=4, sampler="ddim", seed=7, consistency="every")
    assert (np.asarray(Image.open(tmp_path / "out.png")) == np.asarray(expected)).all()


def test_a_picture_goes_into_a_folder_under_its_own_name(upscale: Command, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert upscale("-i", photos / "b.jpg", "-o", tmp_path / "out")[0] == 0
    assert Image.open(tmp_path / "out" / "b.png").size == (28, 36)


def test_a_folder_is_upscaled_and_other_files_are_left_alone(upscale: Command, photos: Path, tmp_path: Path) -> None:
    (photos / "b.png").write_bytes((photos / "a.png").read_bytes())
    assert upscale("-i", photos, "-o", tmp_path / "out") == (0, "", "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.jpg.png", "b.png.png"]


def test_pictures_that_are_not_read_are_named_and_hidden_files_are_not_looked_at(upscale: Command, photos: Path, tmp_path: Path) -> None:
    (photos / "._a.png").write_bytes(b"\x00\x05\x16\x07")
    for name in ("moving.gif", "x.AVIF", "._x.gif"):
        (photos / name).touch()
    said = "2 in formats that are not read are passed over: moving.gif, x.AVIF\n"
    assert upscale("-i", photos, "-o", tmp_path / "out") == (0, "", said)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.png"]


def test_two_pictures_never_become_one(upscale: Command, photos: Path, tmp_path: Path) -> None:
    for name in ("b.jpg.bmp", "b.png"):
        Image.new("RGB", (4, 4)).save(photos / name)
    status, _, said = upscale("-i", photos, "-o", tmp_path / "out")
    assert status == 1 and re.search(r"b\.jpg and .*b\.jpg\.bmp would both become .*b\.jpg\.png: rename one", said)
    assert not (tmp_path / "out").exists()


def test_a_picture_is_not_replaced_by_its_result(upscale: Command, photos: Path) -> None:
    before = (photos / "a.png").read_bytes()
    status, _, said = upscale("-i", photos / "a.png", "-o", photos / "a.png", "--overwrite", "--compare")
    assert status == 1 and "is the picture itself: give -o another name" in said
    assert (photos / "a.png").read_bytes() == before


@pytest.mark.parametrize(
    ("mode", "size", "target", "words"),
    [
        ("RGBA", (4, 4), "out.jpg", "JPEG cannot hold a picture of mode RGBA"),
        ("L", (4096, 1), "out.webp", r"WEBP holds sides of up to 16383 pixels, the result has 16384×4: write it as \.png"),
    ],
)
def test_what_a_format_cannot_hold_is_said_before_the_work(
    upscale: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, size: tuple[int, int], target: str, words: str
) -> None:
    monkeypatch.setattr(upscaler.Upscaler, "run", None)
    Image.new(mode, size).save(tmp_path / "in.png")
    status, _, said = upscale("-i", tmp_path / "in.png", "-o", tmp_path / target)
    assert status == 1 and re.search(words, said)


def test_a_folder_that_may_not_be_written_to_is_refused_before_any_work(upscale: Command, photos: Path, read_only: Path) -> None:
    assert upscale("-i", photos / "a.png", "-o", read_only) == (
        1,
        "",
        f"sr3rt: the folder {read_only} may not be written to: give -o another\n",
    )


def test_neither_a_file_nor_a_folder(upscale: Command, tmp_path: Path) -> None:
    assert upscale("-i", "/dev/null", "-o", tmp_path)[2] == "sr3rt: /dev/null is neither a picture file nor a folder of pictures\n"


def test_a_bad_picture_is_reported_and_the_others_go_on(upscale: Command, photos: Path, tmp_path: Path) -> None:
    (photos / "aa.png").write_bytes((photos / "a.png").read_bytes()[:60])
    (photos / "c.png").write_text("no picture")
    status, _, said = upscale("-i", photos, "-o", tmp_path / "out")
    assert status == 1
    first, second, last = said.splitlines()
    assert "aa.png" in first and "c.png" in second
    assert last == "sr3rt: 2 of 4 pictures failed"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "b.png"]


def test_existing_outputs_are_skipped_unless_told_otherwise(upscale: Command, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").write_text("mine")
    status, _, said = upscale("-i", photos, "-o", tmp_path / "out")
    assert (status, said) == (0, "1 of 2 outputs exist and are skipped (--overwrite replaces them)\n")
    assert (tmp_path / "out" / "a.png").read_text() == "mine"
    assert upscale("-i", photos, "-o", tmp_path / "out", "--overwrite")[0] == 0
    assert Image.open(tmp_path / "out" / "a.png").size == (40, 24)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-m", "none"), "none"),
        (("-n", "0"), "steps must be between 1 and"),
        (("--seed", "-1"), "seed must be"),
        (("-t", "3"), "tile must be"),
    ],
)
def test_what_is_asked_wrongly_is_told_before_any_folder_is_made_and_where_nothing_is_to_be_done(
    upscale: Command, photos: Path, tmp_path: Path, options: tuple[str, str], words: str
) -> None:
    status, _, said = upscale("-i", photos, "-o", tmp_path / "out", *options)
    assert (status, words in said, (tmp_path / "out").exists()) == (1, True, False)
    (tmp_path / "out.png").touch()
    status, _, said = upscale("-i", photos / "a.png", "-o", tmp_path / "out.png", *options)
    assert (status, words in said) == (1, True)


def test_what_the_terminal_has_no_sign_for_ends_nothing() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "sr3rt", "info"], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr, b"?" in done.stdout) == (0, b"", True)


def test_the_run_is_noted_in_the_picture(upscale: Command, bundle: Path, photos: Path, tmp_path: Path) -> None:
    upscale("-i", photos / "a.png", "-o", tmp_path / "out.png", "--seed", "5", "-n", "2")
    notes = {key: value for key, value in Image.open(tmp_path / "out.png").info.items() if key.startswith("sr3rt:")}
    assert notes == {
        "sr3rt:bundle": Bundle.open(bundle).sha256,
        "sr3rt:seed": "5",
        "sr3rt:steps": "2",
        "sr3rt:sampler": "ddim(0.5)",
        "sr3rt:consistency": "final",
        "sr3rt:precision": "fp32",
    }


def test_two_models_are_a_cascade(upscale: Command, bundle: Path, photos: Path, tmp_path: Path) -> None:
    assert upscale("-m", bundle, "-i", photos / "a.png", "-o", tmp_path / "out.png", "-n", "2", "-n", "1")[0] == 0
    picture, original = Image.open(tmp_path / "out.png"), Image.open(photos / "a.png")
    assert picture.size == (original.width * 16, original.height * 16)
    assert (picture.info["sr3rt:before:steps"], picture.info["sr3rt:steps"]) == ("2", "1")


def test_the_seed_that_was_drawn_makes_the_same_picture_again(upscale: Command, photos: Path, tmp_path: Path) -> None:
    upscale("-i", photos / "a.png", "-o", tmp_path / "one.png")
    seed = Image.open(tmp_path / "one.png").info["sr3rt:seed"]
    upscale("-i", photos / "a.png", "-o", tmp_path / "two.png", "--seed", seed)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_a_sheet_of_compare_is_written_over_nothing(upscale: Command, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out-compare.png").write_bytes(b"kept")
    assert upscale("-i", photos / "a.png", "-o", tmp_path / "out.png", "--compare")[0] == 0
    assert (tmp_path / "out-compare.png").read_bytes() == b"kept" and not (tmp_path / "out.png").exists()
    assert upscale("-i", photos / "a.png", "-o", tmp_path / "out.png", "--compare", "--overwrite")[0] == 0
    before = (photos / "a.png").read_bytes()
    (photos / "o-compare.png").write_bytes(before)
    status, _, said = upscale("-i", photos / "o-compare.png", "-o", photos / "o.png", "--compare", "--overwrite")
    assert status == 1 and re.search(r"o-compare\.png is the picture itself", said)
    (photos / "a-compare.png").write_bytes(before)
    status, _, said = upscale("-i", photos, "-o", tmp_path / "results", "--compare")
    assert status == 1 and re.search(r"a-compare\.png and .*a\.png would both become|a\.png and .*a-compare\.png would both become", said)
    assert (photos / "o-compare.png").read_bytes() == before


@pytest.mark.parametrize("compare", [(), ("--compare",)])
def test_no_provenance_leaves_no_word_in_any_file(compare: tuple[str, ...], upscale: Command, photos: Path, tmp_path: Path) -> None:
    upscale("-i", photos / "a.png", "-o", tmp_path / "out.png", "--no-provenance", *compare)
    for path in tmp_path.glob("*.png"):
        assert b"sr3rt" not in path.read_bytes()
        assert Image.open(path).info == {}


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "1", "I;16", "RGBA"])
def test_compare_shows_input_bicubic_and_result(mode: str, upscale: Command, tmp_path: Path) -> None:
    rows, columns = np.mgrid[:6, :10]
    grey = Image.fromarray((rows * 30 + columns * 8).astype(np.uint8))
    picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    picture.save(tmp_path / "in.png")
    assert upscale("-i", tmp_path / "in.png", "-o", tmp_path / "out.png", "--compare", "--seed", "1") == (0, "", "")
    sheet = Image.open(tmp_path / "out-compare.png")
    assert (sheet.mode, sheet.size) == ("RGB", (3 * 40 + 8, 24))
    pixels = np.asarray(sheet).astype(int)
    shown = np.asarray(picture.convert("L") if mode == "1" else grey).astype(int)
    assert (pixels[2::4, 2:40:4, 0] == shown).all()  # the input, each pixel 4×4
    assert (pixels[:, 40:44] == 255).all()
    bicubic = Image.fromarray(shown.astype(np.uint8)).resize((40, 24), Image.Resampling.BICUBIC)
    assert abs(pixels[:, 44:84, 0] - np.asarray(bicubic).astype(int)).max() <= 1
    result = np.round(np.asarray(Image.open(tmp_path / "out.png")) / (257 if mode == "I;16" else 1)).astype(int)
    assert (pixels[:, 88:, 0] == (result if result.ndim == 2 else result[..., 0])).all()


# --- what cannot be done: one line, a status, no traceback


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("-i", "none.png", "-o", "out.png"), "there is no none.png"),
        (("-i", "photos/a.png", "-o", "out.gif"), "out.gif is no folder and its suffix names no format"),
        (("-i", "photos/a.png", "-o", "out"), "out is no folder and its suffix names no format"),
        (("-i", "photos", "-o", "photos"), "photos is the folder with the pictures"),
        (("-i", "photos", "-o", "photos/a.png"), "photos/a.png is a file: give -o a folder"),
        (("-i", "empty", "-o", "out"), "empty holds no pictures"),
        (("-i", "photos", "-o", "out.png"), "photos is a folder and out.png a picture's name: give -o a folder"),
        (
            ("-i", "photos/a.png", "-o", "photos/a.png/out.png"),
            "the folder photos/a.png cannot be made (File exists): give -o another name",
        ),
        (("-i", "photos/a.png", "-o", "o" * 300 + ".png"), ".png cannot be used (File name too long): give another name"),
        (
            ("-i", "photos/a.png", "-o", "out.png", "--backend", "torch", "--device", "cpu"),
            "the torch backend runs on a GPU, device 'cpu' was",
        ),
        (("-i", "photos/a.png", "-o", "out.png", "-n", "101"), "steps must be between 1 and the 100"),
        (("-i", "photos/a.png", "-o", "out.png", "--sampler", "euler"), "unknown sampler 'euler'"),
        (("-i", "photos/a.png", "-o", "out.png", "--seed", "-1"), "seed must be"),
        (("-i", "photos/a.png", "-o", "out.png", "--backend", "cuda"), "unknown backend 'cuda'"),
        (("-i", "photos/a.png", "-o", "out.png", "--precision", "fp8"), "unknown precision 'fp8': expected auto, fp32, fp16, bf16"),
        (("-i", "photos/a.png", "-o", "out.png", "--threads", "-1"), "threads must be"),
        (("-i", "photos/notes.txt", "-o", "out.png"), "photos/notes.txt"),
    ],
)
def test_an_error_is_one_line(
    arguments: tuple[str, ...], expected: str, upscale: Command, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    Path("empty").mkdir()
    status, said, complaint = upscale(*arguments)
    assert (status, said) == (1, "")
    assert one_line(complaint)
    assert expected in complaint
    assert not Path("out.png").exists()


@pytest.mark.parametrize("arguments", [("-m", "none"), ("-m", "photos"), ("-m", "photos/a.png")])
def test_a_bad_bundle_is_one_line(arguments: tuple[str, str], sr3rt: Command, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    for command in (("upscale", "-i", "photos/a.png", "-o", "out.png", *arguments), ("info", arguments[1])):
        status, said, complaint = sr3rt(*command)
        assert (status, said) == (1, "")
        assert one_line(complaint)
        assert "no bundle at" in complaint


@pytest.mark.parametrize(
    "arguments",
    [("upscale",), ("upscale", "-i", "a.png"), ("upscale", "-i", "", "-o", "b.png"), ("upscale", "-i", "a.png", "-o", ""),
     ("upscale", "-i", "a", "-o", "b", "-n", "many"), ("upscale", "-i", "a", "-o", "b", "--empty-steps"), ("unknown",), ("info", "a", "b"),
     ("upscale", "-i", "a", "-o", "b", "--consistency", "often"), ("upscale", "-i", "a", "-o", "b", "--unknown", "1")],
)  # fmt: skip
def test_wrong_usage_is_status_2(arguments: tuple[str, ...], sr3rt: Command) -> None:
    status, said, complaint = sr3rt(*arguments)
    assert status == 2
    assert "Error" in said + complaint
    assert "Traceback" not in said + complaint


def test_a_warning_is_one_line(upscale: Command, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "in.ppm")
    head = b"P6 4 4 65535\n"
    (tmp_path / "in.ppm").write_bytes(head + bytes(4 * 4 * 6))
    status, _, said = upscale("-i", tmp_path / "in.ppm", "-o", tmp_path / "out.png")
    assert status == 0
    assert re.fullmatch(r"sr3rt: warning: .*in\.ppm.*\n", said)


def test_an_interruption_is_status_130(upscale: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(upscaler.Upscaler, "run", interrupt)
    assert upscale("-i", photos, "-o", tmp_path / "out") == (130, "", "")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interruption_before_anything_began_is_status_130_too() -> None:
    interrupted = (
        "import builtins, signal, os; given = builtins.__import__\n"
        "def of(name, *rest): os.kill(os.getpid(), signal.SIGINT) if name == 'cyclopts' else None; return given(name, *rest)\n"
        "builtins.__import__ = of; from sr3rt.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", interrupted], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


# --- info, doctor, export


def test_info_says_what_a_bundle_is_and_verifies_it(sr3rt: Command, bundle: Path) -> None:
    status, said, _ = sr3rt("info", bundle)
    flat = re.sub(r"[\s│]+", " ", said)
    assert status == 0
    facts = ("tiny [4x]", "3 parameters", "100 steps", "ddim(0.5)", "1.2e-07", "groups: one of [1, 2]", "[bold]none[/bold]", "verified")
    for fact in facts:
        assert fact in flat
    assert Bundle.open(bundle).sha256 in re.sub(r"[\s│]+", "", said)


def test_info_of_a_damaged_bundle_is_an_error(sr3rt: Command, tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "b")
    (path / "network.onnx").write_bytes(bytes(442))
    status, said, complaint = sr3rt("info", path)
    assert (status, said) == (1, "")
    assert one_line(complaint) and "is damaged" in complaint


def test_doctor_says_what_works(sr3rt: Command, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upscaler, "SHIPPED", bundle)
    status, said, _ = sr3rt("doctor")
    assert status == 0
    assert re.search(r"backend onnxruntime *│ works", said)
    assert re.search(rf"numpy *│ {re.escape(np.__version__)}", said)


def test_doctor_says_why_a_backend_does_not_work(sr3rt: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upscaler, "SHIPPED", tmp_path / "none")
    status, said, _ = sr3rt("doctor")
    assert status == 1
    assert re.search(r"backend onnxruntime *│ cannot run: no bundle at", said)


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""


@pytest.mark.parametrize(
    ("start", "arguments"),
    [
        ("import sr3rt.cli; sr3rt.cli.main()", ["export", "x.pth"]),
        ("import runpy; runpy.run_path('export/to_onnx.py', run_name='__main__')", ["x.pth"]),
    ],
    ids=["sr3rt export", "export/to_onnx.py"],
)
def test_export_without_torch_names_the_pip_command(start: str, arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED + start, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert """export needs the package 'torch', which is not installed: run  pip install "sr3rt[cpu,export]\"""" in done.stderr


def test_bench_prints_the_bundle_s_figures_here(sr3rt: Command, bundle: Path) -> None:
    status, out, err = sr3rt("bench", bundle, "--size", "32", "--batch", "2", "--seconds", "0.2")
    assert status == 0, err
    for text in ("32×32, batch 2", "onnxruntime, fp32", "step, p50", "outside the network", "pictures/s at"):
        assert text in out


def test_bench_refuses_a_size_that_the_network_cannot_have(sr3rt: Command, bundle: Path) -> None:
    status, _, err = sr3rt("bench", bundle, "--size", "0")
    assert status == 1 and one_line(err)
    assert "found size 0" in err


def test_help_needs_no_extra() -> None:
    start = BLOCKED + "import sr3rt.cli; sr3rt.cli.main()"
    done = subprocess.run([sys.executable, "-c", start, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in ("upscale", "info", "doctor", "bench", "export"))


def test_the_installed_command_upscales(bundle: Path, photos: Path, tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("sr3rt"), "upscale", "-m", bundle, "-i", photos / "a.png", "-o", tmp_path / "out.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert Image.open(tmp_path / "out.png").size == (40, 24)


def test_the_export_script_explains_itself() -> None:
    done = subprocess.run([sys.executable, "export/to_onnx.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    if "pip install" in done.stderr:
        pytest.skip("torch is not installed")
    assert done.returncode == 0
    assert "--norm-groups" in done.stdout
