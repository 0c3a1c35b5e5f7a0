"""palate from Python: what the commands do, with Python values in and out.

import palate
run = palate.train("reward", model="models/sft", data="comparisons.jsonl", out="runs/reward")
palate.score(run / "model", ["How are you?"], ["Fine, thank you."])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palate.errors import ConfigError
from palate.method_docs import Explanation

if TYPE_CHECKING:
    from palate.data.kinds import PromptText
    from palate.texts import Checked

__all__ = ["check", "explain", "run", "sample", "score", "train"]


def train(
    method: str | None = None,
    *,
    config: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Path:
    """Train one method; the same call on an unfinished run resumes it.

    Args:
        method: "sft", "reward", "ppo", ... or "my_package.my_method"; None = from ``config``.
        config: a YAML settings file.
        overrides: dotted keys, which win over everything: {"training.learning_rate": 1e-5}.
        quiet: print nothing.
        settings: the settings of a run by section, as in the file: ``model=``, ``data=`` (a path or a mapping), ``out=``,
            ``reward=``, ``lora=True``, ``training={"epochs": 2}``, ``method_settings={"kl_coef": 0.1}``.
    Returns:
        The run's folder; its ``model`` folder is what plain transformers loads.
    Raises:
        PalateError: what is wrong and what to do.

    >>> palate.train("ppo", model="runs/sft/model", reward="runs/reward/model", data="prompts.jsonl", out="runs/ppo")
    ... # doctest: +SKIP
    PosixPath('runs/ppo')
    """
    from palate.config import load_settings
    from palate.stage import run_stage

    if "method_settings" in settings:
        settings["method"] = settings.pop("method_settings")
    return run_stage(load_settings(method, file=config, settings=settings, overrides=overrides or {}), quiet=quiet)


def sample(
    model: str | Path,
    prompts: Sequence[PromptText],
    *,
    samples_per_prompt: int = 1,
    seed: int = 0,
    chat_template: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    engine: str = "embedded",
    progress: Callable[[int, int], None] | None = None,
    **decoding: Any,
) -> list[dict[str, Any]]:
    """Responses of a model.

    Args:
        model: folder or hub name.
        prompts: texts or conversations.
        engine: what samples, "embedded" or "vllm".
        decoding: ``max_new_tokens=64, temperature=1.0, top_p=1.0, top_k=0, min_new_tokens=0``.
    Returns:
        {"prompt", "response", "finished"} for each response, in the order of the prompts.
    """
    from palate.texts import sample_records

    if isinstance(prompts, str):
        raise ConfigError("prompts is one string; give a list of prompts.")
    return sample_records(
        str(model),
        prompts,
        decoding=decoding,
        samples_per_prompt=samples_per_prompt,
        seed=seed,
        chat_template=chat_template,
        dtype=dtype,
        device=device,
        engine=engine,
        progress=progress,
    )


def score(
    reward: Any,
    prompts: Sequence[PromptText],
    responses: Sequence[str],
    *,
    finished: Sequence[bool] | None = None,
    tokenizer: str | Path | None = None,
    max_length: int | None = None,
    chat_template: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
) -> list[float]:
    """What a reward says of each response: the number that training saw.

    Args:
        reward: a reward model's folder or hub name, "module:function", a Python function, or a mapping of several.
        prompts, responses: equally many.
        finished: whether each response ended by itself; None = all did. One that was cut off is scored without an end
            of text.
        tokenizer: for a reward without one of its own.
    Raises:
        ConfigError: not as many prompts as responses. DataError: an empty response.
    """
    from palate.data.kinds import Demonstration
    from palate.errors import DataError
    from palate.texts import Scorable, score_records

    for name, given in (("prompts", prompts), ("responses", responses)):
        if isinstance(given, str):
            raise ConfigError(f"{name} is one string; give a list of {name}.")
    if len(prompts) != len(responses):
        raise ConfigError(f"{len(prompts)} prompts for {len(responses)} responses; one for each was expected.")
    ends = [True] * len(responses) if finished is None else list(finished)
    records = [
        Scorable(Demonstration(prompt, response, source=f"pair {i}"), end)
        for i, (prompt, response, end) in enumerate(zip(prompts, responses, ends, strict=True))
    ]
    found = score_records(
        str(reward) if isinstance(reward, Path) else reward,
        records,
        tokenizer=None if tokenizer is None else str(tokenizer),
        max_length=max_length,
        chat_template=chat_template,
        dtype=dtype,
        device=device,
    )
    scores = [line["score"] for line in found.lines]
    if None in scores:
        raise DataError(f"pair {scores.index(None)}: the response is empty; there is nothing to score.")
    return scores


def check(model: str | Path, data: str | Path | None = None, **options: Any) -> Checked:
    """What is trained and what is masked, token by token, and what is wrong with the template; see ``texts.looking``."""
    from palate.texts import check_tokens

    return check_tokens(str(model), None if data is None else str(data), **options)


def explain(method: str) -> Explanation:
    """A method's paper, equations, roles, data and settings; ``print`` it.

    Raises:
        ConfigError: no such method.
    """
    from palate.lookup import find_method
    from palate.method_docs import explain as explanation_of

    return explanation_of(find_method(method))


def run(
    pipeline: str | Path, *, out: str | Path | None = None, overrides: Sequence[str] = (), quiet: bool = False
) -> dict[str, Any]:
    """Run a pipeline, stage by stage: a built-in name ("quickstart") or a YAML file.

    Returns:
        {"out": folder, "seconds", "stages": {name: figures}}.
    """
    from palate.pipelines.runner import run_pipeline

    return run_pipeline(pipeline, out=out, overrides=overrides, quiet=quiet)
