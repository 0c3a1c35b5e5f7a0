"""What to label next, and how much more.

A store's answers, and reward models trained on them, put to ``feedback.selection`` and ``feedback.label_plan``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from palate.data.kinds import Comparison, Demonstration, PromptText, prompt_key
from palate.errors import ConfigError, DataError, FeedbackError
from palate.evaluation.statistics import Interval
from palate.feedback import views
from palate.feedback.annotator_model import AnnotatorFit, fit_annotators
from palate.feedback.label_plan import LearningCurve, human_agreement, learning_curve, model_limit
from palate.feedback.learned import is_store, learn, votes_of
from palate.feedback.queue import prioritise
from palate.feedback.selection import choose, ensemble_disagreement, expected_information
from palate.feedback.store import Store
from palate.texts.common import Progress
from palate.texts.scoring import Scorable, score_records


@dataclass
class LabelPlan:
    """What is known of a store's answers and of what more would buy.

    Attributes:
        answers: in force.
        agreement: how often two people who judged a pair agree, or None, and ``limit`` what that allows a model.
        curve: accuracies by number of labels, if runs were given.
        found: what was asked of the curve: {"accuracy at 400": "0.71 [...]"}; a reason where it cannot be said.
    """

    answers: int
    annotators: int
    pairs: int
    agreement: Interval | None = None
    limit: float | None = None
    curve: LearningCurve | None = None
    found: dict[str, str] = field(default_factory=dict)
    why_not: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        made: dict[str, Any] = {"answers": self.answers, "annotators": self.annotators, "pairs": self.pairs}
        made |= {"agreement": None if self.agreement is None else list(self.agreement), "limit": self.limit}
        if self.curve is not None:
            made["curve"] = {"labels": list(self.curve.sizes), "accuracy": list(self.curve.accuracies)}
            made["curve"] |= {"ceiling": list(self.curve.ceiling), "exponent": list(self.curve.exponent)}
        return made | {"found": self.found, "why_not": self.why_not}

    def text(self) -> str:
        lines = [f"{self.answers} answers by {self.annotators} annotators about {self.pairs} pairs"]
        if self.agreement is not None and self.limit is not None:
            lines.append(f"two people agree on {self.agreement.percent()} of the pairs that both decided")
            lines.append(f"no model can agree with single answers more often than {100 * self.limit:.1f} %")
        if self.curve is not None:
            for size, accuracy in zip(self.curve.sizes, self.curve.accuracies, strict=True):
                lines.append(f"{size:>8g} labels   accuracy {accuracy:.3f}")
        lines += [f"{name}: {value}" for name, value in self.found.items()]
        return "\n".join([*lines, *self.why_not])


def plan_labels(
    where: str | Path,
    *,
    runs: Sequence[tuple[int, str]] = (),
    held_out: str | None = None,
    more: Sequence[int] = (),
    target: float | None = None,
    seed: int = 0,
    tokenizer: str | None = None,
    progress: Progress = None,
) -> LabelPlan:
    """Agreement of people, and with trained runs the learning curve and what more labels would buy.

    Args:
        runs: (number of labels, reward model's folder).
        held_out: comparisons that no run was trained on: a file or a store; needed with runs.
        more: further labels to say the gain of.
        target: accuracy to say the needed labels of, in (0.5, 1).
        tokenizer: for rewards that have none of their own, such as functions.
    Raises:
        ConfigError: runs without held-out comparisons.
        DataError, FeedbackError: nothing to go by.
    """
    if bool(runs) != (held_out is not None):
        raise ConfigError("a learning curve needs both: --run LABELS=FOLDER for each model, and --held-out RECORDS.")
    with Store.open(where) as store:
        task, given = store.task, views.labels(store, decided=False)
    votes = votes_of(given, task)
    pairs = {(vote.prompt, frozenset((vote.left, vote.right))) for vote in votes}
    made = LabelPlan(len(given), len({answer.annotator for answer in given}), len(pairs))
    try:
        made.agreement = human_agreement(votes, seed=seed)
        made.limit = model_limit(max(0.5, made.agreement.estimate))
    except FeedbackError as error:
        made.why_not.append(f"agreement: {error}")
    if runs and held_out is not None:
        records = _comparisons(held_out)
        outcomes = [_outcomes(folder, records, tokenizer, progress) for _, folder in runs]
        sizes, clusters = [labels for labels, _ in runs], [prompt_key(r.prompt) for r in records]
        curve = learning_curve(sizes, outcomes, clusters, ceiling=_ceiling(made.limit), seed=seed)
        made.curve = curve
        made.why_not += list(curve.why_not)
        for extra in more:
            made.found[f"{extra} more labels"] = _said(partial(curve.gain, extra, now=max(sizes)))
        if target is not None:
            made.found[f"labels for an accuracy of {target:g}"] = _said(partial(curve.labels_for, target))
    return made


def set_next(
    where: str | Path,
    *,
    rewards: Sequence[str] = (),
    count: int | None = None,
    random_share: float = 0.2,
    seed: int = 0,
    dry_run: bool = False,
    tokenizer: str | None = None,
    progress: Progress = None,
) -> dict[str, Any]:
    """Say to the queue which items come next: those whose answer would tell most, mixed with a random share.

    Args:
        rewards: folders of two or more reward models, whose disagreement counts (variance of margins); none = what one
            more answer would tell by the annotator-aware model of the answers so far.
        count: items to put first; None = all that are open.
        random_share: of these, drawn at random, in [0, 1].
        dry_run: say it, and change nothing.
        tokenizer: for rewards that have none of their own, such as functions.
    Returns:
        {"by", "items", "random", "first": [{"item", "need", "value", "random"}]}.
    Raises:
        ConfigError: a single reward model. FeedbackError: nothing to choose.
    """
    if len(rewards) == 1:
        raise ConfigError(
            "one reward model cannot disagree with itself. Give --reward two times or more, or not at all."
        )
    with Store.open(where) as store:
        task, given = store.task, views.labels(store, decided=False)
        with store.read() as tx:
            rows = tx.all("SELECT id, prompt, responses FROM item WHERE kind = 'task' AND open ORDER BY seq")
        items = [(item, _prompt(prompt), [r["text"] for r in json.loads(texts)]) for item, prompt, texts in rows]
        items = [each for each in items if len(set(each[2])) > 1]
        if not items:
            raise FeedbackError(f"{where}: no item with two responses is open: there is nothing to choose.")
        if rewards:
            values = _disagreements(items, rewards, tokenizer, progress)
        else:
            votes = votes_of(given, task)
            values = _information(items, fit_annotators(votes) if votes else None)
        keys = [prompt_key(prompt) for _, prompt, _ in items]
        chosen = choose(values, keys, count=count, random_share=random_share, seed=seed)
        order = [int(i) for i in chosen.order]
        needs = {items[i][0]: float(len(order) - place) for place, i in enumerate(order)}
        others = {item: 0.0 for item, _, _ in items if item not in needs}
        if not dry_run:
            prioritise(store, needs | others)
    first = [
        {"item": items[i][0], "need": needs[items[i][0]], "value": float(values[i]), "random": bool(random)}
        for i, random in zip(order[:10], chosen.random[:10], strict=False)
    ]
    by = f"disagreement of {len(rewards)} reward models" if rewards else "information of one more answer"
    return {"by": by, "items": len(order), "random": int(chosen.random.sum()), "first": first}


def _information(items: Sequence[tuple[str, PromptText, list[str]]], fit: AnnotatorFit | None) -> list[float]:
    """Of each item the most that one answer about two of its responses tells, nats; unseen responses by the prior."""
    known = fit.index() if fit is not None else {}
    typical = abs(fit.typical) if fit is not None and fit.typical else 1.0
    means, sds, owner = [], [], []
    for number, (_, prompt, texts) in enumerate(items):
        key = prompt_key(prompt)
        seen = [text for text in texts if (key, text) in known]
        for a, b in combinations(dict.fromkeys(texts), 2):
            owner.append(number)
            if fit is not None and a in seen and b in seen:
                (estimate,) = fit.pairs([(key, a, b)])
                means.append(estimate.margin)
                sds.append(estimate.margin_sd)
            else:
                means.append(0.0)
                sds.append(typical * math.sqrt(2))  # two scores of standard deviation 1
    told = expected_information(means, sds)
    best = [0.0] * len(items)
    for number, value in zip(owner, told.tolist(), strict=True):
        best[number] = max(best[number], value)
    return best


def _disagreements(
    items: Sequence[tuple[str, PromptText, list[str]]],
    rewards: Sequence[str],
    tokenizer: str | None,
    progress: Progress,
) -> list[float]:
    """Of each item the largest variance of its pairs' margins over the reward models."""
    records = [Scorable(Demonstration(prompt, text)) for _, prompt, texts in items for text in texts]
    scores = [
        [line["score"] for line in score_records(r, records, tokenizer=tokenizer, progress=progress).lines]
        for r in rewards
    ]
    best, start = [], 0
    for _, _, texts in items:
        own = [row[start : start + len(texts)] for row in scores]
        pairs = list(combinations(range(len(texts)), 2))
        best.append(float(ensemble_disagreement([[row[i] - row[j] for i, j in pairs] for row in own]).max()))
        start += len(texts)
    return best


def _outcomes(folder: str, records: Sequence[Comparison], tokenizer: str | None, progress: Progress) -> list[float]:
    """1 where the model prefers what was chosen, 0 where not, 1/2 for a tie."""
    scorable = [Scorable(record) for record in records]
    lines = score_records(folder, scorable, tokenizer=tokenizer, progress=progress).lines
    return [_side(line["chosen_score"] - line["rejected_score"]) for line in lines]


def _side(difference: float) -> float:
    return 0.5 if difference == 0 else float(difference > 0)


def _comparisons(where: str) -> list[Comparison]:
    from palate.data.ranking import ranking_to_comparisons
    from palate.data.records import Ranking, read_records

    found = learn(where, "comparisons").records if is_store(where) else read_records(where, "comparisons")
    pairs: list[Comparison] = []
    for record in found:
        if isinstance(record, Ranking):
            pairs += ranking_to_comparisons(record)
        elif isinstance(record, Comparison) and record.probability in (None, 1):
            pairs.append(record)
    if not pairs:
        raise DataError(f"{where}: no comparison with a sure label to hold the runs against.")
    return pairs


def _ceiling(limit: float | None) -> float | None:
    return limit if limit is not None and 0.5 < limit <= 1 else None


def _said(ask: Callable[[], Interval]) -> str:
    try:
        return str(ask())
    except FeedbackError as error:
        return f"cannot be said: {error}"


def _prompt(text: str) -> PromptText:
    found = json.loads(text)
    return found if isinstance(found, str) else tuple(found)
