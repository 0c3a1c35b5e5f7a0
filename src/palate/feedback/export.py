"""What leaves a store: records as palate's JSONL, single answers as JSONL or CSV, events as they are.

Beside a file of records stands FILE.provenance.json: the state of the log they come from, who answered how much, and
what gave no record.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from palate.data.formats.convert import write_lines
from palate.data.formats.palate import to_json
from palate.errors import ConfigError, DataError
from palate.feedback import views
from palate.feedback.store import Store
from palate.feedback.tables import canonical_json

RECORDS = ("comparisons", "rankings", "judgements", "demonstrations", "corrections")
TALKED = ("battles", "thumbs", "signals")  # of conversations with models, see chat_views
KINDS = (*RECORDS, *TALKED, "answers", "events", "csv")
# A spreadsheet takes a cell that begins so for a formula (OWASP, "CSV Injection"); the wide forms too.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def export(
    store: Store,
    kind: str,
    target: str | Path = "-",
    *,
    question: str | None = None,
    consensus: bool = False,
    decided: bool = True,
    margins: Sequence[float] | None = None,
    ties: str = "drop",
    histories: str = "same",
    least: float = 0.5,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write what people said.

    Args:
        kind: "comparisons", "rankings", "judgements", "demonstrations" or "corrections": records; "answers": every single
            answer with the order in which the responses were shown, tests and repeats included; "csv": the same as a
            table; "battles", "thumbs", "signals": comparisons, judgements, and noisy judgements with their probability, of
            conversations with models; "events": the log, which ``store.chain`` can check.
        target: a file, or "-" for standard output.
        question: which of the task's questions; None = the first that fits.
        consensus: comparisons only: one for each pair with the share of annotators as probability, in place of one for
            each annotator.
        decided: an adjudicator's decision stands in place of the answers it is about; False = all answers, no decisions.
        margins, ties: see ``views.comparisons``.
        histories, least: of "battles" and "signals", see ``chat_views``.
    Returns:
        Provenance.
    Raises:
        ConfigError: an unknown kind, or an option that does not go with it.
        DataError: the file exists.
    """
    if kind not in KINDS:
        from palate.feedback.exchange import EXPORTS  # which is built on this module

        raise ConfigError(
            f'nothing is exported as "{kind}". Expected one of: {", ".join(KINDS)}; or for other tools: {", ".join(EXPORTS)}.'
        )
    if kind != "comparisons" and (consensus or margins is not None or (ties != "drop" and kind != "battles")):
        raise ConfigError(f"consensus, margins and ties are options of comparisons, not of {kind}.")
    if (histories != "same" and kind != "battles") or (least != 0.5 and kind != "signals"):
        raise ConfigError(f"histories is an option of battles, and least one of signals; not of {kind}.")
    if kind in TALKED:
        return _export_talked(store, kind, target, ties, histories, least, overwrite)
    if kind in RECORDS:
        given = views.labels(store, decided=decided)
        made = _made(given, store, kind, question, consensus, margins, ties)
        about = views.provenance(
            store,
            given,
            made,
            kind=kind,
            question=question,
            consensus=consensus,
            decided=decided,
            margins=margins,
            ties=ties,
        )
        write_lines(target, (to_json(record) for record in made.records), overwrite=overwrite)
        if str(target) != "-":
            write_lines(f"{target}.provenance.json", [about], overwrite=True)
        return about
    lines: Iterable[dict[str, Any]] = _events(store) if kind == "events" else answer_lines(store)
    if kind == "csv":
        text = csv_text(answer_rows(store))
        print(text, end="") if str(target) == "-" else _write_text(Path(target), text, overwrite)
        return {"answers": text.count("\n")}
    return {kind: write_lines(target, lines, overwrite=overwrite)}


def answer_lines(store: Store) -> Iterator[dict[str, Any]]:
    """Every answer in force and every decision: who, what was shown in which order, what was said."""
    for answer in views.answers(store, ("task", "gold", "attention", "repeat", "adjudicate")):
        yield {
            "event": answer.event,
            "seq": answer.seq,
            "time": answer.time,
            "annotator": answer.annotator,
            "purpose": answer.purpose,
            "item": answer.item,
            "prompt": answer.prompt if isinstance(answer.prompt, str) else list(answer.prompt),
            "responses": list(answer.responses),
            "sources": [dict(source) for source in answer.sources],
            "images": list(answer.images),
            "shown": list(answer.shown),
            "values": answer.values,
            "gold": answer.gold,
            "seconds": answer.seconds,
            "changed": answer.changed,
        }


def answer_rows(store: Store) -> Iterator[list[Any]]:
    """The answers as a table with a header; what is no single value is JSON."""
    names: list[str] = []
    for line in answer_lines(store):
        if not names:
            names = list(line)
            yield names
        yield [value if isinstance(value, str | int | float) else canonical_json(value) for value in line.values()]


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV whose cells no spreadsheet takes for a formula."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerows([csv_cell(value) for value in row] for row in rows)
    return buffer.getvalue()


def csv_cell(value: Any) -> Any:
    """A cell; text that looks like a formula gets an apostrophe before it, numbers stay numbers.

    >>> csv_cell("=1+1"), csv_cell(-1), csv_cell("a=b")
    ("'=1+1", -1, 'a=b')
    """
    if value is None or isinstance(value, int | float):
        return value
    text = str(value).replace("\x00", "")
    return f"'{text}" if text.lstrip(" ").startswith(_FORMULA) or text.startswith(_FORMULA) else text


def _made(
    given: list[views.Answer],
    store: Store,
    kind: str,
    question: str | None,
    consensus: bool,
    margins: Sequence[float] | None,
    ties: str,
) -> views.Made:
    if kind != "comparisons":
        return getattr(views, kind)(given, store.task, question=question)
    if ties not in ("drop", "half"):
        raise ConfigError(f'ties is "{ties}". Expected "drop" or "half".')
    if consensus and (margins is not None or ties != "drop"):
        raise ConfigError("a consensus has probabilities; it takes neither margins nor ties.")
    if consensus:
        return views.majority(given, store.task, question=question)
    return views.comparisons(given, store.task, question=question, margins=margins, ties=ties)  # type: ignore[arg-type]


def _export_talked(
    store: Store, kind: str, target: str | Path, ties: str, histories: str, least: float, overwrite: bool
) -> dict[str, Any]:
    from palate.feedback import chat_views

    if ties not in ("drop", "half") or histories not in ("same", "winner"):
        raise ConfigError(
            f'ties is "{ties}" and histories "{histories}". Expected "drop" or "half", and "same" or "winner".'
        )
    shares = chat_views.measured_shares(store)
    if kind == "signals":
        made = chat_views.signals(store, shares=shares, least=least)
    elif kind == "thumbs":
        made = chat_views.thumbs(store)
    else:
        made = chat_views.battles(store, ties=ties, histories=histories)  # type: ignore[arg-type]
    options: dict[str, Any] = {"kind": kind, "ties": ties, "histories": histories, "least": least}
    if kind == "signals":
        options["shares"] = {name: {"share": share.share, "measured_on": share.n} for name, share in shares.items()}
    about = views.provenance(store, [], made, **options)
    about |= {"answers": len(made.records) + sum(made.left_out.values())}
    line = chat_views.noisy_line if kind == "signals" else to_json
    write_lines(target, (line(record) for record in made.records), overwrite=overwrite)
    if str(target) != "-":
        write_lines(f"{target}.provenance.json", [about], overwrite=True)
    return about


def _events(store: Store) -> Iterator[dict[str, Any]]:
    for event in store.events():
        yield {
            "seq": event.seq,
            "id": event.id,
            "time": event.time,
            "kind": event.kind,
            "actor": event.actor,
            "body": dict(event.body),
            "previous": event.previous,
            "hash": event.hash,
        }


def _write_text(path: Path, text: str, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise DataError(f"{path} exists and is not overwritten. Name another file, or remove it first.")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    unfinished.write_text(text, encoding="utf-8", newline="")
    os.replace(unfinished, path)
