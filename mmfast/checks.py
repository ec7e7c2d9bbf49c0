"""Argument checks shared by the ops: each message names what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from mmfast import library

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDEX = (torch.int64, torch.int32)
INTEGERS = (*INDEX, torch.int16, torch.int8, torch.uint8)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(dtypes))


def check_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """``tensor`` is a strided tensor of one of ``dtypes``, else TypeError."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        got = str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be strided, got a tensor of layout {got}")
    if tensor.dtype not in dtypes:
        got = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{name} must be {_names(dtypes)}, got {got}")


def check_floating(name: str, tensor: Tensor) -> None:
    """``tensor`` has one of the four floating dtypes, else TypeError."""
    check_dtype(name, tensor, FLOATING)


def check_least(least: int, **numbers: int) -> None:
    """All are ints of at least ``least``, else TypeError or ValueError."""
    for name, number in numbers.items():
        check_integer(name, number)
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")


def check_codes(
    name: str,
    indices: Tensor,
    num_codes: int,
    least: int = 0,
    dtypes: tuple[torch.dtype, ...] = INDEX,
) -> None:
    """``indices`` are from ``least`` to ``num_codes`` - 1, else TypeError or ValueError.

    Their values are looked at on the CPU alone, and not in code that is compiled, traced or under a
    transform of torch.func.
    """
    check_dtype(name, indices, dtypes)
    if indices.device.type != "cpu" or not indices.numel():
        return
    if library.traced() or torch._C._len_torch_dispatch_stack() or is_fake(indices):
        return
    low, high = indices.aminmax()
    if low < least or high >= num_codes:
        raise ValueError(
            f"{name} must be from {least} to {num_codes - 1}, got {int(low)} to {int(high)}"
        )


def check_integer(name: str, value: int) -> None:
    """``value`` is an int, or a number of another library that stands for one, else TypeError."""
    # Symbolic numbers of torch.compile are ints, and know of no attributes.
    if not isinstance(value, int) and not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """``value`` is one of ``choices``, else ValueError."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_possible(contradictions: dict[str, bool]) -> None:
    """None of the options, by their description, contradict each other, else ValueError."""
    for options, contradict in contradictions.items():
        if contradict:
            raise ValueError(f"not possible: {options}")


def check_device(**tensors: Tensor) -> None:
    """All on one device, else ValueError."""
    devices = {name: t.device for name, t in tensors.items()}
    if len(set(devices.values())) > 1:
        got = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device, got {got}")


def check_beside(owner: str, device: torch.device, name: str, tensor: Tensor) -> None:
    """``tensor`` is on the ``device`` that ``owner`` is on, else ValueError."""
    if tensor.device != device:
        raise ValueError(
            f"all tensors must be on one device, got {owner} on {device}, {name} on {tensor.device}"
        )


def check_codebook(x: Tensor, codebook: Tensor) -> None:
    """Shapes of vectors and codebook fit together, else ValueError."""
    if codebook.dim() not in (2, 3):
        raise ValueError(f"codebook must be (K, D) or (H, K, D), got shape {tuple(codebook.shape)}")
    if codebook.shape[-2] < 1:
        raise ValueError(
            f"codebook must hold at least one code (K >= 1), got shape {tuple(codebook.shape)}"
        )
    least = 1 if codebook.dim() == 2 else 2
    expected = "(..., D)" if least == 1 else "(H, ..., D)"
    if x.dim() < least:
        raise ValueError(f"x must be {expected}, got shape {tuple(x.shape)}")
    if x.shape[-1] != codebook.shape[-1] or x.shape[-1] < 1:
        raise ValueError(
            f"x must be {expected} with the codebook's D = {codebook.shape[-1]} (at least 1), "
            f"got shape {tuple(x.shape)}"
        )
    if least == 2 and x.shape[0] != codebook.shape[0]:
        raise ValueError(
            f"x must be (H, ..., D) with the codebook's H = {codebook.shape[0]}, "
            f"got shape {tuple(x.shape)}"
        )


def check_mask(x: Tensor, mask: Tensor) -> None:
    """``mask`` is bool, beside ``x`` and of its leading shape, else TypeError or ValueError."""
    check_dtype("mask", mask, (torch.bool,))
    check_device(x=x, mask=mask)
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"mask must have shape {tuple(x.shape[:-1])}, got {tuple(mask.shape)}")
