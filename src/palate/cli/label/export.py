"""``palate label export``: records for training, for other tools, single answers, or the log itself."""

from __future__ import annotations

from typing import Annotated

import typer

from palate.cli.label.stores import StoreFile, open_store
from palate.cli.options import Overwrite, numbers
from palate.errors import ConfigError


def export(
    store: StoreFile,
    kind: Annotated[
        str,
        typer.Option(
            "--as",
            help="comparisons, rankings, judgements, demonstrations, corrections, answers, csv, or events; of "
            "conversations with models battles, thumbs, signals; for other "
            "tools preference, ranking, kto, stepwise, rlhf_v, ddpo, sft, hh_rlhf, ultrafeedback, argilla, label_studio.",
        ),
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="File, or - for standard output.")] = "-",
    question: Annotated[str | None, typer.Option("--question", help="Id; default: the first that fits.")] = None,
    consensus: Annotated[
        bool, typer.Option("--consensus", help="One comparison a pair, with the share for it.")
    ] = False,
    individual: Annotated[
        bool, typer.Option("--individual", help="All answers also where an adjudicator decided; no decisions.")
    ] = False,
    margins: Annotated[str | None, typer.Option("--margins", help="Of the strengths, e.g. 0.33,0.67,1.")] = None,
    ties: Annotated[str, typer.Option("--ties", help='"drop", or "half": probability 1/2.')] = "drop",
    histories: Annotated[
        str, typer.Option("--histories", help='battles: "same" prompt on both sides, or "winner": the chosen one\'s.')
    ] = "same",
    least: Annotated[float, typer.Option("--least", help="signals: lowest probability that is kept.")] = 0.5,
    overwrite: Overwrite = False,
    conversational: Annotated[
        bool, typer.Option("--conversational", help="preference, kto, sft: prompts and responses as messages.")
    ] = False,
    validation: Annotated[
        float,
        typer.Option("--validation", min=0.0, max=0.9, help="Share of prompts for FILE.validation; other tools'."),
    ] = 0.0,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="ddpo: also the weight of every token of this model's.")
    ] = None,
) -> None:
    """Write what people said: records for training, single answers, or the log itself."""
    from palate.feedback.exchange import EXPORTS, Settings, export_file
    from palate.feedback.export import export as export_as

    expected = f"margins {margins!r}: expected numbers with commas between them, e.g. 0.33,0.67,1."
    steps = None if margins is None else numbers(margins, expected)
    for_others = kind in EXPORTS
    if not for_others and (conversational or validation or tokenizer is not None):
        raise ConfigError(
            f"--conversational, --validation and --tokenizer are no options of {kind}: {', '.join(EXPORTS)}."
        )
    with open_store(store) as opened:
        if for_others:
            if consensus and (kind != "preference" or steps is not None):
                raise ConfigError("--consensus is an option of preference and comparisons, and has margins of its own.")
            settings = Settings(
                question, "consensus" if consensus else "each", steps, conversational, tokenizer=tokenizer
            )
            about = export_file(
                opened,
                kind,
                out,
                settings=settings,
                decided=not individual,
                validation=validation,
                overwrite=overwrite,
            )
        else:
            about = export_as(
                opened,
                kind,
                out,
                question=question,
                consensus=consensus,
                decided=not individual,
                margins=steps,
                ties=ties,
                histories=histories,
                least=least,
                overwrite=overwrite,
            )
    if "left_out" in about:
        left = ", ".join(f"{count} {reason}" for reason, count in about["left_out"].items())
        said = f"{about['records']} {'records' if for_others else kind} of {about['answers']} answers"
        typer.echo(said + (f"; left out: {left}" if left else ""), err=True)
