"""What is refused, and the words it is refused with."""

from __future__ import annotations

import re

import pytest
import torch

import mmfast


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


NEAREST_CODE = [
    ([1.0], zeros(2, 3), {}, TypeError, "x must be a torch.Tensor, got list"),
    (zeros(2, 3), None, {}, TypeError, "codebook must be a torch.Tensor, got NoneType"),
    (
        zeros(2, 3, dtype=torch.int64),
        zeros(2, 3),
        {},
        TypeError,
        "x must be float32, float16, bfloat16, float64, got int64",
    ),
    (
        zeros(2, 3),
        zeros(2, 3).to_sparse(),
        {},
        TypeError,
        "codebook must be strided, got a tensor of layout sparse_coo",
    ),
    (
        zeros(2, 3),
        zeros(2, 3, dtype=torch.complex64),
        {},
        TypeError,
        "codebook must be float32, float16, bfloat16, float64, got complex64",
    ),
    (
        zeros(2, 3),
        zeros(2, 3, device="meta"),
        {},
        ValueError,
        "all tensors must be on one device, got x on cpu, codebook on meta",
    ),
    (
        zeros(2, 3),
        zeros(3),
        {},
        ValueError,
        "codebook must be (K, D) or (H, K, D), got shape (3,)",
    ),
    (
        zeros(2, 3),
        zeros(1, 1, 2, 3),
        {},
        ValueError,
        "codebook must be (K, D) or (H, K, D), got shape (1, 1, 2, 3)",
    ),
    (
        zeros(2, 3),
        zeros(0, 3),
        {},
        ValueError,
        "codebook must hold at least one code (K >= 1), got shape (0, 3)",
    ),
    (zeros(), zeros(2, 3), {}, ValueError, "x must be (..., D), got shape ()"),
    (zeros(3), zeros(1, 2, 3), {}, ValueError, "x must be (H, ..., D), got shape (3,)"),
    (
        zeros(2, 4),
        zeros(2, 3),
        {},
        ValueError,
        "x must be (..., D) with the codebook's D = 3 (at least 1), got shape (2, 4)",
    ),
    (
        zeros(2, 0),
        zeros(2, 0),
        {},
        ValueError,
        "x must be (..., D) with the codebook's D = 0 (at least 1), got shape (2, 0)",
    ),
    (
        zeros(2, 5, 3),
        zeros(4, 7, 3),
        {},
        ValueError,
        "x must be (H, ..., D) with the codebook's H = 4, got shape (2, 5, 3)",
    ),
    (
        zeros(2, 3),
        zeros(2, 3),
        {"metric": "l2"},
        ValueError,
        "metric must be one of euclidean, cosine, dot, got 'l2'",
    ),
    (
        zeros(2, 3),
        zeros(2, 3),
        {"metric": None},
        ValueError,
        "metric must be one of euclidean, cosine, dot, got None",
    ),
]


@pytest.mark.parametrize(("x", "codebook", "options", "error", "message"), NEAREST_CODE)
def test_nearest_code(x, codebook, options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        mmfast.nearest_code(x, codebook, **options)


def indices(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return zeros(*shape, dtype=dtype)


CODE_STATISTICS = [
    (None, indices(2), 4, None, TypeError, "x must be a torch.Tensor, got NoneType"),
    (
        zeros(2, 3, dtype=torch.uint8),
        indices(2),
        4,
        None,
        TypeError,
        "x must be float32, float16, bfloat16, float64, got uint8",
    ),
    (
        zeros(2, 3),
        indices(2, dtype=torch.int16),
        4,
        None,
        TypeError,
        "indices must be int64, int32, got int16",
    ),
    (zeros(2, 3), zeros(2), 4, None, TypeError, "indices must be int64, int32, got float32"),
    (
        zeros(2, 3),
        indices(2),
        4,
        indices(2),
        TypeError,
        "weights must be float32, float16, bfloat16, float64, got int64",
    ),
    (
        zeros(2, 3),
        indices(2),
        4,
        zeros(2, device="meta"),
        ValueError,
        "all tensors must be on one device, got x on cpu, indices on cpu, weights on meta",
    ),
    (
        zeros(3),
        indices(1),
        4,
        None,
        ValueError,
        "x must be (N, D) or (H, N, D), got shape (3,)",
    ),
    (
        zeros(1, 1, 2, 3),
        indices(1, 1, 2),
        4,
        None,
        ValueError,
        "x must be (N, D) or (H, N, D), got shape (1, 1, 2, 3)",
    ),
    (
        zeros(2, 3),
        indices(3),
        4,
        None,
        ValueError,
        "indices must have x's leading shape (2,), got shape (3,)",
    ),
    (
        zeros(2, 3),
        indices(2),
        4,
        zeros(2, 1),
        ValueError,
        "weights must have x's leading shape (2,), got shape (2, 1)",
    ),
    (
        zeros(5, 2, 3),
        indices(2),
        4,
        None,
        ValueError,
        "indices must have x's leading shape (5, 2), got shape (2,)",
    ),
    (zeros(2, 3), indices(2), 0, None, ValueError, "num_codes must be at least 1, got 0"),
    (zeros(2, 3), indices(2), -1, None, ValueError, "num_codes must be at least 1, got -1"),
]


@pytest.mark.parametrize(("x", "index", "k", "weights", "error", "message"), CODE_STATISTICS)
def test_code_statistics(x, index, k, weights, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        mmfast.code_statistics(x, index, k, weights=weights)


def test_compiled_code_refuses_too():
    compiled = torch.compile(mmfast.nearest_code, backend="eager")
    with pytest.raises(ValueError, match="x must be \\(\\.\\.\\., D\\)"):
        compiled(zeros(2, 4), zeros(2, 3))
