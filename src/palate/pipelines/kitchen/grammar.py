"""Prompts and responses of the kitchen: what guests ask, and what more or less gifted waiters say.

Everything is drawn with ``random.Random``, so one seed is one text. ``read_prompt`` and ``read_sentence`` are the way
back from text to meaning; the gold preference is built on them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

from palate.errors import DataError
from palate.pipelines.kitchen.facts import (
    FILLERS,
    KINDS,
    OCCASIONS,
    POLITE_CLOSERS,
    POLITE_OPENERS,
    REASONS,
    RUDE_OPENERS,
    WISHES,
    Choice,
    Kind,
)


@dataclass(frozen=True)
class Task:
    """What a prompt asks for: a kind of question about a subject, with a wish ("" = none)."""

    kind: Kind
    family: str
    subject: str
    wish: str

    def fits(self, choice: Choice) -> bool:
        """Does this choice suit the subject and respect the wish?"""
        return choice in self.kind.choices[self.family] and not (self.wish and choice.conflict == self.wish)


@dataclass(frozen=True)
class Sentence:
    """What a sentence of a response is.

    ``role`` is "polite_opener", "rude_opener", "polite_closer", "filler", "answer" or "broken" (not a sentence of this
    world). An answer has the kind's name, the choice's name, the subject, and a reason or "".
    """

    role: str
    text: str
    kind: str = ""
    choice: str = ""
    subject: str = ""
    reason: str = ""


def all_prompts() -> Iterator[str]:
    """Every prompt of the world, in a fixed order."""
    for kind in KINDS:
        subjects = [s for family in kind.subjects.values() for s in family]
        for subject, question, wish, occasion in product(subjects, kind.questions, kind.wishes, OCCASIONS):
            for said in WISHES.get(wish, ("",)):
                yield " ".join(part for part in (occasion, question.format(subject=subject), said) if part)


def draw_prompts(n: int, seed: int) -> list[str]:
    """``n`` different prompts.

    Raises:
        ValueError: more than there are.
    """
    return random.Random(f"prompts {seed}").sample(_prompt_list(), n)


def split_prompts(train: int, held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """Two lists without a common prompt."""
    prompts = draw_prompts(train + held_out, seed)
    return prompts[:train], prompts[train:]


def read_prompt(prompt: str) -> Task:
    """The task behind a prompt.

    Raises:
        DataError: not a prompt of this world.
    """
    for kind, pattern in _question_patterns():
        if match := pattern.search(prompt):
            wish = next((w for w, ways in WISHES.items() if any(way in prompt for way in ways)), "")
            subject = match.group("subject")
            family = next(f for f, subjects in kind.subjects.items() if subject in subjects)
            return Task(kind, family, subject, wish)
    raise DataError(f"{prompt!r} is not a question of the kitchen. Expected one like {_prompt_list()[0]!r}")


def sentences(text: str) -> list[str]:
    """A text cut after each full stop, question or exclamation mark; the last part may be unfinished."""
    return [part for part in re.split(r"(?<=[.?!])\s+", text.strip()) if part]


def read_sentence(text: str) -> Sentence:
    """What one sentence says; words and punctuation must be exactly right."""
    if role := _fixed_sentences().get(text):
        return Sentence(role, text)
    for kind, pattern in _answer_patterns():
        if match := pattern.fullmatch(text):
            return Sentence("answer", text, kind, match["choice"], match["subject"], match["reason"] or "")
    return Sentence("broken", text)


def perfect_response(prompt: str, rng: random.Random) -> str:
    """A response with every good quality: polite, fitting, with a true reason, brief."""
    task = read_prompt(prompt)
    choice = rng.choice([c for c in task.kind.choices[task.family] if task.fits(c)])
    answer = _answer(task.kind, choice, task.subject, rng.choice(choice.reasons), rng)
    return " ".join([rng.choice(POLITE_OPENERS), answer, rng.choice(POLITE_CLOSERS)])


def mixed_response(prompt: str, rng: random.Random) -> str:
    """What an ordinary waiter says: readable, but of mixed quality.

    Chances: polite opener 0.3, rude 0.15; an answer about another subject 0.08; a choice of another family than that
    subject's 0.15 (and the guest's wish is not listened to); a reason 0.45, of which 0.65 true; each of two fillers 0.35;
    polite closer 0.3; a slip (word said twice, sentence said twice, end missing) 0.04.
    """
    task = read_prompt(prompt)
    parts = []
    manners = rng.random()
    if manners < 0.45:
        parts.append(rng.choice(POLITE_OPENERS if manners < 0.3 else RUDE_OPENERS))
    family, subject = task.family, task.subject
    if rng.random() < 0.08:
        family = rng.choice(list(task.kind.subjects))
        subject = rng.choice([s for s in task.kind.subjects[family] if s != task.subject])
    if rng.random() < 0.15:
        family = rng.choice([f for f in task.kind.choices if f != family])
    choice = rng.choice(task.kind.choices[family])
    reason = ""
    if rng.random() < 0.45:
        reason = rng.choice(choice.reasons) if rng.random() < 0.65 else rng.choice(list(REASONS.values()))
    parts.append(_answer(task.kind, choice, subject, reason, rng))
    parts += [f for f in rng.sample(FILLERS, 2) if rng.random() < 0.35]
    if rng.random() < 0.3:
        parts.append(rng.choice(POLITE_CLOSERS))
    return _slip(parts, rng) if rng.random() < 0.04 else " ".join(parts)


def _answer(kind: Kind, choice: Choice, subject: str, reason: str, rng: random.Random) -> str:
    text = rng.choice(kind.answers).format(choice=choice.name, subject=subject)
    return f"{text} because {reason}." if reason else f"{text}."


def _slip(parts: list[str], rng: random.Random) -> str:
    """A sentence twice, a word twice, or the end missing."""
    way = rng.randrange(3)
    if way == 0:
        i = rng.randrange(len(parts))
        return " ".join([*parts[: i + 1], parts[i], *parts[i + 1 :]])
    words = " ".join(parts).split()
    i = rng.randrange(1, len(words))
    return " ".join([*words[: i + 1], words[i], *words[i + 1 :]] if way == 1 else words[: max(2, i)])


@cache
def _prompt_list() -> list[str]:
    return list(all_prompts())


@cache
def _fixed_sentences() -> dict[str, str]:
    roles = {
        "polite_opener": POLITE_OPENERS,
        "rude_opener": RUDE_OPENERS,
        "polite_closer": POLITE_CLOSERS,
        "filler": FILLERS,
    }
    return {text: role for role, texts in roles.items() for text in texts}


def _one_of(words: list[str]) -> str:
    return "|".join(re.escape(w) for w in sorted(words, key=len, reverse=True))


def _pattern(template: str, **slots: list[str]) -> str:
    text = re.escape(template)
    for name, words in slots.items():
        text = text.replace(r"\{" + name + r"\}", f"(?P<{name}>{_one_of(words)})")
    return text


@cache
def _question_patterns() -> list[tuple[Kind, re.Pattern[str]]]:
    return [
        (kind, re.compile(_pattern(question, subject=[s for family in kind.subjects.values() for s in family])))
        for kind in KINDS
        for question in kind.questions
    ]


@cache
def _answer_patterns() -> list[tuple[str, re.Pattern[str]]]:
    reasons = f"(?: because (?P<reason>{_one_of(list(REASONS.values()))}))?"
    return [
        (
            kind.name,
            re.compile(
                _pattern(
                    answer,
                    choice=[c.name for family in kind.choices.values() for c in family],
                    subject=[s for family in kind.subjects.values() for s in family],
                )
                + reasons
                + r"\."
            ),
        )
        for kind in KINDS
        for answer in kind.answers
    ]
