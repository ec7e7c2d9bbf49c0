"""What holds for every op, from the registry: each backend against its reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import backends_here, device_of
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

import mmfast  # noqa: F401  (registers the ops)
from mmfast import backends
from mmfast.registry import OPS, Arguments, Op, Sample

MOST_FLOPS = 1e10  # of a sample whose reference the tests evaluate


def affordable(op: Op, sample: Sample) -> bool:
    """Whether the reference of ``sample`` takes a few seconds at most."""
    if not sample.bench:
        return True
    arguments = sample.make(torch.device("cpu"), torch.float32, 0)
    return op.cost(*arguments).flops <= MOST_FLOPS


def cases(bench: bool) -> list[Any]:
    """Parameters (op, backend, sample)."""
    return [
        pytest.param(op, backend, sample, id=f"{op.name}-{backend}-{sample.name}")
        for op in OPS.values()
        for sample in op.samples()
        if sample.bench == bench and affordable(op, sample)
        for backend in backends_here(op)
        if not (bench and backend == "reference")
    ]


def run(op: Op, backend: str, arguments: Arguments) -> Any:
    """The result of ``backend``, and no other."""
    return op.result(backends.select(op, backend, *arguments), arguments)


def change_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``change`` applied to the tensors in it."""
    leaves, spec = tree_flatten(value)
    return tree_unflatten([change(v) if isinstance(v, Tensor) else v for v in leaves], spec)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("op", "backend", "sample"), cases(bench=False))
def test_small_samples(op, backend, sample, seed):
    for dtype in op.dtypes:
        arguments = sample.make(device_of(backend), dtype, seed)
        assert op.compare(run(op, backend, arguments), arguments) == [], dtype


@pytest.mark.parametrize(("op", "backend", "sample"), cases(bench=True))
def test_bench_samples(op, backend, sample):
    arguments = sample.make(device_of(backend), torch.float32, 0)
    assert op.compare(run(op, backend, arguments), arguments) == []


def swapped(t: Tensor) -> Tensor:
    """``t``, its last two dimensions swapped in memory."""
    return t.mT.contiguous().mT if t.dim() > 1 else t


def spread(t: Tensor) -> Tensor:
    """``t``, every other element of a buffer that starts with another one."""
    if t.dim() == 0:
        return t
    other = -1 if t.dtype.is_signed else 1
    buffer = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), other)
    view = buffer[..., 1::2]
    view.copy_(t)
    return view


@pytest.mark.parametrize("restride", [swapped, spread])
@pytest.mark.parametrize(("op", "backend", "sample"), cases(bench=False))
def test_strides(op, backend, sample, restride):
    arguments = sample.make(device_of(backend), torch.float32, 0)
    strided = change_tensors(arguments, restride)
    expected = run(op, backend, arguments)
    for got, want in zip(
        tree_flatten(run(op, backend, strided))[0], tree_flatten(expected)[0], strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("op", "backend", "sample"), cases(bench=False))
def test_arguments_are_left_alone(op, backend, sample):
    arguments = sample.make(device_of(backend), torch.float32, 0)
    before = change_tensors(arguments, torch.clone)
    run(op, backend, arguments)
    for now, then in zip(tree_flatten(arguments)[0], tree_flatten(before)[0], strict=True):
        assert torch.equal(now, then) if isinstance(now, Tensor) else now == then


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_compare_sees_a_wrong_element(op):
    sample = next(
        s for s in op.samples() if not s.bench and min(s.shape["N"], s.shape["K"], s.shape["D"]) > 1
    )
    arguments = sample.make(torch.device("cpu"), torch.float32, 0)
    result = op.result(op.reference, arguments)
    leaves, spec = tree_flatten(result)
    assert op.compare(result, arguments) == []
    for i, leaf in enumerate(leaves):
        if leaf.numel() == 0:  # a gradient that this sample does not ask for
            continue
        wrong = leaf.clone()
        wrong.view(-1)[-1] += 1
        changed = [wrong if j == i else other for j, other in enumerate(leaves)]
        assert op.compare(tree_unflatten(changed, spec), arguments) != []


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_samples_and_costs(op):
    samples = list(op.samples())
    assert len({sample.name for sample in samples}) == len(samples)
    assert any(sample.bench for sample in samples)
    for sample in samples:
        if sample.bench:
            continue
        arguments = sample.make(torch.device("cpu"), torch.float32, 0)
        cost = op.cost(*arguments)
        outputs = sum(t.nbytes for t in tree_flatten(op.result(op.reference, arguments))[0])
        assert cost.bytes >= outputs
        assert cost.flops >= 0
