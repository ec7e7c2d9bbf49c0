"""The first codebook: Lloyd's algorithm from random vectors of the first batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from mmfast.nn.ranks import Joined, Sharing, add_up
from mmfast.ops.code_statistics import code_statistics
from mmfast.ops.nearest_code import nearest_code

LEAST_NORM = 1e-6  # of a normalised vector's division

_WHAT = "initialising a codebook"


def unit(x: Tensor) -> Tensor:
    """``x`` (..., D) with rows of norm 1."""
    return torch.nn.functional.normalize(x, dim=-1, eps=LEAST_NORM)


@torch.no_grad()
def lloyd(
    x: Tensor,
    num_codes: int,
    iterations: int,
    *,
    metric: str,
    inside: Tensor | None,
    sharing: Sharing,
    look_up: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes ``(H, P, D)`` of the vectors ``x`` (H, N, D), and how many vectors each had, (H, P):
    this process's P of ``num_codes`` K.

    Starts from different random vectors, with repetitions if there are fewer than K. A code that
    loses all its vectors stays. Vectors that are not finite, or where ``inside`` (H, N) is False,
    are left out.

    Args:
        sharing: whose vectors they are. look_up: which of these codes (H, P, D) the vectors have,
            (H, N), -1 for another process's; None where there are no others.

    Raises:
        ValueError: no finite vector is left.
    """
    finite = x.isfinite().all(2).all(0).expand(x.shape[:2])  # [H, N]
    inside = finite if inside is None else finite & inside
    batch = Joined(x, inside, sharing, _WHAT)
    total = int(batch.total[0])
    if total == 0:
        raise ValueError(
            f"the codebook must be initialised from at least one finite vector, "
            f"got none in x of shape {tuple(x.shape)}"
        )
    if total < num_codes:
        warnings.warn(
            f"a codebook of {num_codes} codes is initialised from {total} vectors: "
            "some codes will be equal",
            stacklevel=2,
        )
    drawn = [
        torch.randperm(total, device=x.device)[:num_codes]
        if total >= num_codes
        else torch.randint(0, total, (num_codes,), device=x.device)
        for _ in range(x.shape[0])
    ]
    codes = batch.take(sharing.same(torch.stack(drawn), _WHAT)[:, sharing.codes])  # [H, P, D]
    counts = torch.ones_like(codes[:, :, 0])
    own = codes.shape[1]
    for _ in range(iterations):
        if look_up is None:
            indices, _ = nearest_code(x, codes, metric=metric)
        else:
            indices = look_up(x, codes)
        indices = torch.where(inside, indices, -1)
        counts, sums = (t[:, :own].contiguous() for t in code_statistics(x, indices, max(own, 1)))
        add_up(counts, sharing.sync, _WHAT, sharing.group)
        add_up(sums, sharing.sync, _WHAT, sharing.group)
        means = sums / counts.clamp_min(1)[:, :, None]
        if metric == "dot":
            means = unit(means)
        codes = torch.where(counts[:, :, None] > 0, means, codes)
    return codes, counts
