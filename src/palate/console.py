"""What the commands print for people: tables, explanations, coloured tokens, a progress line. Nothing is computed here."""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from palate.method_docs import Explanation, Setting
    from palate.texts import Checked
    from palate.texts.looking import ShownRow

WIDE = 110  # columns of a terminal in which a table of four columns can be read


def print_explanation(found: Explanation, shared: Mapping[str, Sequence[Setting]] | None = None) -> None:
    """The method's own words, then its settings; then the settings that every run has, where asked for."""
    out = Console(highlight=False)
    first, _, rest = found.text.partition("\n\n")
    out.print(_filled(first, out.width), style="bold", markup=False, soft_wrap=True)
    for paragraph in rest.split("\n\n"):
        out.print(f"\n{_filled(paragraph, out.width)}", markup=False, soft_wrap=True)
    out.print()
    out.print(_roles(found))
    if found.settings:
        _print_settings(out, found.settings, "method.")
    else:
        out.print("No settings of its own.")
    for section, settings in (shared or {}).items():
        _print_settings(out, settings, f"{section}." if section else "")
    if not shared:
        out.print(
            f"Settings of the run (training., data., sampling., lora.): palate explain {escape(found.name)} --all"
        )


def _filled(paragraph: str, width: int) -> str:
    """Prose as it is where it fits, else broken anew; equations (indented) and lines that begin "Word:" stay lines."""
    lines = paragraph.splitlines()
    if all(len(line) <= width for line in lines) or any(line.startswith(" ") for line in lines):
        return paragraph
    parts: list[str] = []
    for line in lines:
        if parts and not re.match(r"[A-Z][\w ]*: ", line):
            parts[-1] += f" {line}"
        else:
            parts.append(line)
    return "\n".join(textwrap.fill(part, width, break_on_hyphens=False) for part in parts)


def _roles(found: Explanation) -> Table:
    table = Table(title="Roles and data", title_justify="left")
    for column in ("needs", "trains", "reads"):
        table.add_column(column)
    table.add_row(", ".join(found.needs), ", ".join(found.trains), found.reads)
    return table


def _print_settings(out: Console, settings: Sequence[Setting], prefix: str) -> None:
    """A table where there is room for four columns; else each setting on its line, with its meaning indented below."""
    if out.width >= WIDE:
        out.print(_settings_table(settings, prefix))
        return
    out.print()
    for setting in settings:
        named = (prefix + setting.name, "cyan"), f" = {setting.default_text} ", (f"({setting.type})", "dim")
        out.print(Text.assemble(*named))
        if setting.text:
            out.print(Padding(Text(setting.text), (0, 0, 0, 4), expand=False))


def _settings_table(settings: Sequence[Setting], prefix: str) -> Table:
    table = Table(show_lines=False)
    table.add_column("setting", no_wrap=True, style="cyan")
    table.add_column("default", overflow="fold")
    table.add_column("type", overflow="fold", style="dim")
    table.add_column("meaning", overflow="fold")
    for setting in settings:
        cells = (prefix + setting.name, setting.default_text, setting.type, setting.text)
        table.add_row(*(Text(cell) for cell in cells))
    return table


def print_methods(found: Sequence[Explanation]) -> None:
    """One row for each method; where that would be cramped, one paragraph."""
    out = Console(highlight=False)
    if out.width >= WIDE:
        out.print(_methods_table(found))
    else:
        for each in found:
            _print_method(out, each)
    out.print("More: palate explain METHOD")


def _print_method(out: Console, each: Explanation) -> None:
    what, paper = _title(each)
    roles = f"needs {', '.join(each.needs)}; trains {', '.join(each.trains)}; reads {each.reads}"
    out.print(Text.assemble((each.name, "cyan"), "  ", (what, "bold")))
    for line in (paper, roles):
        if line:
            out.print(Padding(Text(line), (0, 0, 0, 4), expand=False))
    out.print()


def _title(each: Explanation) -> tuple[str, str]:
    """What a method is, and its paper."""
    what, _, paper = each.title.partition(" -- ")
    return what, paper


def _methods_table(found: Sequence[Explanation]) -> Table:
    table = Table(show_lines=True)
    table.add_column("method", no_wrap=True, style="cyan")
    table.add_column("what it is, and its paper", min_width=24)
    table.add_column("needs", min_width=9)
    table.add_column("trains")
    table.add_column("reads", no_wrap=True)
    for each in found:
        what, paper = _title(each)
        about = Text.assemble((what, "bold"), f"\n{paper}" if paper else "")
        table.add_row(
            Text(each.name), about, *(Text(t) for t in (" ".join(each.needs), " ".join(each.trains), each.reads))
        )
    return table


def print_check(found: Checked) -> None:
    """Tokens: green = trained, yellow = trained and of what was changed, dim = seen and masked; without colours,
    [[trained]] and <<changed>>. A line break is shown as its sign.
    """
    from palate.texts.looking import REST

    out = Console(highlight=False)
    plain = out.color_system is None or out.no_color
    if found.report:
        out.print(found.report, markup=False)
    for row in found.rows:
        changed = "" if row.changed is None else f", {sum(row.changed)} of them changed"
        counts = f"{sum(row.trained)} of {len(row.trained)} tokens are trained{changed}"
        out.print(f"\n{row.source}: {counts}", style="bold", markup=False)
        out.print(_tokens(row, plain), soft_wrap=True)
    if found.rows:
        trained = "[[trained]]" if plain else "trained"
        legend = Text.assemble("\n", (trained, "black on green"), "  ")
        if any(row.changed is not None for row in found.rows):
            legend.append("<<changed>>" if plain else "changed", "black on yellow").append("  ")
        legend.append("masked: seen, not trained", "dim")
        if any(REST in row.tokens for row in found.rows):
            legend.append(f"  {REST} belongs to the character before it", "dim")
        out.print(legend)
    for finding in found.findings:
        out.print(f"found: {finding}", style="yellow", markup=False)
    if not found.template:
        text = "No chat template: string prompts are continued as plain text, nothing in between."
        out.print(text, soft_wrap=True)
    elif not found.findings:
        out.print("The chat template and the stop token are in order.", style="green")


def _tokens(row: ShownRow, plain: bool) -> Text:
    line = Text()
    changed = row.changed or [False] * len(row.tokens)
    signs = ((row.trained, "[[", "]]"), (changed, "<<", ">>")) if plain else ()
    for i, token in enumerate(row.tokens):
        for marked, opening, _ in signs:
            line.append(opening if marked[i] and not any(marked[i - 1 : i]) else "")
        style = "black on yellow" if changed[i] else "black on green" if row.trained[i] else "dim"
        line.append(token.replace("\n", "⏎\n"), style=style)
        for marked, _, closing in reversed(signs):
            line.append(closing if marked[i] and not any(marked[i + 1 : i + 2]) else "")
        line.append("|" if not token.endswith("\n") else "", style="dim")
    return line


def progress_line(what: str) -> Callable[[int, int], None]:
    """``progress(done, total)`` that keeps one line on standard error: share, rate, time left."""
    started = time.monotonic()
    console = Console(stderr=True)

    def progress(done: int, total: int) -> None:
        seconds = time.monotonic() - started
        rate = done / seconds if seconds else 0.0
        left = f"{(total - done) / rate:.0f} s left" if rate else ""
        end = "\n" if done >= total else "\r"
        console.print(f"{what} {done}/{total}  {rate:.1f}/s  {left}   ", end=end, highlight=False)

    return progress
