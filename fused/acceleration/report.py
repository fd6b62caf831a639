"""What `accelerate()` did to a model, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Entry:
    """One module that a rule matches."""

    path: str  # as in `model.named_modules()`; empty for the model itself
    cls: str
    op: str
    outcome: str  # "replaced", "left" or "already replaced"
    why: str = ""


class Report:
    """The modules that a rule matches, and what became of each. `print(report)` is a table.

    `report.replaced`, `.left` and `.already` are lists of entries with `path`, `cls`, `op` and `why`. `undo()` puts
    back what this call replaced, once; as a context manager the report does so at the end of the block.
    """

    def __init__(self, model: str, entries: list[Entry], nothing: str, dry_run: bool) -> None:
        self.model, self.entries, self.dry_run = model, entries, dry_run
        self._nothing = nothing
        self._way_back = ExitStack()

    @property
    def replaced(self) -> list[Entry]:
        return self._of("replaced")

    @property
    def left(self) -> list[Entry]:
        return self._of("left")

    @property
    def already(self) -> list[Entry]:
        """Replaced by an earlier call, whose report can undo it, as `mmfuse.decelerate(model)` can."""
        return self._of("already replaced")

    def _of(self, outcome: str) -> list[Entry]:
        return [e for e in self.entries if e.outcome == outcome]

    def remember(self, undo: Callable[[], None]) -> None:
        self._way_back.callback(undo)

    def undo(self) -> None:
        """Put the original forward methods back: the model is what it was before the call.

        Raises:
            RuntimeError: another tool has replaced one of them since.
        """
        self._way_back.close()

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def summary(self) -> str:
        counts = [f"{len(self._of(o))} {o}" for o in ("replaced", "left", "already replaced") if self._of(o)]
        if not (self.replaced or self.already):
            counts.insert(0, "nothing replaced")
        note = " (dry run: the model is unchanged)" if self.dry_run else ""
        return f"accelerate({self.model}): {', '.join(counts)}{note}"

    def _rows(self) -> list[tuple[str, str, str, str]]:
        return [(e.path or "(the model)", e.cls, e.op, f"{e.outcome}: {e.why}".rstrip(": ")) for e in self.entries]

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
        return "\n  ".join([self.summary(), *(lines or [self._nothing])])

    __repr__ = __str__

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title=self.summary(), title_justify="left", caption=None if self.entries else self._nothing)
        for column in ("module", "class", "operator", "outcome"):
            table.add_column(column)
        for row in self._rows():
            table.add_row(*row)
        return table
