"""Which policies can be averaged, as far as it is seen without reading weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate.errors import ConfigError, ModelError
from palate.models.adapters import ADAPTER_CONFIG
from palate.models.files import read_json
from palate.models.places import is_classifier
from palate.models.tokenizer import load_tokenizer

# Not the architecture: where a model was saved, and by what.
OF_THE_FILE = ("_name_or_path", "transformers_version", "architectures", "use_cache")


@dataclass(frozen=True)
class Ingredients:
    """Folders that were found to belong together; ``adapters`` holds their descriptions, if they are adapters."""

    folders: tuple[Path, ...]
    adapters: tuple[Mapping[str, Any], ...] = ()


def check_ingredients(models: Sequence[str | Path]) -> Ingredients:
    """Folders of policies that can be averaged; what can be seen without reading weights.

    Raises:
        ModelError: see ``make_soup``.
    """
    if len(models) < 2:
        raise ConfigError(f"{len(models)} model(s) given; a soup is of at least two.")
    folders = tuple(_folder(model) for model in models)
    kinds = [(folder / ADAPTER_CONFIG).is_file() for folder in folders]
    if any(kinds) and not all(kinds):
        raise ModelError(
            f"{folders[kinds.index(True)]} is an adapter and {folders[kinds.index(False)]} a whole model; they cannot be "
            "averaged. Give adapters of one base, or whole models (save_model(..., merge_adapter=True))."
        )
    names = (ADAPTER_CONFIG,) if all(kinds) else ("config.json",)
    configs = tuple(read_json(folder / name) for folder in folders for name in names)
    for folder, config in zip(folders, configs, strict=True):
        _refuse_scores(folder, config)
    for folder, config in zip(folders[1:], configs[1:], strict=True):
        if all(kinds):
            _same_base(folders[0], configs[0], folder, config)
        else:
            _same_architecture(folders[0], configs[0], folder, config)
    if all(kinds):
        for folder, config in zip(folders, configs, strict=True):
            _refuse_special(folder, config)
    _same_tokenizer(folders)
    return Ingredients(folders, configs if all(kinds) else ())


def _folder(where: str | Path) -> Path:
    path = Path(where).expanduser()
    if not path.is_dir():
        raise ModelError(f"{where}: there is no such folder. A soup is made of model folders on this machine.")
    if any((path / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        return path.resolve()
    inside = path / "model"
    hint = f" Did you mean {inside}?" if inside.is_dir() else ""
    raise ModelError(f"{where}: not a model folder: neither config.json nor {ADAPTER_CONFIG} is there.{hint}")


def _refuse_scores(folder: Path, config: Mapping[str, Any]) -> None:
    scores = is_classifier(config.get("architectures")) or config.get("task_type") == "SEQ_CLS"
    if scores or config.get("modules_to_save"):
        raise ModelError(
            f"{folder}: this is a reward or value model (or has whole layers beside its adapter); soups are of policies. "
            "Rewards are combined by their scores: {ensemble: [one, another]}."
        )


def _same_architecture(one: Path, first: Mapping[str, Any], other: Path, second: Mapping[str, Any]) -> None:
    keys = [key for key in dict.fromkeys([*first, *second]) if key not in OF_THE_FILE]
    differ = [key for key in keys if first.get(key) != second.get(key)]
    if differ:
        said = "; ".join(f"{key} {first.get(key)!r} and {second.get(key)!r}" for key in differ[:3])
        raise ModelError(
            f"{one} and {other} have different architectures: {said}. Only models of one shape, trained from the same start, "
            "can be averaged."
        )


def _same_base(one: Path, first: Mapping[str, Any], other: Path, second: Mapping[str, Any]) -> None:
    bases = [str(config.get("base_model_name_or_path") or "") for config in (first, second)]
    if _resolved(bases[0]) != _resolved(bases[1]):
        raise ModelError(
            f"{one} is an adapter of {bases[0] or 'nothing'}, {other} of {bases[1] or 'nothing'}. Only adapters of one base "
            "can be averaged."
        )


def _resolved(base: str) -> str:
    return str(Path(base).resolve()) if Path(base).is_dir() else base


def _refuse_special(folder: Path, config: Mapping[str, Any]) -> None:
    """Only what B A alone describes."""
    special = [key for key in ("use_dora", "rank_pattern", "alpha_pattern", "layer_replication") if config.get(key)]
    special += ["bias"] if config.get("bias", "none") != "none" else []
    special += ["peft_type"] if config.get("peft_type") != "LORA" else []
    if special:
        raise ModelError(
            f"{folder}: only plain LoRA adapters can be averaged; this one has {special[0]} {config.get(special[0])!r}. "
            "Merge each adapter into its base first (save_model(..., merge_adapter=True)), then average the whole models."
        )


def _same_tokenizer(folders: Sequence[Path]) -> None:
    """Every token has the same id, and conversations the same template."""
    first = load_tokenizer(folders[0])
    words, template = first.get_vocab(), getattr(first, "chat_template", None)
    for folder in folders[1:]:
        other = load_tokenizer(folder)
        if other.get_vocab() != words:
            raise ModelError(
                f"{folders[0]} and {folder} have different tokenizers ({len(words)} and {len(other.get_vocab())} tokens): "
                "their weights speak of other tokens. Average models that were trained from the same start."
            )
        if getattr(other, "chat_template", None) != template:
            raise ModelError(
                f"{folders[0]} and {folder} have different chat templates: they were trained on differently written prompts. "
                "Train both with the same template."
            )
