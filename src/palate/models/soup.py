"""Rewarded soups: one policy from several, by the weighted mean of their weights -- Rame et al. 2023, arXiv:2306.04488.

    theta = sum_i w_i theta_i,      w_i >= 0,  sum_i w_i = 1                                           (section 2.2, step 2)

The theta_i start from the same model and were trained on different rewards. Then theta is close to what training on
sum_i w_i r_i would have given, for every w, after n trainings. It is exact where the policy is log-linear in what is
averaged and a response is one step: logits add, so pi ~ prod_i pi_i^(w_i), and with pi_i = ref exp(r_i / beta) / Z_i that is
ref exp(sum_i w_i r_i / beta) / Z. For sequences, and for deep networks, it is an approximation: measure it.

Whole models are read and written tensor by tensor, so that memory holds one tensor of each. Of LoRA adapters it is their
updates that are averaged, not their factors: the ranks add up,

    sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...],      s_i = alpha_i / rank_i.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palate.errors import ConfigError, ModelError
from palate.models import adapters
from palate.models.load import load_tokenizer
from palate.models.save import new_folder

SOUP_FILE = "soup.json"  # what a soup is made of
ALIKE = 0.5  # cosine of two models' weights below which they cannot come from the same start
# Not the architecture: where a model was saved, and by what.
_OF_THE_FILE = ("_name_or_path", "transformers_version", "architectures", "use_cache")
_WEIGHTS, _INDEX, _ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
_LONGEST_LIST = 200  # soups of one grid


@dataclass(frozen=True)
class Soup:
    """What was made.

    Attributes:
        folder: a model folder, or an adapter folder of the same base.
        weights: of the ingredients, in their order.
        cosine: between the matrices of the first ingredient and of the one least like it; 1 = equal, about 0 = of
            different starts. None for adapters, whose common start is their base.
    """

    folder: Path
    weights: tuple[float, ...]
    cosine: float | None


def make_soup(
    models: Sequence[str | Path], weights: Sequence[float], out: str | Path, *, overwrite: bool = False
) -> Soup:
    """Write the weighted mean of policies as one folder, with config and tokenizer of the first.

    Args:
        models: at least two folders of whole models, or at least two LoRA adapter folders of one base.
        weights: one each, >= 0, with sum 1.
        out: written whole or not at all.
        overwrite: replace an earlier model folder.
    Raises:
        ConfigError: the weights.
        ModelError: folders that are not policies, or of different architectures, tokenizers, bases, or starts.
        RunError: ``out`` exists, or cannot be written.
    """
    found, mixed = check_ingredients(models), check_weights(weights, len(models))
    with new_folder(out, overwrite=overwrite) as target:
        if found.adapters:
            cosine = None
            _mix_adapters(found, mixed, target)
        else:
            cosine = _mix_models(found.folders, mixed, target)
        _copy_the_rest(found.folders[0], target)
        made = {"models": [str(folder) for folder in found.folders], "weights": list(mixed), "cosine": cosine}
        (target / SOUP_FILE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return Soup(Path(out), mixed, cosine)


def grid(models: int, points: int) -> list[tuple[float, ...]]:
    """All weights in steps of 1 / (points - 1), from all of the first to all of the last.

    >>> grid(2, 3)
    [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    >>> len(grid(3, 5))
    15

    Raises:
        ConfigError: fewer than 2 points, or more soups than anybody would measure.
    """
    if points < 2:
        raise ConfigError(
            f"--grid {points}: at least 2 was expected; 2 gives the models themselves, 3 adds the middle."
        )
    steps = points - 1
    count = math.comb(steps + models - 1, models - 1)
    if count > _LONGEST_LIST:
        raise ConfigError(
            f"--grid {points} of {models} models is {count} soups; at most {_LONGEST_LIST} are made at once."
        )
    return sorted((tuple(n / steps for n in parts) for parts in _parts(steps, models)), reverse=True)


def _parts(total: int, count: int) -> Iterator[tuple[int, ...]]:
    """Every way to write ``total`` as a sum of ``count`` whole numbers >= 0."""
    for bars in combinations(range(total + count - 1), count - 1):
        edges = (-1, *bars, total + count - 1)
        yield tuple(b - a - 1 for a, b in pairwise(edges))


def soup_name(weights: Sequence[float]) -> str:
    """Folder name of one soup of a family.

    >>> soup_name((0.75, 0.25))
    '0.75-0.25'
    """
    return "-".join(f"{weight:.4g}" for weight in weights)


def check_weights(weights: Sequence[float], models: int) -> tuple[float, ...]:
    """The weights as they are.

    Raises:
        ConfigError: another number than there are models, below 0, not finite, or with another sum than 1.
    """
    given = ",".join(f"{w:g}" for w in weights)
    if len(weights) != models:
        raise ConfigError(f"--weights {given}: {len(weights)} weight(s) for {models} models; one each was expected.")
    if not all(math.isfinite(w) and w >= 0 for w in weights):
        raise ConfigError(f"--weights {given}: numbers of at least 0 were expected.")
    if abs(sum(weights) - 1) > 1e-6:
        total = sum(weights)
        hint = f" Did you mean {','.join(f'{w / total:.4g}' for w in weights)}?" if total > 0 else ""
        raise ConfigError(f"--weights {given}: their sum is {total:g}; 1 was expected.{hint}")
    return tuple(float(w) for w in weights)


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i x_i in float32 (float64 of float64), in the dtype of the first; whole numbers as the first has them.

    What has weight 0 takes no part, so that a weight of 1 gives back its model bit by bit.
    """
    first = tensors[0]
    if not first.is_floating_point():
        return first
    wide = torch.promote_types(first.dtype, torch.float32)
    total = torch.zeros(first.shape, dtype=wide)
    for tensor, weight in zip(tensors, weights, strict=True):
        if weight:
            total += weight * tensor.to(wide)
    return total.to(first.dtype)


# -- what may be mixed -----------------------------------------------------------------------------------------------


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
    kinds = [(folder / adapters.ADAPTER_CONFIG).is_file() for folder in folders]
    if any(kinds) and not all(kinds):
        raise ModelError(
            f"{folders[kinds.index(True)]} is an adapter and {folders[kinds.index(False)]} a whole model; they cannot be "
            "averaged. Give adapters of one base, or whole models (save_model(..., merge_adapter=True))."
        )
    names = (adapters.ADAPTER_CONFIG,) if all(kinds) else ("config.json",)
    configs = tuple(_read_json(folder / name) for folder in folders for name in names)
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
    if any((path / name).is_file() for name in ("config.json", adapters.ADAPTER_CONFIG)):
        return path.resolve()
    inside = path / "model"
    hint = f" Did you mean {inside}?" if inside.is_dir() else ""
    raise ModelError(f"{where}: not a model folder: neither config.json nor {adapters.ADAPTER_CONFIG} is there.{hint}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON ({error}). Save the model again.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: one JSON object was expected. Save the model again.")
    return found


def _refuse_scores(folder: Path, config: Mapping[str, Any]) -> None:
    classifier = any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ())
    if classifier or config.get("task_type") == "SEQ_CLS" or config.get("modules_to_save"):
        raise ModelError(
            f"{folder}: this is a reward or value model (or has whole layers beside its adapter); soups are of policies. "
            "Rewards are combined by their scores: {ensemble: [one, another]}."
        )


def _same_architecture(one: Path, first: Mapping[str, Any], other: Path, second: Mapping[str, Any]) -> None:
    keys = [key for key in dict.fromkeys([*first, *second]) if key not in _OF_THE_FILE]
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


# -- whole models ----------------------------------------------------------------------------------------------------


def _mix_models(folders: Sequence[Path], weights: Sequence[float], target: Path) -> float:
    """Write the files of the first with the means in their places; returns the smallest cosine to the first."""
    with ExitStack() as stack:
        readers = [_Reader(folder, stack) for folder in folders]
        for reader in readers[1:]:
            readers[0].compare(reader)
        alike = _Alike(len(folders))
        for path in readers[0].files:
            _write_like(path, target / path.name, lambda name: _mean(readers, name, weights, alike))
    cosine, which = alike.least()
    if cosine < ALIKE:
        raise ModelError(
            f"{folders[0]} and {folders[which]} do not come from the same start: the cosine of their weights is {cosine:.2f} "
            f"(at least {ALIKE} was expected; about 1 is usual). A mean of unrelated networks computes nothing. Train each "
            "from the same model."
        )
    return cosine


def _mean(readers: Sequence[_Reader], name: str, weights: Sequence[float], alike: _Alike) -> Tensor:
    tensors = [reader.tensor(name) for reader in readers]
    alike.add(tensors)
    return weighted_mean(tensors, weights)


class _Reader:
    """The tensors of one model folder, by name, however many files they are in."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        self.where: dict[str, Any] = {}  # tensor -> the open file that has it
        self.files = _weight_files(folder)
        for path in self.files:
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{path}: cannot be read ({error}). Fetch or save it again.") from error
            self.where |= dict.fromkeys(file.keys(), file)

    def tensor(self, name: str) -> Tensor:
        found: Tensor = self.where[name].get_tensor(name)
        if not bool(found.isfinite().all()):
            raise ModelError(f"{self.folder}: {name} holds NaN or Inf. The run that saved it had diverged.")
        return found

    def compare(self, other: _Reader) -> None:
        """Refuse other names, shapes or dtypes."""
        missing = sorted(self.where.keys() ^ other.where.keys())
        if missing:
            raise ModelError(
                f"{self.folder} and {other.folder}: {len(missing)} tensor(s) are in one of them only, first {missing[0]}. "
                "Only models of one shape can be averaged."
            )
        for name, file in self.where.items():
            ours, theirs = file.get_slice(name), other.where[name].get_slice(name)
            for what, a, b in (
                ("shape", ours.get_shape(), theirs.get_shape()),
                ("dtype", ours.get_dtype(), theirs.get_dtype()),
            ):
                if a != b:
                    raise ModelError(
                        f"{self.folder} and {other.folder}: {name} has {what} {a} and {b}. Save both in the same way."
                    )


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        names = sorted(set(_read_json(folder / _INDEX)["weight_map"].values()))
        return [folder / str(name) for name in names]
    raise ModelError(f"{folder}: no {_WEIGHTS}. Only safetensors are read; save the model again in that form.")


class _Alike:
    """Cosines between the first model's matrices and every other's, summed up tensor by tensor."""

    def __init__(self, models: int) -> None:
        self.dots = torch.zeros(models, 3, dtype=torch.float64)  # x.y, x.x, y.y

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Vectors are left out: norms' gains are near 1 in every network."""
        if tensors[0].ndim < 2 or not tensors[0].is_floating_point():
            return
        x = tensors[0].flatten().float()
        for i, tensor in enumerate(tensors):
            y = tensor.flatten().float()
            self.dots[i] += torch.stack([x @ y, x @ x, y @ y]).double()

    def least(self) -> tuple[float, int]:
        """The smallest cosine, and whose."""
        x_y, x_x, y_y = self.dots.unbind(1)
        cosines = x_y / (x_x * y_y).sqrt().clamp(min=1e-30)
        which = int(cosines.argmin())
        return float(cosines[which]), which


def _write_like(source: Path, target: Path, tensor: Any) -> None:
    """A safetensors file with the header of ``source`` and ``tensor(name)`` in each place.

    Layout: 8 bytes with the length of the header (little-endian), the header (JSON: name -> dtype, shape, data_offsets),
    then the tensors' bytes one after the other.
    """
    with open(source, "rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    with open(target, "wb") as file:
        file.write(size + header)
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            data = tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy()
            start, end = entry["data_offsets"]
            assert len(data) == end - start
            file.write(memoryview(data))


# -- adapters --------------------------------------------------------------------------------------------------------


def _mix_adapters(found: Ingredients, weights: Sequence[float], target: Path) -> None:
    """Factors side by side: the rank of the soup is the sum of the ranks, and its scale is 1."""
    from safetensors.torch import load_file, save_file

    factors = []
    for folder in found.folders:
        if not (folder / _ADAPTER).is_file():
            raise ModelError(f"{folder}: an {adapters.ADAPTER_CONFIG} but no {_ADAPTER}. Save the adapter again.")
        factors.append(load_file(folder / _ADAPTER))
        bad = [name for name, tensor in factors[-1].items() if not bool(tensor.isfinite().all())]
        if bad:
            raise ModelError(f"{folder}: {bad[0]} holds NaN or Inf. The run that saved it had diverged.")
        if factors[-1].keys() != factors[0].keys():
            odd = min(factors[-1].keys() ^ factors[0].keys())
            raise ModelError(
                f"{found.folders[0]} and {folder} adapt different layers ({odd} is in one of them only). Train both with the "
                "same lora.target_modules."
            )
    scales = [weight * _scale(config) for weight, config in zip(weights, found.adapters, strict=True)]
    mixed = {name: _joined(name, [each[name] for each in factors], scales) for name in factors[0]}
    rank = sum(int(config["r"]) for config in found.adapters)
    own = {"r": rank, "lora_alpha": rank, "use_rslora": False}
    config = dict(found.adapters[0]) | own
    save_file(mixed, target / _ADAPTER, metadata={"format": "pt"})
    (target / adapters.ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _scale(config: Mapping[str, Any]) -> float:
    """s in s B A; rank-stabilised LoRA divides by the root of the rank."""
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _joined(name: str, parts: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    if "lora_A" in name or "lora_embedding_A" in name:
        return torch.cat(list(parts), 0).contiguous()
    if "lora_B" in name or "lora_embedding_B" in name:
        scaled = [
            scale * part.float() if scale else torch.zeros_like(part) for scale, part in zip(scales, parts, strict=True)
        ]
        return torch.cat([part.to(parts[0].dtype) for part in scaled], 1).contiguous()
    raise ModelError(f"{name}: no factor of a plain LoRA adapter. Merge each adapter into its base first.")


def _copy_the_rest(source: Path, target: Path) -> None:
    """Config, generation config, tokenizer, template, index of shards: everything but weights and descriptions."""
    for path in sorted(source.iterdir()):
        readable = path.suffix in (".json", ".jinja", ".txt", ".model", ".tiktoken")
        if path.is_file() and readable and not (target / path.name).exists() and path.name != SOUP_FILE:
            shutil.copyfile(path, target / path.name)
