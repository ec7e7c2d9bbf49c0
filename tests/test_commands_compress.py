"""``mmfast compress`` and ``decompress``: what comes back is what the model makes of the codes."""

from __future__ import annotations

import struct
import sys
import zlib

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("PIL")
pytest.importorskip("constriction")

from command_models import names, picture, read, refused, run, save_vqvae, vqvae

from mmfast.data import ImageReader, to_uint8
from mmfast.models import compress, decompress, save_model
from mmfast.models.compression import padded


def restored(model, path):
    """uint8 (height, width, channels)."""
    x = ImageReader(channels=model.channels).read(path)
    with torch.no_grad():
        y = model.decode(model.encode(padded(x[None], model.downsampling)))[0]
    return to_uint8(y[:, : x.shape[1], : x.shape[2]]).permute(1, 2, 0).squeeze(2).numpy()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(13, 10), (8, 8), (1, 5), (40, 3)])
def test_there_and_back(tmp_path, capsys, size, channels):
    model = vqvae(channels)
    file = save_vqvae(tmp_path / "m.safetensors", model)
    source = picture(tmp_path / "a.png", *size, channels)
    packed, back = tmp_path / "a.mmv", tmp_path / "b.png"
    status, out, _ = run(capsys, "compress", file, source, packed)
    assert status == 0
    length = packed.stat().st_size
    bits = f"{8 * length / (size[0] * size[1]):.3f} bits per pixel"
    assert out == f"{packed}: {length} bytes, {bits}, {source.stat().st_size} before\n"
    assert run(capsys, "decompress", file, packed, back)[0] == 0
    np.testing.assert_array_equal(read(back), restored(model, source))


def test_tiles(tmp_path, capsys):
    """They are the option's; the tests of models say that they are right."""
    model = vqvae()
    file = save_vqvae(tmp_path / "m.safetensors", model)
    source, packed, back = (tmp_path / name for name in ("a.png", "a.mmv", "b.png"))
    x = ImageReader().read(picture(source, 61, 70))
    words = "--tile", 16
    assert run(capsys, "compress", file, source, packed, *words)[0] == 0
    assert packed.read_bytes() == compress(model, x, tile=16)
    assert run(capsys, "decompress", file, packed, back, *words)[0] == 0
    made = decompress(model, packed.read_bytes(), tile=16).x
    np.testing.assert_array_equal(read(back), to_uint8(made).permute(1, 2, 0).numpy())
    assert run(capsys, "decompress", file, packed, back)[0] == 0
    assert (read(back) != to_uint8(made).permute(1, 2, 0).numpy()).any()
    out = tmp_path / "shown"
    assert run(capsys, "reconstruct", file, source, "--out", out, *words)[0] == 0
    np.testing.assert_array_equal(
        read(out / "a.png")[:, -70:], to_uint8(made).permute(1, 2, 0).numpy()
    )


def test_a_folder_of_a_run_and_a_model_that_says_nothing(tmp_path, capsys):
    source = picture(tmp_path / "a.png")
    save_model(vqvae(), tmp_path / "model.safetensors")
    assert run(capsys, "compress", tmp_path, source, tmp_path / "a.mmv")[0] == 0
    assert run(capsys, "decompress", tmp_path, tmp_path / "a.mmv", tmp_path / "b.webp")[0] == 0
    assert read(tmp_path / "b.webp").shape == (13, 10, 3)


@pytest.fixture
def packed(tmp_path, capsys):
    """A model's file and a compressed one."""
    file = save_vqvae(tmp_path / "m.safetensors")
    run(capsys, "compress", file, picture(tmp_path / "a.png"), tmp_path / "a.mmv")
    return file, tmp_path / "a.mmv"


def test_damaged_files(tmp_path, capsys, packed):
    file, good = packed
    data, bad, out = good.read_bytes(), tmp_path / "bad.mmv", tmp_path / "out.png"

    def message(content):
        bad.write_bytes(content)
        said = refused(capsys, "decompress", file, bad, out)
        assert str(bad) in said
        assert not out.exists()
        return said

    assert "damaged: the checksum" in message(data[:50] + b"?" + data[51:])
    assert "truncated" in message(data[:-1])
    assert "damaged" in message(data + b"?")
    assert "not a file of compress" in message(b"")
    assert "not a file of compress" in message((tmp_path / "a.png").read_bytes())
    assert "version 9 of the format" in message(data[:8] + b"\x09" + data[9:])
    lying = data[:18] + b"\x03" + data[19:-4]  # three dimensions
    assert "makes no sense" in message(lying + struct.pack("<I", zlib.crc32(lying)))
    assert names(tmp_path) == ["a.mmv", "a.png", "bad.mmv", "m.safetensors"]


def test_what_is_refused(tmp_path, capsys, packed):
    file, good = packed
    out = tmp_path / "out.png"
    other = save_vqvae(tmp_path / "other.safetensors", vqvae(seed=1))
    assert "wrong model: compressed with" in refused(capsys, "decompress", other, good, out)
    absent = tmp_path / "absent"
    assert "No such file" in refused(capsys, "decompress", file, absent, out)
    assert "picture format" in refused(capsys, "decompress", file, good, tmp_path / "out.xyz")
    assert "there is no folder" in refused(capsys, "decompress", file, good, absent / "out.png")
    assert "is a folder" in refused(capsys, "decompress", file, good, tmp_path)

    source, target = tmp_path / "a.png", tmp_path / "b.mmv"
    assert "no such file" in refused(capsys, "compress", file, absent, target)
    assert "is no picture" in refused(capsys, "compress", file, good, target)
    assert "would replace the file" in refused(capsys, "compress", file, source, source)
    assert "no such file" in refused(capsys, "compress", absent, source, target)
    assert "no safetensors file" in refused(capsys, "compress", source, source, target)
    words = "compress", file, source, target, "--device"
    assert "--device tpu: Expected one of" in refused(capsys, *words, "tpu")
    assert "--device must be cpu or cuda, got meta" in refused(capsys, *words, "meta")


def test_models_of_other_data(tmp_path, capsys):
    source, target = picture(tmp_path / "a.png"), tmp_path / "b.mmv"
    model = vqvae(1, 1)
    save_model(model, tmp_path / "nothing.safetensors")
    said = refused(capsys, "compress", tmp_path / "nothing.safetensors", source, target)
    assert "does not say what its data is" in said
    about = {"data": {"modalities": {n: ImageReader().describe() for n in ("image", "other")}}}
    save_model(model, tmp_path / "two.safetensors", **about)
    said = refused(capsys, "compress", tmp_path / "two.safetensors", source, target)
    assert "of one modality, is image, other" in said


def test_a_package_that_is_not_there(tmp_path, capsys, packed, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    said = refused(capsys, "compress", packed[0], tmp_path / "a.png", tmp_path / "b.mmv")
    assert "pip install 'mmfast[train]' brings it" in said
