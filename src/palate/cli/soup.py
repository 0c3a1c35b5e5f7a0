"""``palate soup``: reads arguments, calls ``palate.models.soup``, prints; heavy things are imported inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from palate.cli.options import JsonFlag, numbers
from palate.cli.output import print_json
from palate.errors import ConfigError


def soup(
    models: Annotated[
        list[str], typer.Argument(help="Two or more folders: whole models, or LoRA adapters of one base.")
    ],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder of the soup, or of the family.")],
    weights: Annotated[
        str | None, typer.Option("--weights", "-w", help="One each, >= 0, with sum 1: 0.75,0.25. Default: equal.")
    ] = None,
    points: Annotated[
        int | None, typer.Option("--grid", help="Write a family into OUT: all weights in steps of 1/(N-1).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing model folders.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Mix policies into one by the weighted mean of their weights (rewarded soups).

    palate soup runs/helpful/model runs/harmless/model --weights 0.75,0.25 --out runs/soup

    They must come from the same start. What a soup is worth is measured, not assumed: docs/soups.md.
    """
    from palate.models.soup import Soup, grid, make_soup, soup_name

    if points is not None and weights is not None:
        raise ConfigError("--weights makes one soup, --grid a family: give one of them.")
    if points is None:
        expected = f"--weights {weights!r}: numbers with commas were expected, as in 0.75,0.25."
        mixes = [numbers(weights, expected) if weights is not None else [1 / len(models)] * len(models)]
        places = [Path(out)]
    else:
        mixes = [list(mix) for mix in grid(len(models), points)]
        places = [Path(out) / soup_name(mix) for mix in mixes]
    made: list[Soup] = []
    for mix, place in zip(mixes, places, strict=True):
        made.append(make_soup(models, mix, place, overwrite=overwrite))
        alike = "" if made[-1].cosine is None else f"   cosine {made[-1].cosine:.4f}"
        typer.echo(f"{place}   {', '.join(f'{weight:.4g}' for weight in mix)}{alike}", err=True)
    if as_json:
        found = [{"out": str(s.folder), "weights": list(s.weights), "cosine": s.cosine} for s in made]
        print_json(found)
