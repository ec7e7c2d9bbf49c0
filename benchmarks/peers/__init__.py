"""Other people's ways of computing an op: ``peers/<op>.py`` has a mapping ``PEERS``.

A file may also define ``PLAIN``, the formulation that users write and ``torch.compile`` gets, with
``PLAIN_WORKSPACE``, as ``Peer.workspace``. ``first_rows(arguments, rows)`` lets slow peers be
measured on fewer rows; ``first_results(results, rows)`` gives their results, where these belong to
single rows and need not be computed anew.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from mmfast.registry import OPS

# Gradients are taken again and again of one compiled forward.
torch._functorch.config.donated_buffer = False


def nothing(*_: Any) -> list[str]:
    """No reasons against."""
    return []


@dataclass(frozen=True)
class Peer:
    """A contender that is not mmfast.

    Attributes:
        make: takes the op's arguments, does what a user does once (moving the codebook into an
            index, say), and returns the call to be timed. The call returns what the op returns,
            or only its first output.
        missing: why this installation cannot run it.
        unsupported: why it cannot run these arguments.
        workspace: bytes it needs beside its inputs, so that rows can be cut before memory runs out.
        cut: whether it may be measured on fewer rows when it is slow.
        floor: it does less than the op (a bare matrix product) and returns nothing to compare.
        random: it does the same with other random numbers: there is nothing to compare.
        aside: no goal compares with it: it is timed once unless it is quick.
        rarely: and on a CPU it takes part in ``contest.HEADLINES`` only, without ``--full``.
        note: what a reader must know about it.
    """

    make: Callable[..., Callable[[], Any]]
    missing: Callable[[], list[str]] = nothing
    unsupported: Callable[..., list[str]] = nothing
    workspace: Callable[..., int] = lambda *_: 0
    cut: bool = True
    floor: bool = False
    random: bool = False
    aside: bool = False
    rarely: bool = False
    note: str = ""


def needs(package: str) -> Callable[[], list[str]]:
    """``missing`` of a peer that lives in ``package``."""

    def missing() -> list[str]:
        found = importlib.util.find_spec(package) is not None
        return [] if found else [f"the package {package} is not installed"]

    return missing


def library(make: Callable[..., Callable[[], Any]], **options: Any) -> Peer:
    """vector-quantize-pytorch, by a function of ``benchmarks.modules``."""

    def made(*arguments: Any) -> Callable[[], Any]:
        return make(importlib.import_module("vector_quantize_pytorch"), *arguments)

    return Peer(made, needs("vector_quantize_pytorch"), **options)


def as_many_bytes(index: torch.dtype) -> Peer:
    """What a forward and backward of ``(z, gradient, ...)`` must at least move: z read, codes and
    indices written; z and the gradient read, another one written."""

    def make(z: Tensor, gradient: Tensor, *_: Any) -> Callable[[], Any]:
        codes, indices, made = z.clone(), z.new_zeros(z.shape[0], dtype=index), z.clone()
        return lambda: (codes.copy_(z), indices.zero_(), torch.add(z, gradient, out=made))

    return Peer(
        make,
        cut=False,
        floor=True,
        note="a copy, zeros and an addition of the sizes it moves, into memory that is there",
    )


def traffic(name: str) -> Peer:
    """torch.add of tensors that are together as large as what the op ``name`` has to move."""

    def make(*arguments: Any) -> Callable[[], Any]:
        like = next(a for a in arguments if isinstance(a, Tensor))
        numbers = OPS[name].cost(*arguments).bytes // like.element_size() // 3
        a, b, out = (torch.ones(numbers, dtype=like.dtype, device=like.device) for _ in range(3))
        return lambda: torch.add(a, b, out=out)

    return Peer(make, cut=False, floor=True, note="the same bytes, read twice and written once")


def compiled(function: Callable[..., Any], dynamic: bool | None = True) -> Callable[..., Any]:
    """By torch.compile; on a GPU for the very sizes, without which its reductions are slower."""
    import torch._dynamo.config as limits

    # One formulation has many sizes and dtypes; beyond the limit it would run as it is.
    limits.recompile_limit, limits.accumulated_recompile_limit = 256, 4096
    made: Any = torch.compile(function, dynamic=False if torch.cuda.is_available() else dynamic)
    return made


def written_plainly(plain: Callable[..., Any], **options: Any) -> dict[str, Peer]:
    """``plain`` as it is, and compiled.

    Args:
        options: of both, as :class:`Peer`.
    """
    once = functools.cache(lambda: compiled(plain))
    return {
        "plain torch": Peer(lambda *arguments: lambda: plain(*arguments), cut=False, **options),
        "torch.compile": Peer(
            lambda *arguments: functools.partial(once(), *arguments),
            cut=False,
            note="of the plain formulation; compiling is not timed",
            **options,
        ),
    }


def of(op: str) -> ModuleType | None:
    """The peers of ``op``; None where nobody wrote any."""
    name = f"{__name__}.{op}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None
