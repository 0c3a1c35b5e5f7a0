"""Talking to models that answer while one watches: two of unknown name side by side, or one with thumbs.

    GET  /api/arena          what this server offers, and the conversation that one is in
    POST /api/arena/start    {key} -> a new conversation
    POST /api/arena/turn     {key, conversation, text} or {..., again: true} -> server-sent events, see ``Arena.turn``
    POST /api/arena/vote     {key, conversation, turn, choice, seconds}               battles
    POST /api/arena/thumb    {key, conversation, turn, version, up}                   chats
    POST /api/arena/signal   {key, conversation, turn, version, signal, seconds}      chats

A turn is kept when all its answers are complete, and before the page is told so: a retry with the same key then gets
what was kept, and one before that is answered anew. A client that leaves stops its models at the next token.

Which model answers on which side is drawn for each battle, and kept. No answer of this server names a model, unless it
was started with ``reveal``: then the names come after the vote, and the battle is over.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException

from palate.data.kinds import Message
from palate.errors import PalateError
from palate.feedback import conversations
from palate.feedback.conversations import LONGEST_TEXT, MOST_TURNS, SIDES, Answered, Conversation
from palate.feedback.hidden import visible
from palate.feedback.people import Person
from palate.feedback.store import Conflict, Store
from palate.server.bodies import Begin, Said, Signalled, Thumbed, Voted
from palate.server.door import Rights
from palate.server.events import ALIVE, Events, event, once
from palate.server.served import Speaker
from palate.server.speaking import Speaking

WAITING = 20  # turns at once; who comes later is asked to wait


@dataclass(frozen=True)
class _Turn:
    """A message to be answered: whose, the request's key, and its (turn, version) in the conversation."""

    who: str
    key: str
    conversation: str
    text: str
    place: tuple[int, int]


class Arena:
    """The models of a server and who is talking to them.

    Args:
        store: where everything is kept.
        models: two or more for battles, one for a chat.
        reveal: tell the names after the vote of a battle, and end it.
    """

    def __init__(self, store: Store, models: Sequence[Speaker], *, reveal: bool = False) -> None:
        self.store, self.models, self.reveal = store, list(models), reveal
        self.mode: Literal["battle", "chat"] = "battle" if len(models) > 1 else "chat"
        self.sides = SIDES if self.mode == "battle" else ("one",)
        self._threads = ThreadPoolExecutor(max_workers=len(models), thread_name_prefix="model")
        self._talking: set[str] = set()
        self._lock = threading.Lock()

    def offer(self, person: Person) -> dict[str, Any]:
        now = conversations.latest(self.store, person.pseudonym, self.mode)
        if now is not None and self._speakers(now) is None:
            now = None  # its models are served no more
        return {
            "mode": self.mode,
            "reveal": self.reveal,
            "current": None if now is None else self.view(now),
            "longest": LONGEST_TEXT,
            "most_turns": MOST_TURNS,
        }

    def start(self, person: Person, key: str) -> dict[str, Any]:
        drawn = secrets.SystemRandom().sample(self.models, len(self.sides))
        about = [dict(each.about) for each in drawn]
        name = conversations.start(self.store, person.pseudonym, key, self.mode, about, reveal=self.reveal)
        with self.store.read() as tx:
            return self.view(conversations.load(tx, name, person.pseudonym))

    def view(self, conversation: Conversation) -> dict[str, Any]:
        """A conversation as its person may see it."""
        named = conversation.mode == "battle" and conversation.reveal and any(e.vote for e in conversation.turns)
        names = {"models": {s: m["name"] for s, m in zip(self.sides, conversation.models, strict=True)}}
        return {
            "conversation": conversation.id,
            "mode": conversation.mode,
            "closed": conversation.closed,
            "turns": [self._shown(each) for each in conversation.current],
        } | (names if named else {})

    def _shown(self, each: Answered) -> dict[str, Any]:
        answers = [
            {"side": side, "text": visible(text), "finished": finished}
            for side, text, finished in zip(self.sides, each.answers, each.finished, strict=True)
        ]
        said = {"vote": each.vote} if self.mode == "battle" else {"thumb": each.thumb}
        return {"turn": each.turn, "version": each.version, "text": visible(each.text), "answers": answers} | said

    def turn(self, person: Person, body: Said) -> StreamingResponse:
        """The answers of all sides as server-sent events:

        piece  {"side", "text"}     what was written just now, as it is; hidden characters are for the page to show
        side   {"side"}             this side is complete
        done   a turn, as in ``view``: kept; its texts stand for the pieces
        error  {"error", "do"}      nothing is kept; the same request may be sent again

        Raises:
            HTTPException, PalateError: before anything is streamed, as for any other request.
        """
        who, store = person.pseudonym, self.store
        if body.again == (body.text is not None):
            raise HTTPException(422, "Give a text, or again: true, and not both.")
        if body.text is not None and not body.text.strip():
            raise HTTPException(422, "text: it is empty.")
        kept = conversations.find_turn(store, who, body.key, body.conversation, body.text)
        if kept is not None:
            return Events(once("done", self._shown(kept)))
        with store.read() as tx:
            found, turn, version = conversations.next_turn(tx, who, body.conversation, again=body.again)
        if found.mode != self.mode:
            raise Conflict("this conversation belongs to another page. Start a new one.")
        speakers = self._speakers(found)
        if speakers is None:
            raise Conflict("its models are not served here any more. Start a new conversation.")
        text = body.text if body.text is not None else found.current[-1].text
        self._take_place(who)
        now: tuple[Message, ...] = () if body.again else ({"role": "user", "content": text},)
        histories = [(*found.history(side, turn), *now) for side in range(len(self.sides))]
        asked = _Turn(who, body.key, body.conversation, text, (turn, version))
        return Events(self._answers(asked, speakers, histories), after=lambda: self._free(who))

    async def _answers(
        self, asked: _Turn, speakers: Sequence[Speaker], histories: Sequence[Sequence[Message]]
    ) -> AsyncGenerator[str]:
        spoken = Speaking(speakers, histories, self._threads)
        stopped = True
        try:
            while not spoken.complete():
                heard = await spoken.hear()
                if heard is None:
                    yield ALIVE
                elif heard.error is not None:
                    stopped = False  # not by the person
                    known = isinstance(heard.error, PalateError)
                    error = "A model cannot answer this." if known else "Something went wrong here."
                    do = "Start a new conversation, or send something shorter."
                    yield event("error", {"error": error, "do": do})
                    return
                elif heard.piece is not None:
                    yield event("piece", {"side": self.sides[heard.side], "text": heard.piece})
                else:
                    yield event("side", {"side": self.sides[heard.side]})
            stopped = False
            yield self._keep(asked, spoken)
        finally:
            spoken.stop()
            if stopped:
                conversations.record_stopped(
                    self.store, asked.who, asked.conversation, asked.text, asked.place, spoken.answers
                )

    def _keep(self, asked: _Turn, spoken: Speaking) -> str:
        """Keep a turn; returns the event that tells the page."""
        answers, finished = spoken.answers, spoken.finished
        told = (asked.who, asked.key, asked.conversation, asked.text)
        try:
            conversations.record_turn(
                self.store, *told, place=asked.place, answers=answers, finished=finished, seeds=spoken.seeds
            )
        except PalateError as error:
            return event("error", {"error": str(error), "do": "Load the page again."})
        return event("done", self._shown(Answered(*asked.place, asked.text, tuple(answers), tuple(finished), seq=0)))

    def _take_place(self, who: str) -> None:
        with self._lock:
            if who in self._talking:
                raise HTTPException(429, "Your last message is still being answered.", {"retry-after": "1"})
            if len(self._talking) >= WAITING:
                raise HTTPException(429, "Too many people are talking to the models.", {"retry-after": "5"})
            self._talking.add(who)

    def _free(self, who: str) -> None:
        with self._lock:
            self._talking.discard(who)

    def vote(self, person: Person, body: Voted) -> dict[str, Any]:
        kept, after = conversations.vote(
            self.store, person.pseudonym, body.key, body.conversation, body.turn, body.choice, body.seconds
        )
        return {"ok": True, "event": kept.id} | self.view(after)

    def _speakers(self, conversation: Conversation) -> list[Speaker] | None:
        """The models of a conversation, or None when one is not served here (any more)."""
        served = {(each.about["name"], each.about.get("hash")): each for each in self.models}
        found = [served.get((model["name"], model.get("hash"))) for model in conversation.models]
        return None if None in found else found  # type: ignore[return-value]


def routes(arena: Arena, may: Rights) -> APIRouter:
    """What people do in an arena."""
    router = APIRouter()

    @router.get("/api/arena")
    def offer(person: Person = may.anyone) -> dict[str, Any]:
        return arena.offer(person)

    @router.post("/api/arena/start")
    def start(body: Begin, person: Person = may.anyone) -> dict[str, Any]:
        return arena.start(person, body.key)

    @router.post("/api/arena/turn")
    def turn(body: Said, person: Person = may.anyone) -> StreamingResponse:
        return arena.turn(person, body)

    @router.post("/api/arena/vote")
    def vote(body: Voted, person: Person = may.anyone) -> dict[str, Any]:
        return arena.vote(person, body)

    @router.post("/api/arena/thumb")
    def thumb(body: Thumbed, person: Person = may.anyone) -> dict[str, Any]:
        told = (body.key, body.conversation, body.turn, body.version, body.up)
        return {"ok": True, "event": conversations.thumb(arena.store, person.pseudonym, *told).id}

    @router.post("/api/arena/signal")
    def signal(body: Signalled, person: Person = may.anyone) -> dict[str, Any]:
        told = (body.key, body.conversation, body.turn, body.version, body.signal, body.seconds)
        return {"ok": True, "event": conversations.signal(arena.store, person.pseudonym, *told).id}

    return router
