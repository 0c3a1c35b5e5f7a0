"""``palate explain`` and ``palate methods``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from palate.cli.options import METHOD, JsonFlag
from palate.cli.output import print_json


def explain(
    method: Annotated[str, METHOD],
    every: Annotated[bool, typer.Option("--all", help="Also the settings that all methods share.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Explain a method: the paper's equations, its roles and data, and every setting with its default."""
    from palate.api import explain as explanation_of

    found = explanation_of(method)
    shared = _shared_settings() if every else {}
    if as_json:
        listed = {section: [setting.to_dict() for setting in settings] for section, settings in shared.items()}
        print_json(found.to_dict() | ({"shared": listed} if every else {}))
    else:
        from palate.console import print_explanation

        print_explanation(found, shared)


def _shared_settings() -> dict[str, Any]:
    from palate.config import shared_settings

    return shared_settings()


def methods(
    reads: Annotated[str | None, typer.Option("--reads", help="Only those that read this kind of records.")] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Only those that can read this file.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the methods: paper, roles, data. To choose one: docs/choose.md."""
    from palate.api import explain as explanation_of
    from palate.lookup import method_names

    kinds = _kinds(reads, data)
    found = [each for each in map(explanation_of, method_names()) if kinds is None or each.reads in kinds]
    if data is not None:
        names = ", ".join(kinds or ()) or "no kind of records that palate knows"
        typer.echo(f"{data} can be read as {names}", err=True)
    if as_json:
        print_json([{k: v for k, v in each.to_dict().items() if k not in ("text", "settings")} for each in found])
    else:
        from palate.console import print_methods

        print_methods(found)


def _kinds(reads: str | None, data: str | None) -> list[str] | None:
    """The kinds of records that were asked for; None = all."""
    if reads is None and data is None:
        return None
    from palate.data.formats.detect import check_kind
    from palate.stage.records import kinds_of

    if reads is not None:
        check_kind(reads)
    found = [reads] if reads is not None else []
    return found if data is None else [kind for kind in kinds_of(data) if reads in (None, kind)]
