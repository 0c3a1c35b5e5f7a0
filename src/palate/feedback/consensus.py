"""From votes to comparisons with soft labels, for training a reward model.

Each pair becomes one ``Comparison``: chosen is the likelier side, ``probability`` how likely a typical annotator prefers
it (``PairEstimate.preferred``, in [0.5, 1]), ``annotator`` the names of those who judged the pair. What cannot be a
comparison is listed with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from palate.data.kinds import Comparison, PromptText
from palate.errors import FeedbackError
from palate.feedback.annotator_model import AnnotatorFit, Item

Pair = tuple[Hashable, Hashable, Hashable]


@dataclass(frozen=True)
class Consensus:
    """Comparisons, and what did not become one: ((prompt, first, second), reason)."""

    comparisons: list[Comparison]
    left_out: list[tuple[Pair, str]]

    def summary(self) -> str:
        """``17 comparisons; 2 left out: the same text``."""
        reasons = Counter(reason for _, reason in self.left_out)
        return "; ".join([f"{len(self.comparisons)} comparisons", *(f"{n} left out: {r}" for r, n in reasons.items())])


def consensus_comparisons(
    fit: AnnotatorFit,
    prompts: Mapping[Hashable, PromptText],
    responses: Mapping[Item, str],
    *,
    min_probability: float = 0.5,
    margin: bool = False,
) -> Consensus:
    """One comparison for each pair that somebody voted on, in order of first votes.

    Args:
        fit: of ``fit_annotators``.
        prompts: text of each prompt key.
        responses: text of each (prompt key, response key).
        min_probability: leave out pairs less sure than this, in [0.5, 1]; 0.5 keeps all, and soft labels need no such cut.
        margin: also say by how much, in the typical annotator's logits. ``probability`` holds the same and its
            uncertainty: use one of them.

    Raises:
        FeedbackError: a text is missing, or a typical reliability that is not above 0: then people do not agree on
            anything, and there is no consensus.
    """
    if not 0.5 <= min_probability <= 1:
        raise FeedbackError(f"min_probability {min_probability}: expected a number in [0.5, 1]")
    if not fit.typical > 0:
        raise FeedbackError(f"the typical annotator's reliability is {fit.typical:.2f}: these votes hold no consensus")
    voters = _voters(fit)
    _check_texts(list(voters), prompts, responses)
    comparisons, left_out = [], []
    for (pair, names), estimate in zip(voters.items(), fit.pairs(list(voters)), strict=True):
        prompt, first, second = pair
        if estimate.preferred < 0.5:
            first, second = second, first
        probability = max(estimate.preferred, 1 - estimate.preferred)
        chosen, rejected = responses[prompt, first], responses[prompt, second]
        if chosen == rejected:
            left_out.append((pair, "both responses are the same text"))
        elif probability < min_probability:
            left_out.append((pair, f"less sure than {min_probability:g}"))
        else:
            by = abs(estimate.margin) if margin else None
            comparisons.append(
                Comparison(prompts[prompt], chosen, rejected, by, probability, annotator=", ".join(sorted(names)))
            )
    return Consensus(comparisons, left_out)


def _voters(fit: AnnotatorFit) -> dict[Pair, set[str]]:
    """Who voted on each pair; a pair's two sides are one pair, as it was first shown."""
    voters: dict[Pair, set[str]] = {}
    for v in fit.votes:
        pair, turned = (v.prompt, v.left, v.right), (v.prompt, v.right, v.left)
        voters.setdefault(turned if turned in voters else pair, set()).add(v.annotator)
    return voters


def _check_texts(pairs: Sequence[Pair], prompts: Mapping[Hashable, PromptText], responses: Mapping[Item, str]) -> None:
    lost = [p for p, *_ in pairs if p not in prompts]
    if lost:
        raise FeedbackError(f"no text for the prompt {lost[0]!r}, which was voted on. Give the text of every prompt.")
    missing = [(p, r) for p, *both in pairs for r in both if (p, r) not in responses]
    if missing:
        raise FeedbackError(
            f"no text for the response {missing[0]}, which was voted on. Give the text of every response."
        )
