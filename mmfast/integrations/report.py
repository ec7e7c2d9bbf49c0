"""What :func:`mmfast.integrations.patch` did to a model or a pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType

from rich import box
from rich.console import Console
from rich.table import Table

from mmfast.integrations.binding import Exchange, Method, is_bound

_WIDTH = 110  # of the printed table


@dataclass(frozen=True)
class Entry:
    """A module of the model, or a scheduler.

    Attributes:
        name: dotted, as ``model.named_modules()`` gives it; ``""`` is the model itself.
        library, class_name: what it is.
        done: what runs on mmfast now; empty when the module stays as it was.
        left: what keeps its own code, and why.
    """

    name: str
    library: str
    class_name: str
    done: str
    left: str


@dataclass(frozen=True)
class PatchReport:
    """The modules and schedulers that were found, and the way back.

    Used as a context manager, it undoes the patch at the end of the block.
    """

    entries: tuple[Entry, ...]
    methods: tuple[Method, ...] = field(default=(), repr=False)
    exchanges: tuple[Exchange, ...] = field(default=(), repr=False)
    noun: str = field(default="modules", repr=False)

    @property
    def swapped(self) -> tuple[Entry, ...]:
        """Those that run on mmfast."""
        return tuple(entry for entry in self.entries if entry.done)

    @property
    def left(self) -> tuple[Entry, ...]:
        """Those that stay as they were; ``left`` of each says why."""
        return tuple(entry for entry in self.entries if not entry.done)

    def undo(self) -> None:
        """Give the modules their own code back. A second call does nothing.

        Raises:
            RuntimeError: something else has replaced a method since, and may hold on to ours.
        """
        replaced = [str(exchange) for exchange in self.exchanges if not exchange.undo()]
        for method in self.methods:
            if is_bound(method.owner, method.name):
                delattr(method.owner, method.name)
            elif method.name in vars(method.owner):
                replaced.append(f"{type(method.owner).__name__}.{method.name}")
        if replaced:
            raise RuntimeError(
                "cannot undo what was wrapped or replaced after the patch: "
                f"{', '.join(replaced)}; remove that first"
            )

    def __enter__(self) -> PatchReport:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("module", "class", "on mmfast", "on its own code"):
            table.add_column(heading, overflow="fold")
        for entry in self.entries:
            class_name = f"{entry.library}: {entry.class_name}"
            table.add_row(entry.name or "(the model)", class_name, entry.done or "-", entry.left)
        console = Console(width=_WIDTH, markup=False, highlight=False, color_system=None)
        with console.capture() as captured:
            console.print(table)
        total, swapped = len(self.entries), len(self.swapped)
        heading = f"{swapped} of {total} {self.noun} run on mmfast\n"
        return heading + "\n".join(line.rstrip() for line in captured.get().splitlines())
