"""What the methods that sample share: looking at a batch of samples before anything is trained on it, and reporting it.

No method by itself. ``measure`` asks the roles once a batch; the rest is arithmetic on what they said.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from palate.errors import ConfigError, DataError
from palate.functional.advantages import group_stds
from palate.functional.divergences import k1, k2, k3
from palate.functional.masked import masked_mean, masked_variance
from palate.models.forward import score_responses, token_logprobs
from palate.types import Mean, Models, Scored, Tokens, Trajectories


class Measured(NamedTuple):
    """What the roles say of a batch of samples."""

    logprobs: Tensor  # [N, T], of the policy, nats, zero outside the response
    reference_logprobs: Tensor | None  # the same of the reference, where there is one
    scores: Tensor  # [N], as the reward gave them
    metrics: dict[str, Mean]


def measure(models: Models, tokens: Tokens, temperature: float, scored: Scored | None = None) -> Measured:
    """Ask policy, reference (if there is one) and reward, once each.

    Args:
        temperature: of the sampling distribution.
        scored: what the reward said, where it was asked before.
    """
    assert models.policy is not None and models.reward is not None
    logprobs = sampled_logprobs(models.policy, tokens, temperature)
    reference = None
    if models.reference is not None:
        reference = token_logprobs(models.reference, tokens, temperature=temperature)
    scored = score_responses(models.reward, tokens) if scored is None else scored
    metrics = {f"score/{name}": Mean.of(part) for name, part in scored.parts.items()}
    metrics |= rollout_metrics(tokens, logprobs, reference, scored.scores)
    return Measured(logprobs, reference, scored.scores, metrics)


def sampled_logprobs(policy: nn.Module, tokens: Tokens, temperature: float) -> Tensor:
    """log pi of what pi itself has just drawn, [N, T]: computed, or those of the draw where ``old_logprobs`` trusts them."""
    kept = tokens.extras.get("policy_logprobs")
    return kept if isinstance(kept, Tensor) else token_logprobs(policy, tokens, temperature=temperature)


def rollout_metrics(
    tokens: Tokens, logprobs: Tensor | None, reference_logprobs: Tensor | None, scores: Tensor
) -> dict[str, Mean]:
    """What every method that samples reports of its batch.

    Args:
        logprobs, reference_logprobs: [N, T], nats, zero outside the response; None = not asked, and no KL of it.
        scores: [N], as the reward model gave them.
    """
    mask = tokens.response_mask
    metrics = {
        "score": Mean.of(scores),
        "score/std": Mean.of(scores.std(unbiased=False)),
        "length/response": Mean.of(mask.sum(-1).float()),
    }
    if logprobs is not None and reference_logprobs is not None:
        metrics["kl/reference"] = Mean.of(torch.where(mask, k1(logprobs, reference_logprobs), 0).sum(-1))
        metrics["kl/reference_k3"] = Mean.of(torch.where(mask, k3(logprobs, reference_logprobs), 0).sum(-1))
    if "finished" in tokens.extras:
        metrics["length/no_eos"] = Mean.of((~torch.as_tensor(tokens.extras["finished"])).float())
    if "turns" in tokens.extras:
        metrics["length/turns"] = Mean.of(torch.as_tensor(tokens.extras["turns"]).float())
    sampler = tokens.extras.get("sampler_logprobs")
    if logprobs is not None and isinstance(sampler, Tensor) and "policy_logprobs" not in tokens.extras:
        metrics["kl/sampler"] = Mean.of(k3(sampler[mask], logprobs[mask]))
    return metrics


def rows_drawn_by(method: str, tokens: Tokens, who: str) -> Tensor:
    """Numbers of the rows that ``who`` drew, int64; see ``training.rollouts``.

    Raises:
        DataError: the sampler did not say who drew what, or drew none for a group.
    """
    whose = tokens.extras.get("drawn_by", ())
    rows = torch.tensor([i for i, name in enumerate(whose) if name == who], dtype=torch.long, device=tokens.ids.device)
    if len(torch.unique(tokens.group[rows])) != len(torch.unique(tokens.group)):
        raise DataError(f'{method}: the sampler drew no responses of "{who}" to some prompt, and the method needs one.')
    return rows


# --- scores and rewards -----------------------------------------------------------------------------------------------


def with_missing_end(method: str, scores: Tensor, tokens: Tokens, replaced: float | None, penalty: float) -> Tensor:
    """Scores, [N], with those of responses that did not end by themselves replaced or charged.

    Args:
        replaced: ``missing_eos_score``, takes the score's place; None = not. penalty: ``missing_eos_penalty``,
            subtracted, >= 0.
    """
    if replaced is None and not penalty:
        return scores
    finished = tokens.extras.get("finished")
    if finished is None:
        raise DataError(f'{method}: missing_eos_* is set, but the sampler did not say which responses are "finished".')
    finished = torch.as_tensor(finished, device=scores.device)
    if replaced is not None:
        return torch.where(finished, scores, replaced)
    return scores - penalty * (~finished)


def sequence_rewards(found: Measured, scores: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """R(x, y) = r(x, y) - kl_coef * sum_t k1_t, [N]: the KL charge of the whole response, without gradient.

    Args:
        scores: [N], reward units, as they are to be optimised.
        kl_coef: reward units a nat; 0 needs no reference.
    """
    if not kl_coef:
        return scores
    assert found.reference_logprobs is not None
    return scores - kl_coef * torch.where(mask, k1(found.logprobs, found.reference_logprobs), 0).sum(-1)


# --- batches ----------------------------------------------------------------------------------------------------------


def trajectories(tokens: Tokens, found: Measured, rewards: Tensor, advantages: Tensor, kl_coef: float) -> Trajectories:
    """The batch that ``loss`` gets.

    Args:
        rewards: [N], what the response earned in all.
        advantages: [N], shared by all tokens of the response, or [N, T].
    """
    mask = tokens.response_mask
    spread = torch.where(mask, advantages if advantages.ndim == 2 else advantages[:, None], 0)
    metrics = found.metrics | {"reward/total": Mean.of(rewards)}
    if found.reference_logprobs is not None:
        metrics["kl/coef"] = Mean.of(torch.tensor(kl_coef, dtype=torch.float64))
    metrics |= advantage_metrics(spread, mask)
    return Trajectories(tokens, found.logprobs, found.reference_logprobs, spread, found.scores, metrics=metrics)


def advantage_metrics(advantages: Tensor, mask: Tensor) -> dict[str, Mean]:
    """Mean, spread and largest size of the advantages of all response tokens of the batch."""
    size = torch.where(mask, advantages, 0).abs()
    return {
        "advantage/mean": Mean.of(masked_mean(advantages, mask)),
        "advantage/std": Mean.of(masked_variance(advantages, mask).sqrt()),
        "advantage/largest": Mean.of(size.max() if size.numel() else size.sum()),
    }


def with_groups(method: str, batch: Trajectories) -> Trajectories:
    """The batch, with what its groups of responses look like among the metrics.

    Raises:
        DataError: no prompt has two responses, so that there is nothing to compare with.
    """
    return replace(batch, metrics={**batch.metrics, **group_metrics(method, batch.scores, batch.tokens.group)})


def group_metrics(method: str, scores: Tensor, group: Tensor) -> dict[str, Mean]:
    """How far the scores, [N], of the responses to one prompt are apart; raises as ``with_groups``."""
    stds, equal, counts = group_stds(scores, group)
    if len(group) and int(counts.max()) < 2:
        raise DataError(
            f"{method} compares the responses to one prompt with each other, and every prompt has one. Set "
            "samples_per_prompt to 2 or more."
        )
    return {"groups/score_std": Mean.of(stds), "groups/all_equal": Mean.of(equal.float())}


# --- what a loss reports ----------------------------------------------------------------------------------------------


def policy_metrics(
    batch: Trajectories, logprobs: Tensor, entropy: Tensor, ratio: Tensor, clipped: Tensor, counts: Tensor
) -> dict[str, Mean]:
    """How far the policy is from the one that sampled, and how sure it is.

    Args:
        logprobs, entropy: [N, T], of the policy now, nats.
        ratio, clipped: of tokens, [N, T], or of whole responses, [N]; counts: bool, which of them count.
    """
    mask = batch.tokens.response_mask
    return {
        "entropy": Mean.of(entropy.detach(), mask),
        "kl/old": Mean.of(k2(logprobs, batch.logprobs).detach(), mask),
        "ratio": Mean.of(ratio.detach(), counts),
        "clip_fraction": Mean.of(clipped.detach().to(ratio.dtype), counts),
    }


# --- settings ---------------------------------------------------------------------------------------------------------

_RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (("epochs", "minibatches", "keep", "ptx_batch_size", "max_new_tokens"), lambda x: x >= 1, "1 or more"),
    (("beta", "clip", "value_clip", "score_clip", "temperature", "clip_high"), lambda x: x > 0, "a number above 0"),
    (("clip_low",), lambda x: 0 < x <= 1, "a number above 0, at most 1"),
    (("adaptive_kl_target", "adaptive_kl_horizon", "target_kl", "kl_budget"), lambda x: x > 0, "a number above 0"),
    (("alpha",), lambda x: 0 <= x < math.inf, "0 or more"),
    (
        ("kl_coef", "value_coef", "entropy_coef", "missing_eos_penalty", "ptx_coef", "std_eps", "overlong_buffer"),
        lambda x: 0 <= x < math.inf,
        "0 or more",
    ),
    (("refills",), lambda x: x >= 0, "0 or more"),
    (("gamma", "lam", "baseline_decay", "mixture"), lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    (("dual_clip",), lambda x: x > 1, "a number above 1"),
)


def check_settings(name: str, method: Any) -> None:
    """The ranges of the settings that methods which sample have in common.

    Raises:
        ConfigError: a setting is out of its range, or two exclude each other.
    """
    if getattr(method, "missing_eos_score", None) is not None and method.missing_eos_penalty:
        raise ConfigError("missing_eos_score replaces the score, missing_eos_penalty is subtracted from it: set one.")
    for names, holds, wanted in _RANGES:
        for setting in names:
            value = getattr(method, setting, None)
            if value is not None and not holds(value):
                raise ConfigError(f"{name}: {setting} = {value!r}, expected {wanted}.")


def check_choice(name: str, setting: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises: ConfigError when a setting is none of its choices."""
    if value not in choices:
        raise ConfigError(f"{name}: {setting} = {value!r}, expected {' or '.join(choices)}.")


def check_kl_place(name: str, kl: str) -> None:
    """Raises: ConfigError for a place of the KL term other than "loss" (k3) and "reward" (k1)."""
    if kl not in ("loss", "reward"):
        raise ConfigError(
            f'{name}: kl = {kl!r}, expected "loss" (k3 as a term of the loss) or "reward" (k1, charged in the reward). '
            "k1 in the loss is not on offer: its gradient is zero on average, as if there were no KL term."
        )


WITH_REFERENCE = ("policy", "reference", "reward")
WITHOUT_REFERENCE = ("policy", "reward")


def set_needs(method: Any) -> None:
    """A reference is needed where leaving it costs something. To be called by ``__post_init__``: a class says what its
    defaults need, an instance what its own settings do."""
    object.__setattr__(method, "needs", WITH_REFERENCE if method.kl_coef else WITHOUT_REFERENCE)
