"""Rollouts one update ahead: the next batch is drawn in the background while this one is trained on.

    step n     main thread      theta_n -> prepare, update -> theta_n+1
               background       batch n + 1 is drawn from a frozen copy of theta_n

So responses come from mu, the policy of one batch before, and pi is trained. With w = pi(y|x)/mu(y|x), E_mu[w f] = E_pi[f]: every
response's gradient is multiplied by its weight, cut at ``importance_max`` (``functional.importance``). The old log-probs of
a loss stay the trainer's own, of pi before the batch's updates: a ratio still starts at 1, and what bounds the update and
what corrects for its data are two things, as in decoupled PPO (AReaL, Fu et al. 2025, arXiv:2505.24298, section 5.2;
Hilton et al. 2021, arXiv:2110.00641).

Nothing depends on when a thread runs: the weights are copied between two batches, the copy shares no module with the policy
that is trained, and random numbers are a function of (seed, step).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from palate.data.collate import Item
from palate.errors import DataError
from palate.functional.importance import effective_share, importance_weights
from palate.models.roles import frozen
from palate.training.order import batch_items
from palate.training.rollouts import Rollout
from palate.training.settings import TrainingSettings
from palate.types import Batch, Mean, Method, Tokens, Trajectories, moved

_FIELDS = ("ids", "attention_mask", "response_mask", "group")


class Stored(NamedTuple):
    """A drawn batch as a checkpoint keeps it: tensors, and what JSON can say. Records are found again by their prompt."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]  # {"step": int, "lists": {name: list}, "records": bool}


@dataclass
class Ahead:
    """Draws the batch of each step, one step before it is asked for.

    Attributes:
        rollout: of the run; its policy is the one that is trained.
        items: what to train on. total: batches of the whole run.
    """

    rollout: Rollout
    items: Sequence[Item]
    settings: TrainingSettings
    total: int

    def __post_init__(self) -> None:
        self._drawer = copy.copy(self.rollout)
        self._drawer.policy = sampling_copy(self.rollout.policy)
        self._thread = ThreadPoolExecutor(1, "palate-rollout")
        self._pending: tuple[int, Future[Tokens]] | None = None
        self._closing = False

    def take(self, step: int) -> Tokens:
        """The batch of this step; that of the next begins to be drawn, by the policy as it is now."""
        if self._pending is not None and self._pending[0] == step:
            tokens = self._pending[1].result()
        else:  # the first of a run: nothing was drawn before it
            tokens = self.rollout(self._items(step), self.settings.seed, step)
        self._pending = None
        if step + 1 < self.total:
            self._copy_weights()
            self._pending = step + 1, self._thread.submit(self._draw, step + 1)
        return tokens

    def _items(self, step: int) -> list[Item]:
        return batch_items(self.items, self.settings.batch_size, step, self.settings.seed)

    @torch.no_grad()
    def _copy_weights(self) -> None:
        for mine, theirs in _moving(self._drawer.policy, self.rollout.policy):
            mine.copy_(theirs)

    def _draw(self, step: int) -> Tokens:
        return self._drawer(self._items(step), self.settings.seed, step, progress=self._go_on)

    def _go_on(self, done: int, rows: int) -> None:
        if self._closing:
            raise CancelledError

    def close(self) -> None:
        """Give up what is being drawn; returns when the thread has ended."""
        self._closing = True
        self._thread.shutdown(wait=True, cancel_futures=True)

    # --- in checkpoints ---------------------------------------------------------------------------------------------

    def stored(self) -> Stored | None:
        """The batch of the next step, once it is drawn; None when there is none."""
        if self._pending is None:
            return None
        step, future = self._pending
        tokens = future.result()
        tensors = {name: getattr(tokens, name) for name in _FIELDS}
        lists: dict[str, list[Any]] = {}
        for name, values in tokens.extras.items():
            if isinstance(values, Tensor):
                tensors[f"extras.{name}"] = values
            elif name != "records":
                lists[name] = [*values]
        facts = {"step": step, "lists": lists, "records": "records" in tokens.extras}
        return Stored({name: value.contiguous() for name, value in tensors.items()}, facts)

    def restore(self, stored: Stored, device: torch.device) -> None:
        """Go on with the batch of a checkpoint."""
        step, extras = stored.facts["step"], dict(stored.facts["lists"])
        given = {name: stored.tensors[name] for name in _FIELDS}
        prefix = "extras."
        extras |= {n.removeprefix(prefix): value for n, value in stored.tensors.items() if n.startswith(prefix)}
        if stored.facts["records"]:
            items = self._items(step)
            extras["records"] = [items[number].record for number in given["group"].tolist()]
        future: Future[Tokens] = Future()
        future.set_result(moved(Tokens(**given, extras=extras), device))
        self._pending = step, future


def sampling_copy(policy: nn.Module) -> nn.Module:
    """A second policy to sample from: modules of its own, copies of what is trained; frozen weights are shared."""
    shared: dict[int, Any] = {id(p): p for p in policy.parameters() if not p.requires_grad}
    return frozen(copy.deepcopy(policy, shared))


def _moving(mine: nn.Module, theirs: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The weights that are copied, each with where it comes from."""
    pairs = zip(mine.parameters(), theirs.parameters(), strict=True)
    return [(one, other) for one, other in pairs if one is not other]


# --- the correction ---------------------------------------------------------------------------------------------------


def corrected(method: Method, batch: Batch, settings: TrainingSettings) -> Batch:
    """The prepared batch with an importance weight on every response, and what the weights look like among its metrics.

    Raises:
        DataError: the sampler did not say how probable its tokens were.
    """
    if getattr(method, "off_policy", "") != "weights" or not len(batch):
        return batch
    assert isinstance(batch, Trajectories)
    tokens = batch.tokens
    drawn = tokens.extras.get("sampler_logprobs")
    if not isinstance(drawn, Tensor):
        raise DataError(
            'training.rollouts_ahead: the sampler did not say how probable its tokens were ("sampler_logprobs"), so nothing '
            "can be corrected. Leave rollouts_ahead out with this rollout."
        )
    most = settings.importance_max
    weights = importance_weights(batch.logprobs, drawn, tokens.response_mask, level=settings.importance, most=most)
    raw = weights.raw[weights.counts]
    metrics = {
        "importance/weight": Mean.of(raw.clamp(max=most)),
        "importance/truncated": Mean.of((raw > most).float()),
    }
    if len(raw):
        metrics["importance/largest"] = Mean.of(raw.max())
        metrics["importance/effective"] = Mean.of(effective_share(raw.clamp(max=most)))
    tokens = replace(tokens, extras={**tokens.extras, "importance": weights.used})
    return replace(batch, tokens=tokens, metrics={**batch.metrics, **metrics})
