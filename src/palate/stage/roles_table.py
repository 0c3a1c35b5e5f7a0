"""What each role of a run holds in memory, as it is printed before the first step: a table, or paragraphs where it has no room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from palate.stage.roles import Role

UNBOUNDED = 10_000  # columns; for asking how wide a table would like to be


@dataclass(frozen=True)
class RolesTable:
    """Weights of each role, and of those that are trained gradients and the optimizer's state.

    Args:
        notes: what else is to be said of a role, behind what plays it.
    """

    title: str
    lines: Sequence[Role]
    notes: dict[str, str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = self._table()
        needed = Measurement.get(console, options.update(width=UNBOUNDED), table).minimum
        if needed <= options.max_width:
            yield table
        else:
            yield from self._paragraphs(options.max_width)

    def _what(self, line: Role) -> str:
        return line.what + self.notes.get(line.role, "")

    def _sums(self) -> Role:
        parameters, trained, weights, training = (
            sum(held)
            for held in zip(*((x.parameters, x.trained, x.weights, x.training) for x in self.lines), strict=True)
        )
        return Role("all", f"{bytes_text(weights + training)} together", parameters, trained, "", weights, training)

    def _table(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        table.add_column("role", no_wrap=True)
        table.add_column("what", overflow="fold")
        for name in ("parameters", "trained", "dtype", "weights", "gradients\n+ optimizer"):
            table.add_column(name, justify="right", no_wrap=True)
        for line in self.lines:
            table.add_row(*self._cells(line, f"{line.trained:,}" if line.trained else "frozen"))
        if len(self.lines) > 1:
            table.add_section()
            table.add_row(*self._cells(sums := self._sums(), f"{sums.trained:,}"))
        return table

    def _cells(self, line: Role, trained: str) -> list[Text]:
        cells = (line.role, self._what(line), f"{line.parameters:,}", trained, line.dtype)
        return [Text(cell) for cell in (*cells, bytes_text(line.weights), bytes_text(line.training))]

    def _paragraphs(self, width: int) -> RenderResult:
        """What plays each role, and below it the numbers; the bytes are those of weights + gradients and optimizer."""
        yield Text(f"{self.title}\n(memory: weights + gradients and optimizer)", style="italic")
        lines = [*self.lines, self._sums()] if len(self.lines) > 1 else self.lines
        indent = " " * (4 + max(len(line.role) for line in lines))
        for line in lines:
            said = f"  {line.role}".ljust(len(indent)) + self._what(line)
            yield Text(fill(said, width, subsequent_indent=indent))
            if line.parameters:
                yield Text(fill(_counted(line), width, initial_indent=indent, subsequent_indent=indent))


def _counted(line: Role) -> str:
    trained = (
        "all trained" if line.trained == line.parameters else f"{line.trained:,} trained" if line.trained else "frozen"
    )
    held = bytes_text(line.weights) + (f" + {bytes_text(line.training)}" if line.training else "")
    return ", ".join(part for part in (f"{line.parameters:,} parameters", trained, line.dtype, held) if part)


def bytes_text(count: int) -> str:
    """``3.0 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.1f} {unit}" if unit != "B" else f"{count} B"
        count /= 1024  # type: ignore[assignment]
    raise AssertionError
