"""Peers that there are on a GPU alone, by op."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import transformers
from benchmarks.peers import Peer, needs
from benchmarks.peers.joint_attention import joined, mask_of
from benchmarks.peers.nearest_code import addmm_argmin

# PyTorch's backends of attention, by the names of their rows.
BACKENDS = {
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
}
FLEX, FLASH_3 = "FlexAttention", "FlashAttention 3"
FLASH_KMEANS, COMPILED_TF32 = "flash-kmeans", "torch.compile, TF32"
BF16_PRODUCT, TF32_PRODUCT = "torch.mm, bfloat16", "torch.mm, TF32"

# From query, key, mask, is_causal and scale, what takes query, key and value.
Attention = Callable[..., Callable[[Tensor, Tensor, Tensor], Tensor]]


def _sdpa(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return functools.partial(
        functional.scaled_dot_product_attention,
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Causality and padding as its masks of blocks."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, lengths = query.shape[0], (query.shape[2], key.shape[2])
    blocks = None
    if causal:
        blocks = create_block_mask(_causal, None, None, *lengths, device=str(query.device))
    elif mask is not None:
        there = mask.view(batch, -1)

        def is_there(b: Any, h: Any, q: Any, k: Any) -> Any:
            return there[b, k]

        blocks = create_block_mask(is_there, batch, None, *lengths, device=str(query.device))
    return functools.partial(_compiled_flex(), block_mask=blocks, scale=scale)


def _flash_3(
    query: Tensor, key: Tensor, mask: None, causal: bool, scale: float
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from flash_attn_interface import flash_attn_func

    def run(*heads_first: Tensor) -> Tensor:
        tensors = (t.transpose(1, 2) for t in heads_first)
        made = flash_attn_func(*tensors, softmax_scale=scale, causal=causal)
        out: Tensor = made[0] if isinstance(made, tuple) else made
        return out.transpose(1, 2)

    return run


def _forward(attention: Attention, *arguments: Any) -> Callable[[], Tensor]:
    query, key, value, mask, _, causal, scale, *_ = arguments
    run = attention(query, key, mask, causal, scale)
    return lambda: run(query, key, value)


def _backward(attention: Attention, grad: Tensor, *arguments: Any) -> Callable[[], Tensor]:
    """Queries' gradients first; those of keys and values are computed too."""
    query, key, value, _, _, mask, _, causal, scale, *_ = arguments
    leaves = [t.detach().clone().requires_grad_() for t in (query, key, value)]
    out = attention(query, key, mask, causal, scale)(*leaves)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)[0]


def _named(backend: SDPBackend, make: Callable[..., Callable[[], Tensor]]) -> Any:
    """With this backend or none: its refusal is an error."""

    def made(*arguments: Any) -> Callable[[], Tensor]:
        with sdpa_kernel([backend]):
            call = make(_sdpa, *arguments)

        def run() -> Tensor:
            with sdpa_kernel([backend]):
                return call()

        return run

    return made


def _drops(place: int) -> Callable[..., list[str]]:
    def unsupported(*arguments: Any) -> list[str]:
        return ["drops other weights"] if arguments[place] else []

    return unsupported


def _unmasked(place: int) -> Callable[..., list[str]]:
    def unsupported(*arguments: Any) -> list[str]:
        dense = ["takes no dense mask"] if arguments[place] is not None else []
        return dense + _drops(place + 1)(*arguments)

    return unsupported


def _padded(place: int) -> Callable[..., list[str]]:
    def unsupported(*arguments: Any) -> list[str]:
        mask = arguments[place]
        other = mask is not None and tuple(mask.shape[1:3]) != (1, 1)
        return (["its masks are made of blocks"] if other else []) + _drops(place + 1)(*arguments)

    return unsupported


def _attention(make: Callable[..., Any], mask: int) -> dict[str, Peer]:
    """All of them; ``mask``: its place among the arguments."""
    dropping = _drops(mask + 1)
    found = {
        name: Peer(_named(backend, make), unsupported=dropping, cut=False)
        for name, backend in BACKENDS.items()
    }
    found[FLEX] = Peer(
        functools.partial(make, _flex),
        unsupported=_padded(mask),
        cut=False,
        note="compiled; that is not timed, nor is making its masks of blocks",
    )
    found[FLASH_3] = Peer(
        functools.partial(make, _flash_3),
        needs("flash_attn_interface"),
        unsupported=_unmasked(mask),
        cut=False,
    )
    return found


def _together(streams: list[Tensor], lengths: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Streams put together, with a dense mask."""
    image, text = streams[:3], streams[3:]
    mask = mask_of(image[0], text[0], lengths)
    query, key, value = joined(image, text)
    out = _sdpa(query, key, mask, False, scale)(query, key, value)
    first, second = out.split([image[0].shape[2], text[0].shape[2]], 2)
    if mask is not None:
        second = second * mask[:, :, 0, image[0].shape[2] :, None]
    return first, second


def _joint(backend: SDPBackend) -> Callable[..., Callable[[], tuple[Tensor, Tensor]]]:
    def make(*arguments: Any) -> Callable[[], tuple[Tensor, Tensor]]:
        *streams, lengths, scale = arguments

        def run() -> tuple[Tensor, Tensor]:
            with sdpa_kernel([backend]):
                return _together(streams, lengths, scale)

        return run

    return make


def _joint_backward(backend: SDPBackend) -> Callable[..., Callable[[], tuple[Tensor, ...]]]:
    """Gradients of all six, in the op's order."""

    def make(*arguments: Any) -> Callable[[], tuple[Tensor, ...]]:
        *grads, lengths, scale = (*arguments[:2], *arguments[-2:])
        leaves = [t.detach().clone().requires_grad_() for t in arguments[2:8]]
        with sdpa_kernel([backend]):
            outputs = _together(leaves, lengths, scale)

        def run() -> tuple[Tensor, ...]:
            with sdpa_kernel([backend]):
                return torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

        return run

    return make


def _product(precision: str, x: Tensor, codebook: Tensor, metric: str) -> Callable[[], Any]:
    """x.c of all pairs."""
    if precision == "bfloat16":
        a, b = x.bfloat16(), codebook.bfloat16()
        return lambda: torch.mm(a, b.T)

    def run() -> Tensor:
        with _precision(precision):
            return torch.mm(x, codebook.T)

    return run


@contextlib.contextmanager
def _precision(name: str) -> Iterator[None]:
    """Of float32's products inside the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _compiled_tf32(x: Tensor, codebook: Tensor, metric: str) -> Callable[[], Tensor]:
    compiled = torch.compile(addmm_argmin, dynamic=False)

    def run() -> Tensor:
        with _precision("high"):
            found: Tensor = compiled(x, codebook)
            return found

    return run


def _flash_lookup(x: Tensor, codebook: Tensor, metric: str) -> Callable[[], Tensor]:
    """The assignment of flash-kmeans, which wants the squared norms of the vectors."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    vectors, codes = x[None], codebook[None]

    def run() -> Tensor:
        found: Tensor = euclid_assign_triton(vectors, codes, (vectors**2).sum(-1))
        return found[0].long()

    return run


def _flash_kmeans(x: Tensor, codebook: Tensor, iterations: int) -> Callable[[], Tensor]:
    """All iterations: centres never move by less than nothing."""
    from flash_kmeans import batch_kmeans_Euclid

    def run() -> Tensor:
        # It writes into the initial centres.
        made = batch_kmeans_Euclid(
            x[None],
            len(codebook),
            max_iters=iterations,
            tol=-1.0,
            init_centroids=codebook[None].clone(),
        )
        codes: Tensor = made[1][0]
        return codes

    return run


def _by_blocks(make: Callable[..., Callable[[], Any]]) -> Mapping[str, Peer]:
    """A transformer that is compiled."""
    peer = Peer(
        functools.partial(make, transformers.compiled),
        cut=False,
        note="the blocks, one after the other; compiling is not timed",
    )
    return {"torch.compile": peer}


def _bytes(size: int) -> Callable[..., int]:
    return lambda x, codebook, metric: size * math.prod((x.shape[0], codebook.shape[0]))


def _float32(x: Tensor, codebook: Tensor, metric: str) -> list[str]:
    return [] if x.dtype == torch.float32 else ["TF32 takes float32"]


_PEERS: Mapping[str, Mapping[str, Peer]] = {
    "scaled_dot_product_attention": _attention(_forward, 3),
    "scaled_dot_product_attention_bwd": _attention(_backward, 6),
    "joint_attention": {
        f"concatenated {name}": Peer(_joint(backend), cut=False)
        for name, backend in BACKENDS.items()
    },
    "dit_eval": _by_blocks(transformers.evaluation),
    "dit_step": _by_blocks(transformers.step),
    "joint_attention_bwd": {
        f"concatenated {name}": Peer(_joint_backward(backend), cut=False)
        for name, backend in BACKENDS.items()
    },
    "kmeans": {FLASH_KMEANS: Peer(_flash_kmeans, needs("flash_kmeans"), cut=False)},
    "nearest_code": {
        COMPILED_TF32: Peer(
            _compiled_tf32,
            unsupported=_float32,
            workspace=_bytes(4),
            note="compiling is not timed; not exact",
        ),
        FLASH_KMEANS: Peer(
            _flash_lookup,
            needs("flash_kmeans"),
            cut=False,
            note="TF32 where vectors are float32: not exact",
        ),
        BF16_PRODUCT: Peer(
            functools.partial(_product, "bfloat16"),
            workspace=_bytes(2),
            cut=False,
            floor=True,
            note="only the products x.c of rounded numbers; returns no indices",
        ),
        TF32_PRODUCT: Peer(
            functools.partial(_product, "high"),
            unsupported=_float32,
            workspace=_bytes(4),
            cut=False,
            floor=True,
            note="only the products x.c, likewise",
        ),
    },
}


def of(op: str) -> Mapping[str, Peer]:
    """The peers of ``op``; none where there are but those of ``benchmarks.peers``."""
    return _PEERS.get(op, {})
