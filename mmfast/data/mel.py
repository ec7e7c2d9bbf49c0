"""Log-mel spectrograms, and the way back by Griffin and Lim."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from mmfast.checks import check_choice

_FLOOR = 1e-8  # -80 dB


def mel_of_hertz(frequency: Tensor, scale: str) -> Tensor:
    """Frequencies in mel.

    ``"htk"``: ``2595 log10(1 + f / 700)``. ``"slaney"``: linear up to 1000 Hz, ``3 f / 200``, and
    ``15 + 27 ln(f / 1000) / ln 6.4`` above.

    Source: Young et al., "The HTK Book" (2006), section 5.4; Slaney, "Auditory Toolbox" (1998).
    """
    if scale == "htk":
        return 2595 * torch.log10(1 + frequency / 700)
    logarithmic = 15 + 27 * torch.log(frequency.clamp(min=1) / 1000) / math.log(6.4)
    return torch.where(frequency < 1000, 3 * frequency / 200, logarithmic)


def hertz_of_mel(mel: Tensor, scale: str) -> Tensor:
    """The inverse of :func:`mel_of_hertz`."""
    if scale == "htk":
        return 700 * (10 ** (mel / 2595) - 1)
    return torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))


def mel_filters(
    bins: int, sample_rate: int, n_mels: int, f_min: float, f_max: float, scale: str
) -> Tensor:
    """Triangles of height 1, ``(n_mels, bins)`` in float64.

    Their corners lie at equal distances in mel from ``f_min`` to ``f_max``; each reaches from the
    peak before to the one behind.

    Args:
        bins: of a spectrum from 0 to half the sampling rate.
        sample_rate: in hertz.
        n_mels: number of filters.
        f_min, f_max: in hertz.
        scale: ``"slaney"`` or ``"htk"``.

    Raises:
        ValueError: a filter lies between two bins, so that it is always 0; or the frequencies are
            out of range.
    """
    check_choice("scale", scale, ("slaney", "htk"))
    if not 0 <= f_min < f_max <= sample_rate / 2:
        raise ValueError(
            f"f_min and f_max must ascend between 0 and {sample_rate / 2} Hz, "
            f"got {f_min} and {f_max}"
        )
    frequencies = torch.linspace(0, sample_rate / 2, bins, dtype=torch.float64)
    low, high = mel_of_hertz(torch.tensor([f_min, f_max], dtype=torch.float64), scale)
    corners = hertz_of_mel(torch.linspace(low, high, n_mels + 2, dtype=torch.float64), scale)
    left, peak, right = (c[:, None] for c in (corners[:-2], corners[1:-1], corners[2:]))
    rising, falling = (frequencies - left) / (peak - left), (right - frequencies) / (right - peak)
    filters = torch.minimum(rising, falling).clamp(min=0)
    empty = int((filters.amax(1) == 0).sum())
    if empty:
        raise ValueError(
            f"{empty} of {n_mels} mel filters are narrower than the {bins} bins of the spectrum: "
            "take fewer, or a longer window"
        )
    return filters


@dataclass(frozen=True)
class LogMel:
    """Waveforms as log-mel spectrograms in [-1, 1].

    A frame's spectrum, with a Hann window, is scaled such that a sine of amplitude 1 has power 1.
    The power in each mel filter becomes decibels, of which -80 and less are -1, 0 is 1; what
    exceeds 0, as noise of many bins can, is more than 1.

    Args:
        sample_rate: of the waveforms, in hertz.
        n_fft: samples of the window and the transform, even.
        hop: samples from one frame to the next; at most half of ``n_fft``.
        n_mels: number of mel filters.
        f_min, f_max: where these begin and end, in hertz; at half the sampling rate by default.
        scale: ``"slaney"`` or ``"htk"``, see :func:`mel_of_hertz`.

    Raises:
        ValueError: the options make no sense.
    """

    sample_rate: int = 16000
    n_fft: int = 1024
    hop: int = 256
    n_mels: int = 80
    f_min: float = 0.0
    f_max: float | None = None
    scale: str = "slaney"

    def __post_init__(self) -> None:
        if self.n_fft < 4 or self.n_fft % 2 or not 1 <= self.hop <= self.n_fft // 2:
            raise ValueError(
                "n_fft must be even and at least 4, and hop at most half of it, got "
                f"{self.n_fft} and {self.hop}"
            )
        self.filters  # noqa: B018  wrong options are to fail here

    @functools.cached_property
    def filters(self) -> Tensor:
        """``(n_mels, n_fft / 2 + 1)``."""
        f_max = self.sample_rate / 2 if self.f_max is None else self.f_max
        bins = self.n_fft // 2 + 1
        filters = mel_filters(bins, self.sample_rate, self.n_mels, self.f_min, f_max, self.scale)
        return filters.float()

    def _window(self, like: Tensor) -> Tensor:
        return torch.hann_window(self.n_fft, device=like.device)

    def _spectrum(self, waveform: Tensor) -> Tensor:
        """Complex ``(B, bins, frames)``; frames are centred at multiples of ``hop``."""
        return torch.stft(
            waveform,
            self.n_fft,
            self.hop,
            window=self._window(waveform),
            center=True,
            pad_mode="constant",
            return_complex=True,
        )

    def __call__(self, waveform: Tensor) -> Tensor:
        """The spectrogram, ``(..., n_mels, ceil(samples / hop))``, of ``(..., samples)``."""
        samples = waveform.shape[-1]
        frames = -(-samples // self.hop)
        spectrum = self._spectrum(waveform.reshape(-1, samples).float())[..., :frames]
        full_scale = self.n_fft / 4  # half the sum of the window
        power = self.filters.to(waveform.device) @ (spectrum.abs() / full_scale).square()
        decibels = 10 * torch.log10(power.clamp(min=_FLOOR))
        return (decibels / 40 + 1).reshape(*waveform.shape[:-1], self.n_mels, frames)

    def waveform(self, mel: Tensor, *, iterations: int = 60, seed: int = 0) -> Tensor:
        """A waveform ``(..., frames * hop)`` with about this spectrogram, by Griffin-Lim.

        The spectrum is one of no negative power whose mel bands come closest, by multiplicative
        updates; its phases are those of a signal that is transformed there and back, with momentum
        0.99, from random ones on.

        Args:
            mel: ``(..., n_mels, frames)``.
            iterations: of the search for phases.
            seed: of the first phases.

        Source: Griffin and Lim, "Signal estimation from modified short-time Fourier transform"
        (1984); Perraudin et al., "A fast Griffin-Lim algorithm" (2013); Lee and Seung, "Algorithms
        for Non-negative Matrix Factorization" (2000).
        """
        flat = mel.reshape(-1, *mel.shape[-2:]).float()
        power = 10 ** (4 * (flat.clamp(-1, 1.5) - 1))
        power = torch.where(flat <= -1, 0, power)
        magnitude = self._powers(power).sqrt() * (self.n_fft / 4)
        magnitude = torch.nn.functional.pad(magnitude, (0, 1))  # the frame that __call__ leaves out
        samples = flat.shape[-1] * self.hop
        generator = Generator().manual_seed(seed)
        angles = 2 * math.pi * torch.rand(magnitude.shape, generator=generator).to(mel.device)
        phases, before = torch.polar(torch.ones_like(angles), angles), torch.zeros(())
        for _ in range(iterations):
            spectrum = self._spectrum(self._signal(magnitude * phases, samples))
            ahead = spectrum + 0.99 * (spectrum - before) if before.dim() else spectrum
            phases, before = ahead / ahead.abs().clamp(min=1e-16), spectrum
        return self._signal(magnitude * phases, samples).reshape(*mel.shape[:-2], samples)

    def _powers(self, mel: Tensor) -> Tensor:
        """The spectrum's power ``(B, bins, frames)``, of that in mel bands."""
        filters = self.filters.to(mel.device)
        spread = filters.T @ mel
        power = spread / filters.sum(0).clamp(min=1)[:, None]
        for _ in range(100):
            power = power * spread / (filters.T @ (filters @ power)).clamp(min=1e-20)
        return power

    def _signal(self, spectrum: Tensor, samples: int) -> Tensor:
        return torch.istft(
            spectrum, self.n_fft, self.hop, window=self._window(spectrum), length=samples
        )
