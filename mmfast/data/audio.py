"""Sound, read and written with soundfile: waveforms and log-mel spectrograms."""

from __future__ import annotations

import functools
import io
import os
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Generator, Tensor

from mmfast.data.errors import FileError, needed
from mmfast.data.mel import LogMel
from mmfast.data.readers import Reader, checked_file
from mmfast.data.resample import reach_of, resample
from mmfast.data.truncation import check_whole
from mmfast.files import write_whole

_FORMATS = {
    ".wav": ("WAV", "WAVEX", "RF64"),
    ".flac": ("FLAC",),
    ".ogg": ("OGG",),
    ".opus": ("OGG",),
    ".mp3": ("MP3", "MPEG"),
    ".aif": ("AIFF",),
    ".aiff": ("AIFF",),
    ".au": ("AU",),
}
_BLOCK = 1 << 18  # frames that are read at a time to verify a file


def _opened(path: str | os.PathLike[str]) -> Any:
    """A ``soundfile.SoundFile`` of the format that its name says."""
    soundfile = needed("soundfile")
    file = checked_file(path)
    check_whole(path)
    try:
        sound = soundfile.SoundFile(file)
    except soundfile.LibsndfileError as error:
        raise FileError(path, f"is no sound file ({error.error_string})") from None
    named = _FORMATS.get(file.suffix.lower())
    if named and sound.format not in named:
        sound.close()
        raise FileError(path, f"is named {file.suffix}, but holds {sound.format}")
    if not sound.frames:
        sound.close()
        raise FileError(path, "holds no samples")
    return sound


def _read(path: str | os.PathLike[str], sound: Any, frames: int) -> np.ndarray:
    """The next float32 ``(frames, channels)``."""
    try:
        samples = sound.read(frames, dtype="float32", always_2d=True)
    except needed("soundfile").LibsndfileError as error:
        raise FileError(path, f"is damaged ({error.error_string})") from None
    if len(samples) < frames:
        raise FileError(path, f"is truncated: {frames - len(samples)} samples are not there")
    if not np.isfinite(samples).all():
        raise FileError(path, "has samples that are no finite numbers")
    return samples


@dataclass(frozen=True)
class _SoundReader(Reader):
    """What the two readers of sound share."""

    sample_rate: int = 16000
    random_start: bool = False

    source: ClassVar[str] = "audio"
    suffixes: ClassVar[frozenset[str]] = frozenset(_FORMATS)
    sequential: ClassVar[bool] = True

    @property
    @abstractmethod
    def samples(self) -> int | None:
        """That a waveform has at most; None if all of the file's."""

    @abstractmethod
    def made_of(self, waveform: Tensor) -> Tensor:
        """What the reader makes of a waveform ``(1, samples)`` at its sampling rate."""

    def check_name(self, path: str | os.PathLike[str]) -> None:
        """See :func:`write_sound`."""
        sound_suffix(path)

    def _start(self, have: int, want: int, generator: Generator | None) -> int:
        if generator is None or not self.random_start or have <= want:
            return 0
        return int(torch.randint(have - want + 1, (), generator=generator))

    def _wanted(self, have: int, rate: int) -> int:
        """Samples at another rate that are needed, of so many."""
        return (
            have if self.samples is None else min(have, -(-self.samples * rate // self.sample_rate))
        )

    def prepare(self, value: tuple[Tensor, int], generator: Generator | None = None) -> Tensor:
        """A waveform in memory, prepared like a file's.

        Args:
            value: float32 ``(channels, samples)`` and the sampling rate in hertz.
            generator: see :meth:`Reader.read`.

        Raises:
            ValueError: it has no samples.
        """
        waveform, rate = value
        if waveform.dim() != 2 or not waveform.numel():
            raise ValueError(f"a waveform must be (channels, samples), got {tuple(waveform.shape)}")
        wanted = self._wanted(waveform.shape[1], rate)
        start = self._start(waveform.shape[1], wanted, generator)
        before, after = self._around(start, wanted, waveform.shape[1], rate)
        return self._made(waveform[:, start - before : start + wanted + after], rate, before, after)

    def _around(self, start: int, wanted: int, have: int, rate: int) -> tuple[int, int]:
        """Samples beside those of a part that resampling looks at."""
        reach = reach_of(rate, self.sample_rate)
        return min(start, reach), min(have - start - wanted, reach)

    def _made(self, waveform: Tensor, rate: int, before: int, after: int) -> Tensor:
        """Of a part with what is around it."""
        mono = waveform.mean(0, keepdim=True)
        made = resample(mono, rate, self.sample_rate, before=before, after=after)
        return self.made_of(made[:, : self.samples])

    def load(self, path: str | os.PathLike[str], generator: Generator | None = None) -> Tensor:
        """The sound in a file; see :meth:`Reader.read`."""
        with _opened(path) as sound:
            wanted = self._wanted(sound.frames, sound.samplerate)
            start = self._start(sound.frames, wanted, generator)
            before, after = self._around(start, wanted, sound.frames, sound.samplerate)
            if start - before:
                sound.seek(start - before)
            samples = _read(path, sound, before + wanted + after)
            return self._made(torch.from_numpy(samples.T), sound.samplerate, before, after)

    def verify(self, path: str | os.PathLike[str]) -> None:
        """Read all samples."""
        with _opened(path) as sound:
            left = sound.frames
            while left:
                left -= len(_read(path, sound, min(left, _BLOCK)))


def sound_suffix(path: str | os.PathLike[str]) -> str:
    """The ending of the name of a sound that is to be written, in lower case.

    Raises:
        ValueError: the name ends in no format of sound.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        raise ValueError(f"{path}: the name must end in one of {', '.join(_FORMATS)}")
    return suffix


def write_sound(waveform: Tensor, rate: int, path: str | os.PathLike[str]) -> None:
    """Write ``(channels, samples)`` in [-1, 1], what is beyond clamped, by the name's ending.

    Args:
        waveform: one channel or more.
        rate: in hertz.
        path: of the file; its directory must exist.

    Raises:
        ValueError: the name ends in no format of sound.
    """
    suffix = sound_suffix(path)
    subtype = "OPUS" if suffix == ".opus" else None
    buffer = io.BytesIO()
    samples = waveform.detach().float().clamp(-1, 1).T.cpu().numpy()
    soundfile = needed("soundfile")
    try:
        soundfile.write(buffer, samples, rate, subtype, format=_FORMATS[suffix][0])
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path}: cannot be written ({error.error_string})") from None
    write_whole(path, buffer.getvalue())


@dataclass(frozen=True)
class WaveformReader(_SoundReader):
    """Sound as float32 ``(1, samples)``, in [-1, 1] as far as the file is.

    Channels are averaged; the sampling rate is changed by :func:`mmfast.data.resample`.

    Args:
        sample_rate: in hertz.
        random_start: with a generator, cut anywhere instead of from the start.
        length: in samples, at which longer sounds are cut and to which shorter ones are filled up
            with zeros; None keeps their own.

    Raises:
        ValueError: an option is below 1.
    """

    length: int | None = None

    modality: ClassVar[str] = "waveform"

    def __post_init__(self) -> None:
        if self.sample_rate < 1 or (self.length is not None and self.length < 1):
            raise ValueError(
                f"sample_rate and length must be at least 1, got {self.sample_rate}, {self.length}"
            )

    @property
    def shape(self) -> tuple[int | None, ...]:
        """``(1, length)``."""
        return 1, self.length

    @property
    def samples(self) -> int | None:
        """``length``."""
        return self.length

    def made_of(self, waveform: Tensor) -> Tensor:
        """The waveform."""
        return waveform

    def write(self, value: Tensor, path: str | os.PathLike[str]) -> None:
        """See :func:`write_sound`."""
        write_sound(value, self.sample_rate, path)


@dataclass(frozen=True)
class MelReader(_SoundReader):
    """Sound as log-mel spectrograms, float32 ``(n_mels, frames)``; see :class:`LogMel`.

    Args:
        random_start: with a generator, cut anywhere instead of from the start.
        frames: of ``hop`` samples, at which longer sounds are cut and to which shorter ones are
            filled up with -1, silence; None keeps their own.
        sample_rate, n_fft, hop, n_mels, f_min, f_max, scale: of :class:`LogMel`.

    Raises:
        ValueError: an option makes no sense.
    """

    frames: int | None = None
    n_fft: int = 1024
    hop: int = 256
    n_mels: int = 80
    f_min: float = 0.0
    f_max: float | None = None
    scale: str = "slaney"

    modality: ClassVar[str] = "mel"

    def __post_init__(self) -> None:
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"frames must be at least 1, got {self.frames}")
        self.log_mel  # noqa: B018  wrong options are to fail here

    @functools.cached_property
    def log_mel(self) -> LogMel:
        """The transform: of waveforms at ``sample_rate``, and back."""
        return LogMel(
            self.sample_rate,
            self.n_fft,
            self.hop,
            self.n_mels,
            self.f_min,
            self.f_max,
            self.scale,
        )

    @property
    def shape(self) -> tuple[int | None, ...]:
        """``(n_mels, frames)``."""
        return self.n_mels, self.frames

    @property
    def padding(self) -> float:
        """Silence."""
        return -1.0

    @property
    def samples(self) -> int | None:
        """Of the frames."""
        return None if self.frames is None else self.frames * self.hop

    def made_of(self, waveform: Tensor) -> Tensor:
        """Its spectrogram."""
        return self.log_mel(waveform)[0]

    def write(self, value: Tensor, path: str | os.PathLike[str]) -> None:
        """Write a waveform with this spectrogram, to listen to; see :meth:`LogMel.waveform`."""
        write_sound(self.log_mel.waveform(value)[None], self.sample_rate, path)
