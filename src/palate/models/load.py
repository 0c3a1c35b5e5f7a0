"""Models in: a policy, a scalar model or a tokenizer from a Hugging Face folder, a PEFT adapter folder or a hub name.

What comes back is the plain Hugging Face model (or peft's model around it), checked: weights finite and complete, read
from left to right, vocabulary as large as the tokenizer's, dropout 0, a scalar head in float32 as the file has it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from palate.errors import ConfigError, ModelError
from palate.models import adapters
from palate.models.adapters import LoraSettings
from palate.models.attention import needed_attention
from palate.models.checks import (
    check_left_to_right,
    check_reads_last_token,
    check_tokenizer,
    check_weights,
    refuse_missing,
    same_vocabulary,
)
from palate.models.dropout import without_dropout, without_dropout_config
from palate.models.heads import HEAD_NAMES, base_of, new_score_head, normalisation, scalar_head
from palate.models.precision import use_working_copies
from palate.models.quiet import did_you_mean, first_line, quiet
from palate.models.save import save_model
from palate.models.scratch import new_policy
from palate.models.sharing import stand_on

__all__ = [
    "LoraSettings",
    "check_tokenizer",
    "load_policy",
    "load_scalar",
    "load_tokenizer",
    "new_policy",
    "same_vocabulary",
    "save_model",
]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
CLASS_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")


def load_tokenizer(where: str | Path) -> Any:
    """The tokenizer of a folder or hub name; of an adapter folder without one, its base's.

    A missing pad token, or one that equals the end of text, is fine: no mask is ever made from token values.

    Raises:
        ModelError: no tokenizer there, or one that cannot be read.
    """
    from transformers import AutoTokenizer

    place = _place(where)
    if Path(place).is_dir() and not any(Path(place, name).exists() for name in TOKENIZER_FILES):
        adapter = adapters.adapter_config(place)
        if adapter and adapter.get("base_model_name_or_path"):
            return load_tokenizer(adapter["base_model_name_or_path"])
        _refuse_run_folder(place)
        raise ModelError(
            f"{where}: no tokenizer in this folder (looked for {', '.join(TOKENIZER_FILES)}). Found: {_listing(place)}. "
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
            else _hub_hint(place)
        )
        raise ModelError(f"{where}: its tokenizer cannot be loaded. {first_line(error)}{advice}") from error
    if not tokenizer.get_vocab():
        raise ModelError(f"{where}: its tokenizer has no tokens. Save the model's tokenizer into the folder again.")
    return tokenizer


def load_policy(
    where: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    lora: LoraSettings | None = None,
    trainable: bool = True,
    seed: int = 0,
    keep_dropout: bool = False,
    tokenizer: Any = None,
    trunk: nn.Module | None = None,
) -> nn.Module:
    """A causal language model as policy or reference.

    Args:
        where: a model folder, an adapter folder, or a hub name. Only safetensors are read. An adapter folder gives base
            and adapter as one peft model whose adapter is trained on; with ``lora`` the adapter is merged into the base
            first, so that the new adapter switched off is the model of the folder (the SFT model, say) and serves as
            the reference for nothing.
        dtype: "float32"; "bfloat16" (weights and arithmetic; adapters and scalar heads stay in float32); "mixed" (bf16
            products, but the weights that learn are float32: full fine-tuning with small learning rates needs it,
            because an update of less than 1/512 of a weight is lost in bf16). How mixed is done depends on the device:
            on a GPU by autocast; on a CPU the model's parameters are bf16 copies of float32 masters, which
            ``training.optimizer`` steps (``models/precision.py``), and what does not learn is bf16.
        device: "cpu", "cuda", "cuda:1", ...
        lora: a new adapter, the only thing that is trained.
        trainable: False freezes every weight.
        seed: of the new adapter.
        keep_dropout: dropouts as the model's config has them. Otherwise all are 0, as preference learning and PPO need.
        tokenizer: to check the vocabulary against; None = the folder's own.
        trunk: an adapted model of the same base, whose frozen weights this one is to use instead of its own copies.
    Raises:
        ModelError: not a causal language model, no tokenizer, weights missing, NaN or Inf, vocabulary too small; another
            base than the trunk's.
        ConfigError: a dtype, device or LoRA setting that does not exist.
    """
    place = _place(where)
    adapter = adapters.adapter_config(place)
    base = _adapter_base(place, adapter) if adapter else place
    config = _config(base)
    if _is_classifier(config):
        raise ModelError(
            f"{where}: this is a {config.architectures[0]} (a reward model or classifier), not a language model. Give the "
            "folder of a language model as policy, and this one as reward."
        )
    model, missing = _pretrained("AutoModelForCausalLM", base, config, dtype, keep_dropout)
    refuse_missing(where, missing)
    check_tokenizer(model, tokenizer or load_tokenizer(where), where)
    if adapter:
        model = adapters.attach_adapter(model, place, trainable=trainable, scalar=False)
        model = adapters.merge_adapter(model) if lora else model
    model = _placed(model, where, device, trunk, trained_whole=trainable and lora is None)
    return _ready(model, lora, trainable=trainable, seed=seed, keep_dropout=keep_dropout, scalar=False)


def load_scalar(
    where: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    lora: LoraSettings | None = None,
    trainable: bool = True,
    seed: int = 0,
    keep_dropout: bool = False,
    tokenizer: Any = None,
    new_head: bool = True,
    trunk: nn.Module | None = None,
) -> nn.Module:
    """A reward or value model: one number a token, read off the hidden state by a float32 head.

    Args:
        where: a reward folder or hub name (any decoder with a one-label ``AutoModelForSequenceClassification`` head): its
            head and normalisation are taken, so a value model made from it says, at the last response token, what the
            reward says. A causal language model: a new head is drawn, N(0, 1 / (hidden + 1)). An adapter folder of a
            reward model: base, adapter and head, as one peft model; of a language model (SFT with LoRA): merged, and a
            new head drawn. With ``lora`` any old adapter is merged into the base first.
        dtype, device, lora, trainable, keep_dropout, tokenizer, trunk: as in ``load_policy``; the head is trained with the
            adapter and saved in its folder.
        seed: of the new head and the new adapter.
        new_head: False refuses what would need a new head: a reward to be used must have been trained.
    Raises:
        ModelError: several labels, no score head where one should be, an encoder (reads its first token), and what
            ``load_policy`` raises.
    """
    place = _place(where)
    adapter = adapters.adapter_config(place)
    base = _adapter_base(place, adapter) if adapter else place
    may_draw = new_head or (adapter is not None and adapters.adapter_has_head(place))
    model = _scalar_from_folder(
        base, dtype, keep_dropout, seed, where=where, may_lack_head=adapter is not None, may_draw=may_draw
    )
    check_tokenizer(model, tokenizer or load_tokenizer(where), where)
    if adapter:
        own_head = adapters.adapter_has_head(place)
        if adapter.get("task_type") == "SEQ_CLS" and not own_head and not _is_classifier(_config(base)):
            raise ModelError(
                f"{where}: this adapter of a classifier was saved without its score head, and its base {base} has none. "
                'The trained head is lost; train again with modules_to_save=["score"] (load_scalar does so).'
            )
        model = adapters.attach_adapter(model, place, trainable=trainable, scalar=True)
        _read_score_file(model, place)
        model = model if own_head and not lora else adapters.merge_adapter(model)
    normalisation(model)  # raises on nonsense
    model = _placed(model, where, device, trunk, trained_whole=trainable and lora is None)
    return _ready(model, lora, trainable=trainable, seed=seed, keep_dropout=keep_dropout, scalar=True)


# ---------------------------------------------------------------------------------------------------------------------


def _place(where: str | Path) -> str:
    """An absolute folder, or a hub name as it is."""
    path = Path(where).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.is_file():
        raise ModelError(f"{where}: this is a file; the folder of a model was expected: {path.parent}")
    text = str(where)
    if text.startswith(("/", ".", "~")) or text.count("/") > 1 or not text:
        raise ModelError(f"{where}: there is no such folder. Expected: a model folder or a hub name (owner/name).")
    return text


def _adapter_base(place: str, adapter: Mapping[str, Any]) -> str:
    base = adapter.get("base_model_name_or_path") or ""
    if not base:
        raise ModelError(
            f'{place}: its {adapters.ADAPTER_CONFIG} names no base model. Write the base\'s folder into "base_model_name_or_path".'
        )
    try:
        return _place(base)
    except ModelError as error:
        raise ModelError(
            f"{place}: the base of this adapter, {base}, is not there. If it was moved, write its new place into "
            f'"base_model_name_or_path" of {adapters.ADAPTER_CONFIG}.'
        ) from error


def _config(place: str) -> Any:
    from transformers import AutoConfig

    folder = Path(place)
    if folder.is_dir() and not (folder / "config.json").exists():
        _refuse_run_folder(place)
        raise ModelError(
            f"{place}: not a model folder: it has no config.json. Found: {_listing(place)}. Expected a folder saved by "
            "save_pretrained."
        )
    try:
        with quiet():
            return AutoConfig.from_pretrained(place)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{place}: its config cannot be read. {first_line(error)}{_hub_hint(place)}") from error


def _refuse_run_folder(place: str) -> None:
    """A folder without a model, in which there is the folder of one."""
    for name in ("model", "checkpoint"):
        if any((Path(place) / name / file).exists() for file in ("config.json", adapters.ADAPTER_CONFIG)):
            raise ModelError(f"{place}: not a model folder, but it holds one. Did you mean {Path(place) / name}?")


def _is_classifier(config: Any) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def _pretrained(
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
            else _hub_hint(place)
        )
        raise ModelError(f"{place}: the model cannot be loaded. {first_line(error)}{advice}") from error
    if compute is not None:
        model.compute_dtype = compute  # models.forward multiplies in it
    return model, set(info["missing_keys"])


def _placed(
    model: nn.Module, where: str | Path, device: str | torch.device, trunk: nn.Module | None, *, trained_whole: bool
) -> nn.Module:
    """The model, checked, on its device, and on the trunk's weights if there is a trunk."""
    check_weights(model, where)
    if trunk is not None:
        assert adapters.is_adapted(model) or not trained_whole, "weights that are shared are never trained: give lora"
        if _is_mixed_on_cpu(base_of(model), device):
            use_working_copies(model, masters=False)  # as the trunk is held
        stand_on(model, trunk, where)
    _align(model)
    model = model.to(device_of(device))
    check_left_to_right(model, where)
    return model


def _align(model: nn.Module) -> None:
    """Weights in memory of their own, aligned as torch allocates it.

    They come as views into the mapped file, at any address, and matrix products round differently there: the same weights
    would then give last digits that depend on whether they were loaded, trained or copied.
    """
    for weight in model.parameters():
        if weight.data_ptr() % 64:
            weight.data = weight.data.clone()


def _scalar_from_folder(
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
    config = _config(place)
    classifier = _is_classifier(config)
    if classifier and config.num_labels != 1:
        labels = ", ".join(str(name) for name in config.id2label.values())
        raise ModelError(
            f"{place}: this classifier has {config.num_labels} labels ({labels}); a reward or value model has one. As a "
            'reward, choose a label: {"classifier": '
            + f'"{place}", "label": "{list(config.id2label.values())[-1]}"'
            + "}"
        )
    config.num_labels = 1
    model, missing = _pretrained("AutoModelForSequenceClassification", place, config, dtype, keep_dropout)
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
    for path in _weight_files(place) if rounded else ():
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # the file cannot be iterated
                if key.split(".")[0] == name:
                    head.get_parameter(key.removeprefix(f"{name}.")).copy_(file.get_tensor(key))


def _weight_files(place: str) -> list[str]:
    """The safetensors files of a folder or (in the hub's cache) of a hub name."""
    from transformers.utils import cached_file

    for name in ("model.safetensors", "model.safetensors.index.json"):
        with contextlib.suppress(OSError):
            path = str(cached_file(place, name))
            if name.endswith(".safetensors"):
                return [path]
            shards = sorted(set(json.loads(Path(path).read_text("utf-8"))["weight_map"].values()))
            return [str(cached_file(place, shard)) for shard in shards]
    return []


def _read_score_file(model: nn.Module, place: str) -> None:
    path = adapters.adapter_file(place, adapters.SCORE_FILE)
    if path is not None:
        config, stored = base_of(model).config, json.loads(path.read_text("utf-8"))
        config.score_mean, config.score_std = stored["score_mean"], stored["score_std"]


def _ready(
    model: Any, lora: LoraSettings | None, *, trainable: bool, seed: int, keep_dropout: bool, scalar: bool
) -> Any:
    """Last touches: the new adapter, dropouts, what is trained."""
    inner = base_of(model)
    # An embedding never learns at its padding_idx, and the pad token may be the end of text. Masks make it needless.
    inner.get_input_embeddings().padding_idx = None
    if not adapters.is_adapted(model):
        model.requires_grad_(trainable)
    if not keep_dropout:
        without_dropout(model)
    if lora is not None:
        model = adapters.add_lora(model, lora, seed=seed, scalar=scalar)
    if not trainable:
        model.requires_grad_(False)
    if _is_mixed_on_cpu(inner, inner.device):
        del inner.compute_dtype
        use_working_copies(model)
    # Training mode only matters to dropout here; without it, evaluation mode keeps every other kind of noise off too.
    model.train(trainable and (keep_dropout or (lora is not None and lora.dropout > 0)))
    return model


def _is_mixed_on_cpu(inner: nn.Module, device: str | torch.device) -> bool:
    return getattr(inner, "compute_dtype", None) is not None and torch.device(device).type == "cpu"


def dtypes_of(dtype: str | torch.dtype) -> tuple[torch.dtype, torch.dtype | None]:
    """(of the weights, of the arithmetic when it differs)."""
    known = {
        "float32": (torch.float32, None),
        "bfloat16": (torch.bfloat16, None),
        "mixed": (torch.float32, torch.bfloat16),
    }
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise ConfigError(f'dtype "{name}" is not known.{did_you_mean(name, known)} Choose from: {", ".join(known)}.')
    return known[name]


def device_of(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f'device "{device}" is not known. Write "cpu", "cuda" or "cuda:0".') from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f'device "{device}": this machine has no CUDA device that torch can use. Write "cpu".')
    return chosen


def _listing(place: str) -> str:
    names = sorted(p.name for p in Path(place).iterdir())
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"


def _hub_hint(place: str) -> str:
    if Path(place).is_dir():
        return ""
    return f" There is no folder {place} here, so it was looked for on the model hub: check the name and the network."
