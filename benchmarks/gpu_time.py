"""Seconds that the rows of a run on a GPU are allowed, so that a call is known to fit its minutes.

They are allowances, not measurements: with all that is compiled in its caches, on a machine whose
host is slow. A run stops by the clock, whatever they say.
"""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks import gpu_peers, loops, transformers
from benchmarks.cases import Case
from benchmarks.subjects import Subject, subjects

_TRUTH = 0.15  # the arguments, and the result in float64
_MATRICES = 0.6  # of attention, whose truth has matrices of scores; of lookups, of distances
_MODEL = 4.0  # a whole transformer's
_ROUNDS = 0.3  # of all contenders together
_CALLS = 0.08  # a contender's first calls, its judging, its graph
_TRACED = 0.7  # those of one that torch.compile makes, from its caches
_DEEP = 6.0  # of a whole transformer by torch.compile, block by block
_WIDE = ("attention", "nearest_code", "kmeans", "residual_quantize")
_WHOLE = (*transformers.OPS, loops.OP)


def allowed(case: Case) -> float:
    """Of one case, with everybody who may take part."""
    whole = case.op in _WHOLE and "tiny" not in case.name
    wide = any(word in case.op for word in _WIDE)
    seconds = _ROUNDS + (_MODEL if whole else _MATRICES if wide else _TRUTH)
    there = subjects(case.op)
    there += [Subject(name, "peer", peer) for name, peer in gpu_peers.of(case.op).items()]
    for traced in {s.name: s.compiled and case.compiled for s in there}.values():
        seconds += (_DEEP if whole else _TRACED) if traced else _CALLS
    return seconds


def total(cases: Iterable[Case]) -> float:
    """Of many."""
    return sum(map(allowed, cases))
