"""Normalisation of queries and keys, and their rotary position embedding, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast import backends
from mmfast.checks import FLOATING, check_choice, check_device, check_floating, check_possible
from mmfast.ops.per_sample import differences
from mmfast.registry import Arguments, Backward, Cost, Op, Sample, register

NORMS = ("rms", "layer", "none")
ROTATIONS = ("interleaved", "half")


def qk_norm_rope(
    q: Tensor,
    k: Tensor | None,
    weight_q: Tensor | None = None,
    weight_k: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    norm: str = "rms",
    across_heads: bool = False,
    bias_q: Tensor | None = None,
    bias_k: Tensor | None = None,
    eps: float = 1e-6,
    rotation: str = "interleaved",
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Normalise the heads of queries and keys, then rotate them by their positions.

    With n = x / sqrt(mean(x^2) + eps) weight + bias (``"layer"``: of x less its mean), the pairs of
    the first R numbers of each head are rotated; the others are n::

        out[a] = n[a] cos[a] - n[b] sin[a]
        out[b] = n[b] cos[b] + n[a] sin[b]

    in float32, in float64 if q is float64, rounded once. Gradients pass to all but cos and sin.

    ============================= ====================== ============== ===============
    model                         norm                   across_heads   rotation
    ============================= ====================== ============== ===============
    Flux, HunyuanVideo, Lumina2   ``"rms"``              False          interleaved
    Qwen-Image, Z-Image           ``"rms"``              False          interleaved
    Wan                           ``"rms"``              True           interleaved
    CogVideoX                     ``"layer"``, biases    False          interleaved
    CogView4                      ``"layer"``            False          half
    Cosmos                        ``"rms"``              False          half
    Stable Diffusion 3.5          ``"rms"``              False          no tables
    ============================= ====================== ============== ===============

    Complex frequencies (Lumina2, Z-Image, Qwen-Image) are given as their real and imaginary parts.
    LTX-Video rotates a token's heads as if they were one: ``(B, L, 1, H E)`` here.

    Args:
        q: ``(B, L, H, E)``, float16, bfloat16, float32 or float64. Views are read in place as long
            as the numbers of a head lie one after another: parts of packed projections, transposed
            ``(B, H, L, E)``.
        k: ``(B, S, Hkv, E)`` of q's dtype, S = L if there are tables; or None.
        weight_q, bias_q: ``(E,)``, or ``(H E,)`` with ``across_heads``; any of the dtypes.
        weight_k, bias_k: likewise, with Hkv.
        cos, sin: ``(L, R)`` or ``(B, L, R)``, or a number for each pair, ``(L, R / 2)`` or
            ``(B, L, R / 2)``: see :func:`mmfast.rotary_tables`. Both or none of them. Tokens of
            text that are not rotated have cos = 1 and sin = 0.
        norm: ``"rms"``, ``"layer"`` or ``"none"``.
        across_heads: a token's heads are normalised together, not each by itself.
        eps: added to the mean square.
        rotation: the pairs: ``"interleaved"``, numbers 2i and 2i + 1, or ``"half"``, i and
            i + R / 2.
        rotary_dim: R, if it is less than E.

    Returns:
        q and k in new memory, in the order of their dimensions there: dense ``(B, L, H, E)``, or
        ``(B, H, L, E)`` transposed if heads are further apart than tokens. k is None if it was.

    Raises:
        TypeError: an argument is no tensor, or has another dtype.
        ValueError: shapes, devices or options do not fit, or tables require gradients.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), eq.
    34; Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); Henry et al.,
    "Query-Key Normalization for Transformers" (2020).
    """
    check_choice("norm", norm, NORMS)
    check_choice("rotation", rotation, ROTATIONS)
    tensors: dict[str, Tensor] = {"q": q}
    heads = {"q": q} if k is None else {"q": q, "k": k}
    for name, x in heads.items():
        check_floating(name, x)
        if x.dim() != 4 or x.shape[3] < 1:
            letters = "(B, L, H, E)" if name == "q" else "(B, S, Hkv, E)"
            raise ValueError(f"{name} must be {letters}, E at least 1, got {tuple(x.shape)}")
    if k is not None:
        tensors["k"] = k
        if k.dtype != q.dtype:
            raise TypeError(f"k must have q's dtype, {q.dtype}, got {k.dtype}")
        if (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
            raise ValueError(
                f"k must have q's B = {q.shape[0]} and E = {q.shape[3]}, got {tuple(k.shape)}"
            )
    affine = {"weight_q": weight_q, "bias_q": bias_q, "weight_k": weight_k, "bias_k": bias_k}
    for name, row in affine.items():
        if row is None:
            continue
        check_floating(name, row)
        tensors[name] = row
        of = heads.get(name[-1])
        check_possible(
            {f"{name} without k": of is None, f'{name} with norm="none"': norm == "none"}
        )
        assert of is not None
        width = of.shape[3] * (of.shape[2] if across_heads else 1)
        if row.shape != (width,):
            letters = "(H E,)" if across_heads else "(E,)"
            raise ValueError(f"{name} must be {letters} = ({width},), got {tuple(row.shape)}")
    check_possible({"only one of cos and sin": (cos is None) != (sin is None)})
    rotated = 0
    if cos is not None and sin is not None:
        tensors |= {"cos": cos, "sin": sin}
        rotated = _rotary_dim(q, cos, sin, rotary_dim)
        if k is not None and k.shape[1] != q.shape[1]:
            raise ValueError(f"k must have q's L = {q.shape[1]} tokens, got S = {k.shape[1]}")
    else:
        check_possible({"rotary_dim without cos and sin": rotary_dim is not None})
    check_device(**tensors)
    rows = weight_q, bias_q, weight_k, bias_k
    options = norm, across_heads, rotation, rotated, eps
    out_q, out_k = backends.call(OP, q, k, *rows, cos, sin, *options)
    return out_q, None if k is None else out_k


def _rotary_dim(q: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int | None) -> int:
    """R of checked tables."""
    batch, length, _, num_dims = q.shape
    for name, table in (("cos", cos), ("sin", sin)):
        check_floating(name, table)
        if torch.is_grad_enabled() and table.requires_grad:
            raise ValueError(f"{name} has no gradient, but requires one: detach it")
    rotated = num_dims if rotary_dim is None else rotary_dim
    if rotated % 2 or not 2 <= rotated <= num_dims:
        raise ValueError(f"R must be even, from 2 to E = {num_dims}, got {rotated}")
    width = cos.shape[-1] if cos.dim() else 0
    lead = cos.shape[:-1]
    fits = width in (rotated, rotated // 2) and lead in ((length,), (batch, length))
    if not fits or cos.shape != sin.shape:
        raise ValueError(
            f"cos and sin must be (L, R) or (B, L, R), or with R / 2, of B = {batch}, L = {length} "
            f"and R = {rotated}, got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    return rotated


class _Normed(NamedTuple):
    """What a normalisation leaves. All in the wide dtype."""

    xhat: Tensor  # [B, L, H, E], before weight and bias
    inverse: Tensor  # [B, L, H or 1, 1]
    n: Tensor  # [B, L, H, E]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _widened(x: Tensor) -> Tensor:
    """x in the wide dtype; dense, as torch's sums depend on strides."""
    return x.to(_wide(x.dtype)).contiguous()


def _row(row: Tensor | None, like: Tensor) -> Tensor:
    """Of a weight or bias, [1, E] or [H, E]; one where there is none."""
    return like.new_ones(()) if row is None else row.to(like.dtype).view(-1, like.shape[3])


def _normed(
    x: Tensor,  # [B, L, H, E]
    weight: Tensor | None,  # [E] or [H E]
    bias: Tensor | None,
    norm: str,
    across_heads: bool,
    eps: float,
) -> _Normed:
    one = x.new_ones(())
    if norm == "none":
        return _Normed(x, one, x)
    dims = (2, 3) if across_heads else (3,)
    if norm == "layer":
        x = x - x.mean(dims, keepdim=True)
    inverse = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    xhat = x * inverse
    n = xhat * _row(weight, x)
    return _Normed(xhat, inverse, n if bias is None else n + _row(bias, x))


def _tables(
    cos: Tensor, sin: Tensor, rotation: str, rotary_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin, [..., L, 1, R]; sin has the sign of its term."""
    cos, sin = cos.to(dtype), sin.to(dtype)
    if cos.shape[-1] != rotary_dim:
        if rotation == "half":
            cos, sin = (torch.cat((t, t), -1) for t in (cos, sin))
        else:
            cos, sin = (t.repeat_interleave(2, -1) for t in (cos, sin))
    place = torch.arange(rotary_dim, device=cos.device)
    first = place < rotary_dim // 2 if rotation == "half" else place % 2 == 0
    return cos.unsqueeze(-2), torch.where(first, -sin, sin).unsqueeze(-2)


def _partners(x: Tensor, rotation: str) -> Tensor:
    """The other number of each pair, in its place. x: [..., R]."""
    if rotation == "half":
        return torch.cat(x.chunk(2, -1)[::-1], -1)
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def _rotated(
    n: Tensor,  # [B, L, H, E]
    cos: Tensor | None,  # [..., L, R] or [..., L, R / 2]
    sin: Tensor | None,
    rotation: str,
    rotary_dim: int,
    *,
    back: bool = False,
    absolute: bool = False,
) -> Tensor:
    """n rotated. ``back``: by the transposed matrix; ``absolute``: of absolute values of terms."""
    if cos is None or sin is None:
        return n
    cos, sin = _tables(cos, sin, rotation, rotary_dim, n.dtype)
    if absolute:
        cos, sin = cos.abs(), sin.abs()
    x, rest = n[..., :rotary_dim], n[..., rotary_dim:]
    if back:
        turned = x * cos + _partners(x * sin, rotation)
    else:
        turned = x * cos + _partners(x, rotation) * sin
    return torch.cat((turned, rest), -1)


def _new(x: Tensor) -> Tensor:
    """Memory for what is made of x: see ``Returns``."""
    batch, length, heads, num_dims = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((batch, heads, length, num_dims)).transpose(1, 2)
    return x.new_empty((batch, length, heads, num_dims))


def reference(
    q: Tensor,  # [B, L, H, E]
    k: Tensor | None,  # [B, S, Hkv, E]
    weight_q: Tensor | None,  # [E] or [H E]
    bias_q: Tensor | None,
    weight_k: Tensor | None,  # [E] or [Hkv E]
    bias_k: Tensor | None,
    cos: Tensor | None,  # [L, R], [B, L, R], [L, R / 2] or [B, L, R / 2]
    sin: Tensor | None,
    norm: str,
    across_heads: bool,
    rotation: str,
    rotary_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The specification."""

    def made(x: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if x is None:
            return q.new_empty(0)
        n = _normed(_widened(x), weight, bias, norm, across_heads, eps).n
        return _new(x).copy_(_rotated(n, cos, sin, rotation, rotary_dim))

    return made(q, weight_q, bias_q), made(k, weight_k, bias_k)


def fake(q: Tensor, k: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    """Outputs without values."""
    return _new(q), q.new_empty(0) if k is None else _new(k)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]


def _gradients(ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> tuple[Any, ...]:
    q, k, *rows = ctx.saved_tensors
    grad_k = None if k is None else grad_k
    if grad_q is None and grad_k is None:
        return (None,) * 13
    needs = ctx.needs_input_grad
    wants_rows = any(needs[2:6])
    grads = backends.call(BACKWARD, grad_q, grad_k, q, k, *rows, *ctx.options, wants_rows)
    of = (grad_q, grad_k, grad_q, grad_q, grad_k, grad_k)
    asked = zip(grads, of, needs[:6], strict=True)
    return *(g if o is not None and need else None for g, o, need in asked), *(None,) * 7


def _values_bwd(
    grad: Tensor,  # [B, L, H, E]
    x: Tensor,  # [B, L, H, E]
    weight: Tensor | None,  # [E] or [H E]
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    across_heads: bool,
    rotation: str,
    rotary_dim: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of a weight and of a bias, in x's dtype."""
    to_n = _rotated(grad, cos, sin, rotation, rotary_dim, back=True)  # [B, L, H, E]
    if norm == "none":
        return to_n, to_n, to_n
    xhat, inverse, _ = _normed(x, None, None, norm, across_heads, eps)
    to_xhat = to_n * _row(weight, x)
    dims = (2, 3) if across_heads else (3,)
    to_x = to_xhat - xhat * (to_xhat * xhat).mean(dims, keepdim=True)
    if norm == "layer":
        to_x = to_x - to_xhat.mean(dims, keepdim=True)
    over = (0, 1) if across_heads else (0, 1, 2)
    return to_x * inverse, (to_n * xhat).sum(over).flatten(), to_n.sum(over).flatten()


def reference_bwd(
    grad_q: Tensor | None,  # [B, L, H, E], one of them at least
    grad_k: Tensor | None,  # [B, S, Hkv, E]
    q: Tensor,
    k: Tensor | None,
    weight_q: Tensor | None,  # [E] or [H E]
    bias_q: Tensor | None,
    weight_k: Tensor | None,  # [E] or [Hkv E]
    bias_k: Tensor | None,
    cos: Tensor | None,  # [L, R], [B, L, R], [L, R / 2] or [B, L, R / 2]
    sin: Tensor | None,
    norm: str,
    across_heads: bool,
    rotation: str,
    rotary_dim: int,
    eps: float,
    want_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, weight_q, bias_q, weight_k and bias_k; (0,) where there is none."""
    rows = weight_q, bias_q, weight_k, bias_k
    outputs = fake_bwd(grad_q, grad_k, q, k, *rows, cos, sin, norm, across_heads, rotation,
                       rotary_dim, eps, want_rows)  # fmt: skip
    for i, (grad, x) in enumerate(((grad_q, q), (grad_k, k))):
        if grad is None or x is None:
            continue
        values = _values_bwd(_widened(grad), _widened(x), rows[2 * i], cos, sin, norm, across_heads,
                             rotation, rotary_dim, eps)  # fmt: skip
        places = (i, 2 + 2 * i, 3 + 2 * i)
        for place, value in zip(places, values, strict=True):
            if place < 2 or (rows[place - 2] is not None and want_rows):
                outputs[place].copy_(value)
    return outputs


def fake_bwd(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    weight_q: Tensor | None,
    bias_q: Tensor | None,
    weight_k: Tensor | None,
    bias_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    across_heads: bool,
    rotation: str,
    rotary_dim: int,
    eps: float,
    want_rows: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs without values."""

    def like(grad: Tensor | None, x: Tensor | None) -> Tensor:
        return q.new_empty(0) if grad is None or x is None else _new(x)

    def row(grad: Tensor | None, x: Tensor | None) -> Tensor:
        if grad is None or x is None or not want_rows:
            return q.new_empty(0)
        return x.new_empty(x.shape)

    return (
        like(grad_q, q),
        like(grad_k, k),
        row(grad_q, weight_q),
        row(grad_q, bias_q),
        row(grad_k, weight_k),
        row(grad_k, bias_k),
    )


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def cost(q: Tensor, k: Tensor | None, *arguments: Any) -> Cost:
    """q and k read and written once, weights and tables read once."""
    numbers = q.numel() + (0 if k is None else k.numel())
    return Cost(bytes=2 * _nbytes(q, k) + _nbytes(*arguments[:6]), flops=7 * numbers)


def cost_bwd(
    grad_q: Tensor | None, grad_k: Tensor | None, q: Tensor, k: Tensor | None, *arguments: Any
) -> Cost:
    """Gradients, q and k read and gradients written once; the rest read, or written, once."""
    numbers = sum(g.numel() for g in (grad_q, grad_k) if g is not None)
    moved = 3 * numbers * q.element_size() + _nbytes(*arguments[:6])
    return Cost(bytes=moved, flops=16 * numbers)


def _condition(x: Tensor, norm: str, across_heads: bool, eps: float) -> Tensor | float:
    """What rounding x before its mean is taken off is worth in its normed numbers, [B, L, H, E]."""
    if norm != "layer":
        return 1.0
    dims = (2, 3) if across_heads else (3,)
    inverse = _normed(x, None, None, norm, across_heads, eps).inverse
    return 1.0 + (x.abs() + x.abs().mean(dims, keepdim=True)) * inverse


def compare(
    result: tuple[Tensor, Tensor],
    arguments: Arguments,
    expected: tuple[Tensor, ...] | None = None,
) -> list[str]:
    """Within the rounding of the terms and of the result itself."""
    q, k, weight_q, bias_q, weight_k, bias_k, cos, sin, *options = arguments
    norm, across_heads, rotation, rotary_dim, eps = options
    slack = 16 * torch.finfo(_wide(q.dtype)).eps
    likes = fake(*arguments)
    complaints = []
    given = ((q, weight_q, bias_q), (k, weight_k, bias_k))
    for name, got, like, (x, weight, bias) in zip("qk", result, likes, given, strict=True):
        if x is None:
            complaints += [] if got.shape == (0,) else ["a k that is not there"]
            continue
        x = x.double()
        normed = _normed(x, weight, bias, norm, across_heads, eps)
        want = _rotated(normed.n, cos, sin, rotation, rotary_dim)
        size = (normed.xhat.abs() + 1) * _condition(x, norm, across_heads, eps)
        size = size * _row(weight, x).abs() if norm != "none" else normed.xhat.abs()
        size = size if bias is None else size + _row(bias, x).abs()
        size = _rotated(size, cos, sin, rotation, rotary_dim, absolute=True)
        complaints += differences(name, got, like, want, size, slack)
        if got.stride() != like.stride():
            complaints.append(f"{name}: strides {got.stride()}, expected {like.stride()}")
    return complaints


def compare_bwd(
    result: tuple[Tensor, ...], arguments: Arguments, expected: tuple[Tensor, ...] | None = None
) -> list[str]:
    """Likewise; sums over tokens have the rounding of their terms' absolute values."""
    grad_q, grad_k, q, k, *rows = arguments[:8]
    cos, sin, norm, across_heads, rotation, rotary_dim, eps, want_rows = arguments[8:]
    slack = 32 * torch.finfo(_wide(q.dtype)).eps
    likes = fake_bwd(*arguments)
    wants: list[Tensor | None] = [None] * 6
    sizes: list[Tensor | None] = [None] * 6
    for i, (grad, x) in enumerate(((grad_q, q), (grad_k, k))):
        if grad is None or x is None:
            continue
        grad, x, weight = grad.double(), x.double(), rows[2 * i]
        options = norm, across_heads, rotation, rotary_dim, eps
        found = _values_bwd(grad, x, weight, cos, sin, *options)
        to_n = _rotated(grad.abs(), cos, sin, rotation, rotary_dim, back=True, absolute=True)
        xhat, inverse, _ = _normed(x, None, None, norm, across_heads, eps)
        if norm == "none":
            of = (to_n, to_n, to_n)
        else:
            near = (xhat.abs() + 1) * _condition(x, norm, across_heads, eps)
            dims = (2, 3) if across_heads else (3,)
            to_xhat = to_n * _row(weight, x).abs()
            means = (to_xhat * near).mean(dims, keepdim=True)
            to_x = (to_xhat * _condition(x, norm, across_heads, eps) + near * means) * inverse
            over = (0, 1) if across_heads else (0, 1, 2)
            of = (to_x, (to_n * near).sum(over).flatten(), to_n.sum(over).flatten())
        for place, want, terms in zip((i, 2 + 2 * i, 3 + 2 * i), found, of, strict=True):
            if place < 2 or (rows[place - 2] is not None and want_rows):
                wants[place], sizes[place] = want, terms
    complaints = []
    names = ("q", "k", "weight_q", "bias_q", "weight_k", "bias_k")
    for name, got, like, value, size in zip(names, result, likes, wants, sizes, strict=True):
        if value is None or size is None:
            complaints += [] if got.shape == (0,) else [f"a gradient of {name}, which is not there"]
        else:
            complaints += differences(f"gradients of {name}", got, like, value, size, slack)
    return complaints


class _Case(NamedTuple):
    """What a sample is made of."""

    batch: int
    length: int
    heads: int
    kv_heads: int  # 0: no k
    num_dims: int
    norm: str = "rms"
    across_heads: bool = False
    bias: bool = False
    rotation: str = "interleaved"
    rotary_dim: int = 0  # no tables
    pairs: bool = True  # tables have a number for each pair
    batched: bool = False  # tables have a batch
    layout: str = "packed"  # or "transposed", or "dense"

    @property
    def name(self) -> str:
        """What tells it from the others."""
        shape = f"{self.batch}x{self.length}x{self.heads}x{self.num_dims}"
        parts = [
            self.norm,
            "across" * self.across_heads,
            "bias" * self.bias,
            f"{self.rotation}{self.rotary_dim}" if self.rotary_dim else "",
            "full" * (not self.pairs),
            "batched" * self.batched,
            self.layout * (self.layout != "packed"),
            f"kv{self.kv_heads}" if self.kv_heads != self.heads else "",
        ]
        return "_".join(part for part in (*parts, shape) if part)

    def tensors(self, device: torch.device, dtype: torch.dtype, seed: int) -> list[Tensor | None]:
        """q, k, weights and biases, tables."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def view(*shape: int) -> Tensor:
            if self.layout == "transposed":
                batch, length, heads, num_dims = shape
                return normal(batch, heads, length, num_dims).to(device, dtype).transpose(1, 2)
            return normal(*shape).to(device, dtype)

        b, length, e = self.batch, self.length, self.num_dims
        q: Tensor
        k: Tensor | None = None
        if self.layout == "packed":
            packed = normal(b, length, self.heads + 2 * self.kv_heads, e).to(device, dtype)
            q, k, _ = packed.split((self.heads, self.kv_heads, self.kv_heads), 2)
        else:
            q, k = (view(b, length, h, e) for h in (self.heads, self.kv_heads))
        k = k if self.kv_heads else None
        rows: list[Tensor | None] = []
        for heads, x in ((self.heads, q), (self.kv_heads, k)):
            width = e * (heads if self.across_heads else 1)
            normed = self.norm != "none" and x is not None
            rows.append(1 + 0.2 * normal(width).to(device) if normed else None)
            rows.append(normal(width).to(device) if normed and self.bias else None)
        cos = sin = None
        if self.rotary_dim:
            lead = (b, length) if self.batched else (length,)
            angle = 9 * normal(*lead, self.rotary_dim // (2 if self.pairs else 1))
            wide = _wide(dtype)
            cos, sin = angle.cos().to(device, wide), angle.sin().to(device, wide)
        return [q, k, *rows, cos, sin]

    @property
    def options(self) -> tuple[Any, ...]:
        """The rest of the schema's arguments."""
        return self.norm, self.across_heads, self.rotation, self.rotary_dim, 1e-6

    @property
    def sizes(self) -> dict[str, int]:
        """For the benchmarks' tables."""
        tokens, heads = self.batch * self.length, self.heads + self.kv_heads
        return {"N": tokens, "K": 2, "D": self.num_dims, "H": heads}


_BENCH = (
    _Case(1, 1024, 24, 24, 128, rotary_dim=128),
    _Case(1, 1024, 24, 24, 72, across_heads=True, rotary_dim=72),
)
_ODD = (
    _Case(2, 5, 3, 3, 16, bias=True, rotary_dim=16, pairs=False),
    _Case(2, 5, 4, 2, 72, rotary_dim=72, rotation="half", layout="transposed"),
    _Case(2, 7, 3, 1, 10, rotary_dim=6, rotation="half", pairs=False, batched=True),
    _Case(2, 7, 3, 2, 24, norm="layer", bias=True, rotary_dim=16, batched=True),
    _Case(1, 3, 2, 2, 64, norm="layer", bias=True, across_heads=True, rotary_dim=64),
    _Case(2, 33, 3, 0, 40, rotary_dim=40, across_heads=True, layout="transposed"),
    _Case(3, 4, 2, 2, 128, norm="none", rotary_dim=128, layout="transposed"),
    _Case(2, 19, 3, 2, 128, rotary_dim=128, rotation="half", pairs=False),
    _Case(2, 19, 17, 2, 72, rotary_dim=72, pairs=False, batched=True, layout="transposed"),
    _Case(1, 20, 2, 2, 64, across_heads=True, rotary_dim=64, rotation="half", layout="dense"),
    _Case(1, 5, 2, 2, 90),
    _Case(1, 9, 1, 1, 7),
    _Case(1, 1, 1, 1, 1, norm="layer"),
    _Case(0, 4, 2, 2, 8, rotary_dim=8, layout="dense"),
    _Case(2, 0, 2, 2, 8, bias=True, layout="dense"),
)


def _sample(case: _Case, bench: bool = False) -> Sample:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        return *case.tensors(device, dtype, seed), *case.options

    return Sample(case.name, make, case.sizes, bench)


def samples() -> Iterable[Sample]:
    """Blocks of Flux and of a model that normalises across heads; odd ones."""
    yield from (_sample(case, bench=True) for case in _BENCH)
    yield from (_sample(case) for case in _ODD)


def _sample_bwd(case: _Case, bench: bool = False, only: str = "", rows: bool = True) -> Sample:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        tensors = case.tensors(device, dtype, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        grads = [
            None
            if x is None or only not in ("", name)
            else torch.randn(x.shape, generator=generator).to(device, dtype)
            for name, x in zip("qk", tensors, strict=False)
        ]
        return *grads, *tensors, *case.options, rows

    name = "_".join(
        part for part in (f"only_{only}" * bool(only), "" if rows else "fixed", case.name) if part
    )
    return Sample(name, make, case.sizes, bench)


def samples_bwd() -> Iterable[Sample]:
    """As above."""
    yield from (_sample_bwd(case, bench=True) for case in _BENCH)
    yield from (_sample_bwd(case) for case in _ODD)
    yield _sample_bwd(_ODD[0], only="q")
    yield _sample_bwd(_ODD[3], only="k")
    yield _sample_bwd(_ODD[4], rows=False)


def _load_triton() -> Callable[..., tuple[Tensor, Tensor]]:
    from mmfast.kernels.qk_norm_rope import qk_norm_rope as launch

    return launch


def _load_triton_bwd() -> Callable[..., tuple[Tensor, ...]]:
    from mmfast.kernels.qk_norm_rope import qk_norm_rope_bwd as launch

    return launch


OP = register(
    Op(
        name="qk_norm_rope",
        schema="(Tensor q, Tensor? k, Tensor? weight_q, Tensor? bias_q, Tensor? weight_k, "
        "Tensor? bias_k, Tensor? cos, Tensor? sin, str norm, bool across_heads, str rotation, "
        "int rotary_dim, float eps) -> (Tensor, Tensor)",
        reference=reference,
        fake=fake,
        backends={
            "cpp": backends.cpp("qk_norm_rope"),
            "triton": backends.triton(_load_triton, backends.always),
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
        name="qk_norm_rope_bwd",
        schema="(Tensor? grad_q, Tensor? grad_k, Tensor q, Tensor? k, Tensor? weight_q, "
        "Tensor? bias_q, Tensor? weight_k, Tensor? bias_k, Tensor? cos, Tensor? sin, str norm, "
        "bool across_heads, str rotation, int rotary_dim, float eps, bool want_rows) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        reference=reference_bwd,
        fake=fake_bwd,
        backends={
            "cpp": backends.cpp("qk_norm_rope_bwd"),
            "triton": backends.triton(_load_triton_bwd, backends.always),
        },
        samples=samples_bwd,
        cost=cost_bwd,
        compare=compare_bwd,
        dtypes=FLOATING,
    )
)
