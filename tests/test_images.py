"""Every kind of picture comes in, becomes the network's arrays, and goes back in the form that it came in."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from sr3rt.images import Picture, condition, padded, read, restore
from sr3rt.saving import save

PHOTOGRAPH = Path(__file__).parent / "data" / "kodim23_crop.png"
BICUBIC = Image.Resampling.BICUBIC


def photograph(mode: str = "RGB") -> Image.Image:
    with Image.open(PHOTOGRAPH) as image:
        return image.convert(mode)


def reopened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def pixels() -> NDArray[np.uint8]:
    return np.array(photograph())


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def bicubic(image: Any, scale: int = 4) -> Any:
    """Through the whole of our own path, with the condition in place of a prediction."""
    picture = read(image)
    return restore(picture, condition(picture, scale=scale, stride=8).x, scale=scale)


def tiny_png(width: int, height: int, *, bits: int = 8, rows: bytes = bytes(9)) -> bytes:
    """An RGB PNG of a few bytes, whatever size it claims."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


# --- the network's convention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
def test_the_condition_of_8_bits_is_pils_bicubic_exactly(scale: int) -> None:
    image = photograph()
    expected = np.asarray(image.resize((96 * scale, 72 * scale), BICUBIC)).astype(np.float32) / 255 * 2 - 1
    made = condition(read(image), scale=scale, stride=4)
    assert made.x.dtype == np.float32
    assert made.x.flags.c_contiguous
    assert np.array_equal(made.x, expected.transpose(2, 0, 1))
    assert np.array_equal(made.lr, (pixels().astype(np.float32) / 255 * 2 - 1).transpose(2, 0, 1))
    assert made.size == (72 * scale, 96 * scale)


def test_the_8_bit_result_is_the_references_rounding() -> None:
    y0 = np.random.default_rng(0).uniform(-1.2, 1.2, (3, 288, 384)).astype(np.float32)
    y0[0, 0, :3] = [-1 + 1 / 255, -1 + 3 / 255, -1 + 5 / 255]  # halves: to even
    expected = ((y0.clip(-1, 1) + 1) / 2 * 255.0).round().astype(np.uint8).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(restore(read(photograph()), y0, scale=4)), expected)


def test_16_bits_keep_their_precision_and_agree_with_the_8_bit_convention() -> None:
    fine = (pixels().astype(np.uint16) * 257).clip(3) - 3  # off the 8-bit grid
    picture = read(fine)
    assert picture.colour.dtype == np.uint16
    assert np.array_equal(np.asarray(restore(picture, condition(picture, scale=1, stride=1).x, scale=1)), fine)
    deep, shallow = (
        condition(read(pixels().astype(np.uint16) * 257), scale=4, stride=8),
        condition(read(pixels()), scale=4, stride=8),
    )
    assert np.abs(deep.x - shallow.x).max() <= 1.2 * 2 / 255  # the 8-bit path rounds twice
    assert deep.x.min() >= -1
    assert deep.x.max() <= 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_keep_their_dtype_and_values(dtype: type[np.floating[Any]]) -> None:
    array = (pixels() / 255).astype(dtype)
    result = bicubic(array, scale=1)
    assert result.dtype == dtype
    np.testing.assert_allclose(result, array, rtol=0, atol=1e-3 if dtype is np.float16 else 2e-7)


# --- padding ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "scale", "stride", "minimum", "expected"),
    [
        (64, 4, 8, None, 64),
        (65, 4, 8, None, 66),
        (1, 4, 16, None, 4),
        (5, 3, 8, None, 8),
        (5, 8, 8, None, 5),
        (7, 1, 16, None, 16),
        (1, 4, 8, 64, 16),
        (17, 4, 8, 64, 18),
        (1, 4, 8, 60, 16),
        (3, 4, 1, None, 3),
    ],
)
def test_the_canvas_is_the_smallest_that_the_network_takes(
    length: int, scale: int, stride: int, minimum: int | None, expected: int
) -> None:
    assert padded(length, scale=scale, stride=stride, minimum=minimum) == expected
    assert expected * scale % stride == 0
    assert expected * scale >= (minimum or stride)


def test_padding_leaves_the_top_left_in_place_and_makes_no_seam() -> None:
    image = photograph().crop((0, 0, 61, 45))
    made = condition(read(image), scale=4, stride=32)
    assert made.x.shape == (3, 192, 256)
    assert made.lr.shape == (3, 48, 64)
    assert made.size == (180, 244)
    plain = np.asarray(image.resize((244, 180), BICUBIC)).astype(np.float32) / 255 * 2 - 1
    inside = np.s_[:, :172, :236]  # the kernel reaches two low-res pixels
    assert np.array_equal(made.x[inside], plain.transpose(2, 0, 1)[inside])
    mirrored = np.pad(np.asarray(image), ((0, 3), (0, 3), (0, 0)), mode="reflect")
    expected = np.asarray(Image.fromarray(mirrored).resize((256, 192), BICUBIC)).astype(np.float32) / 255 * 2 - 1
    assert np.array_equal(made.x, expected.transpose(2, 0, 1))


def test_a_picture_smaller_than_its_padding_has_its_border_repeated() -> None:
    made = condition(read(np.array([[10], [200]], np.uint8)), scale=4, stride=16)
    assert made.lr.shape == (3, 4, 4)
    assert np.array_equal(made.lr[0], made.lr[0][:, :1].repeat(4, axis=1))
    assert np.allclose((made.lr[0, :, 0] + 1) * 127.5, [10, 200, 200, 200])


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 3), (33, 18)])
def test_any_size_comes_back_scaled(shape: tuple[int, int]) -> None:
    array = pixels()[: shape[0], : shape[1]]
    assert bicubic(array).shape == (shape[0] * 4, shape[1] * 4, 3)


# --- kinds of picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("1", "L"),
        ("L", "L"),
        ("LA", "LA"),
        ("La", "LA"),
        ("P", "RGB"),
        ("PA", "RGBA"),
        ("RGB", "RGB"),
        ("RGBX", "RGB"),
        ("RGBA", "RGBA"),
        ("RGBa", "RGBA"),
        ("CMYK", "RGB"),
        ("YCbCr", "RGB"),
        ("HSV", "RGB"),
        ("F", "F"),
        ("I;16", "I;16"),
    ],
)
def test_a_pil_image_gives_a_pil_image_of_the_fitting_mode(mode: str, expected: str) -> None:
    if mode == "F":
        image = Image.fromarray(np.asarray(photograph("L"), dtype=np.float32) / 255)
    elif mode == "I;16":
        image = Image.fromarray(np.asarray(photograph("L")).astype(np.uint16) * 257)
    else:
        via = {"La": "LA", "PA": "P", "RGBa": "RGBA"}.get(mode, "RGB")
        image = photograph(via).convert(mode)
    result = bicubic(image)
    assert isinstance(result, Image.Image)
    assert (result.mode, result.size) == (expected, (384, 288))


def test_grey_is_replicated_for_the_network_and_comes_back_as_pils_luma() -> None:
    picture = read(photograph("L"))
    assert picture.grey
    assert np.array_equal(picture.colour[..., 0], picture.colour[..., 2])
    coloured = condition(read(photograph()), scale=1, stride=1).x  # a network may colour a grey picture
    assert np.array_equal(np.asarray(restore(picture, coloured, scale=1)), np.asarray(photograph("L")))
    deep = restore(read(np.zeros((72, 96), np.uint16)), coloured, scale=1)
    assert np.abs(np.asarray(deep) / 257 - np.asarray(photograph("L"))).max() <= 0.51


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.dtype(">u2"), np.float32])
@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4])
def test_an_array_gives_an_array_of_its_dtype_and_channels(dtype: Any, channels: int | None) -> None:
    source = np.concatenate([pixels(), pixels()[..., :1]], axis=2)
    array = source[..., 0] if channels is None else source[..., :channels]
    array = (array / 255).astype(dtype) if dtype is np.float32 else array.astype(dtype)
    result = bicubic(array, scale=1)
    assert result.dtype == dtype
    np.testing.assert_allclose(result, array, rtol=0, atol=2e-7 if dtype is np.float32 else 0)


def test_alpha_is_upscaled_bicubically_beside_the_colour() -> None:
    image = photograph("RGBA")
    image.putalpha(photograph("L"))
    result = np.asarray(bicubic(image))
    assert np.array_equal(result[..., 3], np.asarray(photograph("L").resize((384, 288), BICUBIC)))
    assert np.array_equal(result[..., :3], np.asarray(photograph().resize((384, 288), BICUBIC)))


def test_a_transparent_palette_or_colour_becomes_alpha() -> None:
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), mode=None).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0])
    for transparency in (0, b"\x00\xff"):
        result = np.asarray(bicubic(encoded(palette, "PNG", transparency=transparency), scale=1))
        assert result.tolist() == [[[0, 255, 0, 0], [0, 255, 0, 255]], [[0, 255, 0, 255], [0, 255, 0, 0]]]
    grey = Image.fromarray(np.array([[7, 8]], np.uint8))
    assert np.asarray(bicubic(encoded(grey, "PNG", transparency=7), scale=1)).tolist() == [[[8, 0], [8, 255]]]
    one_bit = grey.point(lambda value: 255 * (value > 7)).convert("1")
    assert np.asarray(bicubic(encoded(one_bit, "PNG", transparency=0), scale=1)).tolist() == [[[255, 0], [255, 255]]]
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert np.asarray(bicubic(encoded(rgb, "PNG", transparency=(1, 2, 3)), scale=1))[..., 3].tolist() == [[0, 255]]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_colours_that_transparency_hides_do_not_show_at_edges(kind: type) -> None:
    most = 1 if kind is np.float32 else np.iinfo(kind).max
    cut_out = np.zeros((23, 38, 4), kind)
    cut_out[5:16, 9:20] = (most, 0.5 * most, 0, most)  # on black, which nobody sees
    cut_out[12:, 30:] = (0, most, most, most)
    result = bicubic(cut_out, scale=4).astype(np.float64) / most
    seen = result[..., 3] > 0.01
    left = seen & (np.arange(152) < 100)
    assert np.abs(result[left, :3] - (1, 0.5, 0)).max() < 0.02
    assert np.abs(result[seen & ~left, :3] - (0, 1, 1)).max() < 0.02
    blank = np.zeros((3, 5, 4), kind)
    assert not bicubic(blank, scale=2).any()  # nothing is seen


def test_16_bit_grey_files_keep_16_bits() -> None:
    deep = np.asarray(photograph("L")).astype(np.uint16) * 257 + 5 * (np.asarray(photograph("L")) < 255)
    image = Image.fromarray(deep.astype(np.uint16))
    ppm = b"P5 96 72 65535\n" + deep.astype(">u2").tobytes()
    for data in (encoded(image, "PNG"), encoded(image, "TIFF"), ppm):
        result = bicubic(data, scale=1)
        assert result.mode == "I;16"
        assert np.array_equal(np.asarray(result), deep)


def test_16_bit_colour_files_are_read_at_8_bits_with_a_warning() -> None:
    pixel = struct.pack(">3H", 0x1234, 0x8000, 0xFFFF)
    for data in (b"P6 1 1 65535\n" + pixel, tiny_png(1, 1, bits=16, rows=b"\0" + pixel)):
        with pytest.warns(UserWarning, match="16 bits per channel, read at 8"):
            assert np.array_equal(read(data).colour, [[[0x12, 0x80, 0xFF]]])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM"])
def test_the_accepted_formats_read_as_bytes_and_as_paths(format: str, tmp_path: Path) -> None:
    data = encoded(photograph(), format)
    (tmp_path / "photograph.of.some.kind").write_bytes(data)
    for image in (data, bytearray(data), tmp_path / "photograph.of.some.kind", str(tmp_path / "photograph.of.some.kind")):
        picture = read(image)
        assert np.array_equal(picture.colour, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        assert picture.dtype is None
        assert picture.alpha is None
        assert not picture.grey


def test_a_cmyk_jpeg_becomes_rgb_without_its_profile() -> None:
    data = encoded(photograph("CMYK"), "JPEG", quality=95, icc_profile=b"of CMYK")
    result = bicubic(data)
    assert result.mode == "RGB"
    assert "icc_profile" not in result.info
    assert np.abs(np.asarray(result.resize((96, 72), BICUBIC)).astype(int) - pixels()).mean() < 6


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_the_icc_profile_is_kept_into_the_file(suffix: str, tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    result = bicubic(encoded(photograph(), "PNG", icc_profile=profile))
    assert result.info["icc_profile"] == profile
    save(result, tmp_path / f"out{suffix}")
    assert reopened(tmp_path / f"out{suffix}").info["icc_profile"] == profile


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(format: str, orientation: int) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 250  # top left
    # The stored picture, whose rows and columns the EXIF specification names for each value.
    stored = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud}
    stored |= {
        5: lambda a: a.swapaxes(0, 1),
        6: np.rot90,
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored[orientation](upright)))
    data = encoded(image, format, exif=exif.tobytes(), **({"quality": 95} if format in ("JPEG", "WEBP") else {}))
    assert np.abs(read(data).colour.astype(int) - upright).mean() < 4
    assert np.abs(read(Image.open(io.BytesIO(data))).colour.astype(int) - upright).mean() < 4


def test_damaged_exif_data_does_not_refuse_the_pixels() -> None:
    data = encoded(photograph(), "PNG", exif=b"Exif\0\0nonsense")
    assert np.array_equal(read(data).colour, pixels())


def test_a_phones_multi_picture_jpeg_is_its_first_picture() -> None:
    data = encoded(photograph(), "MPO", save_all=True, append_images=[photograph().crop((0, 0, 8, 8))])
    assert read(data).colour.shape == (72, 96, 3)
    assert read(Image.open(io.BytesIO(data))).colour.shape == (72, 96, 3)


def test_the_callers_array_may_change_afterwards() -> None:
    array = pixels()
    picture = read(array)
    array[:] = 0
    assert np.array_equal(picture.colour, pixels())


def test_a_picture_says_its_size() -> None:
    picture = read(PHOTOGRAPH)
    assert isinstance(picture, Picture)
    assert (picture.height, picture.width) == (72, 96)
