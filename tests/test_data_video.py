"""Videos of every container: which frames make a clip, broken files, and the way back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from media import HEIGHT, READ, WIDTH, T, movie, video_file

from mmfast.data import Dataset, FileError, VideoReader, reader_from, to_uint8, write_video
from mmfast.data.video import decoded

av = pytest.importorskip("av")
pytest.importorskip("PIL")


def number(frame):
    """Which frame of the movie it is, ``(3, height, width)`` in [-1, 1]."""
    return round((float((frame[..., -8:].mean() + 1) * 127.5) - 20) / 8)


def numbers(video):
    return [number(video[:, i]) for i in range(video.shape[1])]


@pytest.fixture
def file(tmp_path):
    def make(suffix="mp4", name="a"):
        path = tmp_path / f"{name}.{suffix}"
        path.write_bytes(video_file(suffix))
        return path

    return make


@pytest.mark.parametrize("suffix", READ)
def test_there_and_back(file, suffix):
    reader = VideoReader()
    reader.verify(file(suffix))
    made = reader.read(file(suffix))
    assert made.shape == (3, T, HEIGHT, WIDTH)
    assert made.dtype == torch.float32
    assert numbers(made) == list(range(T))
    assert ((made - movie()).abs().mean() < 0.05).item()


@pytest.mark.parametrize("sides", [(31, 48), (32, 47), (1, 3)])
def test_odd_sizes(tmp_path, sides):
    write_video(movie()[:, :3, : sides[0], : sides[1]], tmp_path / "a.mp4", 12.5)
    made = VideoReader().read(tmp_path / "a.mp4")
    assert made.shape == (3, 3, *sides)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 12.5
    grey = VideoReader(channels=1, size=(8, 12)).read(tmp_path / "a.mp4")
    assert grey.shape == (1, 3, 8, 12)


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"frames": 4}, [0, 6, 13, 19]),
        ({"frames": 1}, [0]),
        ({"frames": 5, "stride": 1}, [0, 1, 2, 3, 4]),
        ({"frames": 5, "stride": 3}, [0, 3, 6, 9, 12]),
        ({"stride": 7}, [0, 7, 14]),
        ({"fps": 5}, [0, 5, 10, 15]),
        ({"frames": 3, "fps": 12.5}, [0, 2, 4]),
        ({"frames": 4, "fps": 50}, [0, 0, 1, 1]),
        ({"frames": 4, "fps": 10}, [0, 2, 5, 7]),
    ],
)
def test_sampling(file, options, want):
    """Of frames shown 25 times a second."""
    reader = VideoReader(**options)
    made = reader.read(file())
    assert numbers(made) == want
    torch.testing.assert_close(made, VideoReader().read(file())[:, want])
    memory = reader.prepare((to_uint8(movie()), 25))
    assert numbers(memory) == want


@pytest.mark.parametrize("suffix", ["mp4", "webm", "avi"])
@pytest.mark.parametrize("spacing", [{"stride": 2}, {"fps": 12.5}])
def test_random_start(file, suffix, spacing):
    """Anywhere, also far from a key frame; the same for the same generator."""
    reader = VideoReader(frames=3, random_start=True, **spacing)
    path = file(suffix)

    def clip(seed):
        made = numbers(reader.read(path, torch.Generator().manual_seed(seed)))
        assert made == [made[0], made[0] + 2, made[0] + 4]
        return made[0]

    starts = [clip(seed) for seed in range(12)]
    assert starts == [clip(seed) for seed in range(12)]
    assert len(set(starts)) > 5
    assert 0 <= min(starts) <= max(starts) <= 15
    assert numbers(reader.read(path)) == [0, 2, 4]


@given(
    st.integers(1, 60),
    st.one_of(st.none(), st.integers(1, 20)),
    st.sampled_from([{}, {"stride": 1}, {"stride": 3}, {"fps": 7.0}, {"fps": 30.0}, {"fps": 60}]),
    st.integers(0, 5),
)
def test_places(have, frames, spacing, seed):
    """Always of the video, ascending, as many as asked for; or the video is too short."""
    reader = VideoReader(frames=frames, random_start=True, **spacing)
    times = [i / 29.97 for i in range(have)]
    generator = torch.Generator().manual_seed(seed)
    span = (frames or 1) - 1  # from the first frame of a clip to the last, in frames of the video
    span = span * spacing["stride"] if "stride" in spacing else span
    span = span * 29.97 / spacing["fps"] if "fps" in spacing else span
    # The last frame is shown for a while, too; how long a single one is, nothing says.
    if span > (have - 1e-3 if "fps" in spacing and have > 1 else have - 1):
        with pytest.raises(ValueError, match="is too short"):
            reader.places(times, generator)
        return
    made = reader.places(times, generator)
    assert frames is None or len(made) == frames
    assert made[0] >= 0
    assert made[-1] < have
    assert made == sorted(made)


def test_crops(file):
    """All frames of a clip alike."""
    size = VideoReader(4, 16).read(file())
    assert size.shape == VideoReader(4, 16).shape == (3, 4, 16, 16)
    reader = VideoReader(4, 16, random_crop=True, random_flip=True)
    made = [reader.read(file(), torch.Generator().manual_seed(i)) for i in range(8)]
    edges = {tuple((clip[0, :, 8].diff() / 2).abs().argmax(1).tolist()) for clip in made}
    assert len(edges) > 2
    assert all(len(set(edge)) == 1 for edge in edges)
    assert reader.read(file()).equal(size)


@pytest.mark.parametrize("turns", range(4))
def test_rotation(tmp_path, turns):
    """What players turn is turned: the matrix in an MP4's track header."""
    write_video(movie()[:, :2], tmp_path / "a.mp4")
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b = {0: (1, 0), 1: (0, -1), 2: (-1, 0), 3: (0, 1)}[turns]
    matrix = [a << 16, b << 16, 0, -b << 16, a << 16, 0, 0, 0, 1 << 30]
    assert data[at : at + 4] == (1 << 16).to_bytes(4, "big")
    data[at : at + 36] = b"".join(x.to_bytes(4, "big", signed=True) for x in matrix)
    (tmp_path / "a.mp4").write_bytes(data)
    (first, _) = decoded(tmp_path / "a.mp4")
    flat = np.rot90(np.asarray(to_uint8(movie()[:, 0]).permute(1, 2, 0)), turns)
    assert first.shape == flat.shape
    assert np.abs(first.astype(int) - flat).mean() < 4
    made = VideoReader(2, (8, 20)).read(tmp_path / "a.mp4")
    assert made.shape == (3, 2, 8, 20)


@pytest.mark.parametrize("suffix", READ[:-1])
@pytest.mark.parametrize("share", [0.005, 0.2, 0.5, 0.8, 0.99])
def test_truncated(file, suffix, share):
    path = file(suffix)
    path.write_bytes(video_file(suffix)[: int(share * len(video_file(suffix)))])
    with pytest.raises(FileError, match=f"a.{suffix}: "):
        VideoReader().verify(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.mp4", lambda: b"", "is empty"),
        ("a.mp4", lambda: b"no video, but text " * 50, "cannot be decoded|holds no video"),
        ("a.mkv", lambda: video_file("mp4"), r"is named \.mkv, but holds mov,mp4"),
        ("a.mp4", lambda: video_file("webm"), r"is named \.mp4, but holds matroska,webm"),
    ],
)
def test_broken(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data())
    with pytest.raises(FileError, match=message):
        VideoReader().read(tmp_path / name)


def test_undecodable(file):
    """Whole as a container, but the pictures in it are noise."""
    data = bytearray(video_file("mp4"))
    start = data.index(b"mdat") + 4
    end = start - 8 + int.from_bytes(data[start - 8 : start - 4], "big")
    noise = np.random.default_rng(0).integers(0, 256, end - start, dtype=np.uint8)
    data[start:end] = noise.tobytes()
    path = file()
    path.write_bytes(data)
    with pytest.raises(FileError, match=r"decode|damaged frames"):
        VideoReader().verify(path)


def test_sound_alone(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", 16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(FileError, match="holds no video"):
        VideoReader().read(tmp_path / "a.mp4")


def test_too_short(file):
    for options, message in (
        ({"frames": 21}, "is too short: 20 frames, 21 needed"),
        ({"frames": 6, "stride": 4}, "is too short: 20 frames, 21 needed"),
        ({"frames": 5, "fps": 5}, r"is too short: lasts 0\.8 s, more than 0\.8 s needed"),
    ):
        with pytest.raises(FileError, match=message):
            VideoReader(**options).verify(file())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VideoReader(fps=5, stride=2), "not possible: fps and stride"),
        (lambda: VideoReader(0), "frames must be above 0, got 0"),
        (lambda: VideoReader(stride=1.5), r"stride must be above 0, got 1\.5"),
        (lambda: VideoReader(channels=4), "channels must be 1 or 3, got 4"),
        (lambda: VideoReader(size=(1, 2, 3)), "size must be"),
        (lambda: write_video(torch.zeros(3, 2, 4), "a.mp4"), r"got \(3, 2, 4\)"),
        (lambda: write_video(movie(), "a.gif"), r"must end in \.mp4, .*"),
        (lambda: VideoReader().prepare((torch.zeros(3, 2, 4, 4), 25)), "must be uint8"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_dataset(file, tmp_path):
    file(name="one"), file(name="two", suffix="webm")
    (tmp_path / "three.mp4").write_bytes(video_file("mp4")[:700])
    reader = VideoReader(4, 16, stride=2)
    data = Dataset.from_folder(tmp_path, {"video": reader}, on_error="skip")
    assert [record.name for record in data.records] == ["one", "two"]
    assert "three.mp4: is truncated" in str(data.report)
    assert data.collate([data[0], data[1]])["video"].shape == (2, 3, 4, 16, 16)
    assert reader_from(json.loads(json.dumps(reader.describe()))) == reader
