"""From the indices of a residual quantiser's stages to their codes."""

from __future__ import annotations

from torch import Tensor, nn

from mmfast.checks import INDEX, check_codes, check_dtype


def with_all_stages(indices: Tensor, num_quantizers: int, quantize_dropout: bool) -> Tensor:
    """``indices`` (..., Q), padded with -1 where they are of fewer stages.

    Raises:
        ValueError: they are of more stages, or of fewer without quantize dropout: such a model
            never learned to do with fewer.
    """
    check_dtype("indices", indices, INDEX)
    stages = indices.shape[-1]
    if stages > num_quantizers or (stages < num_quantizers and not quantize_dropout):
        at_most = "at most " if quantize_dropout else ""
        hint = "" if quantize_dropout else "; quantize_dropout=True allows fewer"
        raise ValueError(
            f"indices must be (..., Q) with {at_most}Q = {num_quantizers} stages, "
            f"got shape {tuple(indices.shape)}{hint}"
        )
    return nn.functional.pad(indices, (0, num_quantizers - stages), value=-1)


def codes_at(codebook: Tensor, indices: Tensor) -> Tensor:
    """The codes ``(..., D)`` of a codebook (K, D) at ``indices`` (...), the first where one is
    -1."""
    check_codes("indices", indices, codebook.shape[0], least=-1)
    return nn.functional.embedding(indices.clamp_min(0), codebook)


def without_dropped(codes: Tensor, indices: Tensor) -> Tensor:
    """``codes`` (..., D), zero where the stage's index is -1."""
    return codes.masked_fill((indices == -1)[..., None], 0)
