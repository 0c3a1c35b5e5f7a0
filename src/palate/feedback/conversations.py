"""Conversations with models, and what people say of the answers: battles of two models, and thumbs for one.

Everything is a ``message`` event whose body has ``what`` and ``conversation``:

    start    mode ("battle" or "chat"), models: [{name, hash, ...}, ...] in the order of the sides, left first
    turn     turn, version, text, answers: one a side, finished, seeds. Version 2 of a turn is its answer made anew
    stopped  turn, version, text, answers: what was written when the person left or stopped it; not part of the history
    vote     turn, choice: "left", "right", "tie" or "both_bad", seconds                                   (battles)
    thumb    turn, version, up: true, false, or null = taken back                                          (chats)
    signal   turn, version, signal: "copy" or "dwell", seconds                                             (chats)

A conversation is what its events add up to; nothing else is kept of it. A repeated write with the same key gives the
first one's event.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from palate.data.kinds import Message
from palate.errors import FeedbackError
from palate.feedback.store import Conflict, NotFound, Store, Transaction, same
from palate.feedback.tables import Event

SIDES = ("left", "right")
CHOICES = ("left", "right", "tie", "both_bad")
SIGNALS = ("copy", "dwell")
LONGEST_TEXT = 8_000  # characters of what a person writes at once
MOST_TURNS = 50


@dataclass
class Answered:
    """One version of a turn: what was written, what each side answered, and what was said of it.

    Attributes:
        seq: of its event.
        answers, finished: one for each side, left first.
        vote, vote_seq, seconds: the choice, its event, and the seconds it took; None before.
        thumb, thumb_seq: True, False, or None.
        copies: how often the answer was copied.
        dwell: seconds for which it was looked at, or None.
    """

    turn: int
    version: int
    text: str
    answers: tuple[str, ...]
    finished: tuple[bool, ...]
    seq: int
    vote: str | None = None
    vote_seq: int = 0
    seconds: float | None = None
    thumb: bool | None = None
    thumb_seq: int = 0
    copies: int = 0
    dwell: float | None = None


@dataclass
class Conversation:
    """A conversation as it stands.

    Attributes:
        id: random.
        mode: "battle" (two sides) or "chat" (one).
        annotator: pseudonym of the person.
        models: of each side, left first: name, content hash, how it was sampled. Never to be shown.
        reveal: names may be told after the first vote, which then ends the battle.
        turns: every version of every turn, in their order.
    """

    id: str
    mode: Literal["battle", "chat"]
    annotator: str
    models: tuple[Mapping[str, Any], ...]
    reveal: bool
    seq: int
    turns: list[Answered] = field(default_factory=list)

    @property
    def current(self) -> list[Answered]:
        """The last version of each turn."""
        return list({each.turn: each for each in self.turns}.values())

    @property
    def closed(self) -> bool:
        """Nothing can follow: the names are known, or it is long enough."""
        return len(self.current) >= MOST_TURNS or (self.reveal and any(each.vote for each in self.turns))

    def history(self, side: int, turn: int) -> tuple[Message, ...]:
        """What was said before ``turn`` (from 1), as this side heard it, then what the person wrote there, if anything."""
        messages: list[Message] = []
        for each in self.current:
            if each.turn <= turn:
                messages.append({"role": "user", "content": each.text})
            if each.turn < turn:
                messages.append({"role": "assistant", "content": each.answers[side]})
        return tuple(messages)

    def find(self, turn: int, version: int) -> Answered:
        for each in self.turns:
            if (each.turn, each.version) == (turn, version):
                return each
        raise NotFound("there is no such turn in this conversation.")


def conversations(store: Store, mode: str | None = None) -> list[Conversation]:
    """All conversations, in the order in which they began."""
    with store.read() as tx:
        rows = tx.all("SELECT seq, annotator, body FROM message ORDER BY seq")
    return [each for each in fold(rows) if mode is None or each.mode == mode]


def latest(store: Store, annotator: str, mode: str) -> Conversation | None:
    """The conversation that somebody is in."""
    with store.read() as tx:
        rows = tx.all("SELECT seq, annotator, body FROM message WHERE annotator = ? ORDER BY seq", annotator)
    return next((each for each in reversed(fold(rows)) if each.mode == mode), None)


def load(tx: Transaction, conversation: str, annotator: str) -> Conversation:
    """A conversation of this person's.

    Raises:
        NotFound: there is none, or it is somebody else's.
    """
    rows = tx.all(
        "SELECT seq, annotator, body FROM message WHERE json_extract(body, '$.conversation') = ? ORDER BY seq",
        conversation,
    )
    found = [each for each in fold(rows) if each.annotator == annotator]
    if not found:
        raise NotFound("there is no such conversation, or it is not yours.")
    return found[0]


def fold(rows: Iterable[Sequence[Any]]) -> list[Conversation]:
    """Conversations from rows (seq, annotator, body) in the order of the log; other people's words about one are ignored."""
    found: dict[str, Conversation] = {}
    for seq, annotator, text in rows:
        body = json.loads(text)
        name = body.get("conversation")
        if body.get("what") == "start":
            models = tuple(body["models"])
            found[name] = Conversation(name, body["mode"], annotator, models, bool(body.get("reveal")), seq)
        elif name in found and found[name].annotator == annotator:
            _take(found[name], body, seq)
    return list(found.values())


def _take(conversation: Conversation, body: Mapping[str, Any], seq: int) -> None:
    what = body["what"]
    if what == "turn":
        answers, finished = tuple(body["answers"]), tuple(body["finished"])
        conversation.turns.append(Answered(body["turn"], body["version"], body["text"], answers, finished, seq))
        return
    if what == "stopped":
        return
    about = conversation.find(body["turn"], body.get("version", 1))
    if what == "vote":
        about.vote, about.vote_seq, about.seconds = body["choice"], seq, body["seconds"]
    elif what == "thumb":
        about.thumb, about.thumb_seq = body["up"], seq
    elif body["signal"] == "copy":
        about.copies += 1
    else:
        about.dwell = max(about.dwell or 0.0, body["seconds"])


# --- writes ------------------------------------------------------------------------------------------------------------


def start(
    store: Store, annotator: str, key: str, mode: str, models: Sequence[Mapping[str, Any]], *, reveal: bool = False
) -> str:
    """Begin a conversation with these models, left first; its id. A repeated key gives the first one's."""
    with store.write() as tx:
        before = tx.find(key)
        if before is not None:
            if (before.kind, before.actor, before.body.get("what")) != ("message", annotator, "start"):
                raise _used(key)
            return str(before.body["conversation"])
        name = secrets.token_hex(8)
        body = {"what": "start", "conversation": name, "mode": mode, "models": list(models), "reveal": reveal}
        tx.append("message", annotator, body, key=key)
        return name


def find_turn(store: Store, annotator: str, key: str, conversation: str, text: str | None) -> Answered | None:
    """The turn that was recorded under this key, for a retry; None when there is none yet.

    Raises:
        Conflict: the key was used for something else.
    """
    with store.read() as tx:
        before = tx.find(key)
        if before is None:
            return None
        body = before.body
        told = (before.kind, before.actor, body.get("what"), body.get("conversation"))
        if told != ("message", annotator, "turn", conversation) or text not in (None, body["text"]):
            raise _used(key)
        return load(tx, conversation, annotator).find(body["turn"], body["version"])


def next_turn(tx: Transaction, annotator: str, conversation: str, *, again: bool) -> tuple[Conversation, int, int]:
    """(the conversation, number and version of the turn that may come next).

    Args:
        again: the last turn's answer is to be made anew.
    Raises:
        Conflict: the last turn has no vote yet, the conversation is over, or there is nothing to make anew.
    """
    found = load(tx, conversation, annotator)
    turns = found.current
    if again:
        if found.mode != "chat" or not turns:
            raise Conflict("there is no answer here that could be made anew.")
        return found, turns[-1].turn, turns[-1].version + 1
    if found.closed:
        raise Conflict("this conversation is over. Start a new one.")
    if found.mode == "battle" and turns and turns[-1].vote is None:
        raise Conflict("say first which of the last two answers is better.")
    return found, len(turns) + 1, 1


def record_turn(
    store: Store,
    annotator: str,
    key: str,
    conversation: str,
    text: str,
    *,
    place: tuple[int, int],
    answers: Sequence[str],
    finished: Sequence[bool],
    seeds: Sequence[int],
) -> Event:
    """Keep a turn with all its answers.

    Args:
        place: (turn, version), of ``next_turn``.
    Raises:
        Conflict: something else came in its place meanwhile.
    """
    turn, version = place
    with store.write() as tx:
        if next_turn(tx, annotator, conversation, again=version > 1)[1:] != place:
            raise Conflict("this conversation went on elsewhere. Load the page again.")
        body = {"what": "turn", "conversation": conversation, "turn": turn, "version": version, "text": text}
        body |= {"answers": list(answers), "finished": list(finished), "seeds": list(seeds)}
        return tx.append("message", annotator, body, key=key)


def record_stopped(
    store: Store, annotator: str, conversation: str, text: str, place: tuple[int, int], answers: Sequence[str]
) -> Event:
    """Keep what had been written when it was stopped."""
    body = {"what": "stopped", "conversation": conversation, "turn": place[0], "version": place[1], "text": text}
    return store.append("message", annotator, body | {"answers": list(answers)})


def vote(
    store: Store, annotator: str, key: str, conversation: str, turn: int, choice: str, seconds: float | None = None
) -> tuple[Event, Conversation]:
    """Say which side's answer is better.

    Raises:
        FeedbackError: no such choice. Conflict: this turn has a vote. NotFound: no such turn of a battle.
    """
    if choice not in CHOICES:
        raise FeedbackError(f'the choice is "{choice}". Expected one of: {", ".join(CHOICES)}.')
    body = {"what": "vote", "conversation": conversation, "turn": turn, "choice": choice, "seconds": seconds}
    with store.write() as tx:
        found = load(tx, conversation, annotator)
        about = found.find(turn, 1)
        before = tx.find(key)
        if before is not None:
            return same(before, "message", annotator, body), found
        if found.mode != "battle":
            raise NotFound("this conversation is no battle.")
        if about.vote is not None:
            raise Conflict("this turn has a vote already.")
        event = tx.append("message", annotator, body, key=key)
        return event, load(tx, conversation, annotator)


def thumb(store: Store, annotator: str, key: str, conversation: str, turn: int, version: int, up: bool | None) -> Event:
    """Thumbs up (True), down (False), or taken back (None); the last one counts."""
    return _about(store, annotator, key, conversation, turn, version, {"what": "thumb", "up": up})


def signal(
    store: Store,
    annotator: str,
    key: str,
    conversation: str,
    turn: int,
    version: int,
    name: str,
    seconds: float | None = None,
) -> Event:
    """What somebody did with an answer: "copy", or "dwell" with the seconds for which it was looked at.

    Raises:
        FeedbackError: an unknown signal, or "dwell" without seconds.
    """
    if name not in SIGNALS or (name == "dwell") != (seconds is not None):
        raise FeedbackError(f'the signal is "{name}" with {seconds} seconds. Expected "copy", or "dwell" with seconds.')
    told = {"what": "signal", "signal": name} | ({} if seconds is None else {"seconds": seconds})
    return _about(store, annotator, key, conversation, turn, version, told)


def _about(
    store: Store, annotator: str, key: str, conversation: str, turn: int, version: int, told: Mapping[str, Any]
) -> Event:
    body = {"conversation": conversation, "turn": turn, "version": version, **told}
    with store.write() as tx:
        found = load(tx, conversation, annotator)
        found.find(turn, version)
        before = tx.find(key)
        if before is not None:
            return same(before, "message", annotator, body)
        if found.mode != "chat":
            raise NotFound("this conversation is no chat.")
        return tx.append("message", annotator, body, key=key)


def _used(key: str) -> Conflict:
    return Conflict(f"the key {key!r} was already used for something else. Use a new one for each write.")
