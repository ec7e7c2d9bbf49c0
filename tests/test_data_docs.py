"""What docs/data.md shows works as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mmfast.data import train_tokenizer, write_image, write_sound

for module in ("PIL", "soundfile", "tokenizers"):
    pytest.importorskip(module)


def test_documentation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = torch.Generator().manual_seed(0)
    for folder in ("pictures/a", "pictures/b", "birds/a", "birds/b"):
        Path(folder).mkdir(parents=True)
        for i in range(16):
            write_image(torch.rand(3, 70, 90, generator=rng) * 2 - 1, f"{folder}/{i}.jpg")
    for i in range(2):
        write_sound(torch.rand(1, 9000, generator=rng) - 0.5, 16000, f"birds/a/{i}.wav")
    Path("birds/a/0.txt").write_text("a robin")
    Path("tokenizer.json").write_text(train_tokenizer(["a robin"]))
    Path("birds.csv").write_text("image,audio,text,label\nbirds/a/0.jpg,birds/a/1.wav,robin,x\n")
    Path("new.jpg").write_bytes(Path("birds/a/5.jpg").read_bytes())
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(code, names)
    assert names["batch"]["image"].shape == (32, 3, 64, 64)
    assert names["batch"]["label"].shape == (32,)
    assert names["data"][0].keys() == {"image", "mel", "mel_length", "text", "text_length", "label"}
    assert names["image"].shape == (3, 64, 64)
    assert names["image"].isfinite().all()
