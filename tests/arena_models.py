"""Models for tests of the arena: one that says what it is told to, and a server in the test's own process."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from starlette.testclient import TestClient

from palate.feedback import people
from palate.feedback.store import Store
from palate.server.app import make_app
from palate.server.arena import Arena
from palate.server.auth import access
from palate.server.guard import Limits
from server_client import FREE, HOST, ORIGIN


class Parrot:
    """Answers "NAME heard N: TEXT" word by word.

    Attributes:
        asked: the conversations it was given.
        most: at how many conversations at once it was found speaking.
        pause: seconds before each word.
        given: words that were taken from it.
    """

    def __init__(self, name: str, says: str | None = None, pause: float = 0.0, hash: str | None = None) -> None:
        self.about = {"name": name, "where": f"/secret/{name}", "hash": hash or f"hash-{name}"}
        self.line = asyncio.Lock()
        self.says, self.pause = says, pause
        self.asked: list[list[dict[str, Any]]] = []
        self.most = self.now = self.given = 0
        self._lock = threading.Lock()

    def answer(self, turns: Sequence[Any], seed: int, ended: list[bool]) -> Iterator[str]:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.asked.append([dict(turn) for turn in turns])
        try:
            said = self.says or f"{self.about['name'][::-1]} heard {len(turns)}: {turns[-1]['content']}"
            for i, word in enumerate(said.split(" ")):
                time.sleep(self.pause)
                self.given += 1
                yield word if i == 0 else f" {word}"
            ended.append(True)
        finally:
            with self._lock:
                self.now -= 1


def arena_client(arena: Arena, name: str | None = None, limits: Limits = FREE) -> TestClient:
    """A browser of somebody's, or of nobody's."""
    app = make_app(arena.store, access("127.0.0.1", 8765), limits, arena)
    browser = TestClient(app, base_url=f"http://{HOST}", headers=ORIGIN)
    if name is not None:
        response = browser.post("/api/login", json={"token": people.issue_link(arena.store, name)})
        assert response.status_code == 200, response.text
    return browser


def events_of(text: str) -> list[tuple[str, Any]]:
    """(name, data) of each server-sent event."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


def bodies(store: Store, what: str | None = None) -> list[dict[str, Any]]:
    """Bodies of the message events."""
    return [
        dict(event.body) for event in store.events() if event.kind == "message" and what in (None, event.body["what"])
    ]
