"""The example that compresses pictures: exact round trips, and one line for what is refused."""

from __future__ import annotations

import importlib.util
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

image = pytest.importorskip("PIL.Image")
zstandard = pytest.importorskip("zstandard")

EXAMPLE = Path(__file__).parent.parent / "examples" / "compress_image.py"


def load():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("compress_image", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


example = load()


def picture(height: int = 21, width: int = 30, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (5 + c) + c) + np.cos(y / 7 + seed) for c in range(channels)]
    noise = rng.normal(0, 8, (height, width, channels))
    return (110 + 50 * np.stack(waves, 2) + noise).clip(0, 255).astype(np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(path)
    return path


def quantised(pixels: np.ndarray, book) -> np.ndarray:
    """Each patch replaced by the code with the smallest sum of squared differences."""
    patch = book.patch
    height, width, channels = pixels.shape
    padded = np.pad(pixels, ((0, -height % patch), (0, -width % patch), (0, 0)), mode="edge")
    restored = np.empty_like(padded)
    for top in range(0, height, patch):
        for left in range(0, width, patch):
            block = padded[top : top + patch, left : left + patch].astype(np.int64)
            errors = np.square(book.codes - block.reshape(1, -1)).sum(1)
            code = book.codes[errors.argmin()].reshape(patch, patch, channels)
            restored[top : top + patch, left : left + patch] = code
    return restored[:height, :width]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (3, 50), (16, 24), (21, 30)])
@pytest.mark.parametrize("patch", [1, 4, 5])
def test_round_trip_is_the_quantised_picture(channels, size, patch):
    pixels = picture(*size, channels)
    book = example.learn([pixels], 12, patch)
    assert 1 <= len(book.codes) <= 12
    expected = quantised(pixels, book)
    for shared in (False, True):
        packed = example.compress(pixels, book, shared=shared)
        restored = example.decompress(packed.data, book if shared else None)
        np.testing.assert_array_equal(restored, expected)


def test_more_codes_than_a_byte_counts():
    pixels = picture(64, 64, 1)
    book = example.learn([pixels], 700, 2)
    assert len(book.codes) > 256
    packed = example.compress(pixels, book, shared=False)
    assert packed.indices.max() > 255
    np.testing.assert_array_equal(example.decompress(packed.data), quantised(pixels, book))


PIXELS = picture()
BOOK = example.learn([PIXELS], 12, 4)
PACKED = {s: example.compress(PIXELS, BOOK, shared=s).data for s in (False, True)}


@given(st.data())
def test_a_damaged_byte_is_detected(data):
    shared = data.draw(st.booleans())
    damaged = bytearray(PACKED[shared])
    position = data.draw(st.integers(0, len(damaged) - 1))
    damaged[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(example.RefusedError):
        example.decompress(bytes(damaged), BOOK)


@given(st.integers(0, len(PACKED[False]) - 1))
def test_truncation_is_detected(length):
    with pytest.raises(example.RefusedError, match=r"truncated|not a file"):
        example.decompress(PACKED[False][:length])


def test_bytes_after_the_end_are_detected():
    with pytest.raises(example.RefusedError, match=r"damaged: \d+ bytes, the header says"):
        example.decompress(PACKED[False] + b"\0")


@given(st.binary(max_size=200))
def test_foreign_data_is_refused(data):
    with pytest.raises(example.RefusedError):
        example.decompress(data)
    with pytest.raises(example.RefusedError):
        example.decompress(example.MAGIC + data)


def sealed(position: int, form: str, value: int) -> bytes:
    """A file with one field of the header changed, and the checksum made to match."""
    data = bytearray(PACKED[False][:-4])
    struct.pack_into(form, data, position, value)
    return bytes(data) + struct.pack("<I", zlib.crc32(data))


@pytest.mark.parametrize(
    ("position", "form", "value", "message"),
    [
        (8, "B", 2, "version 2 of the format; this program reads 1"),
        (9, "B", 0, "header makes no sense"),
        (9, "B", 2, "another size"),
        (10, "B", 2, "header makes no sense"),
        (10, "B", 1, "another size"),
        (12, "<I", 0, "header makes no sense"),
        (12, "<I", 2**32 - 1, "header makes no sense"),
        (16, "<I", 2**20, "another size"),
        (20, "<I", 2**31, "header makes no sense"),
        (20, "<I", 3, "another size"),
    ],
)
def test_a_lying_header_is_refused(position, form, value, message):
    with pytest.raises(example.RefusedError, match=message):
        example.decompress(sealed(position, form, value))


def run(capsys, *arguments) -> tuple[int, str]:
    """Exit status, and what went to stderr."""
    status = example.main([str(a) for a in arguments])
    return status, capsys.readouterr().err


def refused(capsys, *arguments) -> str:
    """The one line that a command is refused with."""
    status, printed = run(capsys, *arguments)
    assert status == 1
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    return printed


def test_commands(tmp_path, capsys):
    first = save(tmp_path / "a.png", picture(seed=1))
    second = save(tmp_path / "b.png", picture(seed=2))
    book = tmp_path / "shared.npz"
    packed, restored = tmp_path / "a.mmf", tmp_path / "restored.png"
    assert run(capsys, "learn-codebook", "--codes", 20, first, second, book)[0] == 0
    assert run(capsys, "compress", first, packed, "--codebook", book)[0] == 0
    assert run(capsys, "decompress", packed, restored, "--codebook", book)[0] == 0
    expected = quantised(picture(seed=1), example.read_codebook(book))
    np.testing.assert_array_equal(np.asarray(image.open(restored)), expected)

    assert "give it with --codebook" in refused(capsys, "decompress", packed, restored)
    other = tmp_path / "other.npz"
    assert run(capsys, "learn-codebook", "--codes", 20, second, other)[0] == 0
    message = refused(capsys, "decompress", packed, restored, "--codebook", other)
    assert "wrong codebook" in message
    assert str(packed) in message

    assert run(capsys, "compress", first, packed, "--codes", 9, "--patch", 3)[0] == 0
    assert run(capsys, "decompress", packed, restored)[0] == 0
    assert np.asarray(image.open(restored)).shape == (21, 30, 3)


def test_report(tmp_path, capsys):
    source = save(tmp_path / "a.png", picture())
    status = example.main([str(source), "--codes", "16", "--output-dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert status == 0
    for word in ("bits per pixel", "PSNR", "learn the codebook", "compress", "decompress"):
        assert word in printed
    restored = np.asarray(image.open(tmp_path / "out" / "a-restored.png"))
    error = np.square(picture().astype(np.float64) - restored).mean()
    assert f"{10 * np.log10(255**2 / error):.2f} dB" in printed
    size = (tmp_path / "out" / "a.mmf").stat().st_size
    assert f"{8 * size / (21 * 30):.3f}" in printed
    assert image.open(tmp_path / "out" / "a-compared.png").width >= 60


def test_demo(tmp_path, capsys):
    pytest.importorskip("skimage")
    status = example.main(["--demo", "--codes", "8", "--output-dir", str(tmp_path)])
    assert status == 0
    assert len(list(tmp_path.glob("*.mmf"))) == 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_picture_modes(tmp_path, mode):
    source = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    original = image.fromarray(picture()).convert(mode)
    original.save(source)
    pixels = example.read_image(source)
    target = {"1": "L", "L": "L", "LA": "RGBA", "RGBA": "RGBA"}.get(mode, "RGB")
    expected = np.asarray(original.convert(target)).reshape(pixels.shape)
    np.testing.assert_array_equal(pixels, expected)


def test_turned_photograph(tmp_path):
    exif = image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    image.fromarray(picture()).save(tmp_path / "a.png", exif=exif)
    pixels = example.read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels, np.rot90(picture(), -1))


def test_unusable_inputs(tmp_path, capsys):
    out = tmp_path / "out.mmf"
    deep = tmp_path / "deep.png"
    image.fromarray(np.full((5, 5), 40_000, np.uint16)).save(deep)
    assert "more than 8 bits" in refused(capsys, "compress", deep, out)

    assert "no such file" in refused(capsys, "compress", tmp_path / "absent.png", out)
    text = tmp_path / "text.png"
    text.write_text("hello")
    assert "is no picture that Pillow knows" in refused(capsys, "compress", text, out)
    whole = save(tmp_path / "whole.png", picture(80, 80))
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:4000])
    assert str(cut) in refused(capsys, "compress", cut, out)

    assert "not a codebook" in refused(capsys, "compress", whole, out, "--codebook", text)
    array = tmp_path / "array.npy"
    np.save(array, np.zeros(3))
    assert "not a codebook" in refused(capsys, "compress", whole, out, "--codebook", array)
    grey = save(tmp_path / "grey.png", picture(channels=1))
    assert "grey.png is L" in refused(capsys, "learn-codebook", whole, grey, tmp_path / "b.npz")
    book = tmp_path / "book.npz"
    assert run(capsys, "learn-codebook", "--codes", 4, whole, book)[0] == 0
    message = refused(capsys, "compress", grey, out, "--codebook", book)
    assert "for RGB pictures, this one is L" in message
    assert not out.exists()

    assert "not a file that this program" in refused(capsys, "decompress", text, tmp_path / "r.png")
    assert run(capsys, "compress", whole, out)[0] == 0
    assert "picture format" in refused(capsys, "decompress", out, tmp_path / "restored.xyz")


@pytest.mark.parametrize("arguments", [[], ["a.png", "--demo"], ["a.png", "--codes", "0"]])
def test_wrong_command_lines(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        example.main(arguments)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err
