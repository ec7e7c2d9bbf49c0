"""What the attention kernels share: tiles of heads, scores, which keys take part.

A head size is split into two powers of two, 72 into 64 + 16, so that little is multiplied for
nothing; only the second part needs a mask for its columns. Scores are kept as logarithms to the
base 2. Sequences are those of a dense tensor, or the first tokens of each sample, or lie one behind
the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmfast.kernels import philox
from mmfast.kernels.common import ceil_div, common_multiple, dot

MOST_DIMS = 256
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# How the sequences of a tensor lie.
DENSE = tl.constexpr(0)
LENGTHS = tl.constexpr(1)  # the first tokens of each sample
BEGINS = tl.constexpr(2)  # one behind the other

BOTH = tl.constexpr(2)  # ends of a sequence, that bound a tile of it

NO_MASK = tl.constexpr(0)
BOOL_MASK = tl.constexpr(1)
ADDED_MASK = tl.constexpr(2)
BOOL_OF_KEYS, ADDED_OF_KEYS = tl.constexpr(3), tl.constexpr(4)  # the same for all queries

NOT_CAUSAL = tl.constexpr(0)
TOP_LEFT = tl.constexpr(1)
BOTTOM_RIGHT = tl.constexpr(2)


@triton.jit
def span(ptr, batch, rows, longest, KIND: tl.constexpr):
    """Where the sequence of a sample begins, and its length."""
    begin = tl.full([], 0, tl.int64)
    length = tl.cast(rows, tl.int32)
    if KIND == LENGTHS:
        number = tl.load(ptr + batch).to(tl.int64)
        length = tl.minimum(tl.maximum(number, 0), rows).to(tl.int32)
    if KIND == BEGINS:
        begin = tl.minimum(tl.maximum(tl.load(ptr + batch).to(tl.int64), 0), rows)
        end = tl.minimum(tl.maximum(tl.load(ptr + batch + 1).to(tl.int64), 0), rows)
        length = tl.minimum(tl.maximum(end - begin, 0), longest).to(tl.int32)
    return begin, length


@triton.jit
def load_tile(
    ptr, rows, stride, length, FIRST: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK] from column FIRST on; zeros beyond WIDTH and, if BOUNDED, beyond ``length``."""
    columns = FIRST + tl.arange(0, BLOCK)[None, :]
    p = ptr + rows.to(tl.int64)[:, None] * stride + columns
    if FIRST + BLOCK > WIDTH:
        mask = columns < WIDTH
        if BOUNDED:
            mask = mask & (rows < length)[:, None]
        return tl.load(p, mask=mask, other=0.0)
    elif BOUNDED:
        return tl.load(p, mask=(rows < length)[:, None], other=0.0)
    else:
        return tl.load(p)


@triton.jit
def source_of_tiles(
    ptr, stride, length, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """What :func:`tile` reads: of a sequence at ``ptr`` its descriptor, or the pointer itself."""
    if TMA:
        shape = [tl.maximum(length, 1), WIDTH]
        return tl.make_tensor_descriptor(ptr, shape, [stride.to(tl.int64), 1], [ROWS, BLOCK])
    else:
        return ptr


@triton.jit
def sources_of_tiles(
    ptr, stride, length, ROWS: tl.constexpr, BLOCK_1: tl.constexpr, BLOCK_2: tl.constexpr,
    WIDTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Of both parts of a head; the first again where there is no second."""
    first = source_of_tiles(ptr, stride, length, ROWS, BLOCK_1, WIDTH, TMA)
    second = first
    if BLOCK_2 > 0:
        second = source_of_tiles(ptr, stride, length, ROWS, BLOCK_2, WIDTH, TMA)
    return first, second


@triton.jit
def tile(
    source, start, stride, length, ROWS: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, BOUNDED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[ROWS, BLOCK] from row ``start`` and column FIRST on, BOUNDED as above.

    Where that is BOTH, or by descriptors, there are zeros before the first row too.
    """
    if TMA:
        return source.load([start, FIRST])
    else:
        rows = start + tl.arange(0, ROWS)
        if BOUNDED == BOTH:
            rows = tl.where(rows < 0, length, rows)
        return load_tile(source, rows, stride, length, FIRST, BLOCK, WIDTH, BOUNDED)


@triton.jit
def tiles(
    source_1, source_2, start, stride, length, ROWS: tl.constexpr, BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr, WIDTH: tl.constexpr, BOUNDED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Of both parts of a head, likewise."""
    first = tile(source_1, start, stride, length, ROWS, 0, BLOCK_1, WIDTH, BOUNDED, TMA)
    second = first
    if BLOCK_2 > 0:
        second = tile(source_2, start, stride, length, ROWS, BLOCK_1, BLOCK_2, WIDTH, BOUNDED, TMA)
    return first, second


@triton.jit
def store_tile(
    ptr, rows, stride, length, b_x, FIRST: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    """The inverse, of a tile in the dtype of memory."""
    columns = FIRST + tl.arange(0, BLOCK)[None, :]
    p = ptr + rows.to(tl.int64)[:, None] * stride + columns
    mask = (rows < length)[:, None]
    if FIRST + BLOCK > WIDTH:
        mask = mask & (columns < WIDTH)
    tl.store(p, b_x, mask=mask)


@triton.jit
def product(a_1, a_2, b_1, b_2, dtype: tl.constexpr, SECOND: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T in ``dtype`` of tiles [A, D] and [B, D] in two parts, the second if SECOND."""
    b_s = tl.zeros([a_1.shape[0], b_1.shape[0]], dtype)
    b_s = dot(a_1, tl.trans(b_1), b_s, PRECISION)
    if SECOND:
        b_s = dot(a_2, tl.trans(b_2), b_s, PRECISION)
    return b_s


@triton.jit
def limited(
    b_s, rows, columns, num_rows, num_columns, causal_offset, mask_ptr, stride_ml, stride_ms,
    BOUNDED: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Scores with the mask; -inf where a key takes no part. ``rows`` and ``columns`` broadcast."""
    if MASK != NO_MASK:
        # A number for each key needs few registers, one for each pair many.
        inside = columns < num_columns
        p_mask = mask_ptr + columns.to(tl.int64) * stride_ms
        if MASK < BOOL_OF_KEYS:
            inside = inside & (rows < num_rows)
            p_mask += rows.to(tl.int64) * stride_ml
        if MASK % 2 == 1:  # bool
            b_s = tl.where(tl.load(p_mask, mask=inside, other=0) != 0, b_s, float("-inf"))
        else:
            b_s += tl.load(p_mask, mask=inside, other=0.0).to(b_s.dtype) * LOG2_E
    if BOUNDED:
        allowed = columns < num_columns
        if CAUSAL != NOT_CAUSAL:
            allowed = allowed & (columns <= rows + causal_offset)
        b_s = tl.where(allowed, b_s, float("-inf"))
    return b_s


@triton.jit
def logarithm(b_lse):
    """To the base 2; of rows that attend to nothing such that no probability is left."""
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2_E)


@triton.jit
def kept(b_x, seed, offset, first, rows, columns, num_columns, dropout_p):
    """b_x where dropout leaves it, else 0. ``first``: number of the head's first element."""
    element = first + rows.to(tl.int64) * num_columns + columns
    return tl.where(philox.uniforms(seed, offset, element) >= dropout_p, b_x, 0.0)


class Tokens(NamedTuple):
    """Where the tokens of a tensor (B, H, L, E) are.

    Attributes:
        numbers: lengths of samples, or where sequences begin and the last one ends; or None.
        rows: L, of the tensor.
        longest: at least the length of the longest sequence.
        kind: DENSE, LENGTHS or BEGINS.
    """

    numbers: Tensor | None
    rows: int
    longest: int
    kind: int

    @classmethod
    def of(cls, t: Tensor, lengths: Tensor | None = None) -> Tokens:
        """Of a dense tensor, all or the first of each sample."""
        rows = t.shape[2]
        if lengths is None:
            return cls(None, rows, rows, DENSE.value)
        return cls(lengths.contiguous(), rows, rows, LENGTHS.value)

    def pointer(self, other: Tensor) -> Tensor:
        """What the kernel takes: ``other`` where there is nothing to read."""
        return other if self.numbers is None else self.numbers


def heads_of(t: Tensor) -> Tensor:
    """t, or a copy where the numbers of a head do not lie together."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def head_strides(t: Tensor) -> tuple[int, int, int]:
    """Of samples, heads and tokens; 0 where there is one sample or head, of one token such that a
    descriptor may have it."""
    sizes = zip(t.shape[:2], t.stride()[:2], strict=True)
    batch, head = (stride if size > 1 else 0 for size, stride in sizes)
    alone = 16 * ceil_div(max(1, t.shape[3]), 16)
    return batch, head, t.stride(2) if t.shape[2] > 1 else alone


def factor_of(*tensors: Tensor) -> int:
    """Of which all strides are multiples: what tells the compiler how wide it may load.

    Descriptors need it too, and that tensors begin where 16 bytes may, and rows do not repeat.
    """
    if any(t.data_ptr() % 16 or (t.stride(2) == 0 and t.shape[2] > 1) for t in tensors):
        return 1
    return common_multiple(*(n for t in tensors for n in head_strides(t)))


def parts(width: int) -> tuple[int, int]:
    """Two powers of two, the second may be 0, that hold the columns of a head."""
    whole = max(16, triton.next_power_of_2(width))
    if width == whole or whole == 16:
        return whole, 0
    rest = max(16, triton.next_power_of_2(width - whole // 2))
    return (whole, 0) if whole // 2 + rest >= whole else (whole // 2, rest)


def blocks(width: int, value_width: int) -> dict[str, int]:
    """The compile-time sizes of a kernel's tiles, by their columns."""
    names = "BLOCK_E1", "BLOCK_E2", "BLOCK_V1", "BLOCK_V2"
    return dict(zip(names, (*parts(width), *parts(value_width)), strict=True)) | {
        "E": width,
        "EV": value_width,
    }


def check_widths(*widths: int) -> None:
    """The kernels keep whole heads on the chip: up to 256, else ValueError."""
    if max(widths) > MOST_DIMS:
        got = ", ".join(map(str, widths))
        raise ValueError(f"the Triton kernels take head sizes up to {MOST_DIMS}, got {got}")


def mask_arguments(mask: Tensor | None, other: Tensor) -> tuple[tuple[Any, ...], int]:
    """The mask's pointer and strides, 0 where it broadcasts, and its kind."""
    if mask is None:
        return (other, 0, 0, 0, 0), NO_MASK.value
    sizes = zip(mask.shape, mask.stride(), strict=True)
    strides = [stride if size > 1 else 0 for size, stride in sizes]
    of_keys = strides[2] == 0
    if mask.dtype == torch.bool:
        kind = BOOL_OF_KEYS if of_keys else BOOL_MASK
        if other.dtype == torch.float64:
            # Triton 3.6 takes the layout of a product's operands from the narrowest number that was
            # loaded for them, and has none for eight bits and products of float64.
            once = mask[tuple(slice(None) if stride else slice(0, 1) for stride in strides)]
            numbers = once.to(torch.int64)
            return (numbers, *mask_arguments(numbers, other)[0][1:]), kind.value
        return (mask.view(torch.uint8), *strides), kind.value
    return (mask, *strides), (ADDED_OF_KEYS if of_keys else ADDED_MASK).value


class Limits(NamedTuple):
    """What besides queries, keys and values decides, as the kernels take it.

    Attributes:
        mask: (B or 1, H or 1, L or 1, S or 1), or None.
        causal: NOT_CAUSAL, TOP_LEFT or BOTTOM_RIGHT.
        dropout_p: probability of dropout, by the stream of ``seed`` and ``offset``.
    """

    mask: Tensor | None = None
    causal: int = NOT_CAUSAL.value
    dropout_p: float = 0.0
    seed: Tensor | None = None
    offset: Tensor | None = None

    def arguments(self, other: Tensor) -> tuple[tuple[Any, ...], dict[str, int]]:
        """Of a kernel: at run time, and at compile time."""
        mask, kind = mask_arguments(self.mask, other)
        stream = (other if t is None else t for t in (self.seed, self.offset))
        constants = {"MASK": kind, "CAUSAL": self.causal, "DROPOUT": self.dropout_p > 0}
        return (*mask, *stream, self.dropout_p), constants

    @property
    def growth(self) -> float:
        """Of what dropout leaves."""
        return 1 / (1 - self.dropout_p) if self.dropout_p < 1 else 0.0


def offline_variant(
    name: str, launch: Callable[[int, int], Any], backward: bool, quick: bool
) -> Any:
    """A launch of the forward or of the kernels of the backward, for compiling elsewhere."""
    from mmfast.kernels.offline import Variant

    gradients = tuple(f"attention_{of}_gradient_kernel" for of in ("query", "key", "fused"))
    kernels = gradients if backward else ("attention_forward_kernel",)
    return Variant(
        f"{name}{', backward' if backward else ''}".replace("torch.", ""),
        launch,
        matrix=frozenset(kernels),
        wide=tuple((kernel, "tl.load(p") for kernel in kernels),
        quick=quick,
    )
