"""Models that answer at once: each in a thread of its own, what they write in one line of arrival."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import NamedTuple

from palate.data.kinds import Message
from palate.server.served import Speaker

LOG = logging.getLogger("uvicorn.error")
PATIENCE = 5.0  # seconds without a word after which the page is told that somebody is still there


class Heard(NamedTuple):
    """What a side said: a piece of its answer, or, with neither piece nor error, that it is complete."""

    side: int
    piece: str | None = None
    finished: bool = False
    error: Exception | None = None


class Speaking:
    """The answers of several models to one message, while they are written. Begins at once, in the running event loop.

    Args:
        speakers: one each side.
        histories: what each is to answer.
        threads: where they work.
    Attributes:
        answers: what each side has written so far.
        finished: whether it ended by itself; known when it is complete.
        seeds: what it is drawn with.
    """

    def __init__(self, speakers: Sequence[Speaker], histories: Sequence[Sequence[Message]], threads: Executor) -> None:
        sides = range(len(speakers))
        self.answers, self.finished = ["" for _ in sides], [False for _ in sides]
        self.seeds = [secrets.randbits(48) for _ in sides]
        self._speakers, self._histories, self._threads = speakers, histories, threads
        self._loop, self._arrived = asyncio.get_running_loop(), asyncio.Queue[Heard]()
        self._open, self._gone = set(sides), threading.Event()
        self._tasks = [self._loop.create_task(self._in_line(side)) for side in sides]  # asyncio itself forgets them

    def complete(self) -> bool:
        """Every side has said all it had to say."""
        return not self._open

    async def hear(self) -> Heard | None:
        """What comes next; None when nothing came for a while."""
        try:
            heard = await asyncio.wait_for(self._arrived.get(), PATIENCE)
        except TimeoutError:
            return None
        if heard.piece is not None:
            self.answers[heard.side] += heard.piece
        elif heard.error is None:
            self._open.discard(heard.side)
            self.finished[heard.side] = heard.finished
        return heard

    def stop(self) -> None:
        """Nobody listens any more: each model stops at its next token, or does not begin."""
        self._gone.set()

    async def _in_line(self, side: int) -> None:
        async with self._speakers[side].line:
            if not self._gone.is_set():
                await self._loop.run_in_executor(self._threads, self._speak, side)

    def _speak(self, side: int) -> None:
        """In a thread: one side's answer, piece by piece."""
        ended: list[bool] = []
        try:
            written = self._speakers[side].answer(self._histories[side], self.seeds[side], ended)
            for piece in written:
                if self._gone.is_set():
                    written.close()  # type: ignore[attr-defined]
                    return
                self._say(Heard(side, piece))
            self._say(Heard(side, finished=bool(ended and ended[0])))
        except Exception as error:  # of a model: the person is told, and the log
            LOG.error("a model could not answer", exc_info=error)
            self._say(Heard(side, error=error))

    def _say(self, heard: Heard) -> None:
        self._loop.call_soon_threadsafe(self._arrived.put_nowait, heard)
