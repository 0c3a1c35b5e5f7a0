"""A labelling server on a real port and a browser for its pages, for tests and for the pictures in the documents.

The server runs in a thread and can be stopped and started again on the same port and the same store.
"""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from palate.feedback import people
from palate.feedback.items import Candidate, add_items
from palate.feedback.store import Store
from palate.feedback.task import Task, task_of
from palate.feedback.views import Answer, answers

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Site:
    """A store and a server over it."""

    def __init__(
        self,
        folder: Path,
        task: Task,
        items: Iterable[Candidate],
        names: dict[str, str] | None = None,
        arena: Callable[[Store], Any] | None = None,
    ) -> None:
        self.store = Store.create(folder / "feedback.db", task)
        add_items(self.store, list(items))
        for name, role in (names or {"anna": "annotator"}).items():
            people.add_person(self.store, name, role)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server: Any = None
        self.arena = None if arena is None else arena(self.store)
        self.start()

    def start(self) -> None:
        import uvicorn

        from palate.server.app import make_app
        from palate.server.auth import access
        from palate.server.guard import Limits

        free = Limits(rate=1e6, burst=10**6, logins=1e6)
        app = make_app(self.store, access("127.0.0.1", self.port), free, self.arena)
        config = uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="error", lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        end = time.monotonic() + 20
        while not self._server.started:
            assert time.monotonic() < end, "the server did not start"
            time.sleep(0.01)

    def stop(self) -> None:
        """End it, with connections that are open."""
        self._server.force_exit = self._server.should_exit = True
        self._thread.join(20)

    def log_in(self, page: Any, name: str = "anna", to: str = "/") -> None:
        """The login link, as somebody opens it."""
        page.goto(f"{self.url}/login#{people.issue_link(self.store, name)}")
        page.wait_for_url(f"{self.url}/")
        if to != "/":
            page.goto(self.url + to)

    def answers(self, purposes: tuple[str, ...] = ("task",)) -> list[Answer]:
        return answers(self.store, purposes)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Bodies of the events of a kind, the oldest first."""
        import json

        with self.store.read() as tx:
            return [json.loads(body) for (body,) in tx.all("SELECT body FROM event WHERE kind = ? ORDER BY seq", kind)]


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium with a profile of its own that is thrown away."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        try:
            yield opened
        finally:
            opened.close()


def task_with(*questions: dict[str, Any], **settings: Any) -> Task:
    given = {"random_share": 0.0, **settings.pop("distribution", {})}
    return task_of({"title": "A task", "questions": list(questions), "distribution": given, **settings})


def ready(page: Any) -> None:
    """An item is shown, and it can be answered."""
    page.wait_for_selector("main:not(.busy) .item")


def picture() -> bytes:
    """A small scene as PNG: three shapes on a table."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (480, 320), "#e9e4d8")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 220, 480, 320), fill="#b89b77")
    draw.rectangle((60, 150, 150, 240), fill="#3566a8")
    draw.ellipse((200, 160, 290, 250), fill="#c24d3f")
    draw.polygon([(340, 245), (390, 150), (440, 245)], fill="#3f8a58")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
