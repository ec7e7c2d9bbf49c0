"""Spoken digits, synthesised by espeak-ng in many voices."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmfast.data.errors import needed
from mmfast.data.progress import tracked
from mmfast.data.resample import resample
from mmfast.files import write_whole

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-029")
_SPEAKERS = (
    *("m1", "f1", "m2", "f2", "m3", "f3", "m4", "f4", "m5", "f5", "m6", "m7", "m8"),
    *("Alex", "Alicia", "Andrea", "Andy", "Annie", "Denis", "Diogo", "Gene", "Hugo", "Jacky"),
    *("Lee", "Mario", "Michael", "Mike", "adam", "anika", "antonio", "aunty", "belinda"),
    *("benjamin", "boris", "caleb", "david", "ed", "edward", "grandma", "grandpa", "iven"),
    *("john", "linda", "marcelo", "max", "miguel", "pablo", "paul", "quincy", "rob", "steph"),
    *("travis", "victor", "zac"),
)
VOICES = tuple(f"{_ACCENTS[i % len(_ACCENTS)]}+{speaker}" for i, speaker in enumerate(_SPEAKERS))
"""Voices by default: speakers that espeak-ng brings, in turn with English accents."""

_SILENCE = 1e-3  # below it, of a full scale of 1, ends are cut off


class EspeakError(RuntimeError):
    """espeak-ng is not installed, or cannot say what it was asked to."""


class SpokenDigits(NamedTuple):
    """N recordings.

    Attributes:
        waveforms: float32 ``(N, 1, samples)`` in [-1, 1], zeros behind the end of each.
        lengths: int64 ``(N,)``, samples up to there.
        labels: int64 ``(N,)``, the digit.
        voices: of each.
        sample_rate: in hertz.
    """

    waveforms: Tensor
    lengths: Tensor
    labels: Tensor
    voices: tuple[str, ...]
    sample_rate: int


def has_espeak() -> bool:
    """Whether espeak-ng is installed."""
    return shutil.which("espeak-ng") is not None


def _run(*arguments: str) -> bytes:
    """Standard output of espeak-ng."""
    if not has_espeak():
        raise EspeakError(
            "espeak-ng is not installed; on Debian and Ubuntu, apt-get install espeak-ng brings it"
        )
    done = subprocess.run(["espeak-ng", *arguments], capture_output=True, check=False)
    if done.returncode or not done.stdout:
        message = done.stderr.decode(errors="replace").strip().removeprefix("Error: ")
        raise EspeakError(f"espeak-ng {' '.join(arguments)}: {message or 'no output'}")
    return done.stdout


def speak(text: str, voice: str = "en-us", speed: int = 160, pitch: int = 50) -> tuple[Tensor, int]:
    """Synthesised speech without the silence around it.

    Args:
        text: to be spoken.
        voice: of espeak-ng, such as ``"en-us"`` or, with a speaker, ``"en-us+f2"``.
        speed: in words a minute, at least 80.
        pitch: 0 to 99.

    Returns:
        float32 ``(1, samples)`` and the sampling rate in hertz.

    Raises:
        EspeakError: espeak-ng is not installed, does not know the voice, or says nothing.
        ValueError: the speed or the pitch is out of range.
    """
    soundfile = needed("soundfile")
    if speed < 80 or not 0 <= pitch <= 99:
        raise ValueError(f"speed must be at least 80 and pitch 0 to 99, got {speed} and {pitch}")
    # A speaker that espeak-ng does not know is silently replaced by its standard one.
    _, plus, speaker = voice.partition("+")
    if plus and speaker not in speakers():
        raise EspeakError(f"espeak-ng has no speaker {speaker!r}, only {', '.join(speakers())}")
    data = _run("-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", text)
    # The header of a stream says that it is endless.
    samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    loud = np.flatnonzero(np.abs(samples) > _SILENCE)
    if not len(loud):
        raise EspeakError(f"espeak-ng says nothing for {text!r}")
    return torch.from_numpy(samples[loud[0] : loud[-1] + 1].copy())[None], rate


@functools.cache
def speakers() -> tuple[str, ...]:
    """Names of the speakers that espeak-ng can give a voice, sorted.

    Raises:
        EspeakError: espeak-ng is not installed.
    """
    lines = _run("--voices=variant").decode().splitlines()[1:]
    return tuple(sorted(line.split("!v/")[1].strip() for line in lines if "!v/" in line))


def spoken_digits(
    voices: Sequence[str] = VOICES,
    speeds: Sequence[int] = (140, 170, 200),
    pitches: Sequence[int] = (35, 50, 65),
    *,
    sample_rate: int = 16000,
    seconds: float | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> SpokenDigits:
    """The digits, each spoken by all voices at all speeds and pitches.

    The same bits whenever espeak-ng is of the same version. A recording takes about 15 ms to make.

    Args:
        voices: of espeak-ng.
        speeds: in words a minute.
        pitches: 0 to 99.
        sample_rate: of the result, in hertz.
        seconds: that all recordings last, cut off or filled up with zeros; by default, as long as
            the longest.
        cache: a directory to keep the recordings in, from which the next call takes them.

    Returns:
        All digits of the first voice, speed and pitch, then those of the next pitch, ...

    Raises:
        EspeakError: espeak-ng is not installed, or does not know a voice.
        ValueError: there are no voices, speeds or pitches, or one is out of range.
    """
    spoken = list(product(voices, speeds, pitches, range(len(WORDS))))
    if not spoken:
        raise ValueError("voices, speeds and pitches must hold at least one each")

    def record(given: tuple[str, int, int, int]) -> np.ndarray:
        voice, speed, pitch, digit = given
        waveform, rate = speak(WORDS[digit], voice, speed, pitch)
        # 16 bits, as the cache holds them.
        scaled = resample(waveform, rate, sample_rate)[0] * 32767
        return scaled.round().clamp(-32768, 32767).to(torch.int16).numpy()

    def make() -> list[np.ndarray]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(tracked(pool.map(record, spoken), "speaking", len(spoken)))

    what = json.dumps([list(voices), list(speeds), list(pitches), sample_rate])
    recordings = _cached(cache, what, make) if cache else make()
    longest = max(map(len, recordings))
    samples = longest if seconds is None else round(seconds * sample_rate)
    waveforms = torch.zeros(len(spoken), 1, samples)
    for row, recording in zip(waveforms, recordings, strict=True):
        kept = torch.from_numpy(recording[:samples]).float() / 32767
        row[0, : len(kept)] = kept
    return SpokenDigits(
        waveforms,
        torch.tensor([min(len(r), samples) for r in recordings]),
        torch.tensor([digit for *_, digit in spoken]),
        tuple(voice for voice, *_ in spoken),
        sample_rate,
    )


def _cached(
    directory: str | os.PathLike[str], what: str, make: Callable[[], list[np.ndarray]]
) -> list[np.ndarray]:
    """Recordings from the directory's file for ``what`` and this version of espeak-ng, or made."""
    version = _run("--version").split(b"Data at")[0]
    name = hashlib.sha256(version + what.encode()).hexdigest()[:16]
    path = Path(directory) / f"spoken-digits-{name}.npz"
    if path.is_file():
        with np.load(path) as file:
            return np.split(file["samples"], file["ends"][:-1])
    made = make()
    buffer = io.BytesIO()
    np.savez(buffer, samples=np.concatenate(made), ends=np.cumsum([len(r) for r in made]))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, buffer.getvalue())
    return made
