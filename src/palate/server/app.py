"""The web application: pages, routes, and the guard before them."""

from __future__ import annotations

from fastapi import FastAPI

from palate.feedback.store import Store
from palate.server import admin, annotating, door, pages, refusals
from palate.server.arena import Arena
from palate.server.arena import routes as arena_routes
from palate.server.auth import Access
from palate.server.guard import Guard, Limits


def make_app(store: Store, access: Access, limits: Limits | None = None, arena: Arena | None = None) -> Guard:
    """The application behind its guard, ready for an ASGI server.

    Args:
        access: the server's names, see ``auth.access``.
        limits: sizes and rates.
        arena: models to talk to; its page is then the first one.
    """
    limits = limits or Limits()
    may = door.rights(store, access, limits)
    app = FastAPI(title="palate label", openapi_url=None, docs_url=None, redoc_url=None)
    refusals.register(app)
    if arena is not None:
        app.add_api_route("/", lambda: pages.static_file("arena.html"), methods=["GET"])
        app.include_router(arena_routes(arena, may))
    app.include_router(pages.router)
    app.include_router(door.routes(store, access, limits))
    app.include_router(annotating.routes(store, may))
    app.include_router(admin.routes(store, may))
    return Guard(app, access, limits)
