"""What a method learns from a store: its answers as records of the kind that the method reads, and where they are from.

comparisons      every annotator's own, or one for each pair by the annotator-aware model
rankings         every annotator's own
judgements       of an accept or flags question; where the task asks none, the best and the worst of each ranking
demonstrations   rewritten responses
corrections      rewritten responses beside what they were
prompts          of the task's items
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from palate.data.kinds import Prompt, PromptText, Record, prompt_key
from palate.data.ranking import ranking_to_judgements
from palate.errors import ConfigError, DataError
from palate.feedback import views
from palate.feedback.annotator_model import fit_annotators
from palate.feedback.consensus import Consensus, consensus_comparisons
from palate.feedback.store import APPLICATION, Store
from palate.feedback.task import Task
from palate.feedback.views import Answer, Made
from palate.feedback.votes import Vote, ranking_votes

Labels = Literal["each", "consensus"]
SIMULATED = "simulated-"  # how the names of annotators of ``palate label simulate`` begin
_HEADER = b"SQLite format 3\x00"


@dataclass(frozen=True)
class Learned:
    """Records out of a store.

    Attributes:
        records: of the kind that was asked for.
        origin: one sentence for the card: which events, whose answers, which view.
    """

    records: list[Record]
    origin: str


def is_store(where: str | Path) -> bool:
    """A file is a store of feedback: a SQLite file with our number in its header.

    SQLite is asked for the number, because in a store that is being written to the header may still be in its log.
    """
    path = Path(where).expanduser()
    try:
        with open(path, "rb") as file:
            if file.read(len(_HEADER)) != _HEADER:
                return False
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=30)) as db:
            return bool(db.execute("PRAGMA application_id").fetchone()[0] == APPLICATION)
    except (OSError, sqlite3.Error):
        return False


def learn(where: str | Path, kind: str, *, labels: Labels = "each", limit: int | None = None) -> Learned:
    """The records of a kind in a store.

    Args:
        where: the store.
        kind: "prompts", "demonstrations", "comparisons", "corrections", "rankings" or "judgements".
        labels: of comparisons: "each" = every annotator's own, "consensus" = one for each pair, with a probability.
        limit: at most so many records.
    Raises:
        ConfigError: the task asks nothing of the kind, or there is no consensus of it.
        DataError: nobody answered yet.
    """
    if labels == "consensus" and kind != "comparisons":
        raise ConfigError(
            f"data.labels: a consensus is made of comparisons, and this method reads {kind}. Take labels=each."
        )
    with Store.open(Path(where).expanduser()) as store:
        task, (events, last) = store.task, store.last()
        given = views.labels(store)
        with store.read() as tx:
            store_names = dict(tx.all("SELECT pseudonym, name FROM person"))
        if kind == "prompts":
            records: list[Record] = list(_prompts(store))
            left_out, view = "", f"the prompts of {len(records)} items"
        else:
            records, left_out = _judged(where, given, task, kind, labels)
            view = _view(kind, labels, task)
    if not records:
        raise DataError(
            f"{where}: no {kind} yet: {len(given)} answers{left_out}. Collect some with: palate label serve {where}"
        )
    if kind != "prompts":
        people = _people(store_names, given)
        items = len({answer.item for answer in given})
        view += f" of {len(given)} answers by {people} about {items} items{left_out}"
    origin = f"{Path(where).name}: {view}; {events} events, the last with the hash {last}"
    return Learned(records[:limit], origin)


def consensus(given: Sequence[Answer], task: Task, *, question: str | None = None, margin: bool = False) -> Consensus:
    """One comparison for each pair of responses that somebody judged, by the annotator-aware model.

    Responses with the same text to the same prompt are one, whichever item they were shown in.

    Raises:
        ConfigError: the task's questions say nothing about order.
        DataError: nobody answered.
    """
    votes = votes_of(given, task, question=question)
    if not votes:
        raise DataError("no two responses were compared yet: there is no consensus. Collect answers first.")
    prompts: dict[Any, PromptText] = {prompt_key(answer.prompt): answer.prompt for answer in given}
    texts = {(vote.prompt, key): str(key) for vote in votes for key in (vote.left, vote.right)}
    return consensus_comparisons(fit_annotators(votes), prompts, texts, margin=margin)


def votes_of(given: Sequence[Answer], task: Task, *, question: str | None = None) -> list[Vote]:
    """The pairs that answers order, as votes; a response's key is its text. Sides are those of the screen, if known."""
    asked = views._asked(task, views.ORDERING, question)
    found: list[Vote] = []
    for answer in given:
        value = answer.values.get(asked.id)
        ranks = None if value is None else asked.ranks(value, len(answer.responses))
        if ranks is None or len(set(answer.responses)) < max(2, len(answer.responses)):
            continue
        key, seconds = prompt_key(answer.prompt), answer.seconds or None
        if len(ranks) > 2:
            found += ranking_votes(key, answer.responses, ranks, answer.annotator, seconds=seconds)
            continue
        left, right = answer.shown
        outcome = "tie" if ranks[0] == ranks[1] else "left" if ranks[left] < ranks[right] else "right"
        sides = answer.responses[left], answer.responses[right]
        found.append(Vote(key, *sides, outcome, answer.annotator, seconds, sides_known=answer.sides_known))  # type: ignore[arg-type]
    return found


def _judged(where: str | Path, given: list[Answer], task: Task, kind: str, labels: Labels) -> tuple[list[Record], str]:
    """(records, what was left out)."""
    if kind == "comparisons" and labels == "consensus":
        found = consensus(given, task)
        left = f"; left out: {len(found.left_out)} pairs" if found.left_out else ""
        place = f"{Path(where).name}:consensus"
        return [_placed(pair, place) for pair in found.comparisons], left
    made = _makers()[kind](given, task)
    left = ", ".join(f"{count} {reason}" for reason, count in made.left_out.most_common())
    return made.records, f"; left out: {left}" if left else ""


def _each(given: list[Answer], task: Task) -> Made:
    """Every annotator's own: a ranking stays one record, so that its pairs share one weight."""
    asked = views._asked(task, views.ORDERING, None)
    return views.comparisons(given, task) if asked.type == "compare" else views.rankings(given, task)


def _makers() -> dict[str, Callable[[list[Answer], Task], Made]]:
    return {
        "comparisons": _each,
        "rankings": views.rankings,
        "judgements": _judgements,
        "demonstrations": views.demonstrations,
        "corrections": views.corrections,
    }


def _judgements(given: list[Answer], task: Task) -> Made:
    if _asks_good(task):
        return views.judgements(given, task)
    made = views.rankings(given, task)
    made.records = [judgement for ranking in made.records for judgement in ranking_to_judgements(ranking)]
    return made


def _asks_good(task: Task) -> bool:
    return any(question.type in ("accept", "flags") for question in task.questions)


def _view(kind: str, labels: Labels, task: Task) -> str:
    if kind == "judgements" and not _asks_good(task):
        return "the best as desirable and the worst as undesirable, nobody having been asked what is good,"
    if kind != "comparisons":
        return kind
    if labels == "consensus":
        return "one comparison for each pair, with the probability of the annotator-aware model,"
    return "every annotator's own comparisons"


def _people(names: Mapping[str, str], given: Sequence[Answer]) -> str:
    """ "5 annotators", and how many of them were simulated."""
    who = {answer.annotator for answer in given}
    simulated = sum(names.get(each, "").startswith(SIMULATED) for each in who)
    return f"{len(who)} annotators" + (f", {simulated} of them simulated," if simulated else "")


def _prompts(store: Store) -> list[Prompt]:
    """Each prompt once, in the order in which its items came."""
    with store.read() as tx:
        rows = tx.all("SELECT prompt, seq FROM item WHERE kind = 'task' ORDER BY seq")
    found: dict[str, Prompt] = {}
    for text, seq in rows:
        prompt = json.loads(text)
        found.setdefault(hashlib.sha256(text.encode()).hexdigest(), Prompt(prompt, source=f"{store.path.name}:{seq}"))
    return list(found.values())


def _placed(record: Any, place: str) -> Any:
    return replace(record, source=place)
