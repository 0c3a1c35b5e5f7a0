"""What admins see and do.

GET  /api/admin/summary?model=   where the collection stands; model=true: also what the annotator model says
GET  /api/admin/people           everybody
POST /api/admin/people           {name, role} -> somebody new, with a login link
"""

from __future__ import annotations

import threading
from typing import Any

from fastapi import APIRouter

from palate.feedback import people
from palate.feedback.store import Store
from palate.feedback.summary import summary
from palate.server.bodies import NewPerson
from palate.server.door import Rights


def routes(store: Store, may: Rights) -> APIRouter:
    """The summary and the people."""
    router = APIRouter(prefix="/api/admin", dependencies=[may.admin])
    cache: dict[bool, tuple[str, dict[str, Any]]] = {}
    busy = threading.Lock()

    @router.get("/summary")
    def admin_summary(model: bool = False) -> dict[str, Any]:
        with busy:  # one at a time; the same again until something happens
            last = store.last()[1]
            if cache.get(model, ("", {}))[0] != last:
                cache[model] = (last, summary(store, model=model))
            names = {each.pseudonym: each.name for each in people.people(store)}
            return cache[model][1] | {"names": names}

    @router.get("/people")
    def all_people() -> list[dict[str, Any]]:
        return [
            {"name": each.name, "pseudonym": each.pseudonym, "role": each.role, "active": each.active}
            for each in people.people(store)
        ]

    @router.post("/people")
    def add_person(body: NewPerson) -> dict[str, Any]:
        added = people.add_person(store, body.name, body.role)
        link = f"/login#{people.issue_link(store, added.name)}"
        return {"name": added.name, "pseudonym": added.pseudonym, "link": link}

    return router
