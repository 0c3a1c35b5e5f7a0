"""A reward model on labelled pairs that it was not trained on."""

from __future__ import annotations

import torch

from palate.data.chat import Chat
from palate.data.collate import collate, encode_records
from palate.data.records import read_records
from palate.evaluation.reward_model import RewardModelReport, evaluate_reward_model
from palate.models.forward import response_scores
from palate.models.heads import normalisation
from palate.models.load import load_scalar, load_tokenizer
from palate.types import Comparisons, microbatches


def examine(reward: str, rankings: str, *, max_length: int = 1024, tokens_per_batch: int = 16_384) -> RewardModelReport:
    """Accuracy with its interval over prompts, likelihood, calibration, and what length has to do with it.

    Args:
        reward: a palate reward model's folder.
        rankings: file of rankings or comparisons; lengths are counted in response tokens.
    """
    model, chat = load_scalar(reward, trainable=False), Chat(load_tokenizer(reward))
    items, _ = encode_records(read_records(rankings, "comparisons"), "comparisons", chat, max_length=max_length)
    batch = collate(items, "comparisons")
    assert isinstance(batch, Comparisons)
    parts: list[Comparisons] = list(microbatches(batch, tokens_per_batch))
    _, std = normalisation(model)
    found: dict[str, list[float]] = {"chosen": [], "rejected": [], "chosen_length": [], "rejected_length": []}
    prompts: list[int] = []
    with torch.no_grad():
        for part in parts:
            scores = response_scores(model, part.tokens) * std  # differences are log-odds before normalisation
            lengths = part.tokens.response_mask.sum(-1)
            for name, rows in (("chosen", part.chosen), ("rejected", part.rejected)):
                found[name] += scores[rows].tolist()
                found[f"{name}_length"] += lengths[rows].tolist()
            prompts += part.tokens.group[part.chosen].tolist()
    return evaluate_reward_model(
        found["chosen"],
        found["rejected"],
        prompts=prompts,
        chosen_length=found["chosen_length"],
        rejected_length=found["rejected_length"],
    )
