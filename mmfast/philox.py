"""Random numbers as a function of (seed, offset, element): the specification, in plain PyTorch.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). The key is the
64-bit seed, its low word first. The counter is (block, offset), 64 bits each, low words first; a
block holds four elements, word i its element i. All backends make the same words from that:
``csrc/cpu/philox.h``, ``kernels/philox.py``, and here, on int64 tensors that hold words of 32 bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds. All are int64 tensors of words from 0 to 2^32 - 1 that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The products wrap to 64 bits, of which the shift's sign is masked away.
        p, q = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = (q >> 32 & _WORD) ^ c1 ^ k0, q & _WORD
        c2, c3 = (p >> 32 & _WORD) ^ c3 ^ k1, p & _WORD
        k0, k1 = k0 + _WEYL[0] & _WORD, k1 + _WEYL[1] & _WORD
    return c0, c1, c2, c3


def words(seed: Tensor, offset: Tensor, block: Tensor) -> Tensor:
    """The words of blocks of four elements.

    Args:
        seed, offset, block: int64, any shapes that broadcast.

    Returns:
        int64 from 0 to 2^32 - 1, of the joint shape and a last dimension of 4.
    """
    counter = (block & _WORD, block >> 32 & _WORD, offset & _WORD, offset >> 32 & _WORD)
    made = philox4x32(counter, (seed & _WORD, seed >> 32 & _WORD))
    return torch.stack(torch.broadcast_tensors(*made), -1)


def uniform(word: Tensor) -> Tensor:
    """float32(word) 2^-32 + 2^-33, float32: from 2^-33 to 1, both included."""
    # float64 holds the word exactly, so that it is rounded once.
    return (word.double() * 2.0**-32).float() + 2.0**-33


def angle(word: Tensor) -> Tensor:
    """Turns from -1/8 to 1/8 in float32, of the lower 30 bits of a word as a signed number n.

    float32(4 n) 2^-34 + 2^-33, so that none is 0 and small ones keep their relative precision.
    """
    n = (word << 2 & _WORD) - (word << 3 & 1 << 32)
    return (n.float().double() * 2.0**-34 + 2.0**-33).float()


def box_muller(word: Tensor) -> Tensor:
    """Normals in float64 of words ``(..., 4)``: two for each pair.

    Radius sqrt(-2 log u0), times the cosine and sine of 2 pi a1, the :func:`angle`. Bit 30 of the
    second word has them change places and bit 31 turns both signs, which makes it a whole turn.
    """
    radius = (-2 * uniform(word[..., 0::2]).double().log()).sqrt()
    second = word[..., 1::2]
    radius = torch.where(second >> 31 == 1, -radius, radius)
    radians = angle(second).double() * (2 * math.pi)
    pair = torch.stack((radius * radians.cos(), radius * radians.sin()), -1)
    return torch.where((second >> 30 & 1 == 1)[..., None], pair.flip(-1), pair).flatten(-2)


def gumbel(word: Tensor) -> Tensor:
    """Gumbel noise in float64 of words: -log(-log(1 - u)), u at most 1 - 2^-24.

    Not -log(-log u), which has the same distribution but gives its large values, which decide an
    argmax, in the coarse steps of float32 below 1.
    """
    u = uniform(word).clamp_max(1 - 2.0**-24).double()
    return -(-(-u).log1p()).log()


def normals(seed: Tensor, offset: Tensor, count: int) -> Tensor:
    """The first ``count`` normals of each sample, float64.

    Args:
        seed, offset: int64 of shape ``()`` or ``(B,)``.

    Returns:
        ``(count,)`` or ``(B, count)``.
    """
    block = torch.arange((count + 3) // 4, device=seed.device)
    return box_muller(words(seed[..., None], offset[..., None], block)).flatten(-2)[..., :count]


def uniforms(seed: Tensor, offset: Tensor, count: int) -> Tensor:
    """The first ``count`` uniform numbers of each sample, float32; shapes as in :func:`normals`."""
    block = torch.arange((count + 3) // 4, device=seed.device)
    return uniform(words(seed[..., None], offset[..., None], block)).flatten(-2)[..., :count]


def streams(
    seed: int | Tensor, offset: int | Tensor, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    """Seed and offset as the int64 tensors that ops take; no host synchronisation.

    Args:
        seed, offset: an int from -2^63 to 2^64 - 1, of which the 64 bits count, or an int64
            tensor of shape ``()`` or ``(B,)``.
        device: where they must be; None: where a tensor among them is, else the CPU.

    Raises:
        TypeError: one is neither an int nor an int64 tensor.
        ValueError: an int has more bits, or shapes or devices do not fit.
    """
    if device is None:
        device = next((v.device for v in (seed, offset) if isinstance(v, Tensor)), None)
    return as_stream(seed, device, "seed"), as_stream(offset, device, "offset")


def as_stream(value: int | Tensor, device: torch.device | str | None, name: str) -> Tensor:
    """One of :func:`streams`, under the name that its errors give it."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            got = str(value.dtype).removeprefix("torch.")
            raise TypeError(f"{name} must be an int or an int64 tensor, got {got}")
        if value.dim() > 1:
            raise ValueError(f"{name} must be of shape () or (B,), got {tuple(value.shape)}")
        if value.device == device:
            return value
        wanted = torch.device("cpu" if device is None else device)
        if value.device.type != wanted.type or wanted.index not in (None, value.device.index):
            raise ValueError(f"{name} must be on {device}, got one on {value.device}")
        return value
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an int or an int64 tensor, got {type(value).__name__}")
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"{name} must have at most 64 bits, got {value}")
    # A fill, not a copy from the host, which a graph could not capture.
    if value >= 1 << 63:
        value -= 1 << 64
    return torch.full((), value, dtype=torch.int64, device=device)
