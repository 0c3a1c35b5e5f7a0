"""The web application: routes over ``feedback.queue``, each a few lines.

What an annotator gets is made here from named fields, never by handing on what the store holds: no model name, score,
origin, gold answer, purpose, item id, nor anybody else's answer can be in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from palate.errors import FeedbackError, PalateError
from palate.feedback import people, queue
from palate.feedback.people import Person
from palate.feedback.questions import BadAnswer
from palate.feedback.store import Conflict, NotFound, Store
from palate.feedback.summary import summary
from palate.server import auth, images, pages, render
from palate.server.arena import Arena
from palate.server.arena import routes as arena_routes
from palate.server.auth import Access
from palate.server.guard import Buckets, Guard, Limits

DO = {
    400: "Correct the request and send it again.",
    401: "Log in with your login link.",
    403: "Ask an admin for this right.",
    404: "Ask for the next item.",
    405: "Use the labelling page.",
    409: "Ask for the next item.",
    422: "Correct the answer and send it again.",
    429: "Wait a moment and send it again.",
    500: "Send it again; what was acknowledged is safe.",
}
Key = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{16,64}$")]
Name = Annotated[str, Field(max_length=100)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Empty(_Body):
    """{}"""


class LogIn(_Body):
    token: str = Field(max_length=200)


class Given(_Body):
    key: Key
    presentation: Name
    values: dict[str, Any]
    seconds: float | None = Field(None, ge=0, lt=1e7)
    changed: bool = True


class Decided(_Body):
    key: Key
    presentation: Name
    values: dict[str, Any]


class Undo(_Body):
    key: Key
    presentation: Name


class Skip(_Body):
    key: Key
    presentation: Name
    reason: str = Field("", max_length=queue.LONGEST_REASON)


class Flag(_Body):
    key: Key
    presentation: Name
    text: str = Field(max_length=queue.LONGEST_REASON)


class NewPerson(_Body):
    name: Name
    role: str


def make_app(store: Store, access: Access, limits: Limits | None = None, arena: Arena | None = None) -> Guard:
    """The application behind its guard, ready for an ASGI server.

    Args:
        access: the server's names, see ``auth.access``.
        limits: sizes and rates.
        arena: models to talk to; its page is then the first one.
    """
    limits = limits or Limits()
    app = FastAPI(title="palate label", openapi_url=None, docs_url=None, redoc_url=None)
    _errors(app)
    if arena is not None:
        app.add_api_route("/", lambda: pages.static_file("arena.html"), methods=["GET"])
    app.include_router(pages.router)
    rates, logins = Buckets(limits.rate, limits.burst), Buckets(limits.logins / 60, limits.logins)

    def somebody(request: Request) -> Person:
        person = auth.person_of(store, request.cookies.get(access.cookie))
        if person is None:
            raise HTTPException(401, "You are not logged in, or your session has ended.")
        wait = rates.take(person.pseudonym)
        if wait:
            raise HTTPException(429, "That was too much at once.", {"retry-after": str(int(wait) + 1)})
        return person

    anyone = Depends(somebody)
    if arena is not None:
        app.include_router(arena_routes(arena, anyone))

    def with_role(*roles: str) -> Callable[[Person], Person]:
        def check(person: Person = anyone) -> Person:
            if person.role not in roles:
                raise HTTPException(403, f"This is for the role {' or '.join(roles)}; yours is {person.role}.")
            return person

        return check

    decides, admin = Depends(with_role("adjudicator", "admin")), Depends(with_role("admin"))

    @app.post("/api/login")
    def log_in(body: LogIn, request: Request) -> Response:
        wait = logins.take(request.client.host if request.client else "")
        if wait:
            raise HTTPException(429, "Too many logins at once.", {"retry-after": str(int(wait) + 1)})
        found = people.log_in(store, body.token, replaces=request.cookies.get(access.cookie))
        if found is None:
            raise HTTPException(401, "This login link was used already, or has run out.")
        person, session = found
        return JSONResponse(
            {"ok": True, "role": person.role}, headers={"set-cookie": auth.cookie_header(access, session)}
        )

    @app.post("/api/logout")
    def log_out(body: Empty, request: Request) -> Response:
        session = request.cookies.get(access.cookie)
        if session:
            people.log_out(store, session)
        return JSONResponse({"ok": True}, headers={"set-cookie": auth.cookie_header(access, "")})

    @app.get("/api/me")
    def me(person: Person = anyone) -> dict[str, Any]:
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

    @app.post("/api/next")
    def next_item(body: Empty, person: Person = anyone) -> dict[str, Any]:
        found = queue.next_item(store, person.pseudonym)
        return _shown(store, found) if isinstance(found, queue.Presentation) else {"done": True, "why": found.why}

    @app.post("/api/answer")
    def answer(body: Given, person: Person = anyone) -> Any:
        receipt = queue.answer(
            store,
            person.pseudonym,
            body.key,
            body.presentation,
            body.values,
            seconds=body.seconds,
            changed=body.changed,
        )
        if not receipt.counted:
            error = (
                "You had this item for too long, and it was given to somebody else. Your answer is kept, not counted."
            )
            return JSONResponse({"error": error, "do": DO[409], "recorded": True}, 409)
        return _done(person, receipt.event.id)

    @app.post("/api/undo")
    def undo(body: Undo, person: Person = anyone) -> dict[str, Any]:
        return _done(person, queue.undo(store, person.pseudonym, body.key, body.presentation).id)

    @app.post("/api/skip")
    def skip(body: Skip, person: Person = anyone) -> dict[str, Any]:
        return _done(person, queue.skip(store, person.pseudonym, body.key, body.presentation, body.reason).id)

    @app.post("/api/flag")
    def flag(body: Flag, person: Person = anyone) -> dict[str, Any]:
        return _done(person, queue.flag(store, person.pseudonym, body.key, body.presentation, body.text).id)

    @app.post("/api/adjudicate/next")
    def next_contested(body: Empty, person: Person = decides) -> dict[str, Any]:
        found = queue.next_contested(store, person.pseudonym)
        if isinstance(found, queue.Nothing):
            return {"done": True, "why": found.why}
        shown, given = found
        return _shown(store, shown) | {"answers": [{"annotator": who, "values": values} for who, values in given]}

    @app.post("/api/adjudicate")
    def adjudicate(body: Decided, person: Person = decides) -> dict[str, Any]:
        return _done(person, queue.adjudicate(store, person.pseudonym, body.key, body.presentation, body.values).id)

    @app.get("/api/image/{name}")
    def image(name: str, person: Person = anyone) -> Response:
        found = images.find_image(store, name)
        if found is None:
            raise HTTPException(404, "There is no such picture.")
        content, kind = found
        return Response(content, media_type=kind, headers={"cache-control": "private, max-age=86400, immutable"})

    cache: dict[bool, tuple[str, dict[str, Any]]] = {}
    busy = threading.Lock()

    @app.get("/api/admin/summary")
    def admin_summary(person: Person = admin, model: bool = False) -> dict[str, Any]:
        with busy:  # one at a time; the same again until something happens
            last = store.last()[1]
            if cache.get(model, ("", {}))[0] != last:
                cache[model] = (last, summary(store, model=model))
            names = {each.pseudonym: each.name for each in people.people(store)}
            return cache[model][1] | {"names": names}

    @app.get("/api/admin/people")
    def all_people(person: Person = admin) -> list[dict[str, Any]]:
        return [
            {"name": each.name, "pseudonym": each.pseudonym, "role": each.role, "active": each.active}
            for each in people.people(store)
        ]

    @app.post("/api/admin/people")
    def add_person(body: NewPerson, person: Person = admin) -> dict[str, Any]:
        added = people.add_person(store, body.name, body.role)
        return {
            "name": added.name,
            "pseudonym": added.pseudonym,
            "link": f"/login#{people.issue_link(store, added.name)}",
        }

    def _done(person: Person, event: str) -> dict[str, Any]:
        return {"ok": True, "event": event, "progress": queue.progress(store, person.pseudonym)}

    return Guard(app, access, limits)


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


def _errors(app: FastAPI) -> None:
    """Every error is {"error", "do"}, and says nothing about the inside."""

    def refused(status: int, error: str, headers: Any = None) -> Response:
        said = error.encode("utf-8", "replace").decode("utf-8")  # what was sent may be quoted in it
        return JSONResponse({"error": said, "do": DO.get(status, DO[400])}, status, headers=headers)

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return refused(422, f"{where or 'body'}: {first['msg']}.")

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> Response:
        return refused(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(PalateError)
    def known(request: Request, error: PalateError) -> Response:
        kinds = {BadAnswer: 422, Conflict: 409, NotFound: 404, FeedbackError: 422}
        return refused(next((status for kind, status in kinds.items() if isinstance(error, kind)), 400), str(error))

    @app.exception_handler(RecursionError)
    def deep(request: Request, error: RecursionError) -> Response:
        return refused(422, "The request is nested too deeply.")

    @app.exception_handler(Exception)
    def unknown(request: Request, error: Exception) -> Response:
        return refused(500, "Something went wrong here.")
