"""What a run logs: ``log.csv``, and TensorBoard's files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmfast.files import write_whole
from mmfast.train.run_folder import LOG


class Log:
    """Rows of named numbers in ``log.csv`` of a run's folder.

    A row with a new name gives the file a new column.

    Args:
        folder: of the run; without one, nothing is written.
        start: steps that have been made: rows of later ones, of a run that was killed, go away.
        tensorboard: write to its files in ``tensorboard/`` too.

    Attributes:
        last: the last row that was there, of the same run.
        seconds: that it took until then.

    Raises:
        ImportError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path | None, *, start: int = 0, tensorboard: bool = False) -> None:
        self._path = None if folder is None else folder / LOG
        self._columns: list[str] = []
        self._board: Any = None
        rows = []
        if self._path is not None and self._path.exists():
            rows = [row for row in read_log(self._path) if row["step"] <= start]
        self.last = rows[-1] if rows else {}
        self.seconds = self.last.get("seconds", 0.0)
        self._rewrite(rows)
        if tensorboard and folder is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ImportError(
                    "tensorboard is not installed: pip install 'mmfast[train]'"
                ) from None
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def _rewrite(self, rows: list[dict[str, float]]) -> None:
        for row in rows:
            self._columns += [name for name in row if name not in self._columns]
        if self._path is None:
            return
        text = io.StringIO()
        if self._columns:
            writer = csv.DictWriter(text, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        write_whole(self._path, text.getvalue().encode())

    def write(self, row: Mapping[str, float]) -> None:
        """Add a row; ``"step"`` is among its names."""
        if self._path is not None:
            if any(name not in self._columns for name in row):
                self._rewrite([*read_log(self._path), dict(row)])
            else:
                with self._path.open("a", encoding="utf-8", newline="") as file:
                    csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)
        if self._board is not None:
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(row["step"]))

    def picture(self, name: str, picture: Any, step: int) -> None:
        """Show a picture ``(C, H, W)`` in [-1, 1] in TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, (picture / 2 + 0.5).clamp(0, 1), step)

    def close(self) -> None:
        """Write what TensorBoard has not written yet."""
        if self._board is not None:
            self._board.close()


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a ``log.csv``; a last line that was not written to its end is left out."""
    text = path.read_text("utf-8")
    rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    return [
        {
            name: int(value) if name == "step" else float(value)
            for name, value in row.items()
            if value
        }
        for row in rows
    ]
