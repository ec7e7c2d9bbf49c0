"""Which vectors of a batch take the place of codes that hardly any vector chooses."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfast.nn.ranks import Joined, Sharing

_WHAT = "drawing vectors for dead codes"


def replacements(
    x: Tensor, dead: Tensor, inside: Tensor | None, sharing: Sharing
) -> tuple[Tensor, Tensor]:
    """A vector for each dead code, no vector for two of them.

    Where there are more dead codes than vectors, a random choice of the codes gets one, and the
    others wait for a later batch. Drawn in strata: the vectors in as many equal runs as there are
    codes to replace, one at random from each. Shapes depend on no values, and nothing is read
    back; random numbers come from torch's generator, one process's for all.

    Args:
        x: ``(H, N, D)``. dead: ``(H, K)``, bool, the same in all processes. inside: ``(H, N)``,
            bool, the vectors to draw from; all if None.
        sharing: whose vectors to draw from, which of the codes to draw for.

    Returns:
        Vectors ``(H, P, D)`` for this process's codes, and ``(H, P)``: whether the code is to be
        replaced by its vector. A vector that is not finite replaces nothing.
    """
    batch = Joined(x, inside, sharing, _WHAT)
    num_codes = dead.shape[1]
    uniform = torch.rand(dead.shape[0], num_codes + 1, device=x.device, dtype=torch.float64)
    uniform = sharing.same(uniform, _WHAT)
    total = batch.total[:, None]  # [H, 1]
    num_dead = dead.sum(1, keepdim=True).clamp_min(1)  # [H, 1]
    take = torch.minimum(num_dead, total).clamp_min(1)
    # take of the num_dead codes at equal intervals, from a random place on.
    rank = dead.cumsum(1) - 1  # [H, K]
    phase = (uniform[:, -1:] * num_dead).long()
    stratum = (rank * take + phase) // num_dead
    chosen = dead & ((((rank + 1) * take + phase) // num_dead) > stratum) & (total > 0)
    low, high = stratum * total // take, (stratum + 1) * total // take
    position = low + (uniform[:, :-1] * (high - low)).long()
    own = (slice(None), sharing.codes)
    chosen, position = chosen[own], position[own]
    vectors = batch.take(torch.where(chosen, position, -1))  # [H, P, D]
    return vectors, chosen & vectors.isfinite().all(2)
