"""Sound of every format, rate and number of channels, broken files, and mel spectrograms."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from media import SOUNDS, sound_file

from mmfast.data import (
    Dataset,
    FileError,
    LogMel,
    MelReader,
    WaveformReader,
    reader_from,
    resample,
    write_sound,
)
from mmfast.data.mel import hertz_of_mel, mel_filters, mel_of_hertz

soundfile = pytest.importorskip("soundfile")

LOSSY = {"ogg": 0.03, "opus": 0.03, "mp3": 0.03}


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors here are too small to share among threads that other tests keep busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tone(frequency=440.0, seconds=0.5, rate=16000, amplitude=0.5):
    times = torch.arange(round(seconds * rate), dtype=torch.float64) / rate
    return (amplitude * torch.sin(2 * torch.pi * frequency * times)).float()[None]


@pytest.mark.parametrize("suffix", SOUNDS)
def test_there_and_back(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    reader = WaveformReader(16000)
    reader.write(tone(), path)
    made = reader.read(path)
    assert made.dtype == torch.float32
    assert made.shape == (1, 8000)
    assert (made - tone()).abs().mean() < LOSSY.get(suffix, 1e-4)
    reader.verify(path)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_depths(tmp_path, subtype):
    soundfile.write(tmp_path / "a.wav", tone()[0].numpy(), 16000, subtype)
    made = WaveformReader(16000).read(tmp_path / "a.wav")
    assert (made - tone()).abs().amax() < (0.02 if subtype == "PCM_U8" else 1e-4)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_rates_and_channels(tmp_path, rate, channels):
    """Always the same tone, of the mean of the channels."""
    shares = torch.linspace(0.5, 1.5, channels)[:, None] if channels > 1 else torch.ones(1, 1)
    write_sound(tone(rate=rate, amplitude=0.3) * shares, rate, tmp_path / "a.wav")
    made = WaveformReader(16000).read(tmp_path / "a.wav")
    assert made.shape == (1, 8000)
    want = tone(amplitude=0.3)
    assert (made - want)[:, 400:-400].abs().amax() < 1e-3


@pytest.mark.parametrize("rate", [16000, 44100])
def test_lengths(tmp_path, rate):
    """Cut or filled up; what is cut from a long file is the same as cut after reading all."""
    write_sound(tone(rate=rate), rate, tmp_path / "a.wav")
    whole = WaveformReader(16000).read(tmp_path / "a.wav")
    short = WaveformReader(16000, length=3000)
    made = short.read(tmp_path / "a.wav")
    assert made.shape == short.shape == (1, 3000)
    torch.testing.assert_close(made[:, :2900], whole[:, :2900])
    long = WaveformReader(16000, length=9000)
    assert long.load(tmp_path / "a.wav").shape == (1, 8000)
    made = long.read(tmp_path / "a.wav")
    assert torch.equal(made[:, :8000], whole)
    assert not made[:, 8000:].any()
    torch.testing.assert_close(
        short.prepare((tone(rate=rate), rate)), short.read(tmp_path / "a.wav"), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("rate", [8000, 44100, 48000, 16001])
def test_a_part_sounds_as_in_the_whole(tmp_path, rate):
    """What is cut off is what the filter sees beyond the cut."""
    sound = torch.randn(1, 20000, generator=torch.Generator().manual_seed(0)) / 8
    soundfile.write(tmp_path / "a.wav", sound[0].numpy(), rate, "FLOAT")
    whole, cut = WaveformReader(16000), WaveformReader(16000, length=4000)
    want = whole.read(tmp_path / "a.wav")[:, :4000]
    torch.testing.assert_close(cut.read(tmp_path / "a.wav"), want)
    torch.testing.assert_close(cut.prepare((sound, rate)), want)
    part = resample(sound[:, 300:9300], rate, 16000, before=100, after=200)
    alone = resample(sound[:, 400:], rate, 16000, before=0)
    kept = slice(64, part.shape[1])
    torch.testing.assert_close(part[:, kept], alone[:, kept])


def test_random_start(tmp_path):
    ramp = torch.arange(1000.0)[None] / 1000
    write_sound(ramp, 8000, tmp_path / "a.flac")
    reader = WaveformReader(8000, length=100, random_start=True)

    def start(seed):
        generator = torch.Generator().manual_seed(seed)
        made = reader.read(tmp_path / "a.flac", generator)
        torch.testing.assert_close(made.diff(), torch.full((1, 99), 1e-3), rtol=0, atol=1e-4)
        return round(float(made[0, 0]) * 1000)

    starts = [start(seed) for seed in range(10)]
    assert starts == [start(seed) for seed in range(10)]
    assert len(set(starts)) > 5
    assert float(reader.read(tmp_path / "a.flac")[0, 0]) == 0


@pytest.mark.parametrize("suffix", SOUNDS)
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.99])
def test_truncated(tmp_path, suffix, share):
    path, data = tmp_path / f"a.{suffix}", sound_file(suffix)
    path.write_bytes(data)
    WaveformReader().verify(path)
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(FileError, match=f"a.{suffix}: "):
        WaveformReader().verify(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.wav", b"", "is empty"),
        ("a.wav", b"this is no sound, but text, of some length", "is no sound file"),
        ("a.wav", sound_file("flac"), "is named .wav, but holds FLAC"),
        ("a.flac", sound_file("wav"), "is named .flac, but holds WAV"),
        ("a.mp3", sound_file("wav"), "is named .mp3, but holds WAV"),
        ("a.wav", sound_file("wav")[:40] + bytes(4), "is truncated"),
    ],
)
def test_broken(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    for reader in (WaveformReader(), MelReader()):
        with pytest.raises(FileError, match=message):
            reader.read(tmp_path / name)


def test_other_refusals(tmp_path):
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), 8000)
    with pytest.raises(FileError, match="holds no samples"):
        WaveformReader().read(tmp_path / "none.wav")
    samples = np.zeros(100, np.float32)
    samples[50] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, 8000, "FLOAT")
    with pytest.raises(FileError, match="no finite numbers"):
        WaveformReader().verify(tmp_path / "nan.wav")
    with pytest.raises(ValueError, match=r"must end in one of \.wav"):
        write_sound(tone(), 8000, tmp_path / "a.xyz")
    with pytest.raises(ValueError, match="cannot be written"):
        write_sound(tone(), 12345, tmp_path / "a.mp3")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nan.wav", "none.wav"]
    with pytest.raises(ValueError, match=r"must be \(channels, samples\), got \(5,\)"):
        WaveformReader().prepare((torch.zeros(5), 8000))


def test_endless_header(tmp_path):
    """Programs that write to a pipe do not know the length: such files are whole."""
    data = bytearray(sound_file("wav"))
    data[4:8] = b"\xff\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(data)
    assert WaveformReader().read(tmp_path / "a.wav").shape == (1, 16000)


@given(st.floats(0, 24000), st.sampled_from(["slaney", "htk"]))
def test_mel_and_back(frequency, scale):
    hertz = torch.tensor([frequency], dtype=torch.float64)
    torch.testing.assert_close(hertz_of_mel(mel_of_hertz(hertz, scale), scale), hertz)


@pytest.mark.parametrize("scale", ["slaney", "htk"])
def test_filters(scale):
    utilities = pytest.importorskip("transformers.audio_utils")
    made = mel_filters(513, 22050, 80, 20.0, 8000.0, scale)
    want = utilities.mel_filter_bank(513, 80, 20.0, 8000.0, 22050, norm=None, mel_scale=scale)
    torch.testing.assert_close(made, torch.from_numpy(want).T)


@pytest.mark.parametrize("frequency", [200.0, 1000.0, 5000.0])
def test_mel_of_a_tone(frequency):
    """A tone lies in the filter of its frequency, at its level in decibels."""
    mel = LogMel(16000, n_fft=1024, hop=160, n_mels=40)
    made = mel(tone(frequency, amplitude=0.1)[0])
    assert made.shape == (40, 50)
    column = made[:, 25]
    low, high = mel_of_hertz(torch.tensor([0.0, 8000.0]), "slaney")
    place = (mel_of_hertz(torch.tensor(frequency), "slaney") - low) / (high - low) * 41 - 1
    assert abs(int(column.argmax()) - float(place)) < 1
    decibels = 40 * (column.amax() - 1)
    # The window spreads a tone over several bins, and triangles weigh these.
    assert -23 < decibels < -17
    assert (mel(torch.zeros(3, 2, 1000)) == -1).all()
    louder = mel(tone(frequency, amplitude=1.0)[0])[:, 25].amax()
    torch.testing.assert_close(louder - column.amax(), torch.tensor(0.5))


def test_griffin_lim():
    """The waveform found has about the spectrogram asked for, silence included."""
    mel = LogMel(8000, n_fft=512, hop=128, n_mels=48)
    sound = torch.cat([tone(300, 0.3, 8000), torch.zeros(1, 1200), tone(1500, 0.3, 8000)], 1)[0]
    want = mel(sound)
    made = mel.waveform(want)
    assert made.shape == (want.shape[-1] * 128,)
    loud = want > 0
    assert ((mel(made) - want)[loud].abs() * 40).median() < 1  # decibels
    assert made[3000:3400].abs().amax() < 0.01
    assert torch.equal(made, mel.waveform(want))
    assert mel.waveform(want.expand(2, 3, -1, -1), iterations=1).shape[:2] == (2, 3)


def test_mel_reader(tmp_path):
    write_sound(tone(), 16000, tmp_path / "a.wav")
    reader = MelReader(frames=40, hop=250, n_fft=800, n_mels=40)
    made = reader.read(tmp_path / "a.wav")
    assert made.shape == reader.shape == (40, 40)
    assert reader.load(tmp_path / "a.wav").shape == (40, 32)
    assert (made[:, 32:] == -1).all()
    assert (reader.missing() == -1).all()
    reader.write(made, tmp_path / "b.wav")
    again = reader.read(tmp_path / "b.wav")
    loud = made[:, :30] > 0
    assert ((again - made)[:, :30][loud].abs() * 40).median() < 1
    assert reader_from(json.loads(json.dumps(reader.describe()))) == reader
    batch = reader.log_mel(tone().expand(3, 1, -1))
    torch.testing.assert_close(batch[1, 0], made[:, :32], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WaveformReader(0), "sample_rate and length must be at least 1, got 0, None"),
        (lambda: WaveformReader(length=0), "got 16000, 0"),
        (lambda: MelReader(frames=0), "frames must be at least 1, got 0"),
        (lambda: MelReader(hop=600), "hop at most half of it, got 1024 and 600"),
        (lambda: MelReader(f_max=9000.0), "ascend between 0 and 8000.0 Hz, got 0.0 and 9000.0"),
        (
            lambda: MelReader(n_fft=256, hop=64, n_mels=128),
            "filters are narrower than the 129 bins",
        ),
        (lambda: MelReader(scale="bark"), "scale must be one of slaney, htk, got 'bark'"),
    ],
)
def test_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_dataset(tmp_path):
    """Both readers read the same files, and say how long each is."""
    for i in range(3):
        write_sound(tone(seconds=0.1 * (i + 1)), 16000, tmp_path / f"{i}.wav")
    (tmp_path / "3.wav").write_bytes(sound_file("wav")[:9000])
    readers = {"waveform": WaveformReader(), "mel": MelReader(frames=24, n_mels=40)}
    data = Dataset.from_folder(tmp_path, readers, on_error="skip")
    assert "3.wav: is truncated" in str(data.report)
    batch = data.collate([data[i] for i in range(3)])
    assert batch["waveform"].shape == (3, 1, 4800)
    assert batch["waveform_length"].tolist() == [1600, 3200, 4800]
    assert batch["mel"].shape == (3, 40, 24)
    assert batch["mel_length"].tolist() == [7, 13, 19]
    (tmp_path / "m.csv").write_text("audio\n0.wav\n2.wav\n")
    named = Dataset.from_manifest(tmp_path / "m.csv", readers)
    assert torch.equal(named[1]["mel"], data[2]["mel"])


def test_resampling_takes_no_integers():
    with pytest.raises(TypeError, match="waveform must be float32, float64, got int16"):
        resample(torch.ones(1, 100, dtype=torch.int16), 8000, 4000)
