"""The settings of a run: typed, checked, complete.

What wins: an override (``training.learning_rate=1e-5``) over a flag (``--model M``) over the settings file
(``--config file.yaml``) over the method's defaults. Unknown keys are refused with the nearest known one; values out of
range are refused with the key, the place where it was written, what was found and what was expected. The resolved
settings are written to the run's ``config.yaml``, which is itself a settings file.

Short forms: ``method: reward`` for ``method.name``, ``data: file.jsonl`` for ``data.train``, ``lora: true`` for LoRA
with its defaults, ``environment: module:name`` for ``environment.function``, ``seed`` for ``training.seed``.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, TypeAdapter, ValidationError, field_validator

from palate.environment import EnvironmentSettings
from palate.errors import ConfigError
from palate.generation.engines import EngineName
from palate.generation.settings import SamplingSettings
from palate.lookup import method_class
from palate.method_docs import Setting, settings_of
from palate.models.adapters import LoraSettings
from palate.settings_problems import truths_as_numbers, unknown_keys, wrong_values
from palate.settings_tree import Layer, flatten, merge, put, read_overrides, read_yaml, spelled_out
from palate.training.settings import TrainingSettings


@dataclass(frozen=True)
class DataSettings:
    """Where the records are and how much of each is kept.

    Attributes:
        train: a file (.jsonl, .jsonl.gz, .json, .parquet, .csv), a store of feedback (feedback.db), a folder, a hub name,
            or "-" for standard input.
        validation: the same, or None: then ``validation_fraction`` of the prompts of ``train`` are held out.
        pretraining: text for PPO's pre-training mix (``method.ptx_coef``), read like demonstrations; None = none.
        validation_fraction: share of the prompts held out, in [0, 1); a prompt is never on both sides.
        split_by: "prompt"; "opening" keeps all conversations with the same first user turn on one side.
        format: "auto" detects the public shapes; else its name: trl, openai, sharegpt, alpaca, hh_rlhf, ...
        rename: fields to read under another name, {name in the file: name expected}.
        split: of a hub data set.
        limit: read at most so many records; None = all.
        max_length: tokens of prompt and response together; None = what the model can hold, 1024 at most.
        max_prompt_length: tokens of the prompt; None = whatever the response leaves free.
        labels: of a store of feedback (feedback.db), what comparisons are made of: "each" = every annotator's own answer,
            "consensus" = one for each pair, with the probability that the annotator-aware model gives it.
        prompt_words: of prompts that are plain text, keep the first so many words (the opening of a text that the policy
            goes on with); None = all. For methods that read prompts.
        truncate: what is cut of a record that is too long: "left_prompt" = the prompt's beginning, then the response's
            end; "right" = the response's end; "drop" = the record is dropped, and counted.
        chat_template: None = the model's own, "none" = plain text, "default" = the documented default, else Jinja text
            or the path of a file with it.
        system: a system message put before every conversation; None = none.
        cache: where tokenised records are kept for later runs over the same data: a folder, "auto" (PALATE_CACHE, else the
            user's cache folder), or "off" = tokenised in every run. Changes no number.
    """

    train: str | None = None
    validation: str | None = None
    pretraining: str | None = None
    validation_fraction: float = 0.1
    split_by: Literal["prompt", "opening"] = "prompt"
    format: str = "auto"
    rename: dict[str, str] = field(default_factory=dict)
    split: str = "train"
    limit: int | None = None
    max_length: int | None = None
    max_prompt_length: int | None = None
    labels: Literal["each", "consensus"] = "each"
    prompt_words: int | None = None
    truncate: Literal["left_prompt", "right", "drop"] = "left_prompt"
    chat_template: str | None = None
    system: str | None = None
    cache: str | bool = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.cache, bool):  # YAML reads off as false
            object.__setattr__(self, "cache", "auto" if self.cache else "off")
        if not self.cache:
            raise ConfigError('data.cache: found \'\', expected "auto", "off" or a folder.')
        fraction = self.validation_fraction
        if not 0 <= fraction < 1:
            raise ConfigError(f"data.validation_fraction: found {fraction!r}, expected a share in [0, 1).")
        for name in ("limit", "max_length", "max_prompt_length", "prompt_words"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name}: found {value!r}, expected a whole number above 0, or null.")


@dataclass(frozen=True)
class MethodChoice:
    """A method's name and its settings, the frozen dataclass ``METHOD`` of its module."""

    name: str
    settings: Any


class RunConfig(BaseModel):
    """All settings of one stage of training, validated; made by ``load_config``."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    method: MethodChoice
    model: str | dict[str, Any] = Field(
        description="what is trained: a folder or hub name (policy; of a reward method, the backbone), or the shape of a "
        "new one: {architecture: llama, hidden_size: 64, ...}"
    )
    tokenizer: str | None = Field(None, description="a folder or hub name; null = the model's own")
    reference: str | None = Field(
        None,
        description="frozen reference; null = the model as it is before training (with LoRA: adapter off). For a reward "
        "method: whose samples its scores are normalised on; null = on the responses of the records",
    )
    reference_cache: str = Field(
        "auto",
        description="where the log-probs of a frozen reference are kept, computed once before training: a folder, "
        '"auto" (PALATE_CACHE, else the user\'s cache folder), or "off" = the reference is asked in every batch',
    )
    reward: str | dict[str, Any] | list[Any] | None = Field(
        None,
        description="a reward model's folder, a classifier, a function module:name, a check, a service, an ensemble, or a "
        "weighted sum of several, written out or in a .yaml file",
    )
    value: str | None = Field(
        None, description="what the value model starts from; null = the reward model's folder, else the model"
    )
    offload: list[Literal["reference", "reward", "value"]] = Field(
        default_factory=list,
        description="frozen roles that are in the CPU's memory and visit the device only while a batch is prepared: saves "
        "their bytes there, costs the copying; changes no number, no effect on a CPU",
    )
    lora: LoraSettings | None = Field(None, description="train an adapter instead of all weights; true = its defaults")
    sharing: Literal["separate", "reference", "trunk", "value_head"] = Field(
        "reference",
        description="which roles use the same weights: separate = none; reference = the reference is the policy without its "
        "adapter; trunk = reference, reward and value are adapters and heads on the policy's frozen trunk; value_head = the "
        "same, with the value as a head on the policy itself",
    )
    dtype: Literal["float32", "bfloat16", "mixed"] = Field(
        "float32",
        description="of weights and products; mixed = bfloat16 products, and float32 for the weights that learn; heads are "
        "float32; see docs/runs.md",
    )
    device: str = Field("auto", description='"cpu", "cuda", "cuda:1"; "auto" = cuda where there is one')
    data: DataSettings = Field(default_factory=DataSettings)
    sampling: SamplingSettings = Field(default_factory=SamplingSettings)
    engine: EngineName = Field(
        "embedded",
        description='what draws the responses: "embedded" (palate\'s own sampler) or "vllm" (an optional package; the '
        "policy alone, no mixtures)",
    )
    environment: EnvironmentSettings | None = Field(
        None, description="what answers the policy in conversations of several turns; null = one response a prompt"
    )
    samples_per_prompt: int = Field(1, ge=1, description="responses drawn for each prompt")
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    trackers: list[str] = Field(
        default_factory=list, description="tensorboard, wandb, trackio; metrics.jsonl is always written"
    )
    out: Path = Field(description="the run's folder")
    name: str = Field("", description='of the run; "" = the last part of out')

    _layer: Layer = PrivateAttr(default_factory=Layer)
    _filled: tuple[str, ...] = PrivateAttr(())

    @field_validator("dtype", mode="before")
    @classmethod
    def _short_dtype(cls, value: Any) -> Any:
        return {"fp32": "float32", "bf16": "bfloat16"}.get(value, value) if isinstance(value, str) else value

    @field_validator("reward", mode="before")
    @classmethod
    def _reward_in_full(cls, value: Any) -> Any:
        return spelled_out(value, "reward")

    @field_validator("reference_cache", mode="before")
    @classmethod
    def _yaml_switch(cls, value: Any) -> Any:
        if value == "":
            raise ConfigError('reference_cache: found \'\', expected "auto", "off" or a folder.')
        return {False: "off", True: "auto"}[value] if isinstance(value, bool) else value  # YAML reads off as false

    @field_validator("trackers", "offload", mode="before")
    @classmethod
    def _one_of_them(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @property
    def run_name(self) -> str:
        return self.name or self.out.name

    def place_of(self, key: str) -> str:
        """Where a dotted key was written; "" when it is a default."""
        return self._layer.place_of(key)

    def is_default(self, key: str) -> bool:
        """Whether nobody set this key."""
        return key not in self._layer.places

    @property
    def filled(self) -> dict[str, str]:
        """Keys that were filled in after reading -> why with this value."""
        return {key: self.place_of(key) for key in self._filled}

    def fill(self, key: str, value: Any, reason: str) -> RunConfig:
        """A copy with one dotted key set that nobody had set, checked like any other."""
        above = Layer()
        put(above, key, value, reason)
        copy = config_from(merge([self._layer, above]))
        copy._filled = (*self._filled, key)
        return copy

    def to_dict(self) -> dict[str, Any]:
        """All settings, defaults included, as plain values that YAML can hold."""
        values: dict[str, Any] = {"method": {"name": self.method.name} | dataclasses.asdict(self.method.settings)}
        for key in type(self).model_fields:
            if key != "method":
                value = getattr(self, key)
                is_section = dataclasses.is_dataclass(value) and not isinstance(value, type)
                values[key] = dataclasses.asdict(value) if is_section else value
        return typing.cast("dict[str, Any]", _plain(values))

    def to_yaml(self) -> str:
        """``config.yaml``: every setting; what palate filled in stands at the top with its reason."""
        filled = "".join(f"# {key}: {reason}\n" for key, reason in self.filled.items())
        return filled + yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)


def load_config(
    method: str | None = None,
    *,
    file: str | Path | None = None,
    flags: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """The settings of a run from the command line.

    Args:
        method: the method's name; None = from the file.
        file: a YAML settings file.
        flags: dotted key -> value; None values are flags that were not given.
        overrides: ``section.key=value`` texts.
    Raises:
        ConfigError: with one line for each thing that is wrong.
    """
    given = Layer()
    if method is not None:
        put(given, "method.name", method, "the command's METHOD")
    for key, value in (flags or {}).items():
        if value is not None:
            put(given, key, value, "--data" if key == "data.train" else f"--{key.rpartition('.')[2]}")
    return _layered(file, [given, *(read_overrides([text]) for text in overrides)])


def load_settings(
    method: str | None = None,
    *,
    file: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The settings of a run from Python: ``settings`` as nested mappings, ``overrides`` by dotted key.

    Raises:
        ConfigError: with one line for each thing that is wrong.
    """
    layers = []
    for key, value in ({"method.name": method} if method is not None else {}).items():
        put(named := Layer(), key, value, "method")
        layers.append(named)
    for key, value in flatten(_plain({k: v for k, v in (settings or {}).items() if v is not None})).items():
        put(given := Layer(), key, value, f"argument {key}")
        layers.append(given)
    for key, value in (overrides or {}).items():
        put(above := Layer(), key, _plain(value), f"override {key}")
        layers.append(above)
    return _layered(file, layers)


def _layered(file: str | Path | None, above: Sequence[Layer]) -> RunConfig:
    layers = [read_yaml(file)] if file is not None else []
    return config_from(merge([long_forms(layer) for layer in (*layers, *above)]))


def config_from(layer: Layer) -> RunConfig:
    """Check merged settings.

    Raises:
        ConfigError: unknown method, unknown key, wrong type, out of range, or a required setting missing.
    """
    values = dict(layer.values)
    section = dict(values.get("method") or {})
    name = section.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError('no method is named. Write: palate train METHOD, or "method: METHOD" in the settings file.')
    cls = method_class(name)
    problems = unknown_keys(layer, known_keys(cls))
    if problems:
        raise ConfigError("\n".join(problems))
    annotations = _annotations(cls)
    problems += truths_as_numbers(layer, annotations)
    try:
        settings = TypeAdapter(cls).validate_python(section)
    except ValidationError as error:
        settings, problems = None, problems + wrong_values(error, "method.", layer, annotations)
    values["method"] = MethodChoice(name, settings)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        problems += wrong_values(error, "", layer, annotations)
    if problems:
        raise ConfigError("\n".join(problems))
    config._layer = layer
    return config


def known_keys(method: Any) -> dict[str, bool]:
    """Every dotted key that a run with this method understands -> whether keys of one's own may follow below it."""
    sections = {key for key, info in RunConfig.model_fields.items() if _dataclass_in(info.annotation) is not None}
    return {"method.name": False} | {
        key: key not in sections and _is_open(annotation) for key, annotation in _annotations(method).items()
    }


def _annotations(method: Any) -> dict[str, Any]:
    """Every dotted key -> what its value may be, as it stands in the code."""
    found = {f"method.{f.name}": f.type for f in dataclasses.fields(method) if f.init}
    for key, info in RunConfig.model_fields.items():
        section = _dataclass_in(info.annotation)
        if section is MethodChoice:
            continue
        found[key] = info.annotation
        if section is not None:
            found |= {f"{key}.{f.name}": f.type for f in dataclasses.fields(section) if f.init}
    return found


def shared_settings() -> dict[str, list[Setting]]:
    """The settings that every method's run has, by section; "" holds those at the top."""
    found: dict[str, list[Setting]] = {"": []}
    for key, info in RunConfig.model_fields.items():
        section = _dataclass_in(info.annotation)
        if section is not None and section is not MethodChoice:
            found[key] = settings_of(section)
        elif section is None:
            default = dataclasses.MISSING if info.is_required() else info.get_default(call_default_factory=True)
            found[""].append(Setting(key, inspect.formatannotation(info.annotation), default, info.description or ""))
    return found


def _is_open(annotation: Any) -> bool:
    return "dict" in str(annotation).lower() or "mapping" in str(annotation).lower()


def _dataclass_in(annotation: Any) -> type | None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((a for a in options if isinstance(a, type) and dataclasses.is_dataclass(a)), None)


_SHORT = {
    "method": "method.name",
    "data": "data.train",
    "environment": "environment.function",
    "seed": "training.seed",
}


def long_forms(layer: Layer) -> Layer:
    """The short forms, spelled out."""
    values, places = dict(layer.values), dict(layer.places)
    for short, long in _SHORT.items():
        given = values.get(short, {})
        if not isinstance(given, Mapping) and not (given is None and short == "environment"):
            value, place = values.pop(short), places.pop(short, "")
            section = long.partition(".")[0]
            if section in values:
                values[section] = dict(values[section] or {})
            put(Layer(values, places), long, value, place)
    if isinstance(values.get("lora"), bool):
        values["lora"] = {} if values["lora"] else None
    return Layer(values, places)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
