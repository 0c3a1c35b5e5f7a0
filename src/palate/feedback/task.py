"""A labelling task: what annotators are asked, and how the work is dealt out. Written in YAML, kept in the store.

    title: Which answer is better?
    questions:
      - {id: better, type: compare, strengths: 3, tie: true}
    distribution: {overlap: 3, gold_share: 0.05}

A task of no file is ``instructgpt``; ``templates()`` names the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from itertools import combinations
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from palate.errors import ConfigError, FeedbackError
from palate.feedback.questions import BadAnswer, Question

Values = dict[str, Any]


class Distribution(BaseModel):
    """How items are dealt out.

    Attributes:
        overlap: answers wanted for each item, by different annotators.
        lease_minutes: how long a place is kept for an annotator who was shown an item.
        gold_share: share of presentations that are items with a known answer, in [0, 1).
        attention_share: the same for items that only test whether somebody reads.
        repeat_share: share of presentations that show an annotator an earlier item again, in reverse order.
        repeat_after: presentations of the annotator's own that lie between at least.
        random_share: share of items drawn at random instead of by need, in [0, 1].
        contested_above: items whose answers disagree more than this go to an adjudicator, in [0, 1]; see ``disagreement``.
        seed: of every draw: order of responses, kind of item, random items.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    overlap: int = Field(default=1, ge=1, le=100)
    lease_minutes: float = Field(default=30.0, gt=0, le=10_080)
    gold_share: float = Field(default=0.0, ge=0, lt=1)
    attention_share: float = Field(default=0.0, ge=0, lt=1)
    repeat_share: float = Field(default=0.0, ge=0, lt=1)
    repeat_after: int = Field(default=10, ge=1)
    random_share: float = Field(default=0.1, ge=0, le=1)
    contested_above: float = Field(default=0.4, ge=0, le=1)
    seed: int = 0

    @model_validator(mode="after")
    def _leaves_room(self) -> Distribution:
        extra = self.gold_share + self.attention_share + self.repeat_share
        if extra >= 1:
            raise ValueError(
                f"gold, attention and repeat shares add up to {extra:g}; nothing is left for the task itself"
            )
        return self


class Task(BaseModel):
    """The settings of a labelling task.

    Attributes:
        title: shown above the item.
        instructions: for annotators, in Markdown.
        language: of the page's own words, "en" or "zh".
        render: how prompts and responses are shown: as plain "text", or as "markdown".
        questions: what is asked; ids must differ.
        show: responses shown at once; None = all of an item's. An import with more makes several items of them.
        distribution: how items are dealt out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str = Field(default="Which answer is better?", min_length=1, max_length=300)
    instructions: str = Field(default="", max_length=50_000)
    language: Literal["en", "zh"] = "en"
    render: Literal["text", "markdown"] = "text"
    questions: tuple[Question, ...] = Field(min_length=1)
    show: int | None = Field(default=None, ge=1, le=9)
    distribution: Distribution = Distribution()

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        ids = [question.id for question in self.questions]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise ValueError(f"two questions have the id {twice[0]!r}")
        if any(question.type == "compare" for question in self.questions) and self.show not in (None, 2):
            raise ValueError(f"a question of type compare is about 2 responses, and show is {self.show}")
        return self

    @property
    def shown(self) -> int | None:
        """Responses shown at once: ``show``, or 2 where two are compared."""
        return 2 if any(question.type == "compare" for question in self.questions) else self.show

    @property
    def least(self) -> int:
        """Responses that an item needs for these questions to make sense."""
        return 2 if any(question.type in ("compare", "rank") for question in self.questions) else 1

    def canonical(self, values: Any, ids: Sequence[str], texts: Sequence[str]) -> Values:
        """Check an answer given in a presentation's ids, and number its responses as the item does.

        Args:
            values: {question id: value}.
            ids: the presentation's id of each response of the item, in the item's order.
            texts: the responses' texts in the same order.
        Raises:
            BadAnswer: an unknown or missing question, or a value that does not fit; says which and what was expected.
        """
        if not isinstance(values, dict):
            raise BadAnswer(
                f"an answer's values are {type(values).__name__}; expected an object {{question id: value}}."
            )
        known = {question.id: question for question in self.questions}
        if unknown := sorted(str(name) for name in values if name not in known):
            raise BadAnswer(f'no question "{unknown[0][:60]}" in this task; expected {sorted(known)}.')
        missing = [q.id for q in self.questions if q.required and values.get(q.id) is None]
        if missing:
            raise BadAnswer(f'question "{missing[0]}" has no answer. Answer it, or skip the item.')
        return {name: known[name].canonical(value, ids, texts) for name, value in values.items() if value is not None}

    def shown_values(self, values: Values, ids: Sequence[str]) -> Values:
        """The inverse of ``canonical``: stored values in the ids of a presentation."""
        known = {question.id: question for question in self.questions}
        return {name: known[name].shown(value, ids) for name, value in values.items() if name in known}

    def ranks(self, values: Values, count: int) -> list[int] | None:
        """The order of the responses by the first question that gives one: 1 = best, equal = no preference; or None."""
        for question in self.questions:
            if question.id in values:
                found = question.ranks(values[question.id], count)
                if found is not None:
                    return found
        return None

    def disagreement(self, answers: Sequence[Values], count: int) -> float:
        """1 - mean over pairs of responses of the share of annotators in the majority (better, worse, or no preference).

        0 = unanimous, {A, A, B} gives 1/3, {A, B} gives 1/2, {A, B, tie} gives 2/3. For a single response the two
        "orders" are its accept values. 0 with fewer than two answers that say something about order.
        """
        rankings = [ranks for values in answers if (ranks := self.ranks(values, count)) is not None]
        if len(rankings) < 2:
            return 0.0
        if count == 1:
            return 1 - _majority([ranks[0] for ranks in rankings])
        pairs = list(combinations(range(count), 2))
        signs = [[(ranks[i] > ranks[j]) - (ranks[i] < ranks[j]) for ranks in rankings] for i, j in pairs]
        return 1 - sum(_majority(each) for each in signs) / len(pairs)

    def fingerprint(self) -> str:
        """Equal for tasks that ask the same: their questions, and nothing else."""
        asked = [question.model_dump(mode="json", exclude={"text", "help"}) for question in self.questions]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def task_of(values: Mapping[str, Any], place: Callable[[str], str] = lambda key: "") -> Task:
    """A task from its settings.

    Args:
        values: what the YAML holds.
        place: from a dotted key to where it was written, for messages.
    Raises:
        ConfigError: with the key, what was found and what was expected.
    """
    try:
        return Task.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        kinds = "compare, rank, rating, flags, spans, rewrite, accept, text"
        parts = [str(part) for part in first["loc"] if str(part) not in kinds.split(", ")]
        key = ".".join(parts) or "task"
        where = place(key)
        found = (
            ""
            if first["type"] == "missing" or not parts
            else f" Found {json.dumps(first['input'], default=str)[:120]}."
        )
        hint = f" Question types: {kinds}." if "union_tag" in first["type"] else ""
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where + ': ' if where else ''}{key}: {message}.{found}{hint}") from None


def templates() -> list[str]:
    """The names of the built-in tasks."""
    folder = resources.files("palate.feedback") / "templates"
    return sorted(each.name.removesuffix(".yaml") for each in folder.iterdir() if each.name.endswith(".yaml"))


def template(name: str = "instructgpt") -> Task:
    """A built-in task.

    Raises:
        ConfigError: no such template.
    """
    if name not in templates():
        raise ConfigError(f'no task template "{name}". Templates: {", ".join(templates())}; or give a .yaml file.')
    return task_of(yaml.safe_load(template_text(name)))


def template_text(name: str) -> str:
    """A built-in task as it is written, to start one's own from."""
    return (resources.files("palate.feedback") / "templates" / f"{name}.yaml").read_text(encoding="utf-8")


def check_item(task: Task, responses: Sequence[str], where: str = "item") -> None:
    """That the task's questions can be asked of these responses.

    Raises:
        FeedbackError: too few, or more than are shown at once.
    """
    if len(responses) < task.least:
        raise FeedbackError(f"{where}: {len(responses)} responses; this task's questions need at least {task.least}.")
    if task.shown is not None and len(responses) > task.shown:
        raise FeedbackError(f"{where}: {len(responses)} responses; this task shows {task.shown} at once.")
    if len(responses) > 9:
        raise FeedbackError(f"{where}: {len(responses)} responses; at most 9 are shown at once. Set show in the task.")


def _majority(votes: Sequence[int]) -> float:
    return max(votes.count(vote) for vote in set(votes)) / len(votes)
