"""``mmfast reconstruct``: pictures beside what the model makes of them, and what it costs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("PIL")
pytest.importorskip("constriction")

from command_models import K, names, picture, read, refused, run, save_vqvae, vqvae

from mmfast.data import ImageReader, to_uint8
from mmfast.models import compress


def test_pictures(tmp_path, capsys):
    model, out = vqvae(), tmp_path / "out"
    file = save_vqvae(tmp_path / "m.safetensors", model)
    sources = [picture(tmp_path / "a.png"), picture(tmp_path / "b.png", 20, 8)]
    status, printed, _ = run(capsys, "reconstruct", file, *sources, "--out", out, "--json")
    assert status == 0
    assert names(out) == ["a.png", "b.png"]
    for source, row in zip(sources, json.loads(printed), strict=True):
        x = ImageReader().read(source)
        height, width = x.shape[1:]
        shown = read(out / source.name)
        np.testing.assert_array_equal(shown[:, :width], read(source))
        if height % 2 == width % 2 == 0:
            with torch.no_grad():
                y, indices = model(x[None]).reconstruction[0], model.encode(x[None])
            want = to_uint8(y).permute(1, 2, 0).numpy()
            np.testing.assert_array_equal(shown[:, width + 2 :], want)
            error = (x - y).square().mean().double()
            assert row["psnr"] == pytest.approx(float(10 * torch.log10(4 / error)), rel=1e-5)
            assert row["used"] == len(indices.unique())
            shares = torch.bincount(indices.flatten(), minlength=K) / indices.numel()
            entropy = float(torch.special.entr(shares).sum())
            assert row["perplexity"] == pytest.approx(np.exp(entropy), rel=1e-5)
        assert row["bits"] * height * width == pytest.approx(8 * len(compress(model, x)))
        assert row["unit"] == "pixel"
        assert row["size"] == [height, width]
        assert row["written"] == [str(out / source.name)]


def test_the_table(tmp_path, capsys):
    file = save_vqvae(tmp_path / "m.safetensors")
    source = picture(tmp_path / "a.png")
    status, printed, _ = run(capsys, "reconstruct", file, source, "--out", tmp_path / "out")
    assert status == 0
    for word in ("a.png", "13 x 10", "dB", "bits per pixel", "perplexity", "wrote"):
        assert word in printed


def test_cut(tmp_path, capsys):
    file = save_vqvae(tmp_path / "m.safetensors")
    source = picture(tmp_path / "a.png", 40, 40)
    words = "reconstruct", file, source, "--out", tmp_path / "out", "--cut", "--json"
    assert json.loads(run(capsys, *words)[1])[0]["size"] == [8, 8]
    assert read(tmp_path / "out" / "a.png").shape == (8, 18, 3)


def test_names_with_points_keep_them(tmp_path, capsys):
    file = save_vqvae(tmp_path / "m.safetensors")
    sources = [picture(tmp_path / f"a.v{i}.jpg") for i in (1, 2)]
    assert run(capsys, "reconstruct", file, *sources, "--out", tmp_path / "out")[0] == 0
    assert names(tmp_path / "out") == ["a.v1.png", "a.v2.png"]


def test_originals_are_not_replaced(tmp_path, capsys):
    file, source = save_vqvae(tmp_path / "m.safetensors"), picture(tmp_path / "a.png")
    before = source.read_bytes()
    said = refused(capsys, "reconstruct", file, source, "--out", tmp_path)
    assert f"{source}: would be replaced; give another folder with --out" in said
    assert source.read_bytes() == before
    photo = picture(tmp_path / "b.jpg")
    assert run(capsys, "reconstruct", file, photo, "--out", tmp_path)[0] == 0
    assert (tmp_path / "b.png").is_file()


def test_a_picture_of_one_cell(tmp_path, capsys):
    """Whose group norms have single values."""
    file, source = save_vqvae(tmp_path / "m.safetensors"), picture(tmp_path / "a.png", 1, 1)
    out = tmp_path / "out"
    status, printed, _ = run(capsys, "reconstruct", file, source, "--out", out, "--json")
    assert (status, json.loads(printed)[0]["size"]) == (0, [1, 1])


def test_opacity_is_shown_on_white(tmp_path, capsys):
    from PIL import Image

    file, source = save_vqvae(tmp_path / "m.safetensors", vqvae(4)), tmp_path / "a.png"
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(source)
    assert run(capsys, "reconstruct", file, source, "--out", tmp_path / "out")[0] == 0
    shown = read(tmp_path / "out" / "a.png")
    assert shown.shape == (8, 18, 3)
    assert (shown[:, :8] == 255).all()


def test_files_of_one_name_do_not_replace_each_other(tmp_path, capsys):
    file = save_vqvae(tmp_path / "m.safetensors")
    (tmp_path / "more").mkdir()
    sources = [picture(tmp_path / "a.png"), picture(tmp_path / "more" / "a.png", 20, 20)]
    run(capsys, "reconstruct", file, *sources, "--out", tmp_path / "out")
    assert names(tmp_path / "out") == ["a-2.png", "a.png"]
    assert read(tmp_path / "out" / "a-2.png").shape == (20, 42, 3)


@pytest.mark.parametrize(
    "quantizer",
    [
        {"type": "ResidualVQ", "dim": 4, "num_quantizers": 2, "codebook_size": [16, 8]},
        {"type": "FSQ", "dim": 4, "levels": [4, 4]},
    ],
)
def test_other_quantizers(tmp_path, capsys, quantizer):
    file = save_vqvae(tmp_path / "m.safetensors", vqvae(**quantizer))
    source = picture(tmp_path / "a.png")
    words = "reconstruct", file, source, "--out", tmp_path / "out", "--json"
    row = json.loads(run(capsys, *words)[1])[0]
    assert 1 <= row["perplexity"] <= row["used"] <= 16


def test_broken_files_are_left_out(tmp_path, capsys):
    file = save_vqvae(tmp_path / "m.safetensors")
    good, bad = picture(tmp_path / "a.png"), tmp_path / "bad.png"
    bad.write_bytes(good.read_bytes()[:100])
    words = "reconstruct", file, bad, good, tmp_path / "absent.png", "--out", tmp_path / "out"
    status, printed, error = run(capsys, *words)
    assert status == 1
    assert "a.png" in printed
    assert f"left out: {bad}: " in error
    assert "absent.png: no such file" in error
    assert names(tmp_path / "out") == ["a.png"]


def test_what_is_refused(tmp_path, capsys):
    source = picture(tmp_path / "a.png")
    words = "reconstruct", tmp_path / "absent", source, "--out", tmp_path / "out"
    assert "no such file" in refused(capsys, *words)
    file = save_vqvae(tmp_path / "m.safetensors")
    assert "is a file, expected a folder" in refused(
        capsys, "reconstruct", file, source, "--out", source
    )
    with pytest.raises(SystemExit) as stop:
        run(capsys, "reconstruct", file, source)
    assert stop.value.code == 2
