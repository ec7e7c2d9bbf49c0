"""Attention with PyTorch's signature, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mmfast import backends, philox
from mmfast.checks import FLOATING, check_device, check_dtype, check_possible
from mmfast.ops.attention import (
    Limits,
    attend,
    attend_bwd,
    check_attention,
    check_heads,
    complaints,
    errors,
    errors_bwd,
    new_like,
    new_lse,
    scale_of,
    too_wide,
)
from mmfast.registry import Arguments, Backward, Cost, Op, Sample, register


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
) -> Tensor:
    """softmax(query key^T scale + mask) value, as ``torch.nn.functional`` has it.

    No matrix of L x S is made, and no mask is expanded. Gradients pass to query, key, value and a
    mask that is added. Differences to PyTorch: an order of the arguments in memory is kept, and
    dropout is a function of ``seed`` and ``offset``.

    Args:
        query: ``(..., H, L, E)``, float16, bfloat16, float32 or float64. Any strides; heads behind
            the tokens in memory, as in a packed projection, are read where they are.
        key: ``(..., H, S, E)``, query's dtype. Leading dimensions broadcast, as do value's.
        value: ``(..., H, S, Ev)``.
        attn_mask: broadcasts to ``(..., H, L, S)``: bool, True where a key takes part, or numbers
            of query's dtype or float32, added to the scores. A row with no key at all gives 0.
        dropout_p: probability with which a weight of the softmax becomes 0; the others grow by
            1 / (1 - dropout_p).
        is_causal: query i sees the keys up to i; not together with ``attn_mask``.
        scale: of the scores; 1 / sqrt(E) by default.
        enable_gqa: key and value may have fewer heads, of which each serves H / Hkv in a row.
        seed: of dropout, an int or an int64 tensor ``()``; drawn from torch's generator of the
            device by default.
        offset: of dropout, likewise: the step of the training, say.

    Returns:
        ``(..., H, L, Ev)``, query's dtype; in memory ``(..., L, H, Ev)`` if query is like that.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes, devices or options do not fit.

    Source: Vaswani et al., "Attention Is All You Need" (2017), eq. 1; Dao et al.,
    "FlashAttention" (2022), algorithms 2 and 4, for how it is computed.
    """
    check_attention(query=query, key=key, value=value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2:
            raise ValueError(f"{name} must be (..., H, L, E), got {tuple(tensor.shape)}")
    if key.shape[-2] != value.shape[-2]:
        got = f"{key.shape[-2]} and {value.shape[-2]}"
        raise ValueError(f"key and value must have one length, got {got}")
    num_dims = query.shape[-1]
    if key.shape[-1] != num_dims or num_dims < 1:
        raise ValueError(
            f"query and key must have one head size, at least 1, got {num_dims} and {key.shape[-1]}"
        )
    check_possible({"attn_mask with is_causal": attn_mask is not None and is_causal})
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be from 0 to 1, got {dropout_p}")
    kept = 3 if enable_gqa else 2
    if enable_gqa:
        if min(query.dim(), key.dim(), value.dim()) < 3:
            raise ValueError("with enable_gqa all must be (..., H, L, E)")
        if key.shape[-3] != value.shape[-3]:
            got = f"{key.shape[-3]} and {value.shape[-3]}"
            raise ValueError(f"key and value must have as many heads as each other, got {got}")
        check_heads("key", query.shape[-3], key.shape[-3])
    shape: tuple[int, ...] = query.shape  # [..., H, L, E]
    given = [query, key, value]
    lead = shape[:-kept]
    if key.shape[:-kept] != lead or value.shape[:-kept] != lead:
        try:
            lead = torch.broadcast_shapes(*(t.shape[:-kept] for t in given))
        except RuntimeError:
            got = ", ".join(str(tuple(t.shape)) for t in given)
            raise ValueError(f"leading dimensions must fit each other, got {got}") from None
        shape = (*lead, *shape[-kept:])
        given = [t.expand(*lead, *t.shape[-kept:]) for t in given]
    flat = [_four(t) for t in given]
    mask = None
    if attn_mask is not None:
        check_dtype("attn_mask", attn_mask, (torch.bool, query.dtype, torch.float32))
        check_device(query=query, attn_mask=attn_mask)
        mask = _mask_of(attn_mask, (*shape[:-1], key.shape[-2]))
    streams: tuple[Tensor, Tensor] | tuple[None, None] = None, None
    if dropout_p > 0:
        if seed is None:
            seed = torch.randint(-(1 << 63), (1 << 63) - 1, (), device=query.device)
        streams = philox.streams(seed, offset, query.device)
        for name, stream in zip(("seed", "offset"), streams, strict=True):
            if stream.dim():
                raise ValueError(f"{name} must be of shape (), got {tuple(stream.shape)}")
    factor = scale_of(scale, num_dims)
    out, _ = backends.call(OP, *flat, mask, float(dropout_p), is_causal, factor, *streams)
    return out.reshape(*shape[:-1], value.shape[-1])


def _four(t: Tensor) -> Tensor:
    """(B, H, L, E) of any number of dimensions."""
    if t.dim() > 4:
        return t.flatten(0, -4)
    return t if t.dim() == 4 else t[(None,) * (4 - t.dim())]


def _mask_of(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B or 1, H or 1, L or 1, S or 1) of a mask that broadcasts to (..., H, L, S)."""
    fits = mask.dim() <= len(shape) and all(
        a in (1, b) for a, b in zip(reversed(mask.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(f"attn_mask must broadcast to {shape}, got {tuple(mask.shape)}")
    lead = shape[:-3]
    mask = mask[(None,) * (max(len(shape), 4) - mask.dim())]
    if mask.dim() > 4 and any(n != 1 for n in mask.shape[:-3]):
        mask = mask.expand(*lead, *mask.shape[-3:])
    return _four(mask)


def _shape(query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
    """B, H, L, S."""
    return query.shape[0], query.shape[1], query.shape[2], key.shape[2]


def _limits(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    seed: Tensor | None,
    offset: Tensor | None,
) -> Limits:
    shape = _shape(query, key)
    allowed, bias = None, attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed, bias = attn_mask, None
    if is_causal:
        allowed = torch.ones(shape[2:], dtype=torch.bool, device=query.device).tril()
    kept = None
    if dropout_p > 0:
        assert seed is not None
        assert offset is not None
        count = shape[0] * shape[1] * shape[2] * shape[3]
        numbers = philox.uniforms(seed, offset, count).view(shape)
        # Compared in float32, as the numbers are.
        stays = numbers >= torch.full_like(numbers, dropout_p)
        kept = stays.double() * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    return Limits(allowed, bias, kept)


def reference(
    query: Tensor,  # [B, H, L, E]
    key: Tensor,  # [B, Hkv, S, E]
    value: Tensor,  # [B, Hkv, S, Ev]
    attn_mask: Tensor | None,  # [B or 1, H or 1, L or 1, S or 1]
    dropout_p: float,
    is_causal: bool,
    scale: float,
    seed: Tensor | None,  # []
    offset: Tensor | None,  # []
) -> tuple[Tensor, Tensor]:
    """The specification: outputs, and the logarithms of the sums, without dropout.

    Dropout: element ``((b H + h) L + i) S + j`` of the stream decides about key j of query i.
    """
    out, lse = fake(query, key, value, attn_mask, dropout_p, is_causal, scale, seed, offset)
    limits = _limits(query, key, attn_mask, dropout_p, is_causal, seed, offset)
    made, made_lse = attend(query, key, value, scale=scale, limits=limits)
    return out.copy_(made), lse.copy_(made_lse)


def fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    seed: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs without values."""
    return new_like(query, value.shape[3]), new_lse(query, query.shape[:3])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, mask, *ctx.options, seed, offset = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, out, lse, mask, seed, offset)


def _gradients(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Any, ...]:
    *saved, mask, seed, offset = ctx.saved_tensors
    if grad_out is None:
        return (None,) * 9
    want_mask = mask is not None and mask.is_floating_point() and ctx.needs_input_grad[3]
    *grads, of_mask = backends.call(
        BACKWARD, grad_out, *saved, mask, *ctx.options, seed, offset, want_mask
    )
    return *grads, of_mask if want_mask else None, *(None,) * 5


def reference_bwd(
    grad_out: Tensor,  # [B, H, L, Ev]
    query: Tensor,  # [B, H, L, E]
    key: Tensor,  # [B, Hkv, S, E]
    value: Tensor,  # [B, Hkv, S, Ev]
    out: Tensor,  # [B, H, L, Ev]
    lse: Tensor,  # [B, H, L]
    attn_mask: Tensor | None,  # [B or 1, H or 1, L or 1, S or 1]
    dropout_p: float,
    is_causal: bool,
    scale: float,
    seed: Tensor | None,  # []
    offset: Tensor | None,  # []
    want_mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and of a mask that is added, summed where it broadcasts."""
    options = attn_mask, dropout_p, is_causal, scale, seed, offset, want_mask_grad
    made = fake_bwd(grad_out, query, key, value, out, lse, *options)
    limits = _limits(query, key, attn_mask, dropout_p, is_causal, seed, offset)
    grads = attend_bwd(grad_out, query, key, value, out, lse, scale=scale, limits=limits)
    for tensor, grad in zip(made, _with_mask(grads, attn_mask, want_mask_grad), strict=True):
        tensor.copy_(grad)
    return made


def _with_mask(grads: tuple[Tensor, ...], mask: Tensor | None, want: bool) -> list[Tensor]:
    """Of the four, the last one that of the mask."""
    *of_inputs, scores = grads
    if not want:
        return [*of_inputs, scores.new_empty(0)]
    assert mask is not None
    return [*of_inputs, scores.sum_to_size(mask.shape)]


def fake_bwd(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    seed: Tensor | None,
    offset: Tensor | None,
    want_mask_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs without values."""
    of_mask = query.new_empty(0)
    if want_mask_grad:
        assert attn_mask is not None
        of_mask = attn_mask.new_empty(attn_mask.shape)
    grads = (new_like(t, t.shape[3]) for t in (query, key, value))
    return *grads, of_mask  # type: ignore[return-value]


def _pairs(query: Tensor, key: Tensor, is_causal: bool) -> int:
    """Pairs of a query and a key that it may see."""
    batch, heads, length, keys = _shape(query, key)
    if is_causal:
        both = min(length, keys)
        return batch * heads * (both * (both + 1) // 2 + (length - both) * keys)
    return batch * heads * length * keys


def cost(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    seed: Tensor | None,
    offset: Tensor | None,
) -> Cost:
    """Two products for every pair; inputs read once, outputs written once."""
    out, lse = fake(query, key, value, attn_mask, dropout_p, is_causal, scale, seed, offset)
    tensors = [t for t in (query, key, value, attn_mask, out, lse) if t is not None]
    flops = 2 * _pairs(query, key, is_causal) * (query.shape[3] + value.shape[3])
    return Cost(bytes=sum(t.nbytes for t in tensors), flops=flops)


def cost_bwd(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
    seed: Tensor | None,
    offset: Tensor | None,
    want_mask_grad: bool,
) -> Cost:
    """Five products for every pair."""
    inputs = [grad_out, query, key, value, out, lse, query, key, value]
    if attn_mask is not None:
        inputs += [attn_mask] * (1 + want_mask_grad)
    flops = 2 * _pairs(query, key, is_causal) * (3 * query.shape[3] + 2 * value.shape[3])
    return Cost(bytes=sum(t.nbytes for t in inputs), flops=flops)


def compare(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Within the rounding of scores and, in 16 bits, of probabilities."""
    query, key, value, mask, dropout_p, is_causal, scale, *stream = arguments
    limits = _limits(query, key, mask, dropout_p, is_causal, *stream)
    wanted = attend(query.double(), key.double(), value.double(), scale=scale, limits=limits)
    allowed = errors(query, key, value, scale=scale, limits=limits)
    return complaints(("out", "lse"), result, fake(*arguments), wanted, allowed)


def compare_bwd(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Likewise, and of the gradients of scores."""
    *tensors, mask, dropout_p, is_causal, scale, seed, offset, want_mask = arguments
    limits = _limits(tensors[1], tensors[2], mask, dropout_p, is_causal, seed, offset)
    grads = attend_bwd(*(t.double() for t in tensors), scale=scale, limits=limits)
    wanted = _with_mask(grads, mask, want_mask)
    allowed = _with_mask(errors_bwd(*tensors, scale=scale, limits=limits), mask, want_mask)
    names = ("grad_query", "grad_key", "grad_value", "grad_mask")
    return complaints(names, result, fake_bwd(*arguments), wanted, allowed)


def _sample(
    batch: int,
    heads: int,
    length: int,
    num_dims: int,
    *,
    keys: int | None = None,
    kv_heads: int | None = None,
    value_dims: int | None = None,
    mask: tuple[int, ...] | None = None,
    added: torch.dtype | bool = False,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    packed: bool = False,
    name: str = "",
) -> Sample:
    """``mask``: its shape; ``added``: True or a dtype for one with numbers; ``packed``: qkv is."""
    keys = length if keys is None else keys
    kv_heads = heads if kv_heads is None else kv_heads
    value_dims = num_dims if value_dims is None else value_dims

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        if packed:
            qkv = normal(batch, length, 3, heads, num_dims)
            tensors = [t.transpose(1, 2) for t in qkv.unbind(2)]
        else:
            tensors = [
                normal(batch, heads, length, num_dims),
                normal(batch, kv_heads, keys, num_dims),
                normal(batch, kv_heads, keys, value_dims),
            ]
        given = None
        if mask is not None:
            numbers = torch.randn(mask, generator=generator)
            given = numbers < 0.5
            if added:
                numbers = torch.where(numbers < -1.5, -torch.inf, numbers)
                given = numbers.to(added if isinstance(added, torch.dtype) else dtype)
            given = given.to(device)
        stream: tuple[Tensor | None, Tensor | None] = None, None
        if dropout_p:
            stream = torch.tensor(seed, device=device), torch.tensor(5, device=device)
        factor = scale_of(scale, num_dims)
        return *tensors, given, dropout_p, is_causal, factor, *stream

    sizes = {"N": batch * heads * length, "K": keys, "D": num_dims, "H": heads}
    bench = batch * heads * length * keys >= 1 << 20
    shape = f"{batch}x{heads}x{length}x{num_dims}"
    return Sample("_".join(filter(None, (name, shape))), make, sizes, bench)


def samples() -> Iterable[Sample]:
    """Of DiT-XL/2, SD3 and videos (``bench``); odd ones."""
    yield _sample(2, 16, 256, 72)
    yield _sample(1, 24, 1024, 64)
    yield _sample(1, 8, 4096, 128)
    yield _sample(2, 3, 17, 24)
    yield _sample(1, 2, 40, 72, packed=True, name="packed")
    yield _sample(1, 1, 1, 1)
    yield _sample(2, 4, 9, 8, kv_heads=2, keys=21, value_dims=5, name="grouped")
    yield _sample(1, 2, 19, 16, is_causal=True, name="causal")
    yield _sample(2, 1, 9, 7, keys=5, is_causal=True, name="causal_long")
    yield _sample(2, 2, 7, 8, keys=33, mask=(2, 1, 1, 33), name="padding")
    yield _sample(2, 2, 11, 8, mask=(1, 2, 11, 11), added=True, name="added")
    yield _sample(1, 2, 5, 8, mask=(1, 1, 5, 1), name="rows")
    yield _sample(2, 2, 6, 9, mask=(2, 2, 6, 6), added=torch.float32, name="added_float32")
    yield _sample(2, 2, 13, 8, keys=18, dropout_p=0.3, name="dropout")
    yield _sample(1, 2, 9, 40, scale=-0.5, name="scale")
    yield _sample(2, 2, 0, 8, keys=3, name="no_queries")
    yield _sample(2, 2, 3, 8, keys=0, name="no_keys")
    yield _sample(0, 2, 3, 8)


def _backward_of(sample: Sample) -> Sample:
    """Gradients of ``sample``'s outputs."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        query, key, value, mask, *options = sample.make(device, dtype, seed)
        out, lse = reference(query, key, value, mask, *options)
        generator = torch.Generator().manual_seed(seed + 1)
        grad = torch.randn(out.shape, generator=generator).to(device, dtype)
        want = mask is not None and mask.is_floating_point()
        return grad, query, key, value, out, lse, mask, *options, want

    return Sample(sample.name, make, sample.shape, sample.bench)


def samples_bwd() -> Iterable[Sample]:
    """As above."""
    yield _backward_of(_sample(2, 16, 256, 72))
    # First among the small ones: with all outputs.
    yield _backward_of(_sample(2, 2, 11, 8, mask=(1, 2, 11, 11), added=True, name="added"))
    for sample in samples():
        if not sample.bench and not sample.name.startswith("added_2"):
            yield _backward_of(sample)


def _load_triton() -> Callable[..., tuple[Tensor, Tensor]]:
    from mmfast.kernels.scaled_dot_product_attention import scaled_dot_product_attention as launch

    return launch


def _load_triton_bwd() -> Callable[..., tuple[Tensor, ...]]:
    from mmfast.kernels.scaled_dot_product_attention import (
        scaled_dot_product_attention_bwd as launch,
    )

    return launch


OP = register(
    Op(
        name="scaled_dot_product_attention",
        schema="(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, "
        "bool is_causal, float scale, Tensor? seed, Tensor? offset) -> (Tensor, Tensor)",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("scaled_dot_product_attention"),
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
        name="scaled_dot_product_attention_bwd",
        schema="(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
        "Tensor? attn_mask, float dropout_p, bool is_causal, float scale, Tensor? seed, "
        "Tensor? offset, bool want_mask_grad) -> (Tensor, Tensor, Tensor, Tensor)",
        reference=reference_bwd,
        fake=fake_bwd,
        backends={
            "cpp": backends.cpp("scaled_dot_product_attention_bwd"),
            "triton": backends.triton(_load_triton_bwd, too_wide),
        },
        samples=samples_bwd,
        cost=cost_bwd,
        compare=compare_bwd,
        dtypes=FLOATING,
    )
)
