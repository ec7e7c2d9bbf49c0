"""What was measured: rows, kept in one JSON file that is whole at any moment."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FILE = "results.json"


# Their cases are known by name: there are no codes.
_NAMED = (
    "add_noise",
    "add_noise_bwd",
    "dynamic_threshold",
    "guidance_factors",
    "randn",
    "sampler_call",
    "sampler_step",
    "scheduler_add_noise",
    "sampling_loop",
    "scheduler_step",
)


def letters_of(op: str) -> str:
    """What the titles of the op's cases are made of."""
    return "" if op in _NAMED else "N x K x D"


def title_of(op: str, case: str, shape: Mapping[str, int]) -> str:
    """A case for a reader."""
    if op in _NAMED:
        return case.replace("_", " ")
    return " x ".join(str(shape[letter]) for letter in "NKD")


@dataclass(frozen=True)
class Row:
    """One contender on one case with one number of threads.

    Attributes:
        seconds: median of a call on all of the case's vectors; None if it did not run. ``low``
            and ``high`` are its quartiles, over ``rounds`` rounds.
        measured: vectors it was measured on; where fewer than N, times are scaled up from it.
        graph: seconds of a call as a CUDA graph, without the host; None where there is none.
        gflops, gbps: the op's least operations and bytes over ``seconds``.
        memory: bytes it needs at its peak, outputs included, for ``measured`` vectors.
        match: "" if every result is right; else what is wrong. None where there is nothing to
            compare.
        note: what a reader must know; why it did not run.
        parts: seconds of the parts of a training step.
        errors: of each output against float64, by its norm; None where nobody compares them.
    """

    op: str
    case: str
    shape: dict[str, int]
    data: str
    sweep: str | None
    subject: str
    kind: str
    threads: int
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    measured: int = 0
    graph: float | None = None
    gflops: float | None = None
    gbps: float | None = None
    memory: int | None = None
    match: str | None = None
    note: str = ""
    parts: dict[str, float] | None = None
    errors: list[float] | None = None

    @property
    def title(self) -> str:
        return title_of(self.op, self.case, self.shape)


@dataclass
class Curve:
    """A quantiser in training, step by step.

    Attributes:
        perplexity: e to the entropy of the codes that a batch's vectors chose; used: how many
            of them were chosen at all.
        error: mean squared, of the reconstruction.
        digests: of the indices.
        seconds: of all steps, the network's part included.
    """

    subject: str
    perplexity: list[float] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def agrees(self, other: Curve) -> int:
        """Steps before the first one whose indices differ from the other's."""
        pairs = zip(self.digests, other.digests, strict=True)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), len(self.digests))


@dataclass
class Results:
    """The rows of a device, with the facts about it and its ceilings by number of threads.

    Attributes:
        checks: what was done before anything was timed, and what came of it; and which contender of
            a case, as ``op/case: contender``, hung or took its process with it.
    """

    facts: dict[str, Any]
    ceilings: dict[int, dict[str, float]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    checks: dict[str, str] = field(default_factory=dict)

    def replace(self, rows: list[Row]) -> None:
        """Add ``rows``; those they measure again go."""
        new = {(r.op, r.case, r.subject, r.threads) for r in rows}
        kept = [r for r in self.rows if (r.op, r.case, r.subject, r.threads) not in new]
        self.rows = kept + rows

    def lose(self, what: str, came: str) -> None:
        """Note of a contender of a case, or of whatever else, that it did not come back."""
        case, _, _ = what.partition(": ")
        # Who does so twice is not known well enough.
        self.checks[f"{case}: everybody" if what in self.checks else what] = came

    def lost(self, case: str) -> dict[str, str]:
        """What is noted of a case, op/name, by its contender."""
        prefix = f"{case}: "
        return {
            name.removeprefix(prefix): came
            for name, came in self.checks.items()
            if name.startswith(prefix)
        }

    def save(self, folder: Path) -> None:
        """Write ``folder / FILE``, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "facts": self.facts,
            "ceilings": self.ceilings,
            "rows": [asdict(row) for row in self.rows],
            "curves": [asdict(curve) for curve in self.curves],
            "checks": self.checks,
        }
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False) as file:
            json.dump(content, file, indent=1)
            file.write("\n")
        os.chmod(file.name, 0o644)
        os.replace(file.name, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> Results:
        """What :meth:`save` wrote.

        Raises:
            ValueError: the file is none of ours.
        """
        path = folder / FILE
        try:
            content = json.loads(path.read_text())
            ceilings = {int(k): v for k, v in content["ceilings"].items()}
            rows = [Row(**row) for row in content["rows"]]
            curves = [Curve(**curve) for curve in content.get("curves", [])]
            checks = dict(content.get("checks", {}))
            return cls(content["facts"], ceilings, rows, curves, checks)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} does not hold results of this version ({error!r}); remove it, or give "
                "another folder by --out"
            ) from error
