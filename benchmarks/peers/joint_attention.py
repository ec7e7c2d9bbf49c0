"""Peers of joint_attention: both streams put together, with a dense mask, as diffusers does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.peers import Peer


def mask_of(image: Tensor, text: Tensor, lengths: Tensor | None) -> Tensor | None:
    """Which keys take part, (B, 1, 1, L + T)."""
    if lengths is None:
        return None
    place = torch.arange(-image.shape[2], text.shape[2], device=lengths.device)
    return (place < lengths[:, None])[:, None, None]


def joined(image: list[Tensor], text: list[Tensor]) -> list[Tensor]:
    """Copies, one stream behind the other."""
    return [torch.cat(pair, 2) for pair in zip(image, text, strict=True)]


def PLAIN(
    q_image: Tensor,
    k_image: Tensor,
    v_image: Tensor,
    q_text: Tensor,
    k_text: Tensor,
    v_text: Tensor,
    text_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As a user writes it; what texts have beyond their lengths is made 0."""
    query, key, value = joined([q_image, k_image, v_image], [q_text, k_text, v_text])
    mask = mask_of(q_image, q_text, text_lengths)
    out = functional.scaled_dot_product_attention(
        query, key, value, mask, scale=scale, enable_gqa=True
    )
    image, text = out.split([q_image.shape[2], q_text.shape[2]], 2)
    if mask is not None:
        text = text * mask[:, :, 0, q_image.shape[2] :, None]
    return image, text


PEERS = {
    "concatenated SDPA": Peer(lambda *arguments: lambda: PLAIN(*arguments), cut=False),
}
