"""What every writer makes: lines of a file, each knowing its prompt, and the settings that they share."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from palate.data.kinds import PromptText
from palate.data.ranking import split_by_prompt
from palate.errors import ConfigError
from palate.feedback.task import Task
from palate.feedback.views import Answer


@dataclass(frozen=True)
class Settings:
    """What an export can be told.

    Attributes:
        question: id; None = the first that fits.
        labels: "each" = a row for every annotator's own answer; "consensus" = one for each pair with the probability of
            the annotator-aware model.
        margins: in reward units, for the strengths 1, 2, ... of a compare question; None = the strengths themselves
            are not turned into margins.
        conversational: prompts and responses as messages.
        gamma: weight of corrected tokens (RLHF-V, arXiv:2312.00849, uses 5), > 0.
        tokenizer: folder or hub name, for weights a token; None = spans of characters only.
    """

    question: str | None = None
    labels: Literal["each", "consensus"] = "each"
    margins: Sequence[float] | None = None
    conversational: bool = False
    gamma: float = 5.0
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.labels not in ("each", "consensus"):
            raise ConfigError(f'labels is "{self.labels}". Expected "each" or "consensus".')
        if not self.gamma > 0:
            raise ConfigError(f"gamma is {self.gamma}. Expected a number above 0, e.g. 5.")


@dataclass(frozen=True)
class Line:
    """One line, and the prompt by whose hash it goes to training or validation."""

    prompt: PromptText
    row: dict[str, Any]


@dataclass
class Lines:
    """The lines of a file, and what gave none, by reason."""

    lines: list[Line] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, prompt: PromptText, row: dict[str, Any]) -> None:
        self.lines.append(Line(prompt, row))

    def rows(self) -> list[dict[str, Any]]:
        return [line.row for line in self.lines]

    def split(self, share: float, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(training, validation): a prompt is on one side, by the hash that ``palate train`` uses too."""
        sides = split_by_prompt(self.lines, share, seed)  # type: ignore[type-var]
        return [line.row for line in sides[0]], [line.row for line in sides[1]]


def plain(prompt: PromptText) -> Any:
    """A prompt as JSON has it."""
    return prompt if isinstance(prompt, str) else list(prompt)


def turns(prompt: PromptText) -> list[dict[str, Any]]:
    """A prompt as messages; text is one message of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(turn) for turn in prompt]


def question_text(prompt: PromptText) -> str | None:
    """The text of a prompt of one message; None for a longer conversation, which is no single question."""
    if isinstance(prompt, str):
        return prompt
    return str(prompt[0]["content"]) if len(prompt) == 1 else None


def prompt_text(prompt: PromptText) -> str:
    """A prompt as one text to be shown: of a conversation every turn with its role before it."""
    text = question_text(prompt)
    if text is not None:
        return text
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt if isinstance(turn, dict))


def question_of(task: Task, types: Sequence[str], question: str | None = None) -> Any:
    """The question of one of these types, in their order, or the one with that id; None where the task has none.

    Raises:
        ConfigError: a question was named, and it is not there or of another type.
    """
    fitting = [each for kind in types for each in task.questions if each.type == kind]
    if question is None:
        return fitting[0] if fitting else None
    found = next((each for each in fitting if each.id == question), None)
    if found is None:
        asked = ", ".join(f"{each.id} ({each.type})" for each in task.questions)
        raise ConfigError(f'no question "{question}" of the types {", ".join(types)} in this task. It asks: {asked}.')
    return found


def needed(task: Task, types: Sequence[str], question: str | None, what: str) -> Any:
    """``question_of``, where there must be one.

    Raises:
        ConfigError: the task asks nothing of the kind.
    """
    found = question_of(task, types, question)
    if found is None:
        asked = ", ".join(f"{each.id} ({each.type})" for each in task.questions)
        raise ConfigError(f"{what} is made of questions of the type {' or '.join(types)}; this task asks: {asked}.")
    return found


def names(answers: Iterable[Answer]) -> list[str]:
    """Who answered, each once, in order."""
    return list(dict.fromkeys(answer.annotator for answer in answers))


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
