"""Attention's peers on a GPU: PyTorch's backends by name, FlexAttention, FlashAttention 3."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu_attention
from benchmarks.peers import Peer, compiled, needs, nothing, varlen_attention
from benchmarks.peers.joint_attention import joined, mask_of

# PyTorch's backends, by the names of their rows.
BACKENDS = {
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
}
MATH = "SDPA, math"
FLEX, FLASH_3 = "FlexAttention", "FlashAttention 3"
VARLEN = "PyTorch's varlen_attn"

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

    return compiled(flex_attention, dynamic=False)


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


def _scores(query: int) -> Callable[..., int]:
    """Of three matrices of scores in float32; ``query``: its place among the arguments."""

    def workspace(*arguments: Any) -> int:
        rows, keys = arguments[query].shape[:3].numel(), arguments[query + 1].shape[2]
        return int(12 * rows * keys)

    return workspace


def _attention(make: Callable[..., Any], query: int, mask: int | None = None) -> dict[str, Peer]:
    """All of them.

    Args:
        query, mask: their places among the arguments; None: there is no mask.
    """
    masks = (
        (None, None, None) if mask is None else (_drops(mask + 1), _padded(mask), _unmasked(mask))
    )
    any_mask, of_blocks, no_mask = (nothing if f is None else f for f in masks)
    found = {
        name: Peer(_named(backend, make), unsupported=any_mask, cut=False)
        for name, backend in BACKENDS.items()
    }
    found[MATH] = Peer(
        _named(SDPBackend.MATH, make),
        unsupported=any_mask,
        workspace=_scores(query),
        cut=False,
        aside=True,
    )
    found[FLEX] = Peer(
        functools.partial(make, _flex),
        unsupported=of_blocks,
        cut=False,
        note="compiled; that is not timed, nor is making its masks of blocks",
    )
    found[FLASH_3] = Peer(
        functools.partial(make, _flash_3),
        needs("flash_attn_interface"),
        unsupported=no_mask,
        cut=False,
    )
    return found


def _step(
    attention: Attention, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    run = attention(query, key, None, False, query.shape[-1] ** -0.5)
    return gpu_attention.step(run, query, key, value, gradient)


def _is_there(image: int, lengths: Tensor) -> Callable[..., Any]:
    """Of a mask of blocks: the image's keys, and of the text as many as ``lengths`` say."""

    def there(b: Any, h: Any, q: Any, k: Any) -> Any:
        return k - image < lengths[b]

    return there


def _together(
    kind: SDPBackend | None, streams: list[Tensor], lengths: Tensor | None, scale: float
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Streams put together: with a dense mask by a backend, with blocks by FlexAttention (None)."""
    from torch.nn.attention.flex_attention import create_block_mask

    image, text = streams[:3], streams[3:]
    seen = image[0].shape[2]
    tokens = seen + text[0].shape[2]
    blocks = None
    if kind is None and lengths is not None:
        there = _is_there(seen, lengths)
        device = str(lengths.device)
        blocks = create_block_mask(there, len(lengths), None, tokens, tokens, device=device)

    def run() -> tuple[Tensor, Tensor]:
        mask = mask_of(image[0], text[0], lengths)
        query, key, value = joined(image, text)
        if kind is None:
            out = _compiled_flex()(query, key, value, block_mask=blocks, scale=scale)
        else:
            with sdpa_kernel([kind]):
                out = _sdpa(query, key, mask, False, scale)(query, key, value)
        first, second = out.split([seen, tokens - seen], 2)
        if mask is not None:
            second = second * mask[:, :, 0, seen:, None]
        return first, second

    return run


def _joint(kind: SDPBackend | None) -> Callable[..., Callable[[], tuple[Tensor, Tensor]]]:
    def make(*arguments: Any) -> Callable[[], tuple[Tensor, Tensor]]:
        *streams, lengths, scale = arguments
        return _together(kind, streams, lengths, scale)

    return make


def _joint_backward(kind: SDPBackend | None) -> Callable[..., Callable[[], tuple[Tensor, ...]]]:
    """Gradients of all six, in the op's order."""

    def make(*arguments: Any) -> Callable[[], tuple[Tensor, ...]]:
        *grads, lengths, scale = (*arguments[:2], *arguments[-2:])
        leaves = [t.detach().clone().requires_grad_() for t in arguments[2:8]]
        outputs = _together(kind, leaves, lengths, scale)()

        def run() -> tuple[Tensor, ...]:
            if kind is None:
                return torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
            with sdpa_kernel([kind]):
                return torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

        return run

    return make


# Sequences behind each other.


def _varlen_pytorch(
    query: Tensor, key: Tensor, value: Tensor, *options: Any
) -> Callable[..., Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    *places, _, scale = options
    return _first_of(varlen_attn, *places, scale=scale)


def _varlen_flash_3(
    query: Tensor, key: Tensor, value: Tensor, *options: Any
) -> Callable[..., Tensor]:
    from flash_attn_interface import flash_attn_varlen_func

    *places, causal, scale = options
    return _first_of(flash_attn_varlen_func, *places, softmax_scale=scale, causal=causal)


def _first_of(function: Callable[..., Any], *places: Any, **named: Any) -> Callable[..., Tensor]:
    """``function`` of tensors and what follows them, or the first of what it returns."""

    def run(*given: Tensor) -> Tensor:
        made = function(*given, *places, **named)
        out: Tensor = made[0] if isinstance(made, tuple) else made
        return out

    return run


def _varlen_flex(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> Callable[..., Tensor]:
    """As one sequence, of which a mask of blocks keeps the parts from each other."""
    from torch.nn.attention.flex_attention import create_block_mask

    cu_seqlens_q, cu_seqlens_k, *_, scale = options
    tokens = len(query), len(key)
    owners = [
        torch.bucketize(torch.arange(n, device=query.device), cu_seqlens[1:], right=True)
        for n, cu_seqlens in zip(tokens, (cu_seqlens_q, cu_seqlens_k), strict=True)
    ]

    def own(b: Any, h: Any, q: Any, k: Any) -> Any:
        return owners[0][q] == owners[1][k]

    blocks = create_block_mask(own, None, None, *tokens, device=str(query.device))

    def run(*given: Tensor) -> Tensor:
        heads = (t.transpose(0, 1)[None] for t in given)
        out: Tensor = _compiled_flex()(*heads, block_mask=blocks, scale=scale)
        return out[0].transpose(0, 1)

    return run


def _varlen(attention: Callable[..., Any], *arguments: Any) -> Callable[[], tuple[Tensor]]:
    tensors = arguments[:3]
    run = attention(*arguments)
    return lambda: (run(*tensors),)


def _varlen_backward(
    attention: Callable[..., Any], grad: Tensor, *arguments: Any
) -> Callable[[], tuple[Tensor, ...]]:
    tensors, options = arguments[:3], arguments[5:]
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = attention(*tensors, *options)(*leaves)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def _no_gpu() -> list[str]:
    return [] if torch.cuda.is_available() else ["it is of GPUs only"]


def _sequences(make: Callable[..., Any]) -> dict[str, Peer]:
    options: dict[str, Any] = {"unsupported": varlen_attention.unsupported, "cut": False}
    return {
        VARLEN: Peer(functools.partial(make, _varlen_pytorch), _no_gpu, **options),
        FLEX: Peer(
            functools.partial(make, _varlen_flex),
            note="compiled; that is not timed, nor is making its masks of blocks",
            **options,
        ),
        FLASH_3: Peer(
            functools.partial(make, _varlen_flash_3), needs("flash_attn_interface"), **options
        ),
    }


# mmfast's own ways of the gradients, beside that which it chooses.


def _own_way(name: str) -> Peer:
    """By its name; ``mmfast/kernels/attention_gradients.py`` has them."""

    def launch(*arguments: Any) -> Callable[[], tuple[Tensor, ...]]:
        from mmfast.kernels.scaled_dot_product_attention import scaled_dot_product_attention_bwd

        return functools.partial(scaled_dot_product_attention_bwd, *arguments)

    def unsupported(*arguments: Any) -> list[str]:
        from mmfast.kernels.attention_gradients import ways

        return [] if name in ways(launch(*arguments)) else ["does not take that"]

    def make(*arguments: Any) -> Callable[[], Tensor]:
        from mmfast.kernels.attention_fused_gradient import fused_kernel
        from mmfast.kernels.attention_gradients import ways

        call = launch(*arguments)
        config = ways(call)[name]

        def run() -> Tensor:
            with fused_kernel.forcing(config):
                return call()[0]

        return run

    return Peer(make, _no_hopper, unsupported=unsupported, cut=False, aside=True)


def _no_hopper() -> list[str]:
    if _no_gpu() or torch.version.hip or torch.cuda.get_device_capability()[0] != 9:
        return ["it is of Hopper only"]
    return []


_OWN_WAYS = {f"mmfast, {n}": _own_way(n) for n in ("two kernels", "in turns", "in any order")}

_CONCATENATED: Mapping[str, SDPBackend | None] = {**BACKENDS, FLEX: None}

PEERS: Mapping[str, Mapping[str, Peer]] = {
    "scaled_dot_product_attention": _attention(_forward, 0, 3),
    "scaled_dot_product_attention_bwd": _attention(_backward, 1, 6) | _OWN_WAYS,
    gpu_attention.STEP: _attention(_step, 0),
    "joint_attention": {
        f"concatenated {name}": Peer(_joint(kind), cut=False)
        for name, kind in _CONCATENATED.items()
    },
    "joint_attention_bwd": {
        f"concatenated {name}": Peer(_joint_backward(kind), cut=False)
        for name, kind in _CONCATENATED.items()
    },
    "varlen_attention": _sequences(_varlen),
    "varlen_attention_bwd": _sequences(_varlen_backward),
}
