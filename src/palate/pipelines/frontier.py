"""Several runs from the same model, measured on the way: what each earned for the distance it went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palate.data.collate import encode_records
from palate.data.records import Prompt
from palate.models.load import load_policy
from palate.models.rewards import load_reward
from palate.pipelines.answers import Speaker
from palate.pipelines.measure import Yardstick, along, saved_step


def trace(
    reference: str,
    runs: Mapping[str, str],
    prompts: Sequence[Prompt],
    gold: str,
    *,
    samples_per_prompt: int = 1,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure the start, the checkpoints that a run kept on the way to its model, and the model; all on the same prompts.

    The model of a run with ``training.best_metric`` is its best checkpoint; later ones are no part of the way to it.

    Args:
        reference: where all runs started.
        runs: name -> run folder.
        gold: "module:function"; the preference that counts.

    Returns:
        {"prompts", "samples_per_prompt", "start": quantities, "runs": {name: [{"step", "final", **quantities}, ...]}}.
    """
    speaker = Speaker.load(reference)
    items, _ = encode_records(prompts, "prompts", speaker.chat, max_length=_room(speaker.policy, max_new_tokens))
    stick = Yardstick(
        speaker.chat,
        items,
        reference=speaker.policy,
        gold=load_reward(gold, speaker.chat),
        max_new_tokens=max_new_tokens,
        samples_per_prompt=samples_per_prompt,
        seed=seed,
    )
    found: dict[str, Any] = {
        "prompts": len(items),
        "samples_per_prompt": samples_per_prompt,
        "start": stick.measure(speaker.policy),
        "runs": {},
    }
    for name, where in runs.items():
        run = Path(where)
        policy = load_policy(run / "model", trainable=False)
        last = saved_step(run)
        final = {"step": last, "final": True, **stick.measure(policy)}
        before = ((step, now) for step, now in along(run, policy) if step < last)
        found["runs"][name] = [*({"step": s, "final": False, **stick.measure(now)} for s, now in before), final]
    return found


def _room(policy: Any, max_new_tokens: int) -> int:
    context = getattr(policy.config, "max_position_embeddings", None) or 1024
    return max(2, context - max_new_tokens)
