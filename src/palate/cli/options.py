"""What several commands have: options, said once, and how arguments are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from palate.errors import ConfigError

Model = Annotated[str, typer.Option("--model", "-m", help="Folder or hub name.")]
METHOD = typer.Argument(help="reward, ppo, my_package.my_method; see: palate methods")
DTYPE = typer.Option("--dtype", help="float32, bfloat16, or mixed.")
DEVICE = typer.Option("--device", help='"cpu", "cuda", or "auto".')
Template = Annotated[
    str | None, typer.Option("--chat-template", help='"none", "default", Jinja text or a file; else the model\'s own.')
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Out = Annotated[str, typer.Option("--out", "-o", help="JSONL file, or - for standard output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")]
Format = Annotated[str, typer.Option("--format", help="Shape of the records; found out by itself unless named.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Read at most so many records.")]
MaxLength = Annotated[int | None, typer.Option(min=1, help="Tokens of prompt and response.")]
Seed = Annotated[int, typer.Option("--seed", help="Same seed, same samples.")]
SameResult = Annotated[int, typer.Option("--seed", help="Same seed, same result.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value ...", show_default=False)]
Trained = Annotated[str | None, typer.Option("--model", "-m", help="What is trained: folder or hub name.")]
Validation = Annotated[str | None, typer.Option("--validation", help="Held-out records; default: a share.")]
Tokenizer = Annotated[str | None, typer.Option("--tokenizer", help="Folder or hub name; default: MODEL's.")]
RewardTokenizer = Annotated[str | None, typer.Option("--tokenizer", help="For rewards that have none of their own.")]


def method_and_settings(method: str | None, settings: Sequence[str] | None) -> tuple[str | None, list[str]]:
    """What stands in METHOD's place, if it is a setting, is the first of the settings: a file names the method."""
    if method is not None and "=" in method:
        return None, [method, *(settings or ())]
    return method, list(settings or ())


def numbers(text: str, otherwise: str) -> list[float]:
    """Numbers with commas between them.

    Raises:
        ConfigError: something else; ``otherwise`` says what was expected.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(otherwise) from None
