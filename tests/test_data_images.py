"""Images of every mode, broken ones, and the way back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from media import PICTURES, picture_file

from mmfast.data import FileError, ImageReader, reader_from, to_float, to_pillow, to_uint8

Image = pytest.importorskip("PIL.Image")


def pixels(height=10, width=14, channels=3, seed=0):
    """Smooth, so that compression changes little."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width, :1][:2]
    slopes = rng.uniform(2, 8, (2, channels))
    return (40 + y * slopes[0] + x * slopes[1]).astype(np.uint8)


def saved(path, image, **options):
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


@given(st.integers(0, 255))
def test_there_and_back(value):
    image = to_float(np.full((2, 3, 3), value, np.uint8))
    assert image.shape == (3, 2, 3)
    assert (to_uint8(image) == value).all()


def test_write(tmp_path):
    original = pixels()
    for channels in (1, 3, 4):
        image = to_float(pixels(channels=channels))
        reader = ImageReader(channels=channels)
        reader.write(image, tmp_path / "a.png")
        torch.testing.assert_close(reader.read(tmp_path / "a.png"), image, rtol=0, atol=1e-6)
        assert np.array_equal(
            np.atleast_3d(np.asarray(to_pillow(image))), pixels(channels=channels)
        )
    ImageReader().write(to_float(original), tmp_path / "b.JPG")
    assert Image.open(tmp_path / "b.JPG").format == "JPEG"
    beyond = to_uint8(torch.tensor([-3.0, -1.0, 0.0, 1.0, 5.0]))
    assert beyond.tolist() == [0, 0, 128, 255, 255]
    for path, message in (
        ("c.xyz", "must end in that of a picture"),
        ("c.jpg", "cannot be written"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageReader(channels=4).write(to_float(pixels(channels=4)), tmp_path / path)
    assert not (tmp_path / "c.jpg").exists()
    with pytest.raises(ValueError, match=r"got \(2, 4, 4\)"):
        to_pillow(torch.zeros(2, 4, 4))
    with pytest.raises(TypeError, match="pixels must be uint8, got int64"):
        to_float(np.zeros((2, 2), np.int64))


def test_modes(tmp_path):
    """Every mode that files have gives the same colours."""
    rgb = Image.fromarray(pixels())
    want = to_float(pixels())
    grey = rgb.convert("L")
    grey_rgb = to_float(np.asarray(grey.convert("RGB")))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    opaque, half = rgb.copy(), rgb.copy()
    opaque.putalpha(255)
    half.putalpha(0)
    white = torch.ones_like(want)
    few = rgb.quantize(32)
    cases = {
        "rgb.png": (rgb, want, 1e-6),
        "rgb.webp": (rgb, want, 0.15),
        "rgb.jpg": (rgb, want, 0.15),
        "rgb.ppm": (rgb, want, 1e-6),
        "palette.gif": (few, to_float(np.asarray(few.convert("RGB"))), 1e-6),
        "grey.png": (grey, grey_rgb, 1e-6),
        "bits.png": (grey.point(lambda v: 255 * (v > 90)).convert("1"), None, 0),
        "deep.png": (deep, grey_rgb, 1e-6),
        "deep.tif": (deep, grey_rgb, 1e-6),
        "cmyk.jpg": (rgb.convert("CMYK"), want, 0.2),
        "cmyk.tif": (rgb.convert("CMYK"), want, 1e-6),
        "opaque.png": (opaque, want, 1e-6),
        "clear.png": (half, white, 1e-6),
        "clear.webp": (half, white, 1e-6),
        "grey_alpha.png": (opaque.convert("LA"), grey_rgb, 1e-6),
    }
    for name, (image, expected, tolerance) in cases.items():
        made = ImageReader().read(saved(tmp_path / name, image))
        assert made.shape == want.shape, name
        assert made.dtype == torch.float32
        if expected is None:
            assert set(made.unique().tolist()) == {-1.0, 1.0}, name
        else:
            assert (made - expected).abs().amax() <= tolerance, name
        assert ImageReader(channels=1).read(tmp_path / name).shape == (1, 10, 14), name
        assert ImageReader(channels=4).read(tmp_path / name).shape == (4, 10, 14), name
    black = ImageReader(background=0).read(tmp_path / "clear.png")
    assert (black == -1).all()
    clear = ImageReader(channels=4).read(tmp_path / "clear.png")
    assert (clear[3] == -1).all()
    palette = few.copy()
    saved(tmp_path / "transparent.png", palette, transparency=int(np.asarray(few)[0, 0]))
    made = ImageReader().read(tmp_path / "transparent.png")
    assert (made[:, 0, 0] == 1).all()
    assert (made != 1).any()


def test_sixteen_bits_are_kept(tmp_path):
    """Steps that 8 bits do not tell apart."""
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16) + 5000
    image = ImageReader(channels=1).read(saved(tmp_path / "a.png", Image.fromarray(deep)))
    assert len(image.unique()) == 256
    small = ImageReader((4, 4), channels=3).read(tmp_path / "a.png")
    assert small.shape == (3, 4, 4)
    assert torch.equal(small[0], small[2])
    assert len(small.unique()) == 16


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, orientation):
    upright = pixels()
    stored = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, 1),
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
        8: lambda p: np.rot90(p, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    saved(tmp_path / "a.png", np.ascontiguousarray(stored), exif=exif)
    assert np.array_equal(
        to_uint8(ImageReader().read(tmp_path / "a.png")).permute(1, 2, 0), upright
    )


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))
def test_sizes(height, width, want_height, want_width):
    """Any size is made of any other, and a flat picture stays flat."""
    flat = np.full((height, width, 3), 77, np.uint8)
    for fit in ("crop", "stretch"):
        reader = ImageReader((want_height, want_width), fit=fit)
        made = reader.prepare(flat, torch.Generator().manual_seed(0))
        assert made.shape == reader.shape == (3, want_height, want_width)
        assert (to_uint8(made) == 77).all()


def test_resizing():
    """The middle is kept, means are (antialiasing), and halves lie where they should."""
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    middle = ImageReader(8).prepare(wide)
    assert (to_uint8(middle) == 200).all()
    squeezed = ImageReader((8, 3), fit="stretch").prepare(wide)
    assert to_uint8(squeezed)[0, 0, 1] > 150
    stripes = np.zeros((32, 32), np.uint8)
    stripes[:, ::2] = 255
    assert ImageReader(8, channels=1).prepare(stripes).abs().amax() < 0.15
    thin = np.full((1, 100_000, 3), 9, np.uint8)
    assert ImageReader(16).prepare(thin).shape == (3, 16, 16)


def test_augmentation():
    reader = ImageReader(8, random_crop=True, random_flip=True)
    image = pixels(8, 40)

    def make(seed):
        return reader.prepare(image, torch.Generator().manual_seed(seed))

    assert torch.equal(make(1), make(1))
    means = torch.stack([make(seed).mean() for seed in range(12)])
    assert len(means.unique()) == 12
    assert torch.equal(reader.prepare(image), ImageReader(8).prepare(image))
    ramps = [make(seed)[0, 0].diff().mean() > 0 for seed in range(30)]
    assert 5 < sum(ramps) < 25


@pytest.mark.parametrize("suffix", PICTURES)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.97])
def test_truncated(tmp_path, suffix, share):
    data = picture_file(suffix)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(data)
    whole = ImageReader().read(path)
    assert whole.shape == (3, 40, 50)
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(FileError) as caught:
        ImageReader().verify(path)
    assert (caught.value.path, str(path) in str(caught.value)) == (str(path), True)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.png", b"", "is empty"),
        ("text.png", b"no picture at all, but text", "is no picture that Pillow knows"),
        ("jpeg.png", picture_file("jpg"), "is named as PNG, but holds JPEG"),
        ("png.jpg", picture_file("png"), "is named as JPEG, but holds PNG"),
        ("zeros.png", picture_file("png")[:60] + bytes(9000), "is a damaged picture"),
    ],
)
def test_broken(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(FileError, match=message):
        ImageReader(8).read(path)


def test_other_refusals(tmp_path, monkeypatch):
    with pytest.raises(FileError, match="no such file"):
        ImageReader().read(tmp_path / "none.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(FileError, match="is a directory"):
        ImageReader().read(tmp_path / "folder.png")
    floats = saved(tmp_path / "a.tif", Image.fromarray(np.zeros((4, 4), np.float32)))
    with pytest.raises(FileError, match="floating numbers, of which no scale is known"):
        ImageReader().read(floats)
    deeper = saved(tmp_path / "b.tif", Image.fromarray(np.full((4, 4), 70000, np.int32)))
    with pytest.raises(FileError, match="more than 16 bits"):
        ImageReader().read(deeper)
    saved(tmp_path / "c.png", pixels())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(FileError, match="is too large"):
        ImageReader().read(tmp_path / "c.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, r"size must be a side or \(height, width\), at least 1, got 0"),
        ({"size": (4, 4, 4)}, "size must be"),
        ({"channels": 2}, "channels must be 1, 3 or 4, got 2"),
        ({"fit": "squeeze"}, "fit must be one of crop, stretch, got 'squeeze'"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        ImageReader(**options)


def test_description():
    reader = ImageReader((24, 32), channels=1, random_flip=True)
    described = json.loads(json.dumps(reader.describe()))
    assert described["modality"] == "image"
    again = reader_from(described)
    assert again.shape == reader.shape == (1, 24, 32)
    assert again == reader
    image = pixels()
    assert torch.equal(again.prepare(image), reader.prepare(image))
    for broken, message in (
        ({"modality": "smell"}, "modality must be one of image, .*, got 'smell'"),
        ({"modality": "image", "colour": 1}, "no description of a reader of modality image"),
    ):
        with pytest.raises(ValueError, match=message):
            reader_from(broken)
