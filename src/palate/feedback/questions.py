"""The questions that a task asks about the responses of an item, and what counts as an answer to each.

An answer arrives in the ids of one presentation, {question id: value}, and is stored by number: response 0 is the first of
the item, in whatever order it was shown. ``canonical`` checks a value and translates it in; ``shown`` translates it back.
``ranks`` is what an answer says about the order of the responses, which is how answers of different types are compared.

The types are those of Ouyang et al. 2022 (arXiv:2203.02155, appendix B: overall rating 1-7, binary flags, ranking with
ties), two-way comparison with strength (Touvron et al. 2023, arXiv:2307.09288, section 3.2.1), marked spans with type and
severity, rewrites (Yu et al. 2023, arXiv:2312.00849) and accept/reject (Ethayarajh et al. 2024, arXiv:2402.01306).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from palate.errors import FeedbackError
from palate.feedback.hidden import visible

LONGEST_TEXT = 100_000  # characters of a rewrite or a comment
Ids = Sequence[str]
Texts = Sequence[str]


class BadAnswer(FeedbackError):
    """An answer that does not fit its question."""


class _Question(BaseModel):
    """What all questions have: an id of its own, the text that is asked, a hint, and whether it must be answered."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")
    text: str = ""
    help: str = ""
    required: bool = True

    def canonical(self, value: Any, ids: Ids, texts: Texts) -> Any:
        raise NotImplementedError

    def shown(self, value: Any, ids: Ids) -> Any:
        return value

    def ranks(self, value: Any, count: int) -> list[int] | None:
        """1 = best, equal = no preference; None where the question says nothing about order."""
        return None

    def wrong(self, message: str) -> BadAnswer:
        return BadAnswer(f'question "{self.id}": {message}')

    def _number(self, response: Any, ids: Ids) -> int:
        if not isinstance(response, str) or response not in ids:
            raise self.wrong(f"unknown response {_short(response)}; expected one of {list(ids)}.")
        return list(ids).index(response)


class Compare(_Question):
    """Which of two is better, by how much (1 to ``strengths``), or neither."""

    type: Literal["compare"]
    strengths: int = Field(default=1, ge=1, le=3)
    tie: bool = True
    both_bad: bool = False

    def canonical(self, value: Any, ids: Ids, texts: Texts) -> dict[str, Any]:
        found = self._object(value)
        choice, strength = found.get("choice"), found.get("strength")
        neither = {"tie": self.tie, "both_bad": self.both_bad}
        if isinstance(choice, str) and neither.get(choice):
            return {"choice": choice}
        if not isinstance(choice, str) or choice not in ids:
            options = [*ids, *(name for name, allowed in neither.items() if allowed)]
            raise self.wrong(f"choice is {_short(choice)}; expected one of {options}.")
        if self.strengths == 1 and strength is None:
            strength = 1
        return {
            "choice": self._number(choice, ids),
            "strength": _whole(self, strength, 1, self.strengths, "strength"),
        }

    def _object(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or set(value) - {"choice", "strength"}:
            raise self.wrong(f'found {_short(value)}; expected {{"choice": response id, "strength": number}}.')
        return value

    def shown(self, value: Any, ids: Ids) -> Any:
        return value | {"choice": ids[value["choice"]]} if isinstance(value["choice"], int) else value

    def ranks(self, value: Any, count: int) -> list[int] | None:
        if not isinstance(value["choice"], int):
            return [1] * count
        return [1 if i == value["choice"] else 2 for i in range(count)]


class Rank(_Question):
    """All responses in tiers, best first; several in a tier are a tie."""

    type: Literal["rank"]
    ties: bool = True

    def canonical(self, value: Any, ids: Ids, texts: Texts) -> list[list[int]]:
        if not isinstance(value, list) or not all(isinstance(tier, list) and tier for tier in value):
            raise self.wrong(f"found {_short(value)}; expected a list of tiers, each a list of response ids.")
        tiers = [sorted(self._number(response, ids) for response in tier) for tier in value]
        placed = sorted(number for tier in tiers for number in tier)
        if placed != list(range(len(ids))):
            raise self.wrong(f"{len(placed)} places for {len(ids)} responses; expected each response exactly once.")
        if not self.ties and len(tiers) < len(ids):
            raise self.wrong("two responses share a tier; this task has no ties.")
        return tiers

    def shown(self, value: Any, ids: Ids) -> Any:
        return [[ids[number] for number in tier] for tier in value]

    def ranks(self, value: Any, count: int) -> list[int] | None:
        place = {number: i for i, tier in enumerate(value, 1) for number in tier}
        return [place[i] for i in range(count)]


class _PerResponse(_Question):
    """A value for each response: {response id: value} outside, a list with one entry for each response inside."""

    def canonical(self, value: Any, ids: Ids, texts: Texts) -> list[Any]:
        if not isinstance(value, dict):
            raise self.wrong(f"found {_short(value)}; expected an object from response id to value.")
        given = {self._number(response, ids): entry for response, entry in value.items()}
        missing = [response for i, response in enumerate(ids) if i not in given]
        if missing and self.required and self._each():
            raise self.wrong(f"no value for {missing}; expected one for each of the {len(ids)} responses.")
        return [self._entry(given[i], texts[i]) if i in given else self._nothing() for i in range(len(ids))]

    def shown(self, value: Any, ids: Ids) -> Any:
        return {response: entry for response, entry in zip(ids, value, strict=True) if entry != self._nothing()}

    def _entry(self, entry: Any, text: str) -> Any:
        raise NotImplementedError

    def _each(self) -> bool:
        """Every response must have a value."""
        return True

    def _nothing(self) -> Any:
        return None


class Rating(_PerResponse):
    """A whole number from 1 to ``scale`` for each response."""

    type: Literal["rating"]
    scale: int = Field(default=7, ge=2, le=10)
    labels: tuple[str, str] = ("", "")

    def _entry(self, entry: Any, text: str) -> int:
        return _whole(self, entry, 1, self.scale, "rating")

    def ranks(self, value: Any, count: int) -> list[int] | None:
        if None in value:
            return None
        order = sorted(set(value), reverse=True)
        return [1 + order.index(entry) for entry in value]


class Option(BaseModel):
    """One thing to tick."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")
    label: str


class Flags(_PerResponse):
    """Any number of things to tick for each response; a flag whose id begins with "good_" praises, others blame."""

    type: Literal["flags"]
    options: tuple[Option, ...] = Field(min_length=1)
    required: bool = False

    def _entry(self, entry: Any, text: str) -> list[str]:
        known = [option.id for option in self.options]
        if not isinstance(entry, list) or any(not isinstance(flag, str) or flag not in known for flag in entry):
            raise self.wrong(f"found {_short(entry)}; expected a list of flags from {known}.")
        return [flag for flag in known if flag in entry]

    def _each(self) -> bool:
        return False

    def _nothing(self) -> Any:
        return []


class Spans(_PerResponse):
    """Marked stretches of a response, in code points of its text, each with a kind and perhaps a severity and a comment."""

    type: Literal["spans"]
    kinds: tuple[str, ...] = Field(min_length=1)
    severities: tuple[str, ...] = ()
    required: bool = False

    def _entry(self, entry: Any, text: str) -> list[dict[str, Any]]:
        if not isinstance(entry, list) or len(entry) > 1000:
            raise self.wrong(f"found {_short(entry)}; expected a list of at most 1000 spans.")
        return sorted((self._span(span, text) for span in entry), key=lambda span: (span["start"], span["end"]))

    def _span(self, span: Any, text: str) -> dict[str, Any]:
        if not isinstance(span, dict) or set(span) - {"start", "end", "kind", "severity", "comment"}:
            raise self.wrong(f"found the span {_short(span)}; expected start, end, kind, severity and comment.")
        start = _whole(self, span.get("start"), 0, len(text), "start of a span")
        end = _whole(self, span.get("end"), start + 1, len(text), "end of a span")
        found: dict[str, Any] = {"start": start, "end": end, "kind": self._one(span.get("kind"), self.kinds, "kind")}
        if self.severities:
            found["severity"] = self._one(span.get("severity"), self.severities, "severity")
        if span.get("comment"):
            found["comment"] = _text(self, span["comment"])
        return found

    def _one(self, value: Any, known: Sequence[str], name: str) -> str:
        if not isinstance(value, str) or value not in known:
            raise self.wrong(f"a span's {name} is {_short(value)}; expected one of {list(known)}.")
        return value

    def _each(self) -> bool:
        return False

    def _nothing(self) -> Any:
        return []


class Rewrite(_PerResponse):
    """A better text in place of a response; the same text, or none, is no rewrite."""

    type: Literal["rewrite"]
    required: bool = False

    def _entry(self, entry: Any, text: str) -> str | None:
        rewritten = _text(self, entry)
        return None if rewritten in (text, visible(text)) or not rewritten.strip() else rewritten

    def _each(self) -> bool:
        return False


class Accept(_PerResponse):
    """Good or not good, for each response."""

    type: Literal["accept"]

    def _entry(self, entry: Any, text: str) -> bool:
        if not isinstance(entry, bool):
            raise self.wrong(f"found {_short(entry)}; expected true or false.")
        return entry

    def ranks(self, value: Any, count: int) -> list[int] | None:
        if None in value:
            return None
        return [1 if good else 2 for good in value]


class Text(_Question):
    """Free text about the item as a whole."""

    type: Literal["text"]
    required: bool = False

    def canonical(self, value: Any, ids: Ids, texts: Texts) -> str:
        text = _text(self, value)
        if self.required and not text.strip():
            raise self.wrong("nothing was written; expected some text.")
        return text


Question = Annotated[
    Compare | Rank | Rating | Flags | Spans | Rewrite | Accept | Text,
    Field(discriminator="type"),
]


def _whole(question: _Question, value: Any, low: int, high: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise question.wrong(f"{name} is {_short(value)}; expected a whole number from {low} to {high}.")
    return value


def _text(question: _Question, value: Any) -> str:
    if not isinstance(value, str):
        raise question.wrong(f"found {_short(value)}; expected text.")
    if len(value) > LONGEST_TEXT:
        raise question.wrong(f"{len(value):,} characters; expected at most {LONGEST_TEXT:,}.")
    return value


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
