"""Label Studio's JSON export: tasks with each annotator's annotation.

    {"id", "data": {"prompt": text, "response_1": text, ...}, "annotations": [{"completed_by": 3 or {"id": 3, ...},
     "was_cancelled": false, "lead_time": seconds, "created_at",
     "result": [{"from_name", "to_name", "type", "value"}]}]}

What a result's value holds: {"selected": "left"} (Pairwise), {"ranker": {"rank": [ids, best first]}} or buckets of ids
(Ranker), {"rating": 4}, {"choices": [...]}, {"start", "end", "text", "labels": [...]} (Labels), {"text": [...]} (a
TextArea). A Pairwise has no tie of its own, so a tie is written as a choice; ties of a ranking are written as buckets
"tier_1", "tier_2", ...

https://labelstud.io/guide/task_format, https://labelstud.io/tags/pairwise, https://labelstud.io/tags/ranker
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from palate.data.files import rows
from palate.data.formats import fields as reading
from palate.data.kinds import PromptText
from palate.errors import DataError
from palate.feedback import views
from palate.feedback.exchange.argilla import (
    _BAD,
    _GOOD,
    _NUMBERED,
    _RESPONSE,
    PROMPTS,
    _choice,
    _finished,
    _plain,
    _put,
    _settled,
    _slug,
    _whole,
)
from palate.feedback.exchange.lines import Lines, Settings, plain, prompt_text
from palate.feedback.exchange.taken import UNKNOWN, Judged, Taken, written_by
from palate.feedback.task import Task

PROMPT = "palate_prompt"
_TIER = re.compile(r"^tier_(\d+)$")


def read(where: str | Path) -> Taken:
    taken = Taken("label_studio")
    for source, task in rows(where):
        data, annotations = task.get("data"), task.get("annotations", task.get("completions"))
        if not isinstance(data, dict) or not isinstance(annotations, list):
            found = ", ".join(map(repr, task))
            raise DataError(
                f'{source}: found {found}. Expected "data" and "annotations": export the project as JSON, not JSON-MIN.'
            )
        for number, annotation in enumerate(annotations, 1):
            with written_by("Label Studio", place := f"{source} annotation {number}"):
                _read_annotation(data, annotation, place, taken)
    return _settled(taken)


def _read_annotation(data: dict[str, Any], annotation: dict[str, Any], place: str, taken: Taken) -> None:
    if annotation.get("was_cancelled") or annotation.get("skipped"):
        taken.left_out["skipped annotations"] += 1
        return
    prompt, names, texts = _shown(data, annotation.get("result") or [], place)
    values = _values(annotation.get("result") or [], names, taken)
    if not values:
        taken.left_out["annotations without an answer"] += 1
        return
    taken.judged.append(
        Judged(
            prompt,
            texts,
            values,
            annotator=_who(annotation.get("completed_by")),
            place=place,
            id=str(annotation.get("id") or ""),
            seconds=annotation.get("lead_time"),
            time=annotation.get("created_at"),
        )
    )


def write(given: Sequence[views.Answer], task: Task, settings: Settings) -> Lines:
    """One task for each item, with every annotator's annotation; strengths and severities as ratings and choices."""
    lines = Lines()
    people: dict[str, int] = {}
    for number, group in enumerate(views.by_item(given).values(), 1):
        first = group[0]
        data: dict[str, Any] = {"prompt": prompt_text(first.prompt)}
        if not isinstance(first.prompt, str):
            data[PROMPT] = plain(first.prompt)
        data |= {f"response_{i}": text for i, text in enumerate(first.responses, 1)}
        if any(question.type == "rank" for question in task.questions):
            data["items"] = [{"id": f"response_{i}", "body": text} for i, text in enumerate(first.responses, 1)]
        annotations = []
        for answer in group:
            user = people.setdefault(answer.annotator, len(people) + 1)
            results = [
                each
                for question in task.questions
                if question.id in answer.values
                for each in _written(question, answer.values[question.id], answer.responses)
            ]
            annotations.append(
                {
                    "id": answer.seq,
                    "completed_by": {"id": user, "email": f"{answer.annotator}@palate.invalid"},
                    "result": results,
                    "was_cancelled": False,
                    "ground_truth": False,
                    "created_at": answer.time,
                    "lead_time": answer.seconds,
                    "result_count": len(results),
                }
            )
        lines.add(first.prompt, {"id": number, "data": data, "annotations": annotations, "predictions": []})
    return lines


def _written(question: Any, value: Any, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    name, count = question.id, len(texts)

    def result(kind: str, value: Any, name: str = name, to: str = "prompt", **more: Any) -> dict[str, Any]:
        return {"from_name": name, "to_name": to, "type": kind, "value": value, "origin": "manual", **more}

    if question.type == "compare":
        choice = value["choice"]
        if isinstance(choice, str):
            yield result("choices", {"choices": [choice]})
        else:
            yield result("pairwise", {"selected": ("left", "right")[choice]}, to="response_1,response_2")
            yield result("rating", {"rating": value["strength"]}, f"{name}_strength")
    elif question.type == "rank":
        tiers = [[f"response_{number + 1}" for number in tier] for tier in value]
        strict = all(len(tier) == 1 for tier in tiers)
        order = {"rank": [tier[0] for tier in tiers]} if strict else {f"tier_{i}": t for i, t in enumerate(tiers, 1)}
        yield result("ranker", {"ranker": order}, to="items")
    elif question.type == "text":
        yield result("textarea", {"text": [value]})
    else:
        for number in range(count):
            if value[number] is not None and value[number] != []:
                yield from _about(question, value[number], number, texts[number], result)


def _about(question: Any, entry: Any, number: int, text: str, result: Any) -> Iterator[dict[str, Any]]:
    """Results about one response."""
    name, to = f"{question.id}_{number + 1}", f"response_{number + 1}"
    if question.type == "rating":
        yield result("rating", {"rating": entry}, name, to)
    elif question.type == "accept":
        yield result("choices", {"choices": ["yes" if entry else "no"]}, name, to)
    elif question.type == "flags":
        yield result("choices", {"choices": list(entry)}, name, to, palate="flags")
    elif question.type == "rewrite":
        yield result("textarea", {"text": [entry]}, name, to)
    elif question.type == "spans":
        for place, span in enumerate(entry):
            own = f"{name}_{place}"
            area = {"start": span["start"], "end": span["end"], "text": text[span["start"] : span["end"]]}
            yield result("labels", area | {"labels": [span["kind"]]}, name, to, id=own)
            if "severity" in span:
                yield result("choices", area | {"choices": [span["severity"]]}, f"{name}_severity", to, id=own)
            if "comment" in span:
                yield result("textarea", area | {"text": [span["comment"]]}, f"{name}_comment", to, id=own)


def _who(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("email") or value.get("username") or value.get("id") or UNKNOWN)
    return UNKNOWN if value is None else str(value)


def _shown(
    data: dict[str, Any], results: Sequence[dict[str, Any]], source: str
) -> tuple[PromptText, list[str], tuple[str, ...]]:
    """Prompt, names of the responses, their texts: a list of items, or fields that a Pairwise or their names tell."""
    name = next((name for name in PROMPTS if name in data), None)
    prompt: Any = data.get(name, "") if name else ""
    if PROMPT in data:
        prompt = reading.prompt(data[PROMPT], source)
    elif isinstance(prompt, list):
        prompt = reading.prompt(prompt, source)
    items = next((v for v in data.values() if _is_items(v)), None)
    fields = {key: value for key, value in data.items() if key != name and isinstance(value, str)}
    if items is not None and not any(_RESPONSE.match(_plain(key)) for key in fields):
        return prompt, [str(each["id"]) for each in items], tuple(_item_text(each) for each in items)
    pairwise = [str(r.get("to_name")) for r in results if r.get("type") == "pairwise"]
    pointed = pairwise[0].split(",") if pairwise else []
    pair = [key.strip() for key in pointed if key.strip() in fields]
    names = pair if len(pair) == 2 else [key for key in fields if _RESPONSE.match(_plain(key))]
    if not name and PROMPT not in data and set(fields) - set(names):
        rest = ", ".join(map(repr, fields.keys() - set(names)))
        raise DataError(
            f"{source}: no prompt in the data. Found: {rest}. Expected one of {', '.join(PROMPTS)}; where there is none, "
            '"prompt": "" says so.'
        )
    if not names:
        raise DataError(
            f"{source}: data {', '.join(map(repr, data))}: which of them are responses? Expected names such as "
            '"response_1", "response_2", or a list of {"id", "body"}.'
        )
    return prompt, names, tuple(fields[key] for key in names)


def _is_items(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) and "id" in v for v in value)


def _item_text(item: dict[str, Any]) -> str:
    return str(next((item[name] for name in ("body", "text", "html", "title") if item.get(name)), ""))


def _values(results: Sequence[dict[str, Any]], names: Sequence[str], taken: Taken) -> dict[str, Any]:
    """One annotation's results as values by number."""
    found: dict[str, Any] = {}
    spans: dict[str, dict[str, Any]] = {}
    plain_names = [_plain(name) for name in names]
    for result in results:
        kind, value, own = result.get("type"), result.get("value") or {}, _slug(str(result.get("from_name")))
        if kind == "pairwise" and value.get("selected") in ("left", "right"):
            found.setdefault(own, {})["choice"] = ("left", "right").index(value["selected"])
        elif kind == "ranker":
            order = _order(value.get("ranker"), list(names))
            if order is None:
                taken.left_out["rankings that do not place every response once"] += 1
            else:
                found[taken.ask(id=own, type="rank", ties=True)] = order
        elif own.endswith("_strength") and isinstance(strength := _whole(value.get("rating")), int):
            found.setdefault(own.removesuffix("_strength"), {})["strength"] = strength
        elif "labels" in value and "start" in value:
            made = {"start": value["start"], "end": value["end"], "label": value["labels"][0]}
            spans[str(result.get("id"))] = {"name": own, "span": made, "to": result.get("to_name")}
        elif "start" in value and str(result.get("id")) in spans:
            _detail(spans[str(result["id"])]["span"], kind, value)
        elif (
            kind == "choices"
            and len(names) > 1
            and (choice := _choice(str(value["choices"][0]), plain_names)) is not None
        ):
            found.setdefault(own, {})["choice"] = choice
        elif (entry := _entry(kind, value, result)) is not None:
            _place(found, own, entry, result, list(names), taken)
        else:
            taken.left_out[f"results of the type {kind}"] += 1
    _put_spans(found, spans, list(names), taken)
    return _finished(found, len(names), taken)


def _entry(kind: str | None, value: dict[str, Any], result: dict[str, Any]) -> Any:
    """The value of a rating, a choice or a text; None for other types."""
    if kind == "rating":
        return _whole(value.get("rating"))
    if kind == "choices":
        choices = [str(each) for each in value.get("choices") or []]
        alone = len(choices) == 1 and choices[0].lower() in _GOOD | _BAD and result.get("palate") != "flags"
        return choices[0] if alone else choices
    text = value.get("text")
    return "\n".join(text) if isinstance(text, list) else text


def _place(found: dict[str, Any], own: str, entry: Any, result: dict[str, Any], names: list[str], taken: Taken) -> None:
    """Put a value to the response that the result is about, or to the item as a whole."""
    to, numbered = str(result.get("to_name")), _NUMBERED.match(own)
    if to in names and (len(names) > 1 or numbered):
        stem = numbered[1].rstrip("_") if numbered and int(numbered[2]) == names.index(to) + 1 else own
        _put(found, stem, entry, names.index(to), len(names), taken)
    elif len(names) == 1 and not (isinstance(entry, str) and result.get("type") == "textarea"):
        _put(found, own, entry, 0, 1, taken)
    elif isinstance(entry, str):
        found[taken.ask(id=own, type="text", required=False)] = entry
    else:
        taken.left_out[f'answers to "{own}", which names no response'] += 1


def _detail(span: dict[str, Any], kind: str | None, value: dict[str, Any]) -> None:
    if kind == "choices":
        span["label"] = f"{span['label']}: {value['choices'][0]}"
    elif kind == "textarea":
        text = value.get("text")
        span["comment"] = "\n".join(text) if isinstance(text, list) else text


def _put_spans(found: dict[str, Any], spans: dict[str, dict[str, Any]], names: list[str], taken: Taken) -> None:
    by_response: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for each in spans.values():
        numbered = _NUMBERED.match(each["name"])
        to = str(each["to"])
        number = names.index(to) if to in names else 0
        exact = numbered and to in names and int(numbered[2]) == number + 1
        stem = numbered[1].rstrip("_") if exact and numbered else each["name"]
        by_response.setdefault((stem, number), []).append(each["span"])
    for (stem, number), own in by_response.items():
        _put(found, stem, own, number, len(names), taken)
        for made, span in zip(found[stem][number], own, strict=True):
            if span.get("comment"):
                made["comment"] = span["comment"]


def _order(value: Any, names: list[str]) -> list[list[int]] | None:
    """Tiers: a list of ids, the one key of a ranked list, or buckets in order (palate's own by their number)."""
    if isinstance(value, list):
        value = {"rank": value}
    if not isinstance(value, dict):
        return None
    buckets = {key: each for key, each in value.items() if key != "_" or len(value) == 1}
    if all(_TIER.match(key) for key in buckets):  # of one, too: all are tied
        tiers = [buckets[key] for key in sorted(buckets, key=lambda key: int(key.removeprefix("tier_")))]
    elif len(buckets) == 1:
        tiers = [[each] for each in next(iter(buckets.values()))]
    else:
        return None  # named buckets ("relevant", "biased") have no order that the file tells
    if sorted(str(each) for tier in tiers for each in tier) != sorted(names):
        return None
    return [sorted(names.index(str(each)) for each in tier) for tier in tiers]
