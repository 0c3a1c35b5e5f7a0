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

import asyncio
import json
import logging
import secrets
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from palate.errors import PalateError
from palate.feedback import conversations
from palate.feedback.conversations import LONGEST_TEXT, MOST_TURNS, SIDES, Answered, Conversation
from palate.feedback.hidden import visible
from palate.feedback.people import Person
from palate.feedback.store import Conflict, Store
from palate.server.served import Speaker

LOG = logging.getLogger("uvicorn.error")
WAITING = 20  # turns at once; who comes later is asked to wait
ALIVE = 5.0  # seconds between signs of life while nothing is written

Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{16,64}$")]
Name = Annotated[str, Field(max_length=100)]
Number = Annotated[int, Field(ge=1, le=10_000)]
Seconds = Annotated[float, Field(ge=0, lt=1e7)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Begin(_Body):
    key: Key


class Said(_Body):
    key: Key
    conversation: Name
    text: str | None = Field(None, max_length=LONGEST_TEXT)
    again: bool = False


class Voted(_Body):
    key: Key
    conversation: Name
    turn: Number
    choice: Literal["left", "right", "tie", "both_bad"]
    seconds: Seconds | None = None


class Thumbed(_Body):
    key: Key
    conversation: Name
    turn: Number
    version: Number = 1
    up: bool | None


class Signalled(_Body):
    key: Key
    conversation: Name
    turn: Number
    version: Number = 1
    signal: Literal["copy", "dwell"]
    seconds: Seconds | None = None


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
        self._tasks: set[asyncio.Task[None]] = set()

    def offer(self, person: Person) -> dict[str, Any]:
        now = conversations.latest(self.store, person.pseudonym, self.mode)
        known = now is not None and self._speakers(now) is not None
        limits = {"longest": LONGEST_TEXT, "most_turns": MOST_TURNS}
        return {"mode": self.mode, "reveal": self.reveal, "current": self.view(now) if known and now else None} | limits

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
            return _Events(_once("done", self._shown(kept)))
        with store.read() as tx:
            found, turn, version = conversations.next_turn(tx, who, body.conversation, again=body.again)
        if found.mode != self.mode:
            raise Conflict("this conversation belongs to another page. Start a new one.")
        speakers = self._speakers(found)
        if speakers is None:
            raise Conflict("its models are not served here any more. Start a new conversation.")
        text = body.text if body.text is not None else found.current[-1].text
        with self._lock:
            if who in self._talking:
                raise HTTPException(429, "Your last message is still being answered.", {"retry-after": "1"})
            if len(self._talking) >= WAITING:
                raise HTTPException(429, "Too many people are talking to the models.", {"retry-after": "5"})
            self._talking.add(who)
        now = () if body.again else ({"role": "user", "content": text},)
        histories = [(*found.history(side, turn), *now) for side in range(len(self.sides))]
        return _Events(self._answers(who, body, text, (turn, version), speakers, histories), lambda: self._free(who))

    async def _answers(
        self,
        who: str,
        body: Said,
        text: str,
        place: tuple[int, int],
        speakers: Sequence[Speaker],
        histories: Sequence[Any],
    ) -> AsyncGenerator[str]:
        loop, gone, arrived = (
            asyncio.get_running_loop(),
            threading.Event(),
            asyncio.Queue[tuple[int, str | None, Any]](),
        )
        seeds = [secrets.randbits(48) for _ in speakers]
        answers, finished, open_sides = [""] * len(speakers), [False] * len(speakers), set(range(len(speakers)))
        complete = False

        def put(side: int, piece: str | None, more: Any) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, (side, piece, more))

        def speak(side: int) -> None:
            """In a thread of its own: pieces, then None with whether it ended by itself, or with what went wrong."""
            ended: list[bool] = []
            try:
                written = speakers[side].answer(histories[side], seeds[side], ended)
                for piece in written:
                    if gone.is_set():
                        written.close()  # type: ignore[attr-defined]
                        return
                    put(side, piece, None)
                put(side, None, bool(ended and ended[0]))
            except Exception as error:  # of a model: the person is told, and the log
                LOG.error("a model could not answer", exc_info=error)
                put(side, None, error)

        async def in_line(side: int) -> None:
            async with speakers[side].line:
                if not gone.is_set():
                    await loop.run_in_executor(self._threads, speak, side)

        for side in range(len(speakers)):
            task = loop.create_task(in_line(side))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            while open_sides:
                try:
                    side, piece, more = await asyncio.wait_for(arrived.get(), ALIVE)
                except TimeoutError:
                    yield ": waiting\n\n"
                    continue
                if piece is not None:
                    answers[side] += piece
                    yield _event("piece", {"side": self.sides[side], "text": piece})
                elif isinstance(more, Exception):
                    known = isinstance(more, PalateError)
                    complete = True  # nothing was stopped by the person
                    yield _event(
                        "error",
                        {
                            "error": "A model cannot answer this." if known else "Something went wrong here.",
                            "do": "Start a new conversation, or send something shorter.",
                        },
                    )
                    return
                else:
                    open_sides.discard(side)
                    finished[side] = more
                    yield _event("side", {"side": self.sides[side]})
            complete = True
            try:
                conversations.record_turn(
                    self.store,
                    who,
                    body.key,
                    body.conversation,
                    text,
                    place=place,
                    answers=answers,
                    finished=finished,
                    seeds=seeds,
                )
            except PalateError as error:
                yield _event("error", {"error": str(error), "do": "Load the page again."})
                return
            yield _event("done", self._shown(Answered(*place, text, tuple(answers), tuple(finished), seq=0)))
        finally:
            gone.set()
            if not complete:
                conversations.record_stopped(self.store, who, body.conversation, text, place, answers)

    def _free(self, who: str) -> None:
        with self._lock:
            self._talking.discard(who)

    def vote(self, person: Person, body: Voted) -> dict[str, Any]:
        event, after = conversations.vote(
            self.store, person.pseudonym, body.key, body.conversation, body.turn, body.choice, body.seconds
        )
        return {"ok": True, "event": event.id} | self.view(after)

    def _speakers(self, conversation: Conversation) -> list[Speaker] | None:
        """The models of a conversation, or None when one is not served here (any more)."""
        served = {(each.about["name"], each.about.get("hash")): each for each in self.models}
        found = [served.get((model["name"], model.get("hash"))) for model in conversation.models]
        return None if None in found else found  # type: ignore[return-value]


def routes(arena: Arena, anyone: Any) -> APIRouter:
    """The routes of an arena; ``anyone`` is the dependency that says who is asking."""
    router = APIRouter()

    @router.get("/api/arena")
    def offer(person: Person = anyone) -> dict[str, Any]:
        return arena.offer(person)

    @router.post("/api/arena/start")
    def start(body: Begin, person: Person = anyone) -> dict[str, Any]:
        return arena.start(person, body.key)

    @router.post("/api/arena/turn")
    def turn(body: Said, person: Person = anyone) -> StreamingResponse:
        return arena.turn(person, body)

    @router.post("/api/arena/vote")
    def vote(body: Voted, person: Person = anyone) -> dict[str, Any]:
        return arena.vote(person, body)

    @router.post("/api/arena/thumb")
    def thumb(body: Thumbed, person: Person = anyone) -> dict[str, Any]:
        told = (body.key, body.conversation, body.turn, body.version, body.up)
        return {"ok": True, "event": conversations.thumb(arena.store, person.pseudonym, *told).id}

    @router.post("/api/arena/signal")
    def signal(body: Signalled, person: Person = anyone) -> dict[str, Any]:
        told = (body.key, body.conversation, body.turn, body.version, body.signal, body.seconds)
        return {"ok": True, "event": conversations.signal(arena.store, person.pseudonym, *told).id}

    return router


class _Events(StreamingResponse):
    """Server-sent events, whose source is closed before anything else goes on, also when the client has left."""

    def __init__(self, source: AsyncGenerator[str], after: Callable[[], None] = lambda: None) -> None:
        # a proxy that waits for the whole of it would take the streaming away
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(source, media_type="text/event-stream", headers=headers)
        self._source, self._after = source, after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            try:
                await self._source.aclose()
            finally:
                self._after()


async def _once(name: str, data: Any) -> AsyncGenerator[str]:
    yield _event(name, data)


def _event(name: str, data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"
