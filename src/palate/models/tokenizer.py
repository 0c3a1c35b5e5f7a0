"""A model's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from palate.errors import ModelError
from palate.models.adapters import adapter_config
from palate.models.places import hub_hint, listing, place_of, refuse_run_folder
from palate.models.quiet import first_line, quiet

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
CLASS_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")


def load_tokenizer(where: str | Path) -> Any:
    """The tokenizer of a folder or hub name; of an adapter folder without one, its base's.

    A missing pad token, or one that equals the end of text, is fine: no mask is ever made from token values.

    Raises:
        ModelError: no tokenizer there, or one that cannot be read.
    """
    from transformers import AutoTokenizer

    place = place_of(where)
    if Path(place).is_dir() and not any(Path(place, name).exists() for name in TOKENIZER_FILES):
        adapter = adapter_config(place)
        if adapter and adapter.get("base_model_name_or_path"):
            return load_tokenizer(adapter["base_model_name_or_path"])
        refuse_run_folder(place)
        raise ModelError(
            f"{where}: no tokenizer in this folder (looked for {', '.join(TOKENIZER_FILES)}). Found: {listing(place)}. "
            "Save the tokenizer that the model was trained with into it: tokenizer.save_pretrained(folder)."
        )
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        names_no_class = Path(place).is_dir() and not any(Path(place, name).exists() for name in CLASS_FILES)
        advice = (
            f" None of {', '.join(CLASS_FILES)} is there to say of which class it is. Load it with its class and save it whole, "
            "for GPT-2: transformers.GPT2Tokenizer.from_pretrained(folder).save_pretrained(folder)."
            if names_no_class
            else hub_hint(place)
        )
        raise ModelError(f"{where}: its tokenizer cannot be loaded. {first_line(error)}{advice}") from error
    if not tokenizer.get_vocab():
        raise ModelError(f"{where}: its tokenizer has no tokens. Save the model's tokenizer into the folder again.")
    return tokenizer
