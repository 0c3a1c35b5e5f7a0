"""The chat of a model: its tokenizer, its template, and every token that ends its responses."""

from __future__ import annotations

from typing import Any

from palate.data.chat import Chat
from palate.errors import DataError, ModelError


def chat_of(where: str | None, tokenizer: Any, template: str | None = None, system: str | None = None) -> Chat:
    """A ``Chat`` that stops where the model does, and whose tokenizer carries the template that is used.

    Args:
        where: the model's folder or hub name, for its stop tokens; None for a model that is not on disk.
        tokenizer: of the model; its ``chat_template`` becomes the template in use, so that a saved model is read the
            way it was trained.
        template, system: as ``Chat`` takes them.
    Raises:
        ModelError: the template is broken, or refuses a first question. ConfigError: as ``Chat`` says.
    """
    try:
        chat = Chat(tokenizer, template, system, stop_token_ids=stop_ids(where, len(tokenizer)) if where else ())
    except (ModelError, DataError) as error:
        source = "the one given" if template is not None else f"that of {where or tokenizer.name_or_path}"
        raise ModelError(
            f"{error}\nThe template is {source}. Repair it, or choose another: data.chat_template=default in a run, "
            "--chat-template default elsewhere."
        ) from None
    if template is not None:
        tokenizer.chat_template = chat.template
    return chat


def stop_ids(where: str, vocabulary: int) -> list[int]:
    """What ends a text of this model, from its generation config, its config, or (an adapter) its base's."""
    from transformers import AutoConfig, GenerationConfig

    from palate.models.adapters import adapter_config

    adapter = adapter_config(where)
    places = (
        [where, adapter["base_model_name_or_path"]] if adapter and adapter.get("base_model_name_or_path") else [where]
    )
    for place in places:
        for config in (GenerationConfig, AutoConfig):
            try:
                found = config.from_pretrained(place).eos_token_id
            except (
                OSError,
                ValueError,
                KeyError,
            ):  # it has none; what is wrong with a model is said where it is loaded
                continue
            ids = [found] if isinstance(found, int) else list(found or ())
            # Some configs carry the default of their architecture, which this tokenizer does not have.
            known = [i for i in ids if i < vocabulary]
            if known:
                return known
    return []
