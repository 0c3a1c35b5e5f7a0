"""``palate convert``."""

from __future__ import annotations

from typing import Annotated

import typer

from palate.errors import ConfigError


def convert(
    source: Annotated[str, typer.Argument(help="Records in a public shape: file, or - for standard input.")],
    target: Annotated[str, typer.Argument(help="palate's own JSONL: file, or - for standard output.")] = "-",
    from_format: Annotated[
        str, typer.Option("--from", help="trl, openai, sharegpt, alpaca, hh_rlhf, ...; ratings; or auto.")
    ] = "auto",
    kind: Annotated[
        str,
        typer.Option(
            "--kind", "-k", help="demonstrations, prompts, comparisons, corrections, rankings, or judgements."
        ),
    ] = "demonstrations",
    top: Annotated[int, typer.Option(min=1, help="Rankings to judgements: the best so many are desirable.")] = 1,
    bottom: Annotated[int, typer.Option(min=1, help="And the worst so many are undesirable.")] = 1,
    good: Annotated[float | None, typer.Option(help="Ratings to judgements: desirable from here up.")] = None,
    bad: Annotated[float | None, typer.Option(help="And undesirable from here down.")] = None,
) -> None:
    """Convert records of a public shape to palate's own JSONL, or records of one kind to another.

    palate convert d.json demonstrations.jsonl --from sharegpt --kind demonstrations

    Rankings and comparisons become judgements by --kind judgements (best and
    worst); ratings ({"prompt", "response", "rating"}) rankings by --from
    ratings --kind rankings, judgements by --from ratings --kind judgements
    --good 4 --bad 2.
    """
    if from_format == "ratings":
        from palate.data.ratings import convert_ratings

        report = convert_ratings(source, target, kind, good=good, bad=bad)
    elif good is not None or bad is not None:
        raise ConfigError("--good and --bad are for ratings. Give --from ratings.")
    else:
        from palate.data.derive import convert_between

        report = convert_between(source, target, from_format, kind, top=top, bottom=bottom)
    typer.echo(str(report), err=True)
