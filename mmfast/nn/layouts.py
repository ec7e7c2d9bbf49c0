"""Where vectors lie in what a quantiser is given, and how they are split into heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The arrangement of a quantiser's input.

    Attributes:
        spatial: dimensions that hold positions: 1 for a sequence, 2 for images, 3 for volumes.
        channel_first: (B, C, ...), not (B, ..., C).
    """

    spatial: int
    channel_first: bool

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """(B, L, C) of ``x``, and the sizes that L is made of; none for one vector per sample.

        Raises:
            ValueError: x has another number of dimensions.
        """
        if x.dim() == 2 and self.spatial == 1:
            return x[:, None], ()
        if x.dim() != self.spatial + 2:
            names = ("L", "D", "W") if self.spatial == 1 else ("T", "H", "W")[-self.spatial :]
            where = ", ".join(names[:1] if self.spatial == 1 else names)
            expected = f"(B, C, {where})" if self.channel_first else f"(B, {where}, C)"
            either = " or (B, C)" if self.spatial == 1 else ""
            raise ValueError(f"x must be {expected}{either}, got shape {tuple(x.shape)}")
        if not self.channel_first:
            return x, (x.shape[1],)
        return x.flatten(2).transpose(1, 2), tuple(x.shape[2:])

    def positions(self, t: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """(B, *sizes, ...) of (B, L, ...)."""
        return t.reshape(t.shape[0], *sizes, *t.shape[2:])

    def outputs(self, t: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """(B, L, ..., C) arranged as the input was."""
        return self.channels(self.positions(t, sizes))

    def channels(self, t: Tensor) -> Tensor:
        """(B, ..., C) with the channels where the input has them."""
        return t.movedim(-1, 1) if self.channel_first else t


@dataclass(frozen=True)
class Heads:
    """Splitting into heads; the vectors of B samples of L positions become (C, M, D).

    With a codebook of its own for each head, C = H and M = B L. With one for all, C = 1 and
    M = B H L.
    """

    count: int
    separate: bool

    def split(self, t: Tensor) -> Tensor:
        """(C, M, D) of ``t`` (B, L, H D)."""
        return self.split_indices(t.unflatten(2, (self.count, t.shape[2] // self.count)))

    def join(self, t: Tensor, batch: int, length: int) -> Tensor:
        """(B, L, ..., H D) of ``t`` (C, M, ..., D)."""
        joined = self.join_indices(t, batch, length)
        return joined if self.count == 1 else joined.flatten(2)

    def split_indices(self, t: Tensor) -> Tensor:
        """(C, M, ...) of ``t`` (B, L, H, ...)."""
        if self.separate:
            return t.movedim(2, 0).flatten(1, 2)
        return t.transpose(1, 2).flatten(0, 2)[None]

    def join_indices(self, t: Tensor, batch: int, length: int) -> Tensor:
        """(B, L, H, ...) of ``t`` (C, M, ...); (B, L, ...) with one head."""
        grouped = self.grouped(t, batch, length)
        # Not an index, whose gradient would be copied into zeros.
        if self.count == 1:
            return grouped.squeeze(0)
        if self.separate:
            return grouped.movedim(0, 2)
        return grouped.squeeze(0).reshape(batch, self.count, *grouped.shape[2:]).transpose(1, 2)

    def grouped(self, t: Tensor, batch: int, length: int) -> Tensor:
        """(C, M / L, L, ...) of ``t`` (C, M, ...)."""
        samples = batch if self.separate else batch * self.count
        return t.reshape(t.shape[0], samples, length, *t.shape[2:])

    def spread(self, mask: Tensor) -> Tensor:
        """(C, M) of a mask (B, L)."""
        return self.split_indices(mask[:, :, None].expand(-1, -1, self.count))


def mask_of_lens(lens: Tensor, length: int) -> Tensor:
    """(B, L): True at the first ``lens`` (B,) positions of each sample."""
    return torch.arange(length, device=lens.device) < lens[:, None]
