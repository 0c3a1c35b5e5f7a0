"""Fine-tuning on the best of n samples -- RAFT, Dong et al. 2023, arXiv:2304.06767; rejection sampling in Llama 2, Touvron et
al. 2023, arXiv:2307.09288, section 3.2.3; best-of-n in Stiennon et al. 2020, arXiv:2009.01325.

    y_1 .. y_n ~ pi(.|x)   (or pi_ref),   the ``keep`` with the highest r(x, y_i) are kept
    L = - sum_i w_i log pi(y_i|x) / sum_i w_i |y_i|,      w_i = 1 for kept responses; equal ones at the border share the rest

A mean over tokens, as in sft: all tokens of the kept responses count alike. Drawn by the policy, batch after batch, this is
RAFT: the best of the policy's own samples become what it imitates, and nothing holds it near the reference. Drawn by the
reference (``from_reference``), the fixed point is the law of the best of n,

    P(y) = ref(y)/ref(r = r(y)) * ( F(r(y))^n - F(r(y)-)^n ),       F(r) = ref(score at most r),
    KL(P || ref) <= log n - (n - 1)/n                              (Stiennon et al., appendix G.3; with ties it is less)

Roles: policy (trained), reward (frozen). Data: prompts.
Left out: a KL term; ranking responses across prompts; keeping the best of earlier batches (Llama 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from palate.errors import DataError
from palate.functional.best_of_n import best_of_n_kl_bound, best_weights
from palate.functional.policy_gradient import probability_ratio
from palate.methods._sampled import check_settings, group_metrics, policy_metrics, rollout_metrics, with_missing_end
from palate.methods.sft import sft_loss
from palate.models.forward import score_responses, token_logprobs, token_logprobs_and_entropy
from palate.types import Mean, Models, Tokens, Trajectories


@dataclass(frozen=True)
class BestOfN:
    """Settings; n is ``samples_per_prompt``.

    Attributes:
        keep: how many of the n responses to a prompt are trained on, 1 to n - 1; 1.
        from_reference: the reference draws the samples, not the policy: the policy then learns the best of n once, and not
            the best of the best.
        epochs: passes over each batch of kept responses; 1 to 4.
        minibatches: optimizer steps in one pass.
        missing_eos_score: the score of a response that did not end by itself is *replaced* by this; None = not.
        missing_eos_penalty: *subtracted* from the score of a response that did not end by itself, >= 0.
    """

    keep: int = 1
    from_reference: bool = False
    epochs: int = 1
    minibatches: int = 1
    missing_eos_score: float | None = None
    missing_eos_penalty: float = 0.0

    needs = ("policy", "reward")
    trains = ("policy",)
    reads = "prompts"
    group_size = 8

    def __post_init__(self) -> None:
        check_settings("best_of_n", self)
        if self.from_reference:
            object.__setattr__(self, "needs", ("policy", "reference", "reward"))

    @property
    def drawn_by(self) -> tuple[str, ...]:
        """Who draws the samples."""
        return ("reference",) if self.from_reference else ("policy",)

    def prepare(self, models: Models, batch: Tokens) -> Trajectories:
        """Scores of all samples, and the weights of those that are kept; the others end here."""
        assert models.policy is not None and models.reward is not None
        scored = score_responses(models.reward, batch)
        ranked = with_missing_end("best_of_n", scored.scores, batch, self.missing_eos_score, self.missing_eos_penalty)
        sizes = self._sizes(batch)
        weights = best_weights(ranked, batch.group, self.keep)
        rows = (weights > 0).nonzero()[:, 0]
        kept, weights = batch.select(rows), weights[rows]
        logprobs = token_logprobs(models.policy, kept)
        bounds = torch.tensor([best_of_n_kl_bound(n, self.keep) for n in sizes], dtype=torch.float64)
        metrics = {f"score/{name}": Mean.of(part) for name, part in scored.parts.items()}
        metrics |= rollout_metrics(batch, None, None, scored.scores)
        metrics |= group_metrics("best_of_n", ranked, batch.group)
        metrics |= {"score/best": Mean.of(scored.scores[rows], weights), "kl/best_of_n_bound": Mean.of(bounds)}
        advantages = torch.where(kept.response_mask, weights[:, None], 0)
        return Trajectories(kept, logprobs, None, advantages, scored.scores[rows], metrics=metrics)

    def _sizes(self, batch: Tokens) -> list[int]:
        """n of each prompt."""
        sizes: list[int] = torch.unique(batch.group, return_counts=True)[1].tolist()
        if sizes and min(sizes) <= self.keep:
            raise DataError(
                f"best_of_n: keep = {self.keep}, and a prompt has {min(sizes)} responses: nothing would be left out. Set "
                "samples_per_prompt above method.keep."
            )
        return sizes

    def loss(self, models: Models, batch: Trajectories) -> dict[str, Mean]:
        """Token mean of the negative log-likelihood of what was kept, weighted."""
        assert models.policy is not None
        mask = batch.tokens.response_mask
        logprobs, entropy = token_logprobs_and_entropy(models.policy, batch.tokens)
        ratio = probability_ratio(logprobs, batch.logprobs)
        metrics = policy_metrics(batch, logprobs, entropy, ratio, torch.zeros_like(mask), mask)
        return {
            "loss": Mean.of(sft_loss(logprobs), batch.advantages),
            "logprob/token": Mean.of(logprobs.detach(), batch.advantages),
        } | metrics


METHOD = BestOfN
