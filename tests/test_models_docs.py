"""What docs/models.md shows works as it is written, and README.md of models, samplers and data."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mmfast.data import write_image

pytest.importorskip("safetensors")


def test_documentation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    names: dict = {}
    seen = []
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(code, names)
        seen.append(names.get("made"))
    assert Path("model.safetensors").is_file()
    assert names["codes"].shape == (8, 16, 16)
    assert names["restored"].shape == (8, 3, 32, 32)
    assert [t.shape for t in seen[3:5]] == [(4, 3, 8, 8), (16, 3, 8, 8)]
    assert names["made"]["sound"].shape == (16, 20, 32)
    assert names["made"]["word"].max() < 27


def test_readme(tmp_path, monkeypatch):
    pytest.importorskip("PIL")
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for i in range(33):
        write_image(torch.full((3, 70, 90), i / 33), f"pictures/{i}.png")
    Path("pictures/broken.png").write_bytes(b"broken")
    text = (Path(__file__).parents[1] / "README.md").read_text()
    names: dict = {"torch": torch, "model": lambda x, t: torch.zeros_like(x)}
    shown = re.findall(r"```python\n(.*?)```", text, re.S)
    for words in ("import NoiseSchedule", "import DiT, VQVAE", "import Dataset"):
        (code,) = (code for code in shown if words in code)
        exec(code, names)
    assert names["images"].shape == (4, 4, 64, 64)
    assert names["codes"].shape == (8, 16, 16)
    assert type(names["dit"]).__name__ == "DiT"
    (batch,) = names["batches"]
    assert batch["image"].shape == (32, 3, 64, 64)
