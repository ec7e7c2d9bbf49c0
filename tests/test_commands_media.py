"""The commands on videos and sounds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from command_models import dit, names, read, run, save_vqvae, vqvae

from mmfast.data import MelReader, VideoReader, WaveformReader, write_sound, write_video
from mmfast.data.video import frame_rate
from mmfast.models import Diffusion, save_model
from mmfast.train import about_data

pytest.importorskip("safetensors")
pytest.importorskip("constriction")

RATE = 8000


@pytest.fixture
def clip(tmp_path):
    """Eleven frames of 13 x 10, 12 a second."""
    pytest.importorskip("av")
    t, y, x = torch.meshgrid(torch.arange(11), torch.arange(13), torch.arange(10), indexing="ij")
    waves = torch.stack([torch.sin((x + y + t) / (4 + c)) for c in range(3)])
    write_video(waves, tmp_path / "clip.mp4", 12)
    return tmp_path / "clip.mp4"


@pytest.fixture
def tone(tmp_path):
    """A third of a second."""
    pytest.importorskip("soundfile")
    samples = torch.sin(torch.arange(RATE // 3) * 0.3)[None] / 2
    write_sound(samples, RATE, tmp_path / "tone.wav")
    return tmp_path / "tone.wav"


def test_video(tmp_path, capsys, clip):
    model = vqvae(3, 3)
    file = save_vqvae(tmp_path / "m.safetensors", model, VideoReader(4, 8))
    packed, back = tmp_path / "a.mmv", tmp_path / "b.mkv"
    status, out, _ = run(capsys, "compress", file, clip, packed)
    assert status == 0
    assert f"{8 * packed.stat().st_size / (11 * 13 * 10):.3f} bits per pixel" in out
    assert run(capsys, "decompress", file, packed, back)[0] == 0
    restored = VideoReader().read(back)
    assert restored.shape == (3, 11, 13, 10)
    assert frame_rate(back) == 12
    assert VideoReader().read(clip).shape == (3, 11, 13, 10)

    out = tmp_path / "out"
    words = "reconstruct", file, clip, "--out", out, "--json"
    row = json.loads(run(capsys, *words)[1])[0]
    assert row["size"] == [11, 13, 10]
    assert names(out) == ["clip.mp4", "clip.png"]
    assert VideoReader().read(out / "clip.mp4").shape == (3, 11, 13, 20)
    assert read(out / "clip.png").shape == (2 * 13 + 2, 4 * 10, 3)


@pytest.mark.parametrize(
    ("reader", "channels"),
    [
        (WaveformReader(RATE, 512), 1),
        (MelReader(frames=16, sample_rate=RATE, n_fft=256, hop=64, n_mels=12), 12),
    ],
)
def test_sound(tmp_path, capsys, tone, reader, channels):
    file = save_vqvae(tmp_path / "m.safetensors", vqvae(channels, 1), reader)
    packed, back = tmp_path / "a.mmv", tmp_path / "b.wav"
    status, out, _ = run(capsys, "compress", file, tone, packed)
    assert status == 0
    seconds = (RATE // 3) / RATE
    bits = float(out.split("bytes, ")[1].split(" bits per second")[0])
    assert bits == pytest.approx(8 * packed.stat().st_size / seconds, rel=0.05)
    assert run(capsys, "decompress", file, packed, back)[0] == 0
    restored = WaveformReader(RATE).read(back)
    assert abs(restored.shape[1] - RATE // 3) <= 64
    out = tmp_path / "out"
    words = "reconstruct", file, tone, "--out", out, "--json"
    row = json.loads(run(capsys, *words)[1])[0]
    assert row["unit"] == "second"
    assert names(out) == ["tone.png", "tone.wav"]
    np.testing.assert_allclose(WaveformReader(RATE).read(out / "tone.wav"), restored, atol=1e-3)


def test_samples_that_are_sounds(tmp_path, capsys, tone):
    reader = MelReader(frames=16, sample_rate=RATE, n_fft=256, hop=64, n_mels=12)
    model = dit(12, (16,))
    about = about_data("tones", (12, 16), reader, ["a", "b", "c"])
    objective = Diffusion("flow").config
    save_model(model, tmp_path / "m.safetensors", data=about, objective=objective, latents=None)
    out = tmp_path / "a.png"
    words = "--classes", "b", "--count", 2, "--steps", 2, "--each", tmp_path / "each"
    assert run(capsys, "sample", tmp_path / "m.safetensors", "--out", out, *words)[0] == 0
    assert names(tmp_path / "each") == ["b-0.wav", "b-1.wav"]
    assert read(out).shape == (12, 2 * 16 + 2)
    assert WaveformReader(RATE).read(tmp_path / "each" / "b-0.wav").abs().max() > 0
