"""Training and test parts of a dataset, by a seed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def _checked(test: float) -> None:
    if not 0 < test < 1:
        raise ValueError(f"test must be a share between 0 and 1, got {test}")


def split_by_label(labels: Tensor, test: float = 0.2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices of a training and a test part, in which labels are as frequent as in the whole.

    Args:
        labels: int64 ``(N,)``; zeros where samples have none.
        test: share of the test part; each label has at least one sample there and one in training.
        seed: of the choice.

    Returns:
        Two int64 tensors, ascending.

    Raises:
        ValueError: ``test`` is not between 0 and 1, or a label occurs once only.
    """
    _checked(test)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        if len(members) < 2:
            raise ValueError(f"label {label} occurs once, a split needs it twice")
        count = min(max(round(test * len(members)), 1), len(members) - 1)
        chosen[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]


def split_by_group(
    groups: Sequence[Hashable], test: float = 0.2, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Indices of a training and a test part that have no group in common.

    Args:
        groups: of each sample, such as its speaker or the clip that it was cut from.
        test: share of the groups in the test part; at least one is there and one in training.
        seed: of the choice.

    Returns:
        Two int64 tensors, ascending.

    Raises:
        ValueError: ``test`` is not between 0 and 1, or there are less than two groups.
    """
    _checked(test)
    names = list(dict.fromkeys(groups))
    if len(names) < 2:
        raise ValueError(f"a split needs at least two groups, got {len(names)}")
    count = min(max(round(test * len(names)), 1), len(names) - 1)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {names[i] for i in order[:count]}
    chosen = torch.tensor([group in held_out for group in groups])
    return (~chosen).nonzero()[:, 0], chosen.nonzero()[:, 0]
