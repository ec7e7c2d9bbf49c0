"""What ops share that look up a row of a table for each sample: rows, drawn noise, comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast import philox


def rows_of(name: str, table: Tensor, index: Tensor, batch: int) -> Tensor:
    """The rows of samples, [B, columns]; NaN where there is no such row.

    Raises:
        IndexError: on the CPU, in the place of NaN. ``name`` is what it calls ``index``.
    """
    length = table.shape[0]
    inside = (index >= 0) & (index < length)
    if index.device.type == "cpu" and not bool(inside.all()):
        wrong = int(index[~inside].reshape(-1)[0])
        raise IndexError(
            f"{name} must be from 0 to {length - 1} for a table of {length} rows, got {wrong}"
        )
    rows = table.index_select(0, index.reshape(-1).clamp(0, length - 1))
    return torch.where(inside.reshape(-1, 1), rows, torch.nan).expand(batch, -1)


def drawn(seed: Tensor, offset: Tensor, shape: torch.Size) -> Tensor:
    """The noise of seeds, float64: of one for each sample, or of one stream for them all.

    Args:
        seed, offset: ``()`` or ``(B,)``.
        shape: ``(B, ...)``.
    """
    batch, numbers = shape[0], shape[1:].numel()
    offset = offset.reshape(-1).expand(batch)
    if seed.dim():
        return philox.normals(seed, offset, numbers).view(shape)
    made = philox.normals(seed.expand(batch), offset, batch * numbers)
    own = [made[b, b * numbers : (b + 1) * numbers] for b in range(batch)]
    return torch.stack(own).view(shape) if own else made.view(shape)


def rounding(dtype: torch.dtype, is_drawn: bool) -> float:
    """Relative, of the arithmetic for samples of ``dtype``; noise is drawn in float32."""
    wide = dtype == torch.float64 and not is_drawn
    return torch.finfo(torch.float64 if wide else torch.float32).eps


def differences(
    name: str, got: Tensor, like: Tensor, want: Tensor, size: Tensor, eps: float
) -> list[str]:
    """What speaks against ``got`` as ``want`` after one rounding.

    Args:
        like: has its dtype and shape.
        want: float64.
        size: of the terms that were added up.
        eps: what they may be off, relative.
    """
    if (got.dtype, got.shape) != (like.dtype, like.shape):
        return [f"{name}: {got.dtype} {tuple(got.shape)}, expected {like.dtype}"]
    info = torch.finfo(got.dtype)
    tolerance = eps * size + 0.51 * info.eps * want.abs() + info.smallest_normal * info.eps
    wanted = want.to(got.dtype)
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    same |= (got.double() - want).abs() <= tolerance
    return [] if bool(same.all()) else [f"{int((~same).sum())} of {same.numel()} {name} differ"]
