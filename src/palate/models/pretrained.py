"""A model as it stands in its folder: read from safetensors, weights complete, the scalar head exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from palate.errors import ModelError
from palate.models.adapters import SCORE_FILE
from palate.models.attention import needed_attention
from palate.models.checks import check_reads_last_token, refuse_missing
from palate.models.devices import dtypes_of
from palate.models.dropout import without_dropout_config
from palate.models.files import file_of, weight_files
from palate.models.heads import HEAD_NAMES, base_of, new_score_head, scalar_head
from palate.models.places import config_of, hub_hint, is_classifier
from palate.models.quiet import first_line, quiet


def pretrained(
    auto: str, place: str, config: Any, dtype: str | torch.dtype, keep_dropout: bool
) -> tuple[Any, set[str]]:
    """The model of a folder, and the names of weights that the folder lacks."""
    import transformers
    from safetensors import SafetensorError

    weights, compute = dtypes_of(dtype)
    if not keep_dropout:
        without_dropout_config(config)
    try:
        with quiet():
            model, info = getattr(transformers, auto).from_pretrained(
                place,
                config=config,
                dtype=weights,
                use_safetensors=True,
                output_loading_info=True,
                **needed_attention(config),
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        pickled = sorted(p.name for p in Path(place).glob("pytorch_model*.bin")) if Path(place).is_dir() else []
        advice = (
            f" Its weights are pickled ({pickled[0]}), which can run code when read; save them as safetensors first: "
            "AutoModel...from_pretrained(folder).save_pretrained(new_folder)."
            if pickled
            else " The file is broken or was not copied to its end: fetch or save it again."
            if isinstance(error, SafetensorError)
            else hub_hint(place)
        )
        raise ModelError(f"{place}: the model cannot be loaded. {first_line(error)}{advice}") from error
    if compute is not None:
        model.compute_dtype = compute  # models.forward multiplies in it
    return model, set(info["missing_keys"])


def scalar_from_folder(
    place: str,
    dtype: str | torch.dtype,
    keep_dropout: bool,
    seed: int,
    *,
    where: str | Path,
    may_lack_head: bool,
    may_draw: bool,
) -> Any:
    """A plain scalar model with a float32 head, its own or (from a language model) a new one.

    ``where`` is what was asked for, for errors: the folder itself, or that of an adapter whose base it is.
    """
    config = config_of(place)
    classifier = is_classifier(config.architectures)
    if classifier and config.num_labels != 1:
        labels = [str(name) for name in config.id2label.values()]
        raise ModelError(
            f"{place}: this classifier has {config.num_labels} labels ({', '.join(labels)}); a reward or value model has "
            f'one. As a reward, choose a label: {{"classifier": "{place}", "label": "{labels[-1]}"}}'
        )
    config.num_labels = 1
    model, missing = pretrained("AutoModelForSequenceClassification", place, config, dtype, keep_dropout)
    of_head = {name for name in missing if name.split(".")[0] in HEAD_NAMES}
    refuse_missing(place, missing - of_head)
    check_reads_last_token(model, place)
    if not of_head:
        _exact_head(model, place)
    elif classifier and not may_lack_head:
        raise ModelError(
            f"{place}: a {config.architectures[0]} without its head's weights ({', '.join(sorted(of_head))}). It was "
            "saved incompletely; with a random head every score would be noise. Save or train it again."
        )
    elif not may_draw:
        raise ModelError(
            f"{where}: this is a language model, not a reward: it has no score head, and a new one would score noise. Train a "
            f"reward from it: palate train reward --model {where} --data COMPARISONS --out runs/reward; then give "
            "runs/reward/model."
        )
    else:
        new_score_head(model, seed)
    return model


@torch.no_grad()
def _exact_head(model: nn.Module, place: str) -> None:
    """The head in float32 with the file's own digits, not rounded through the body's bf16."""
    from safetensors import safe_open

    head = scalar_head(model)
    rounded = next(head.parameters()).dtype != torch.float32
    head.float()
    name = next(name for name, module in model.named_children() if module is head)
    for path in weight_files(place) if rounded else ():
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # the file cannot be iterated
                if key.split(".")[0] == name:
                    head.get_parameter(key.removeprefix(f"{name}.")).copy_(file.get_tensor(key))


def read_score_file(model: nn.Module, place: str) -> None:
    """The normalisation that an adapter folder names goes into the model's config."""
    path = file_of(place, SCORE_FILE)
    if path is not None:
        config, stored = base_of(model).config, json.loads(path.read_text("utf-8"))
        config.score_mean, config.score_std = stored["score_mean"], stored["score_std"]
