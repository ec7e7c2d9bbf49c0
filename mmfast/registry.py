"""The one specification per op, read by dispatch, tests, benchmarks, ``info`` and the docs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Backend:
    """One way of running an op.

    ``load`` returns the callable; it takes exactly the arguments of the op's schema. ``missing``
    says why this installation cannot run it at all, ``supported`` why it cannot run these
    arguments; both return an empty list when nothing speaks against it.
    """

    name: str
    device_types: tuple[str, ...]
    load: Callable[[], Callable[..., Any]]
    missing: Callable[[], list[str]]
    supported: Callable[..., list[str]]


@dataclass(frozen=True)
class Cost:
    """What an op must at least do: bytes that have to move, operations that have to be made."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Sample:
    """A named input. ``make(device, dtype, seed)`` returns the op's arguments.

    ``bench`` marks the shapes that the benchmarks time; the others are for the tests.
    """

    name: str
    make: Callable[[torch.device, torch.dtype, int], Arguments]
    shape: Mapping[str, int] = field(default_factory=dict)
    bench: bool = False


@dataclass(frozen=True)
class Backward:
    """Gradients of an op, on whatever backend its own calls choose.

    Attributes:
        setup: ``setup(ctx, inputs, output)``: saves what the gradients need.
        gradients: ``gradients(ctx, *grad_outputs)``: one per argument of the schema. A
            ``grad_output`` is None where nothing asks for it.
        differentiable: whether the gradients have gradients; else asking for these raises.
    """

    setup: Callable[..., None]
    gradients: Callable[..., Any]
    differentiable: bool = False


@dataclass(frozen=True)
class Op:
    """Everything mmfast knows about an op. See ``docs/adding_an_op.md``.

    Attributes:
        name: the op's name, its file's name in ``mmfast/ops``, ``kernels`` and ``csrc/cpu``.
        schema: torch schema of ``torch.ops.mmfast.<name>``, without the name.
        reference: the specification in plain PyTorch; takes the schema's arguments.
        fake: shapes and dtypes of the outputs, for tracing.
        backends: the others, by name, in the order of preference.
        samples: inputs for tests and benchmarks.
        cost: lower bounds for given arguments.
        compare: ``compare(result, arguments, expected=None) -> list of complaints``; empty when
            ``result`` is what the reference promises for ``arguments``. ``expected`` is the
            reference's result, where the caller has it already.
        dtypes: the floating dtypes the op takes.
        backward: None for an op without gradients.
        vmap: batching rule, as ``torch.library.register_vmap`` wants it.
        mutates: positions of the arguments that the op changes in place, as its schema says;
            such an op returns nothing. ``compare`` gets them as they are afterwards.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    backends: Mapping[str, Backend]
    samples: Callable[[], Iterable[Sample]]
    cost: Callable[..., Cost]
    compare: Callable[..., list[str]]
    dtypes: tuple[torch.dtype, ...]
    backward: Backward | None = None
    vmap: Callable[..., Any] | None = None
    mutates: tuple[int, ...] = ()

    def own(self, arguments: Arguments) -> Arguments:
        """``arguments``, with copies of those that the op changes."""
        return tuple(
            a.clone(memory_format=torch.preserve_format)
            if i in self.mutates and a is not None
            else a
            for i, a in enumerate(arguments)
        )

    def changed(self, arguments: Arguments) -> Arguments:
        """Those of ``arguments`` that the op changes, and that are there."""
        return tuple([arguments[i] for i in self.mutates if arguments[i] is not None])

    def result(self, run: Callable[..., Any], arguments: Arguments) -> Any:
        """What ``run`` makes of ``arguments``, which stay as they are: the op's outputs, or the
        arguments that it changed."""
        own = self.own(arguments)
        outputs = run(*own)
        return self.changed(own) if self.mutates else outputs


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Add ``op`` to the registry and to ``torch.ops.mmfast``."""
    from mmfast import library

    if op.name in OPS:
        raise ValueError(f"op {op.name!r} is registered twice")
    library.define(op)
    OPS[op.name] = op
    return op
