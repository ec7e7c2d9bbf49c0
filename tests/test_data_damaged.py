"""Damage of any kind, to files of every format, is an error of the file or goes unnoticed."""

from __future__ import annotations

import random

import pytest
from media import PICTURES, READ, SOUNDS, picture_file, sound_file, video_file

from mmfast.data import (
    FileError,
    ImageReader,
    MelReader,
    TextReader,
    VideoReader,
    WaveformReader,
    train_tokenizer,
)

for module in ("PIL", "av", "soundfile", "tokenizers"):
    pytest.importorskip(module)

TEXT = "größer als\n".encode()
FILES = {
    **{suffix: (lambda s=suffix: picture_file(s)) for suffix in PICTURES},
    **{suffix: (lambda s=suffix: sound_file(s)) for suffix in SOUNDS},
    **{suffix: (lambda s=suffix: video_file(s)) for suffix in READ},
    "txt": lambda: TEXT * 5,
}


def reader(suffix):
    if suffix in PICTURES:
        return ImageReader(8)
    if suffix in SOUNDS:
        return MelReader(frames=8) if suffix == "wav" else WaveformReader(length=100)
    return TextReader(train_tokenizer(["größer"])) if suffix == "txt" else VideoReader(4, 16)


def damaged(data, rng):
    """Bytes changed, removed, added, or made a large number; mostly near the start."""
    made = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 10])):
        at = rng.randrange(min(len(made), rng.choice([40, 200, len(data)])))
        what = rng.random()
        if what < 0.5:
            made[at] = rng.randrange(256)
        elif what < 0.7:
            del made[at : at + rng.randrange(1, 9)]
        elif what < 0.85:
            made[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            made[at : at + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"])
    return bytes(made)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", FILES)
def test_damage(tmp_path, suffix):
    rng = random.Random(suffix)
    path = tmp_path / f"a.{suffix}"
    refused = 0
    for _ in range(12):
        path.write_bytes(damaged(FILES[suffix](), rng))
        try:
            reader(suffix).verify(path)
        except FileError as error:
            refused += error.path == str(path)
    path.write_bytes(FILES[suffix]())
    reader(suffix).verify(path)
    assert refused > 0 or suffix == "mp3"  # whose decoder plays on
