"""The routes of annotators, each a few lines over ``feedback.queue``.

What an annotator gets is made here from named fields, never by handing on what the store holds: no model name, score,
origin, gold answer, purpose, item id, nor anybody else's answer can be in it. (An adjudicator sees the answers that
differ, by pseudonym.)

    GET  /api/me                 who one is, how far one is, and the task
    POST /api/next               {} -> an item, or {"done", "why"}
    POST /api/answer             {key, presentation, values, seconds, changed}
    POST /api/undo               {key, presentation}
    POST /api/skip               {key, presentation, reason}
    POST /api/flag               {key, presentation, text}
    POST /api/adjudicate/next    {} -> a contested item with its answers
    POST /api/adjudicate         {key, presentation, values}
    GET  /api/image/{name}       a picture of an item
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Response
from starlette.exceptions import HTTPException

from palate.feedback import queue
from palate.feedback.people import Person
from palate.feedback.store import Store
from palate.feedback.tables import Event
from palate.server import images, render
from palate.server.bodies import Decided, Empty, Flag, Given, Presented, Skip
from palate.server.door import Rights
from palate.server.refusals import refused


def routes(store: Store, may: Rights) -> APIRouter:
    """What people do with items."""
    router = APIRouter()

    @router.get("/api/me")
    def me(person: Person = may.anyone) -> dict[str, Any]:
        task = store.task
        asked = {
            "title": task.title,
            "instructions_html": render.markdown(task.instructions),
            "language": task.language,
            "render": task.render,
            "questions": [question.model_dump(mode="json") for question in task.questions],
        }
        known = {"name": person.name, "pseudonym": person.pseudonym, "role": person.role, "language": task.language}
        return known | {"progress": queue.progress(store, person.pseudonym), "task": asked}

    @router.post("/api/next")
    def next_item(body: Empty, person: Person = may.anyone) -> dict[str, Any]:
        found = queue.next_item(store, person.pseudonym)
        return _shown(store, found) if isinstance(found, queue.Presentation) else {"done": True, "why": found.why}

    @router.post("/api/answer")
    def answer(body: Given, person: Person = may.anyone) -> Any:
        told = (body.key, body.presentation, body.values)
        receipt = queue.answer(store, person.pseudonym, *told, seconds=body.seconds, changed=body.changed)
        if not receipt.counted:
            error = (
                "You had this item for too long, and it was given to somebody else. Your answer is kept, not counted."
            )
            return refused(409, error, recorded=True)
        return done(person, receipt.event)

    @router.post("/api/undo")
    def undo(body: Presented, person: Person = may.anyone) -> dict[str, Any]:
        return done(person, queue.undo(store, person.pseudonym, body.key, body.presentation))

    @router.post("/api/skip")
    def skip(body: Skip, person: Person = may.anyone) -> dict[str, Any]:
        return done(person, queue.skip(store, person.pseudonym, body.key, body.presentation, body.reason))

    @router.post("/api/flag")
    def flag(body: Flag, person: Person = may.anyone) -> dict[str, Any]:
        return done(person, queue.flag(store, person.pseudonym, body.key, body.presentation, body.text))

    @router.post("/api/adjudicate/next")
    def next_contested(body: Empty, person: Person = may.decides) -> dict[str, Any]:
        found = queue.next_contested(store, person.pseudonym)
        if isinstance(found, queue.Nothing):
            return {"done": True, "why": found.why}
        shown, given = found
        return _shown(store, shown) | {"answers": [{"annotator": who, "values": values} for who, values in given]}

    @router.post("/api/adjudicate")
    def adjudicate(body: Decided, person: Person = may.decides) -> dict[str, Any]:
        return done(person, queue.adjudicate(store, person.pseudonym, body.key, body.presentation, body.values))

    @router.get("/api/image/{name}", dependencies=[may.anyone])
    def image(name: str) -> Response:
        found = images.find_image(store, name)
        if found is None:
            raise HTTPException(404, "There is no such picture.")
        content, kind = found
        return Response(content, media_type=kind, headers={"cache-control": "private, max-age=86400, immutable"})

    def done(person: Person, event: Event) -> dict[str, Any]:
        return {"ok": True, "event": event.id, "progress": queue.progress(store, person.pseudonym)}

    return router


def _shown(store: Store, found: queue.Presentation) -> dict[str, Any]:
    """A presentation as an annotator may see it."""
    how = store.task.render
    return {
        "presentation": found.id,
        "lease_until": datetime.fromtimestamp(found.until, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "prompt": render.prompt_view(found.prompt, how),
        "responses": [render.response_view(key, text, how) for key, text in found.responses],
        "images": [f"/api/image/{name}" for name in found.images],
        "previous": found.previous,
    }
