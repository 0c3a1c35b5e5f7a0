"""One model against another on the same prompts: gold preference, distance, length, variety."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palate.data.records import Prompt
from palate.evaluation.diversity import distinct, distinct_per_prompt, unique_share
from palate.evaluation.statistics import Interval, cluster_bootstrap, paired_difference, win_rate
from palate.models.forward import response_logprobs, score_responses
from palate.models.rewards import load_reward
from palate.pipelines.answers import GoldMany, Speaker
from palate.types import Tokens


class Answers(NamedTuple):
    """What one model said: N = prompts x samples rows."""

    texts: list[str]
    gold: list[float]
    scores: list[float]  # of the reward model, in its units
    kl: Tensor  # [N] log p(row) of this model minus that of the other, nats
    tokens: Tokens


def compare(
    before: str,
    after: str,
    prompts: Sequence[Prompt],
    gold: GoldMany,
    reward: str,
    *,
    samples_per_prompt: int = 2,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Let both answer every prompt, and measure.

    Args:
        before, after: policies' folders.
        prompts: held out.
        gold: the preference that counts.
        reward: the reward model's folder: what ``after`` was trained on.

    Returns:
        Figures (intervals as [estimate, low, high], over prompts), and one entry a prompt with the first answer of each.
    """
    old, new = Speaker.load(before), Speaker.load(after)
    drawn = {"samples_per_prompt": samples_per_prompt, "max_new_tokens": max_new_tokens, "seed": seed}
    a, b = (_answers(x, y, prompts, gold, reward, drawn) for x, y in ((old, new), (new, old)))
    where = [str(p.prompt) for p in prompts for _ in range(samples_per_prompt)]
    figures: dict[str, Any] = {
        "prompts": len(prompts),
        "responses": len(where),
        "win_rate": _list(win_rate(b.gold, a.gold, where, tie=1e-9)),
        "gold_gain": _list(paired_difference(b.gold, a.gold, where)),
        "kl": _list(cluster_bootstrap(b.kl.tolist(), where)),
        "before": _facts(a, where),
        "after": _facts(b, where),
    }
    rows = range(0, len(where), samples_per_prompt)
    entries = [
        {
            "prompt": where[i],
            "before": a.texts[i],
            "after": b.texts[i],
            "before_gold": a.gold[i],
            "after_gold": b.gold[i],
        }
        for i in rows
    ]
    return figures | {"gold_values": {"before": a.gold, "after": b.gold}}, entries


def _answers(
    speaker: Speaker, other: Speaker, prompts: Sequence[Prompt], gold: GoldMany, reward: str, drawn: dict[str, int]
) -> Answers:
    tokens = speaker.answer(prompts, **drawn)
    texts = speaker.texts(tokens)
    asked = [p.prompt for p in prompts for _ in range(drawn["samples_per_prompt"])]
    with torch.no_grad():
        kl = response_logprobs(speaker.policy, tokens) - response_logprobs(other.policy, tokens)
        scores = score_responses(load_reward(reward, speaker.chat), tokens).scores
    return Answers(texts, gold(asked, texts), scores.tolist(), kl, tokens)


def _facts(answers: Answers, where: list[str]) -> dict[str, Any]:
    lengths = answers.tokens.response_mask.sum(-1).float()
    return {
        "gold": _list(cluster_bootstrap(answers.gold, where)),
        "score": _list(cluster_bootstrap(answers.scores, where)),
        "words": sum(len(text.split()) for text in answers.texts) / len(where),
        "tokens": float(lengths.mean()),
        "unfinished": float((~torch.as_tensor(answers.tokens.extras["finished"])).float().mean()),
        "distinct_2": distinct(answers.texts, 2),
        "distinct_2_per_prompt": distinct_per_prompt(answers.texts, where, 2),
        "unique": unique_share(answers.texts),
    }


def _list(interval: Interval) -> list[float]:
    return [float(value) for value in interval]
