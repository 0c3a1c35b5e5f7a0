"""Putting prompts with responses into a store, to be judged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from random import Random
from typing import Any

from palate.data.files import rows
from palate.data.formats.fields import objects
from palate.data.kinds import Comparison, Demonstration, Judgement, Prompt, PromptText, Ranking, Record, prompt_key
from palate.data.records import read_records
from palate.errors import DataError, FeedbackError
from palate.feedback.store import Store
from palate.feedback.tables import canonical_json
from palate.feedback.task import Task, Values, check_item

KINDS = ("task", "gold", "attention")
LONGEST_RESPONSE = 200_000  # characters
AT_ONCE = 500  # items of one transaction


@dataclass(frozen=True)
class Candidate:
    """A prompt with responses, not yet in a store.

    Attributes:
        prompt: text or messages.
        responses: at most 9 texts.
        sources: of each response: what is known of its origin ({"model", "model_hash", "settings", "seed", "score"}; or
            {"annotator": pseudonym} for a person's text, who then never judges it). Never shown to annotators.
        images: content hashes of pictures beside the prompt.
        kind: "task"; "gold" = the answer is known; "attention" = the answer is obvious to whoever reads.
        gold: the known answer: {question id: value}, responses by number; for gold and attention items only.
        meta: anything else to keep, e.g. {"source": "file:line"}.
    """

    prompt: PromptText
    responses: tuple[str, ...]
    sources: tuple[Mapping[str, Any], ...] = ()
    images: tuple[str, ...] = ()
    kind: str = "task"
    gold: Values | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Imported:
    """Counts of an import: items that are new, that were here already, and records that hold nothing to judge."""

    new: int
    known: int
    empty: int = 0

    def __str__(self) -> str:
        texts = [f"{self.new} items"]
        texts += [f"{self.known} were here already"] if self.known else []
        texts += [f"{self.empty} left out: their responses are all alike"] if self.empty else []
        return "; ".join(texts)


def add_items(store: Store, candidates: Iterable[Candidate], *, combinations_of: int | None = None) -> Imported:
    """Put items into a store; one that is there already (same prompt, responses and pictures) is not put in again.

    A prompt with more different responses than the task shows at once becomes several items, one for each combination.

    Args:
        combinations_of: at most so many combinations of a prompt, drawn by the task's seed; None = all.
    Raises:
        FeedbackError: responses that the task's questions cannot be asked of, or a gold answer that does not fit.
    """
    new = known = empty = 0
    task = store.task
    bodies = []
    for number, candidate in enumerate(candidates, 1):
        where = str(candidate.meta.get("source") or f"item {number}")
        different = _different(candidate)
        if len(different) < min(task.least, len(candidate.responses)):
            empty += 1
            continue
        for chosen in _combinations(different, task, combinations_of):
            bodies.append(_body(task, candidate, chosen, where))
    for start in range(0, len(bodies), AT_ONCE):  # annotators may be at work: they wait for one transaction at most
        with store.write() as tx:
            for body in bodies[start : start + AT_ONCE]:
                if tx.find(f"item:{body['item']}"):
                    known += 1
                else:
                    tx.append("item", "admin", body, key=f"item:{body['item']}")
                    new += 1
    return Imported(new, known, empty)


def read_candidates(where: str, *, kind: str = "task") -> list[Candidate]:
    """Candidates from palate's own JSONL: {"prompt", "responses"} as the ``sample`` stage of a pipeline writes it,
    {"prompt", "response"} lines of which those with the same prompt belong together, comparisons, or rankings.

    ``images`` are then still the file names of the records ({"prompt", "responses", "images"} only).
    What somebody said about the responses before (chosen, ranks) is not shown to anybody; with ``kind`` "gold" or
    "attention" it is the known answer.

    Raises:
        DataError: missing file or field, with its place.
    """
    if kind not in KINDS:
        raise FeedbackError(f'unknown kind of item "{kind}". Kinds: {", ".join(KINDS)}.')
    source, first = next(rows(where))
    if ("chosen" in first and "rejected" in first) or ("responses" in first and "ranks" in first):
        return [_compared(record, kind) for record in read_records(where, "comparisons")]
    if kind != "task" and not ("response" in first and "desirable" in first):
        raise DataError(f'{source}: no known answer for a {kind} item. Expected "chosen", "ranks" or "desirable".')
    if "responses" in first:
        return [_from_responses(row, source) for source, row in rows(where)]
    if "desirable" in first:
        judged = [r for r in read_records(where, "judgements") if isinstance(r, Judgement)]
        return [
            Candidate(
                r.prompt, (r.response,), kind=kind, gold=_gold(kind, [r.desirable], "accept"), meta=_meta(r.source)
            )
            for r in judged
        ]
    if "response" not in first:
        raise DataError(f'{source}: no "responses" or "response" field. Found: {", ".join(map(repr, first))}.')
    return _grouped([r for r in read_records(where, "demonstrations") if isinstance(r, Demonstration)])


def _compared(record: Record, kind: str) -> Candidate:
    if isinstance(record, Ranking):
        return _from_ranking(record, kind)
    assert isinstance(record, Comparison)
    sure = 1.0 if record.probability is None else record.probability
    gold = _gold(kind, [1, 2] if sure > 0.5 else [2, 1] if sure < 0.5 else [1, 1], "ranks")
    return Candidate(record.prompt, (record.chosen, record.rejected), kind=kind, gold=gold, meta=_meta(record.source))


def _from_ranking(record: Ranking, kind: str) -> Candidate:
    gold = _gold(kind, list(record.ranks), "ranks")
    return Candidate(record.prompt, record.responses, kind=kind, gold=gold, meta=_meta(record.source))


def _from_responses(row: Mapping[str, Any], source: str) -> Candidate:
    responses, known = row.get("responses"), row.get("sources")
    if not isinstance(responses, list) or row.get("prompt") is None:
        raise DataError(f'{source}: expected {{"prompt": ..., "responses": ["...", "..."]}}.')
    if known is not None and (len(objects(known, "sources", source)) != len(responses)):
        raise DataError(f'{source}: {len(known)} "sources" of {len(responses)} "responses". Expected one of each.')
    sources = tuple(known or ())
    prompt = Prompt(row["prompt"], source=source).prompt
    texts = tuple(Demonstration(prompt, text, source=source).response for text in responses)  # checked like any text
    images = row.get("images") or ()
    if not isinstance(images, list | tuple) or not all(isinstance(image, str) for image in images):
        raise DataError(f'{source}: "images" is not a list of file names.')
    return Candidate(prompt, texts, sources=sources, images=tuple(images), meta=_meta(source))


def _grouped(records: Sequence[Demonstration]) -> list[Candidate]:
    groups: dict[str, list[Demonstration]] = {}
    for record in records:
        groups.setdefault(prompt_key(record.prompt), []).append(record)
    return [
        Candidate(group[0].prompt, tuple(r.response for r in group), meta=_meta(group[0].source))
        for group in groups.values()
    ]


def _meta(source: str) -> dict[str, Any]:
    return {"source": source} if source else {}


def _gold(kind: str, value: list[Any], form: str) -> Values | None:
    """The known answer in a form that ``_known_answer`` turns into answers to the task's questions."""
    return None if kind == "task" else {form: value}


def _different(candidate: Candidate) -> list[int]:
    """Numbers of the responses without repetitions of the same text."""
    first = {text: number for number, text in reversed(list(enumerate(candidate.responses)))}
    return sorted(first.values())


def _combinations(numbers: list[int], task: Task, most: int | None) -> list[tuple[int, ...]]:
    size = min(task.shown or len(numbers), len(numbers))
    found = list(combinations(numbers, size))
    if most is not None and len(found) > most:
        found = sorted(Random(task.distribution.seed).sample(found, most))
    return found


def _body(task: Task, candidate: Candidate, chosen: Sequence[int], where: str) -> dict[str, Any]:
    if candidate.kind not in KINDS:
        raise FeedbackError(f'{where}: unknown kind of item "{candidate.kind}". Kinds: {", ".join(KINDS)}.')
    texts = [candidate.responses[number] for number in chosen]
    check_item(task, texts, where)
    if longest := max((len(text) for text in texts if len(text) > LONGEST_RESPONSE), default=0):
        raise FeedbackError(
            f"{where}: a response of {longest:,} characters; at most {LONGEST_RESPONSE:,} can be shown."
        )
    sources = [dict(candidate.sources[number]) if candidate.sources else {} for number in chosen]
    prompt = candidate.prompt if isinstance(candidate.prompt, str) else list(candidate.prompt)
    gold = None
    if candidate.kind != "task":
        gold = _known_answer(task, candidate, chosen, texts, where)
    content = canonical_json([candidate.kind, prompt, texts, list(candidate.images)])
    return {
        "item": hashlib.sha256(content.encode()).hexdigest()[:20],
        "kind": candidate.kind,
        "prompt": prompt,
        "responses": [{"text": text, "source": source} for text, source in zip(texts, sources, strict=True)],
        "images": list(candidate.images),
        "gold": gold,
        "meta": json.loads(canonical_json(dict(candidate.meta))),
    }


def _known_answer(task: Task, candidate: Candidate, chosen: Sequence[int], texts: Sequence[str], where: str) -> Values:
    """The known answer as values by number, checked like anybody's."""
    given = candidate.gold or {}
    if "ranks" in given or "accept" in given:
        given = _as_values(task, given, chosen)
    ids = [f"r{number}" for number in range(len(texts))]
    known = {question.id: question for question in task.questions}
    values: Values = {}
    for name, value in given.items():
        if name not in known:
            raise FeedbackError(f'{where}: a gold answer to "{name}", which the task does not ask.')
        values[name] = known[name].canonical(known[name].shown(value, ids), ids, texts)
    if not values:
        raise FeedbackError(f"{where}: a {candidate.kind} item without an answer to any of the task's questions.")
    return values


def _as_values(task: Task, given: Values, chosen: Sequence[int]) -> Values:
    """A record's ranks or truth value as answers to those questions of the task that they answer."""
    values: Values = {}
    ranks = [given["ranks"][number] for number in chosen] if "ranks" in given else None
    for question in task.questions:
        if question.type == "rank" and ranks is not None:
            values[question.id] = [[i for i, r in enumerate(ranks) if r == rank] for rank in sorted(set(ranks))]
        elif question.type == "compare" and ranks is not None:
            tie = len(set(ranks)) == 1
            values[question.id] = {"choice": "tie"} if tie else {"choice": ranks.index(min(ranks)), "strength": 1}
        elif question.type == "accept" and "accept" in given:
            values[question.id] = [given["accept"][number] for number in chosen]
    return values
