"""A diffusion transformer over several modalities at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.checks import INDEX, check_dtype
from mmfast.models.configured import Configured
from mmfast.models.modalities import Modality, built
from mmfast.models.patches import xavier
from mmfast.models.repeating import repeatable
from mmfast.nn.adaptive_norm import Pending, settled, zero
from mmfast.nn.dit_block import DiTBlock

Named = Mapping[str, Tensor]


class MultimodalDiT(Configured):
    """All modalities as one sequence of tokens, each with a time of its own.

    A modality is noisy, clean (its time is 0: it is a condition) or absent, in each sample: one
    model has all conditional, joint and marginal distributions
    (:class:`mmfast.models.MultimodalDiffusion` trains and samples it). The adaptive norms get the
    sum of what the times of all modalities that are there say.

    Args:
        modalities: by name, in the order of the sequence: ``{"type": "patches", ...}`` with the
            arguments of :class:`mmfast.models.modalities.Patches`, or ``{"type": "tokens", ...}``
            with those of :class:`mmfast.models.modalities.Tokens`.
        hidden_size: C, of the tokens.
        depth: number of blocks.
        num_heads: H.
        mlp_ratio: of the MLPs' hidden size to C.
        qk_norm: of :class:`mmfast.nn.SelfAttention`.

    Attributes:
        modalities: by name, :class:`mmfast.models.modalities.Modality`.
        gradient_checkpointing: compute what is inside of the blocks again in the backward, instead
            of keeping it.

    Raises:
        ValueError: a modality's description or name is not possible.

    Source: Bao et al., "One Transformer Fits All Distributions in Multi-Modal Diffusion at Scale"
    (2023), sec. 3; adaLN-Zero blocks of Peebles and Xie (2023) in place of theirs.
    """

    gradient_checkpointing = False

    def __init__(
        self,
        modalities: Mapping[str, Mapping[str, Any]],
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        *,
        qk_norm: str = "rms",
    ) -> None:
        super().__init__()
        if not modalities or "loss" in modalities:
            raise ValueError(
                f"modalities must be at least one, none named 'loss', got {list(modalities)}"
            )
        self.modalities = nn.ModuleDict(
            {name: built(name, given, hidden_size) for name, given in modalities.items()}
        )
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            block = DiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm=qk_norm)
            xavier(block)
            zero(block.adaLN_modulation)
            self.blocks.append(block)

    def modality(self, name: str) -> Modality:
        """One of :attr:`modalities`.

        Raises:
            ValueError: there is none of this name.
        """
        if name not in self.modalities:
            known = ", ".join(self.modalities)
            raise ValueError(f"modalities are {known}, got {name!r}")
        found = self.modalities[name]
        assert isinstance(found, Modality)
        return found

    def forward(
        self,
        numbers: Named,
        times: Named,
        lengths: Named | None = None,
        *,
        wanted: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """The outputs of the modalities' heads.

        Args:
            numbers: of each modality that is there in any sample, ``(B, *shape)``: noisy or clean
                ones of :meth:`Modality.numbers`; finite, even where they do not count.
            times: of the same, ``(B,)``: timesteps; 0 for clean ones.
            lengths: of some of them, ``(B,)``, int64: how many of its first tokens are there, 0
                for an absent modality; all for others.
            wanted: whose outputs to make; all by default.

        Returns:
            By name: predictions ``(B, *shape)`` of patches, logits ``(B, L, K)`` of tokens.

        Raises:
            TypeError: lengths are no integers.
            ValueError: an unknown modality, or shapes do not fit.
        """
        lengths = lengths or {}
        for name in (*numbers, *times, *lengths, *(wanted or ())):
            self.modality(name)
            if name not in numbers or name not in times:
                raise ValueError(f"modality {name!r} needs both numbers and times")
        if not numbers:
            raise ValueError("numbers must hold at least one modality, got none")
        names = [name for name in self.modalities if name in numbers]
        sequence = [self.modality(name).embed(numbers[name]) for name in names]
        c = self._condition(names, times, lengths)
        mask = self._mask(names, lengths, sequence[0])
        tokens, pending = torch.cat(sequence, 1), None
        for block in self.blocks:
            run = repeatable(block, self.gradient_checkpointing)
            tokens, pending = run(tokens, c, pending, defer=True, attn_mask=mask)
        parts = _after(tokens, pending).split([part.shape[1] for part in sequence], 1)
        return {
            name: self.modality(name).head(part, c)
            for name, part in zip(names, parts, strict=True)
            if wanted is None or name in wanted
        }

    def _condition(self, names: Sequence[str], times: Named, lengths: Named) -> Tensor:
        """``(B, C)``."""
        parts = []
        for name in names:
            part = self.modality(name).t_embedder(times[name])
            if name in lengths:
                check_dtype(f"lengths of {name!r}", lengths[name], INDEX)
                if lengths[name].shape != times[name].shape:
                    got = f"{tuple(times[name].shape)} and {tuple(lengths[name].shape)}"
                    raise ValueError(f"times and lengths of {name!r} must be (B,), got {got}")
                part = torch.where(lengths[name][:, None] > 0, part, 0)
            parts.append(part)
        return torch.stack(parts).sum(0)

    def _mask(self, names: Sequence[str], lengths: Named, like: Tensor) -> Tensor | None:
        """Which keys there are, ``(B, 1, 1, L)``, or None: all."""
        if not any(name in lengths for name in names):
            return None
        parts = [self.there(name, lengths, like) for name in names]
        return torch.cat(parts, 1)[:, None, None]

    def there(self, name: str, lengths: Named, like: Tensor) -> Tensor:
        """Which tokens of a modality count, ``(B, L)``, bool.

        Args:
            name: of the modality.
            lengths: of :meth:`forward`.
            like: a tensor ``(B, ...)`` on the device.
        """
        place = torch.arange(self.modality(name).length, device=like.device)
        if name not in lengths:
            return (place >= 0).expand(like.shape[0], -1)
        return place < lengths[name][:, None]


def _after(tokens: Tensor, pending: Pending | None) -> Tensor:
    return tokens if pending is None else settled(tokens, pending)
