"""A labelling server in the test's own process, and clients that behave like its page."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("nh3")
from starlette.testclient import TestClient

from palate.feedback import people
from palate.feedback.store import Store
from palate.server.app import make_app
from palate.server.auth import access
from palate.server.guard import Limits

HOST = "127.0.0.1:8765"
ORIGIN = {"origin": f"http://{HOST}"}
FREE = Limits(rate=1e6, burst=10**6, logins=1e6)
_KEYS = itertools.count()


def key() -> str:
    """An idempotency key."""
    return f"key-{next(_KEYS):020d}"


def client(store: Store, *, limits: Limits = FREE, raises: bool = True) -> TestClient:
    """A browser without a session; every write carries the page's Origin."""
    app = make_app(store, access("127.0.0.1", 8765), limits)
    return TestClient(app, base_url=f"http://{HOST}", headers=ORIGIN, raise_server_exceptions=raises)


def logged_in(store: Store, name: str, *, limits: Limits = FREE, raises: bool = True) -> TestClient:
    browser = client(store, limits=limits, raises=raises)
    response = browser.post("/api/login", json={"token": people.issue_link(store, name)})
    assert response.status_code == 200, response.text
    return browser


def next_item(browser: TestClient) -> dict[str, Any]:
    response = browser.post("/api/next", json={})
    assert response.status_code == 200, response.text
    return response.json()


def answer(browser: TestClient, shown: dict[str, Any], values: dict[str, Any], **more: Any) -> Any:
    body = {"key": key(), "presentation": shown["presentation"], "values": values, "seconds": 2.5, "changed": True}
    return browser.post("/api/answer", json=body | more)


def good(shown: dict[str, Any]) -> dict[str, Any]:
    choice = next(each["id"] for each in shown["responses"] if each["text"].startswith("good"))
    return {"better": {"choice": choice, "strength": 2}}


def store_in(folder: Path, **options: Any) -> Store:
    from feedback_stores import compare_task, make_store

    return make_store(folder, options.pop("task", compare_task()), **options)[0]
