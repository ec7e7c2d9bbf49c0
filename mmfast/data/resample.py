"""Waveforms at another sampling rate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmfast.checks import check_dtype

_CHUNK = 1 << 16  # samples made at a time, which bounds the memory


def resample(
    waveform: Tensor,
    rate: int,
    new_rate: int,
    *,
    zeros: int = 24,
    rolloff: float = 0.95,
    before: int = 0,
    after: int = 0,
) -> Tensor:
    """Band-limited interpolation by a windowed sinc, for any ratio of whole rates.

    Sample ``n`` of the result is the sum over ``k`` of ``x[k] h(n rate / new_rate - k)`` with
    ``h(t) = c sinc(c t) w(t)``, ``c = rolloff min(1, new_rate / rate)`` and a Kaiser window ``w``
    (beta 9) that ends after ``zeros`` zeros of the sinc. Beyond its ends the waveform is 0.

    Args:
        waveform: ``(..., samples)``, float32 or float64.
        rate: of the waveform, in hertz.
        new_rate: of the result, in hertz.
        zeros: of the sinc on either side; more make the filter steeper.
        rolloff: where the filter cuts off, as a share of the lower Nyquist frequency.
        before, after: so many samples at the ends are only what the filter sees around the others,
            of which the result is: of a part of a longer sound; see :func:`reach_of`.

    Returns:
        ``(..., ceil(samples * new_rate / rate))``, of the same dtype; without the samples at the
        ends.

    Raises:
        TypeError: the waveform is of another dtype.
        ValueError: a rate is below 1.

    Source: Julius O. Smith, "Digital Audio Resampling Home Page" (2002),
    https://ccrma.stanford.edu/~jos/resample/.
    """
    check_dtype("waveform", waveform, (torch.float32, torch.float64))
    if rate < 1 or new_rate < 1:
        raise ValueError(f"sampling rates must be at least 1 Hz, got {rate} and {new_rate}")
    divisor = math.gcd(rate, new_rate)
    old, new = rate // divisor, new_rate // divisor
    samples = waveform.shape[-1]
    if old == new:
        return waveform[..., before : samples - after]
    cutoff = rolloff * min(1.0, new / old)
    reach = reach_of(rate, new_rate, zeros=zeros, rolloff=rolloff)
    phases = torch.arange(new, dtype=torch.float64)[:, None] / new
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    distance = phases - offsets
    shape = (1 - (distance * (cutoff / zeros)).square()).clamp(min=0).sqrt()
    window = torch.special.i0(9.0 * shape) / torch.special.i0(torch.tensor(9.0).double())
    filters = cutoff * torch.sinc(cutoff * distance) * window
    filters = (filters / filters.sum(1, keepdim=True)).to(waveform.dtype)

    length = -(-(samples - before - after) * new // old)
    padded = torch.nn.functional.pad(waveform.reshape(-1, samples), (reach, reach + 1))
    windows = padded.unfold(1, 2 * reach + 1, 1)
    made = torch.empty(len(padded), length, dtype=waveform.dtype)
    for start in range(0, length, _CHUNK):
        n = torch.arange(start, min(start + _CHUNK, length))
        places = before + n * old // new
        made[:, start : start + _CHUNK] = (windows[:, places] * filters[n * old % new]).sum(2)
    return made.reshape(*waveform.shape[:-1], length)


def reach_of(rate: int, new_rate: int, *, zeros: int = 24, rolloff: float = 0.95) -> int:
    """How many samples on either side :func:`resample` looks at for one of its result."""
    if rate == new_rate:
        return 0
    return math.ceil(zeros / (rolloff * min(1.0, new_rate / rate)))
