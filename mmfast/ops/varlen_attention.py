"""Attention within each of many sequences that lie behind each other, and its gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mmfast import backends
from mmfast.checks import FLOATING, INDEX, check_device, check_dtype
from mmfast.ops.attention import (
    Limits,
    attend,
    attend_bwd,
    check_attention,
    check_heads,
    complaints,
    errors,
    errors_bwd,
    new_lse,
    scale_of,
    too_wide,
)
from mmfast.registry import Arguments, Backward, Cost, Op, Sample, register


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention of each sequence's queries to its own keys; nothing is padded.

    Sequence b has the queries from ``cu_seqlens_q[b]`` to before ``cu_seqlens_q[b + 1]``, and keys
    likewise. Gradients pass to query, key and value.

    Args:
        query: ``(N, H, E)``, float16, bfloat16, float32 or float64, any strides.
        key: ``(M, Hkv, E)``, query's dtype, H a multiple of Hkv.
        value: ``(M, Hkv, Ev)``.
        cu_seqlens_q: ``(B + 1,)``, int32 or int64 on the device, ascending from 0 to N.
        cu_seqlens_k: ``(B + 1,)``, likewise, to M.
        max_seqlen_q: at least the length of the longest sequence of queries.
        max_seqlen_k: of keys.
        is_causal: query i of a sequence sees the keys up to i + its keys - its queries: the last
            query sees all.
        scale: of the scores; 1 / sqrt(E) by default.

    Returns:
        ``(N, H, Ev)``, query's dtype; 0 for queries that are of no sequence, or see no key.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes or devices do not fit. The numbers in cu_seqlens are not read back:
            such as do not ascend give any result, but nothing out of range is read.

    Source: Dao, "FlashAttention-2" (2023), whose interface for such batches this is.
    """
    check_attention(query=query, key=key, value=value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} must be (N, H, E), got {tuple(tensor.shape)}")
    num_dims = query.shape[2]
    check_heads("key", query.shape[1], key.shape[1])
    if num_dims < 1 or key.shape[2] != num_dims:
        raise ValueError(
            f"query and key must have one head size, at least 1, got {num_dims} and {key.shape[2]}"
        )
    if value.shape[:2] != key.shape[:2]:
        expected = (*key.shape[:2], "Ev")
        raise ValueError(f"value must be {expected}, as key is, got {tuple(value.shape)}")
    check_dtype("cu_seqlens_q", cu_seqlens_q, INDEX)
    check_dtype("cu_seqlens_k", cu_seqlens_k, INDEX)
    check_device(query=query, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if cu_seqlens_q.dim() != 1 or len(cu_seqlens_q) < 1 or cu_seqlens_k.shape != cu_seqlens_q.shape:
        got = f"{tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must both be (B + 1,), got {got}")
    for name, number in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if number < 0:
            raise ValueError(f"{name} must be at least 0, got {number}")
    out, _ = backends.call(
        OP, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        is_causal, scale_of(scale, num_dims),
    )  # fmt: skip
    return out


class _Sequences:
    """Tokens of sequences, as they lie and padded.

    Attributes:
        length: of each sequence, [B].
    """

    def __init__(self, cu_seqlens: Tensor, tokens: int, longest: int) -> None:
        ends = cu_seqlens.long().clamp(0, tokens)
        begin = ends[:-1]
        self.length = (ends[1:] - begin).clamp(0, longest)
        place = torch.arange(longest, device=ends.device)
        self._there = place < self.length[:, None]  # [B, longest]
        self._padded = torch.where(self._there, begin[:, None] + place, tokens)
        token = torch.arange(tokens, device=ends.device)
        inside = (token[:, None] >= begin) & (token[:, None] < begin + self.length)  # [N, B]
        slot = torch.where(inside, token[:, None] - begin, 0)
        slot += torch.arange(len(begin), device=ends.device) * longest
        # The padded slot of each token; the last one is that of tokens of no sequence.
        self._slot = torch.where(inside, slot, -1).amax(1) if len(begin) else token * 0 - 1

    def pad(self, t: Tensor, other: float = 0.0) -> Tensor:
        """[B, H, longest, E] of t [N, H, E]."""
        more = torch.cat([t, t.new_full((1, *t.shape[1:]), other)])
        return more[self._padded].transpose(1, 2)

    def unpad(self, t: Tensor, other: float = 0.0) -> Tensor:
        """[N, H, E] of t [B, H, longest, E]; ``other`` for tokens of no sequence."""
        rows = t.transpose(1, 2).flatten(0, 1)  # [B longest, H, E]
        return torch.cat([rows, t.new_full((1, *rows.shape[1:]), other)])[self._slot]

    def unpad_lse(self, t: Tensor, other: float) -> Tensor:
        """[H, N] of t [B, H, longest]."""
        return self.unpad(t[..., None], other)[..., 0].T

    def pad_lse(self, t: Tensor) -> Tensor:
        """[B, H, longest] of t [H, N]."""
        return self.pad(t.T[..., None], -torch.inf)[..., 0]


def _limits(
    queries: _Sequences, keys: _Sequences, longest: tuple[int, int], causal: bool
) -> Limits:
    device = queries.length.device
    i, j = (torch.arange(n, device=device) for n in longest)
    i_there, j_there = i < queries.length[:, None], j < keys.length[:, None]
    allowed = i_there[:, :, None] & j_there[:, None, :]  # [B, L, S]
    if causal:
        last = i + (keys.length - queries.length)[:, None]  # [B, L]
        allowed &= j <= last[:, :, None]
    return Limits(allowed[:, None])


def reference(
    query: Tensor,  # [N, H, E]
    key: Tensor,  # [M, Hkv, E]
    value: Tensor,  # [M, Hkv, Ev]
    cu_seqlens_q: Tensor,  # [B + 1]
    cu_seqlens_k: Tensor,  # [B + 1]
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The specification: outputs, and the logarithms of the sums, -inf where there is no key."""
    options = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal
    outputs = fake(query, key, value, *options, scale)
    queries, _, limits, padded = _padded(query, key, value, *options)
    made, lse = attend(*padded, scale=scale, limits=limits)
    outputs[0].copy_(queries.unpad(made))
    outputs[1].copy_(queries.unpad_lse(lse, -torch.inf))
    return outputs


def _padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
) -> tuple[_Sequences, _Sequences, Limits, tuple[Tensor, Tensor, Tensor]]:
    queries = _Sequences(cu_seqlens_q, query.shape[0], max_seqlen_q)
    keys = _Sequences(cu_seqlens_k, key.shape[0], max_seqlen_k)
    limits = _limits(queries, keys, (max_seqlen_q, max_seqlen_k), is_causal)
    return queries, keys, limits, (queries.pad(query), keys.pad(key), keys.pad(value))


def fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Outputs without values."""
    tokens, heads, _ = query.shape
    return query.new_empty(tokens, heads, value.shape[2]), new_lse(query, (heads, tokens))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, *cu_seqlens, _, _, _, _ = inputs
    ctx.options = inputs[5:]
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, out, lse, *cu_seqlens)


def _gradients(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_out is None:
        return (None,) * 9
    return *backends.call(BACKWARD, grad_out, *ctx.saved_tensors, *ctx.options), *(None,) * 6


def reference_bwd(
    grad_out: Tensor,  # [N, H, Ev]
    query: Tensor,  # [N, H, E]
    key: Tensor,  # [M, Hkv, E]
    value: Tensor,  # [M, Hkv, Ev]
    out: Tensor,  # [N, H, Ev]
    lse: Tensor,  # [H, N]
    cu_seqlens_q: Tensor,  # [B + 1]
    cu_seqlens_k: Tensor,  # [B + 1]
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; 0 for tokens of no sequence."""
    options = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal
    outputs = fake_bwd(grad_out, query, key, value, out, lse, *options, scale)
    unpad, limits, padded = _padded_bwd(grad_out, query, key, value, out, lse, *options)
    *grads, _ = attend_bwd(*padded, scale=scale, limits=limits)
    for output, grad, sequences in zip(outputs, grads, unpad, strict=True):
        output.copy_(sequences.unpad(grad))
    return outputs


def _padded_bwd(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *options: Any,
) -> tuple[tuple[_Sequences, ...], Limits, tuple[Tensor, ...]]:
    """The sequences of each gradient, and what ``attend_bwd`` takes."""
    queries, keys, limits, padded = _padded(query, key, value, *options)
    tensors = (queries.pad(grad_out), *padded, queries.pad(out), queries.pad_lse(lse))
    return (queries, keys, keys), limits, tensors


def fake_bwd(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs without values."""
    return tuple(t.new_empty(t.shape) for t in (query, key, value))  # type: ignore[return-value]


def _pairs(queries: Tensor, keys: Tensor, heads: int) -> int:
    """Of sequences as they are, causal or not; on a device without data, as if there were none."""
    if queries.is_meta:
        return 0
    return heads * int((queries.long().diff() * keys.long().diff()).sum())


def cost(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
) -> Cost:
    """Two products for every pair (half as many if causal); all read and written once."""
    pairs = _pairs(cu_seqlens_q, cu_seqlens_k, query.shape[1]) // (1 + is_causal)
    out = query.shape[0] * query.shape[1] * value.shape[2] * query.element_size()
    lse = query.shape[0] * query.shape[1] * max(query.element_size(), 4)
    return Cost(
        bytes=query.nbytes + key.nbytes + value.nbytes + out + lse,
        flops=2 * pairs * (query.shape[2] + value.shape[2]),
    )


def cost_bwd(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    scale: float,
) -> Cost:
    """Five products for every pair."""
    pairs = _pairs(cu_seqlens_q, cu_seqlens_k, query.shape[1]) // (1 + is_causal)
    moved = sum(t.nbytes for t in (grad_out, query, key, value, out, lse, query, key, value))
    return Cost(bytes=moved, flops=2 * pairs * (3 * query.shape[2] + 2 * value.shape[2]))


def compare(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """As of ``scaled_dot_product_attention``."""
    *inputs, scale = arguments
    queries, _, limits, padded = _padded(*inputs)
    want, lse = attend(*(t.double() for t in padded), scale=scale, limits=limits)
    error, error_lse = errors(*padded, scale=scale, limits=limits)
    wanted = queries.unpad(want), queries.unpad_lse(lse, -torch.inf)
    allowed = queries.unpad(error), queries.unpad_lse(error_lse, 0.0)
    return complaints(("out", "lse"), result, fake(*arguments), wanted, allowed)


def compare_bwd(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Likewise."""
    *inputs, scale = arguments
    unpad, limits, padded = _padded_bwd(*inputs)
    *grads, _ = attend_bwd(*(t.double() for t in padded), scale=scale, limits=limits)
    *error, _ = errors_bwd(*padded, scale=scale, limits=limits)
    wanted, allowed = (
        [sequences.unpad(t) for sequences, t in zip(unpad, made, strict=True)]
        for made in (grads, error)
    )
    names = ("grad_query", "grad_key", "grad_value")
    return complaints(names, result, fake_bwd(*arguments), wanted, allowed)


def _sample(
    lengths: tuple[int, ...],
    heads: int,
    num_dims: int,
    *,
    keys: tuple[int, ...] | None = None,
    kv_heads: int | None = None,
    value_dims: int | None = None,
    is_causal: bool = False,
    more: int = 0,
    dtype_seqlens: torch.dtype = torch.int32,
    packed: bool = False,
    name: str = "",
) -> Sample:
    """``more``: tokens of no sequence at the end; ``packed``: qkv is."""
    keys = lengths if keys is None else keys
    kv_heads = heads if kv_heads is None else kv_heads
    value_dims = num_dims if value_dims is None else value_dims

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        generator = torch.Generator().manual_seed(seed)
        tokens, others = sum(lengths) + more, sum(keys) + more
        if packed:
            qkv = torch.randn(tokens, 3, heads, num_dims, generator=generator)
            tensors = list(qkv.to(device, dtype).unbind(1))
        else:
            of_keys = (others, kv_heads)
            shapes = (tokens, heads, num_dims), (*of_keys, num_dims), (*of_keys, value_dims)
            tensors = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
        cu_seqlens = [
            torch.tensor([0, *itertools.accumulate(n)], dtype=dtype_seqlens, device=device)
            for n in (lengths, keys)
        ]
        longest = (max(n, default=0) for n in (lengths, keys))
        return *tensors, *cu_seqlens, *longest, is_causal, scale_of(None, num_dims)

    bench = heads * sum(a * b for a, b in zip(lengths, keys, strict=True)) >= 1 << 20
    sizes = {"N": sum(lengths) * heads, "K": max(keys, default=0), "D": num_dims, "H": heads}
    shape = f"{sum(lengths)}x{heads}x{num_dims}"
    return Sample("_".join(filter(None, (name, shape))), make, sizes, bench)


def samples() -> Iterable[Sample]:
    """Images of several sizes (``bench``); odd ones."""
    yield _sample((256, 400, 130), 12, 64, packed=True)
    yield _sample((5, 1, 9), 2, 8)
    yield _sample((4, 0, 7), 2, 24, keys=(3, 8, 0), name="cross")
    yield _sample((5, 12, 1), 4, 8, kv_heads=2, value_dims=5, is_causal=True, name="causal")
    yield _sample((9, 3), 1, 8, keys=(4, 20), is_causal=True, name="causal_cross")
    yield _sample((6, 4), 2, 72, more=3, dtype_seqlens=torch.int64, name="more")
    yield _sample((11, 7), 2, 16, packed=True, name="packed")
    yield _sample((0, 0), 2, 8, name="empty")
    yield _sample((), 2, 8, name="no_sequences")


def _backward_of(sample: Sample) -> Sample:
    """Gradients of ``sample``'s outputs."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        query, key, value, *options = sample.make(device, dtype, seed)
        out, lse = reference(query, key, value, *options)
        generator = torch.Generator().manual_seed(seed + 1)
        grad = torch.randn(out.shape, generator=generator).to(out)
        return grad, query, key, value, out, lse, *options

    return Sample(sample.name, make, sample.shape, sample.bench)


def samples_bwd() -> Iterable[Sample]:
    """As above."""
    return map(_backward_of, samples())


def _load_triton() -> Callable[..., tuple[Tensor, ...]]:
    from mmfast.kernels.varlen_attention import varlen_attention as launch

    return launch


def _load_triton_bwd() -> Callable[..., tuple[Tensor, ...]]:
    from mmfast.kernels.varlen_attention import varlen_attention_bwd as launch

    return launch


_OPTIONS = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, "
    "bool is_causal, float scale"
)

OP = register(
    Op(
        name="varlen_attention",
        schema=f"(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> (Tensor, Tensor)",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("varlen_attention"),
            "triton": backends.triton(_load_triton, too_wide),
        },
        samples=samples,
        cost=cost,
        compare=compare,
        dtypes=FLOATING,
        backward=Backward(_setup, _gradients),
    )
)

BACKWARD = register(
    Op(
        name="varlen_attention_bwd",
        schema="(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
        f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
        reference=reference_bwd,
        fake=fake_bwd,
        backends={
            "cpp": backends.cpp("varlen_attention_bwd"),
            "triton": backends.triton(_load_triton_bwd, too_wide),
        },
        samples=samples_bwd,
        cost=cost_bwd,
        compare=compare_bwd,
        dtypes=FLOATING,
    )
)
