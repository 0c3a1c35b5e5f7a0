"""Argilla's records: a JSON list as version 2's ``dataset.records.to_json`` writes it, or rows of a version 1 data set.

    {"id", "fields": {"prompt": text, "response_1": text, ...}, "metadata": {}, "suggestions": {}, "vectors": {},
     "responses": {question: [{"value": ..., "user_id": "...", "status"?: "submitted"}]}}

A question's value is a label (text), several labels (a list), a rating (a number), a text, spans (a list of {"start",
"end", "label"}), or a ranking: option names, best first; version 1 and the server say {"value": name, "rank": 1} for
each. In rows of version 1 fields and questions stand side by side, a question as a list of {"user_id", "value",
"status"}.

Argilla asks about a record, palate about responses: a question about each response is written as one for each, with the
response's number at its end ("overall_2"). A ranking of version 2 has no ties: tiers are kept in the metadata, which
palate reads back. https://docs.argilla.io/latest/reference/argilla/records/responses
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from palate.data.files import rows
from palate.data.formats import fields as reading
from palate.data.kinds import PromptText
from palate.errors import DataError
from palate.feedback import views
from palate.feedback.exchange.lines import Lines, Settings, as_json, plain, prompt_text
from palate.feedback.exchange.taken import UNKNOWN, Judged, Taken, written_by
from palate.feedback.task import Task

PROMPTS = ("prompt", "instruction", "question", "input", "context", "query", "chat")
_RESPONSE = re.compile(r"^(response|reply|answer|completion|generation|output|text|option)s?[-_ ]?(\d+|[a-i])?$")
_ID = re.compile(r"^[a-z][a-z0-9_]{0,39}$")
_NUMBERED = re.compile(r"^(.*?)[-_ ]?(?<!\d)(\d)$")
TIERS, PROMPT = "palate_tiers", "palate_prompt"
TIE, BOTH_BAD, YES, NO = "tie", "both_bad", "yes", "no"
# What people call a tie, or a good one, in labels.
_TIES = {"tie", "same", "equal", "both", "neither", "draw", "no_preference"}
_GOOD, _BAD = (
    {"yes", "true", "good", "accept", "accepted", "positive"},
    {"no", "false", "bad", "reject", "rejected", "negative"},
)
_SPACE = uuid.UUID("6f0b8f43-6a4c-5b3e-9d36-1c1d4a1f7e11")  # of the user ids that pseudonyms become


def read(where: str | Path) -> Taken:
    taken = Taken("argilla")
    for source, row in rows(where):
        with written_by("Argilla", source):
            _read_record(row, source, taken)
    return _settled(taken)


def _read_record(row: dict[str, Any], source: str, taken: Taken) -> None:
    record = row if isinstance(row.get("fields"), dict) else _of_version_1(row)
    shown = record["fields"]
    prompt, responses = _shown(shown, source)
    metadata = record.get("metadata") or {}
    metadata = json.loads(metadata) if isinstance(metadata, str) and metadata.startswith("{") else metadata
    if isinstance(metadata, dict) and PROMPT in metadata:
        prompt = reading.prompt(json.loads(metadata[PROMPT]), source)
    tiers = json.loads(metadata[TIERS]) if isinstance(metadata, dict) and TIERS in metadata else {}
    said: dict[str, dict[str, Any]] = {}
    for question, entries in (record.get("responses") or {}).items():
        for user, value, status in _entries(entries):
            if status in ("discarded", "draft"):
                taken.left_out[f"answers with the status {status}"] += 1
            elif value is not None:
                value = {"tiers": tiers[user][question]} if question in tiers.get(user, {}) else value
                said.setdefault(user, {})[question] = value
    if not said:
        taken.left_out["records without an answer"] += 1
    for user, values in said.items():
        found = _values(values, list(responses), taken)
        if found:
            texts = tuple(responses.values())
            taken.judged.append(Judged(prompt, texts, found, user, source, id=str(record.get("id") or "")))


def write(given: Sequence[views.Answer], task: Task, settings: Settings) -> Lines:
    """One record for each item, with every annotator's answers; a comment on a span has no place and is left out."""
    lines = Lines()
    for item, group in views.by_item(given).items():
        first = group[0]
        responses: dict[str, list[dict[str, Any]]] = {}
        tiers: dict[str, dict[str, Any]] = {}
        for answer in group:
            user = str(uuid.uuid5(_SPACE, answer.annotator))
            for question in task.questions:
                if question.id not in answer.values:
                    continue
                value = answer.values[question.id]
                for name, written in _written(question, value, len(first.responses)):
                    responses.setdefault(name, []).append({"value": written, "user_id": user})
                if question.type == "rank" and any(len(tier) > 1 for tier in value):
                    tiers.setdefault(user, {})[question.id] = value
                if question.type == "spans":
                    lines.left_out["comments on spans"] += sum("comment" in s for spans in value for s in spans)
        metadata = {TIERS: as_json(tiers)} if tiers else {}
        if not isinstance(first.prompt, str):
            metadata[PROMPT] = as_json(plain(first.prompt))
        texts = {f"response_{number}": text for number, text in enumerate(first.responses, 1)}
        row: dict[str, Any] = {"id": item, "fields": {"prompt": prompt_text(first.prompt), **texts}}
        row |= {"metadata": metadata, "suggestions": {}, "responses": responses, "vectors": {}, "_server_id": None}
        lines.add(first.prompt, row)
    lines.left_out = +lines.left_out
    return lines


def _written(question: Any, value: Any, count: int) -> Iterator[tuple[str, Any]]:
    """(name, value) of Argilla's questions that hold an answer."""
    name = question.id
    if question.type == "compare":
        choice = value["choice"]
        yield name, choice if isinstance(choice, str) else f"response_{choice + 1}"
        if "strength" in value:
            yield f"{name}_strength", value["strength"]
    elif question.type == "rank":
        yield name, [f"response_{number + 1}" for tier in value for number in tier]
    elif question.type == "text":
        yield name, value
    else:
        for number in range(count):
            entry = value[number]
            if entry is None or entry == []:
                continue
            if question.type == "accept":
                entry = YES if entry else NO
            if question.type == "spans":
                entry = [{"start": s["start"], "end": s["end"], "label": _label(s)} for s in entry]
            yield f"{name}_{number + 1}", entry


def _label(span: dict[str, Any]) -> str:
    return f"{span['kind']}: {span['severity']}" if "severity" in span else str(span["kind"])


def _of_version_1(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a version 1 data set: whatever holds "user_id" and "value" is a question, other texts are fields."""
    found: dict[str, Any] = {
        "id": row.get("external_id"),
        "fields": {},
        "responses": {},
        "metadata": row.get("metadata"),
    }
    for name, value in row.items():
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, dict) and "value" in first and ("user_id" in first or "status" in first):
            found["responses"][name] = value
        elif isinstance(value, str) and name not in ("external_id", "metadata") and "suggestion" not in name:
            found["fields"][name] = value
    return found


def _entries(entries: Any) -> Iterator[tuple[str, Any, str | None]]:
    """(user, value, status); version 1 may write them as lists side by side."""
    if isinstance(entries, dict):
        columns = [entries.get(name) or [] for name in ("user_id", "value", "status")]
        longest = max(map(len, columns), default=0)
        columns = [column + [None] * (longest - len(column)) for column in columns]
        entries = [dict(zip(("user_id", "value", "status"), each, strict=True)) for each in zip(*columns, strict=True)]
    for entry in entries or []:
        yield str(entry.get("user_id") or UNKNOWN), entry.get("value"), entry.get("status")


def _shown(found: dict[str, Any], source: str) -> tuple[PromptText, dict[str, str]]:
    """The prompt, and the responses by field name."""
    name = next((name for name in PROMPTS if name in found), None)
    responses = {key: value for key, value in found.items() if key != name and _RESPONSE.match(key) and value}
    if name is None or not responses:
        raise DataError(
            f"{source}: fields {', '.join(map(repr, found))}. Expected a prompt ({', '.join(PROMPTS)}) and responses "
            'named "response_1", "response_2", or "response".'
        )
    return reading.prompt(found[name], source), responses


def _values(values: dict[str, Any], names: Sequence[str], taken: Taken) -> dict[str, Any]:
    """A user's answers as values by number; what cannot be placed is counted."""
    found: dict[str, Any] = {}
    plain_names = [_plain(name) for name in names]
    for question, given in values.items():
        own, value = _slug(question), _whole(given)
        stem, number = _about(own, plain_names)
        order = _order(value, plain_names)
        if order is not None:
            found[taken.ask(id=own, type="rank", ties=True)] = order
        elif own.endswith("_strength") and isinstance(value, int):
            found.setdefault(own.removesuffix("_strength"), {})["strength"] = value
        elif isinstance(value, str) and (choice := _choice(value, plain_names)) is not None:
            found.setdefault(own, {})["choice"] = choice
        elif number is not None:
            _put(found, stem or "rating", value, number, len(names), taken)
        elif len(names) == 1:
            _put(found, own, value, 0, 1, taken)
        elif isinstance(value, str):
            found[taken.ask(id=own, type="text", required=False)] = value
        else:
            taken.left_out[f'answers to "{question}", which names no response'] += 1
    return _finished(found, len(names), taken)


def _about(question: str, names: Sequence[str]) -> tuple[str, int | None]:
    """A question's name without the number at its end, and which response has that number: by its own name, in whatever
    order they stand; by its place where no response has one. None where the number is none's."""
    numbered = _NUMBERED.match(question)
    if numbered is None:
        return question, None
    own = [found[2] if (found := _NUMBERED.match(name)) else None for name in names]
    places = own if any(own) else [str(place) for place in range(1, len(names) + 1)]
    return numbered[1].rstrip("_"), places.index(numbered[2]) if numbered[2] in places else None


def _whole(value: Any) -> Any:
    """A rating that went through a table comes back as 4.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _finished(found: dict[str, Any], count: int, taken: Taken) -> dict[str, Any]:
    """Comparisons made whole, and asked for."""
    for name, value in list(found.items()):
        if isinstance(value, dict):
            if "choice" not in value or count != 2:
                del found[name]
                taken.left_out[f'answers to "{name}" that are no choice between two'] += 1
                continue
            if isinstance(value["choice"], int):
                value.setdefault("strength", 1)
            else:
                value.pop("strength", None)
            _ask_compare(taken, name, value.get("strength", 1))
    return found


def _settled(taken: Taken) -> Taken:
    """Where some answers to a question name a response, or a tie, and others do not, what most of them do is what was
    asked; the others are counted: a label "unsure" beside "response_1", or a remark that reads "same"."""
    forms = {"compare": dict, "text": str}
    asked = [{q["id"] for q in taken.questions if q["type"] == kind} for kind in forms]
    for name in set.intersection(*asked):
        given = {
            kind: [j for j in taken.judged if isinstance(j.values.get(name), form)] for kind, form in forms.items()
        }
        few = min(given, key=lambda kind: len(given[kind]))
        for each in given[few]:
            del each.values[name]
        taken.left_out[f'answers to "{name}" that are no {"choice" if few == "text" else "text"}'] += len(given[few])
        taken.questions = [q for q in taken.questions if (q["id"], q["type"]) != (name, few)]
    taken.judged = [each for each in taken.judged if each.values]
    return taken


def _ask_compare(taken: Taken, name: str, strength: int) -> None:
    known = next((q for q in taken.questions if (q["id"], q["type"]) == (name, "compare")), None)
    if known is None:
        taken.ask(id=name, type="compare", strengths=strength, tie=True, both_bad=True)
    else:
        known["strengths"] = max(known["strengths"], strength)


def _put(found: dict[str, Any], name: str, value: Any, number: int, count: int, taken: Taken) -> None:
    """Set a value about one response."""
    if isinstance(value, bool) or (isinstance(value, str) and value.lower() in _GOOD | _BAD):
        good = value if isinstance(value, bool) else value.lower() in _GOOD
        taken.ask(id=name, type="accept")
        found.setdefault(name, [None] * count)[number] = good
    elif isinstance(value, int):
        known = next((q for q in taken.questions if q["id"] == name), None)
        if known is None:
            taken.ask(id=name, type="rating", scale=max(5, value))
        else:
            known["scale"] = max(known["scale"], value)
        found.setdefault(name, [None] * count)[number] = value
    elif isinstance(value, list) and value and all(isinstance(each, dict) and "start" in each for each in value):
        found.setdefault(name, [[] for _ in range(count)])[number] = [_span(each, name, taken) for each in value]
    elif isinstance(value, list):
        _grow(taken, name, "flags", "options", [{"id": _slug(str(each)), "label": str(each)} for each in value])
        found.setdefault(name, [[] for _ in range(count)])[number] = [_slug(str(each)) for each in value]
    elif isinstance(value, str):
        taken.ask(id=name, type="rewrite", required=False)
        found.setdefault(name, [None] * count)[number] = value
    else:
        taken.left_out[f'answers to "{name}" of a form that palate has no question for'] += 1


def _span(span: dict[str, Any], name: str, taken: Taken) -> dict[str, Any]:
    kind, _, severity = str(span.get("label")).partition(": ")
    _grow(taken, name, "spans", "kinds", [kind])
    made: dict[str, Any] = {"start": span["start"], "end": span["end"], "kind": kind}
    if severity:
        _grow(taken, name, "spans", "severities", [severity])
        made["severity"] = severity
    return made


def _grow(taken: Taken, name: str, kind: str, key: str, entries: Sequence[Any]) -> None:
    """A question of choices, with these among them."""
    known = next((q for q in taken.questions if q["id"] == name), None)
    if known is None:
        taken.ask(id=name, type=kind, required=False, **{key: []})
        known = taken.questions[-1]
    known.setdefault(key, []).extend(each for each in entries if each not in known.get(key, []))


def _order(value: Any, names: Sequence[str]) -> list[list[int]] | None:
    """Tiers of a ranking's value in any of its forms; None for something else."""
    if isinstance(value, dict) and "tiers" in value:
        return value["tiers"]  # type: ignore[no-any-return]
    if isinstance(value, dict) and isinstance(value.get("rank"), list) and isinstance(value.get("value"), list):
        value = [{"rank": rank, "value": name} for rank, name in zip(value["rank"], value["value"], strict=False)]
    if not isinstance(value, list) or not value:
        return None
    if all(isinstance(each, dict) and "rank" in each and "value" in each for each in value):
        ranked = [(each["rank"], _plain(str(each["value"]))) for each in value]
    elif all(isinstance(each, str) for each in value):
        ranked = [(place, _plain(each)) for place, each in enumerate(value)]
    else:
        return None
    if sorted(name for _, name in ranked) != sorted(names):
        return None
    tiers: dict[Any, list[int]] = {}
    for rank, name in sorted(ranked, key=lambda pair: pair[0]):
        tiers.setdefault(rank, []).append(names.index(name))
    return [sorted(tier) for tier in tiers.values()]


def _choice(value: str, names: Sequence[str]) -> int | str | None:
    """Which of two a label names; None for a label that names none."""
    label = _plain(value)
    if label in names:
        return names.index(label)
    if label == BOTH_BAD:
        return BOTH_BAD
    return TIE if label in _TIES else None


def _plain(name: str) -> str:
    return re.sub(r"[-\s]", "_", name.strip().lower())


def _slug(name: str) -> str:
    """A name as the id of a question or flag; one that is an id stays as it is."""
    if _ID.match(name):
        return name
    made = re.sub(r"[^a-z0-9_]+", "_", name.strip().lower()).strip("_").lstrip("0123456789_")
    return made[:40] or "question"
