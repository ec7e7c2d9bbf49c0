"""Who takes part: mmfast's backends, the reference, torch.compile, and the peers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mmfast
from benchmarks import gpu_attention_peers, gpu_peers, peers
from benchmarks.composites import COMPOSITES
from benchmarks.peers import Peer
from mmfast.backends import automatic, interpreting, select
from mmfast.registry import OPS, Backend, Op

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Subject:
    """A contender.

    Attributes:
        name: as the tables show it.
        kind: ``"mmfast"``, ``"reference"``, ``"compile"``, ``"peer"`` or ``"floor"`` (does less
            than the op).
        peer: how it is run, also where it is mmfast's own.
    """

    name: str
    kind: str
    peer: Peer

    @property
    def compiled(self) -> bool:
        """Whether torch.compile makes it."""
        named = self.name.startswith("torch.compile") or self.name.endswith("torch.compile")
        return self.kind == "compile" or named or self.name.endswith(gpu_attention_peers.FLEX)

    def reasons(self, arguments: Arguments) -> list[str]:
        """Why it cannot take part."""
        return self.peer.missing() or self.peer.unsupported(*arguments)


def subjects(op: str) -> list[Subject]:
    """All contenders of ``op``, mmfast first."""
    if op in COMPOSITES:
        own = COMPOSITES[op].makes.items()
        found = [Subject(name, "mmfast", Peer(make, cut=False)) for name, make in own]
    else:
        found = _own(OPS[op])
    others = peers.of(op)
    if others is None:
        return found
    if hasattr(others, "PLAIN"):
        compiled = Peer(
            _compiled(others.PLAIN),
            workspace=getattr(others, "PLAIN_WORKSPACE", lambda *_: 0),
            note="torch.compile of the peers' plain formulation; compiling is not timed",
        )
        found.append(Subject("torch.compile", "compile", compiled))
    more = gpu_peers.of(op) if torch.cuda.is_available() else {}
    for name, peer in {**others.PEERS, **more}.items():
        found.append(Subject(name, "floor" if peer.floor else "peer", peer))
    return found


def expected(op: str, arguments: Arguments) -> Any:
    """The float64 result that everybody is held to."""
    if op in COMPOSITES:
        return COMPOSITES[op].expected(*arguments)
    return OPS[op].result(OPS[op].reference, arguments)


def own(op: str, arguments: Arguments) -> Arguments:
    """``arguments`` for one contender, who may change some of them."""
    return OPS[op].own(arguments) if op in OPS else arguments


def answer(op: str, returned: Any, arguments: Arguments) -> Any:
    """The result of a call: what it returned, or what it changed of its own ``arguments``."""
    return OPS[op].changed(arguments) if op in OPS and OPS[op].mutates else returned


def errors(op: str, result: Any, wanted: Any) -> list[float] | None:
    """Of each output by its norm, where anybody asks."""
    found = COMPOSITES[op].errors if op in COMPOSITES else None
    return found(result, wanted) if found else None


def judge(op: str, result: Any, arguments: Arguments, wanted: Any) -> str:
    """What is wrong with ``result``; empty when nothing."""
    if op in COMPOSITES:
        return COMPOSITES[op].judge(result, arguments, wanted)
    if isinstance(wanted, tuple) and (isinstance(result, tuple) or result.is_floating_point()):
        # Who returns only the first of the outputs is held to these.
        first = result if isinstance(result, tuple) else (result,)
        result = (*first, *wanted[len(first) :])
    if isinstance(result, tuple) or isinstance(wanted, Tensor):
        return "; ".join(OPS[op].compare(result, arguments, wanted))
    wanted = wanted[0]
    wrong = int((result.to(wanted.device) != wanted).sum())
    return f"{wrong} of {wanted.numel()} wrong" if wrong else ""


def _own(op: Op) -> list[Subject]:
    found = [
        Subject(f"mmfast ({name})", "mmfast", _backend(op, backend))
        for name, backend in op.backends.items()
        if not (name == "triton" and interpreting())
    ]
    reference = Peer(lambda *arguments: functools.partial(op.reference, *arguments), aside=True)
    return [*found, Subject("reference (float64)", "reference", reference)]


def _backend(op: Op, backend: Backend) -> Peer:
    names = list(inspect.signature(op.reference).parameters)

    def make(*arguments: Any) -> Callable[[], Any]:
        public = getattr(mmfast, op.name, None)
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        takes = inspect.signature(public).parameters if public else {}
        if public and set(names) <= set(takes) and automatic(op, device.type)[0] == backend.name:
            # What a user calls, checks included.
            return functools.partial(public, **dict(zip(names, arguments, strict=True)))
        return functools.partial(select(op, backend.name, *arguments), *arguments)

    return Peer(make, backend.missing, backend.supported, cut=False)


def _compiled(plain: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    compiled = peers.compiled(plain)

    return lambda *arguments: functools.partial(compiled, *arguments)
