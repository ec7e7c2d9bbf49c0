"""What docs/models.md shows works as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

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
