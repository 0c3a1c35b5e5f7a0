"""The scalar head: one linear layer from a token's hidden state to a number.

Read at the response's last token it is a reward, read at every token it is a value (InstructGPT, arXiv:2203.02155,
section 3.5). The head stays in float32 whatever the body is in: two rewards often differ by less than bf16 can hold.
Its normalisation is two numbers in the model's config, so that ``save_pretrained`` carries them:

    score = (head(state) - config.score_mean) / config.score_std
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from palate.errors import ModelError

HEAD_NAMES = ("score", "classifier")


def base_of(model: nn.Module) -> Any:
    """The Hugging Face model inside a peft adapter; any other model is itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if get_base_model is not None else model


def hidden_size(model: nn.Module) -> int:
    """Width of the hidden state that a head reads."""
    config = base_of(model).config
    return int((config.get_text_config() if hasattr(config, "get_text_config") else config).hidden_size)


def scalar_head(model: nn.Module) -> nn.Module:
    """The linear layer of a scalar model, with or without an adapter: float32 [M, H] -> [M, 1].

    Raises:
        ModelError: the model has no such layer; it is not a reward or value model.
    """
    inner = base_of(model)
    for name in HEAD_NAMES:
        head = getattr(inner, name, None)
        if isinstance(head, nn.Module):
            return head
    raise ModelError(
        f"{type(inner).__name__} has no scalar head (looked for {' and '.join('.' + n for n in HEAD_NAMES)}). "
        "A reward or value model is loaded with load_scalar."
    )


@torch.no_grad()
def new_score_head(model: nn.Module, seed: int) -> None:
    """Draw the head anew, in float32: weight ~ N(0, 1 / (hidden + 1)), bias 0.

    The same seed gives the same head on every device. Source: Stiennon et al. 2020 (arXiv:2009.01325), as kept in
    "The N+ implementation details of RLHF with PPO", arXiv:2403.17031.
    """
    head: Any = scalar_head(model).float()
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(head.weight.shape, generator=generator) / math.sqrt(hidden_size(model) + 1)
    head.weight.copy_(weight)
    if getattr(head, "bias", None) is not None:
        head.bias.zero_()


def normalise(model: nn.Module, scores: Tensor) -> None:
    """Make the given responses' scores have mean 0 and standard deviation 1, from now on and after save and load.

    Only a shift and a scale: order and pairwise accuracy stay as they are. Source: Ziegler et al. 2019,
    arXiv:1909.08593, section 2 (rewards of the reference policy's samples have mean 0 and variance 1).

    Args:
        model: a scalar model; its ``config.score_mean`` and ``config.score_std`` are set.
        scores: float [N], N >= 2, what ``response_scores(model, ...)`` says now of the reference responses. They may
            already be normalised: then the two normalisations are joined into one. The standard deviation is the
            biased one (divided by N), so that the very same scores have exactly 1 afterwards.
    Raises:
        ModelError: fewer than two scores, a NaN or Inf among them, or all equal.
    """
    values = scores.detach().double().flatten()
    if len(values) < 2:
        raise ModelError(f"cannot normalise by {len(values)} score(s): give at least 2 reference responses.")
    bad = int((~values.isfinite()).sum())
    if bad:
        raise ModelError(f"cannot normalise: {bad} of {len(values)} scores are NaN or Inf. The reward model is broken.")
    mean, std = float(values.mean()), float(values.std(correction=0))
    if std <= 1e-6 * float(values.abs().max()):  # float32 noise around one number
        raise ModelError(
            f"cannot normalise: all {len(values)} scores are {mean:.6g}. The reward model says the same of every "
            "response; train it, or give it responses that differ."
        )
    config = base_of(model).config
    old_mean, old_std = normalisation(model)
    config.score_mean = old_mean + old_std * mean
    config.score_std = old_std * std


def normalisation(model: nn.Module) -> tuple[float, float]:
    """(score_mean, score_std) of a scalar model; (0, 1) when it was never normalised.

    Raises:
        ModelError: the config holds something that cannot be a mean and a positive standard deviation.
    """
    config = base_of(model).config
    mean, std = getattr(config, "score_mean", 0.0), getattr(config, "score_std", 1.0)
    numbers = all(isinstance(x, int | float) and math.isfinite(x) for x in (mean, std))
    if not numbers or std <= 0:
        raise ModelError(
            f"the model's config has score_mean={mean!r}, score_std={std!r}; a finite number and a positive number "
            "were expected. Correct its config.json, or remove both and normalise again."
        )
    return float(mean), float(std)
