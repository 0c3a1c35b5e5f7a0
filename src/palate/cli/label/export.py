"""``palate label export``: records for training, for other tools, single answers, or the log itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palate.cli.label.stores import StoreFile, open_store
from palate.cli.options import Overwrite, numbers
from palate.errors import ConfigError

if TYPE_CHECKING:
    from palate.feedback.exchange import Settings

Kind = Annotated[
    str,
    typer.Option(
        "--as",
        help="comparisons, rankings, judgements, demonstrations, corrections, answers, csv, or events; of "
        "conversations with models battles, thumbs, signals; for other "
        "tools preference, ranking, kto, stepwise, rlhf_v, ddpo, sft, hh_rlhf, ultrafeedback, argilla, label_studio.",
    ),
]
Out = Annotated[str, typer.Option("--out", "-o", help="File, or - for standard output.")]
Question = Annotated[str | None, typer.Option("--question", help="Id; default: the first that fits.")]
Consensus = Annotated[bool, typer.Option("--consensus", help="One comparison a pair, with the share for it.")]
Individual = Annotated[
    bool, typer.Option("--individual", help="All answers also where an adjudicator decided; no decisions.")
]
Margins = Annotated[str | None, typer.Option("--margins", help="Of the strengths, e.g. 0.33,0.67,1.")]
Ties = Annotated[str, typer.Option("--ties", help='"drop", or "half": probability 1/2.')]
Histories = Annotated[
    str, typer.Option("--histories", help='battles: "same" prompt on both sides, or "winner": the chosen one\'s.')
]
Least = Annotated[float, typer.Option("--least", help="signals: lowest probability that is kept.")]
Conversational = Annotated[
    bool, typer.Option("--conversational", help="preference, kto, sft: prompts and responses as messages.")
]
Validation = Annotated[
    float,
    typer.Option("--validation", min=0.0, max=0.9, help="Share of prompts for FILE.validation; other tools'."),
]
Tokenizer = Annotated[
    str | None, typer.Option("--tokenizer", help="ddpo: also the weight of every token of this model's.")
]


def export(
    store: StoreFile,
    kind: Kind,
    out: Out = "-",
    question: Question = None,
    consensus: Consensus = False,
    individual: Individual = False,
    margins: Margins = None,
    ties: Ties = "drop",
    histories: Histories = "same",
    least: Least = 0.5,
    overwrite: Overwrite = False,
    conversational: Conversational = False,
    validation: Validation = 0.0,
    tokenizer: Tokenizer = None,
) -> None:
    """Write what people said: records for training, single answers, or the log itself."""
    from palate.feedback.exchange import EXPORTS, export_file
    from palate.feedback.export import export as export_as

    expected = f"margins {margins!r}: expected numbers with commas between them, e.g. 0.33,0.67,1."
    steps = None if margins is None else numbers(margins, expected)
    for_others = kind in EXPORTS
    if not for_others and (conversational or validation or tokenizer is not None):
        raise ConfigError(
            f"--conversational, --validation and --tokenizer are no options of {kind}: {', '.join(EXPORTS)}."
        )
    always: dict[str, Any] = {"decided": not individual, "overwrite": overwrite}
    with open_store(store) as opened:
        if for_others:
            settings = _settings(kind, question, consensus, steps, conversational, tokenizer)
            about = export_file(opened, kind, out, settings=settings, validation=validation, **always)
        else:
            always |= {"question": question, "consensus": consensus, "margins": steps}
            about = export_as(opened, kind, out, ties=ties, histories=histories, least=least, **always)
    _say(about, "records" if for_others else kind)


def _settings(
    kind: str,
    question: str | None,
    consensus: bool,
    margins: list[float] | None,
    conversational: bool,
    tokenizer: str | None,
) -> Settings:
    """Of records for other tools."""
    from palate.feedback.exchange import Settings

    if consensus and (kind != "preference" or margins is not None):
        raise ConfigError("--consensus is an option of preference and comparisons, and has margins of its own.")
    return Settings(question, "consensus" if consensus else "each", margins, conversational, tokenizer=tokenizer)


def _say(about: Mapping[str, Any], what: str) -> None:
    """Counts, where anything is counted: not of the log and of single answers."""
    if "left_out" in about:
        left = ", ".join(f"{count} {reason}" for reason, count in about["left_out"].items())
        left = f"; left out: {left}" if left else ""
        typer.echo(f"{about['records']} {what} of {about['answers']} answers{left}", err=True)
