"""What a dataset found, and what it refused."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mmfast.data.errors import FileError

_SHOWN = 20  # names of a list that are printed


@dataclass(frozen=True)
class Report:
    """Counts and names.

    Attributes:
        samples: that the dataset has.
        refused: files, and why.
        left_out: samples of which nothing is left, or not what is required.
        missing: by modality, how many samples are without it.
        ignored: files that no reader reads.
    """

    samples: int
    refused: Sequence[FileError] = ()
    left_out: Sequence[str] = ()
    missing: Mapping[str, int] = field(default_factory=dict)
    ignored: Sequence[str] = ()

    def __str__(self) -> str:
        lines = [f"{self.samples} samples"]
        lines += [f"{count} without {name}" for name, count in self.missing.items() if count]
        lines += _listed("files refused", [str(error) for error in self.refused])
        lines += _listed("samples left out", self.left_out)
        lines += _listed("files ignored, which no reader reads", self.ignored)
        return "\n".join(lines)

    def show(self) -> None:
        """Print it on standard error."""
        print(self, file=sys.stderr)


def _listed(what: str, names: Sequence[str]) -> list[str]:
    """The count and the first names."""
    if not names:
        return []
    lines = [f"{len(names)} {what}:", *(f"  {name}" for name in names[:_SHOWN])]
    if len(names) > _SHOWN:
        lines.append(f"  and {len(names) - _SHOWN} more")
    return lines
