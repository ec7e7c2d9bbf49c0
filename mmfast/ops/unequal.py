"""Comparison of results that only move what they are given, bit for bit."""

from __future__ import annotations

from torch import Tensor


def unequal(result: Tensor, expected: Tensor) -> list[str]:
    """What speaks against ``result`` as ``expected``: dtype, shape, or numbers that differ."""
    if (result.dtype, result.shape) != (expected.dtype, expected.shape):
        return [
            f"{result.dtype} {tuple(result.shape)}, expected {expected.dtype} "
            f"{tuple(expected.shape)}"
        ]
    wrong = int((result != expected).sum())
    return [f"{wrong} of {result.numel()} are wrong"] if wrong else []
