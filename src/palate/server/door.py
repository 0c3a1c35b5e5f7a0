"""Coming in, going out, and who may do what.

POST /api/login    {token} -> a session in a cookie
POST /api/logout   {}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from palate.feedback import people
from palate.feedback.people import Person
from palate.feedback.store import Store
from palate.server import auth
from palate.server.auth import Access
from palate.server.bodies import Empty, LogIn
from palate.server.guard import Buckets, Limits


@dataclass(frozen=True)
class Rights:
    """Dependencies of routes: each gives the ``Person`` who is asking, or refuses.

    Attributes:
        anyone: everybody who is logged in.
        decides: those who settle contested items.
        admin: who sees everything and adds people.
    """

    anyone: Any
    decides: Any
    admin: Any


def rights(store: Store, access: Access, limits: Limits) -> Rights:
    """Who is asking is read from the session's cookie; everybody has a rate of their own."""
    rates = Buckets(limits.rate, limits.burst)

    def somebody(request: Request) -> Person:
        person = auth.person_of(store, request.cookies.get(access.cookie))
        if person is None:
            raise HTTPException(401, "You are not logged in, or your session has ended.")
        _hold_back(rates, person.pseudonym, "That was too much at once.")
        return person

    anyone = Depends(somebody)

    def only(*roles: str) -> Any:
        def check(person: Person = anyone) -> Person:
            if person.role not in roles:
                raise HTTPException(403, f"This is for the role {' or '.join(roles)}; yours is {person.role}.")
            return person

        return Depends(check)

    return Rights(anyone, decides=only("adjudicator", "admin"), admin=only("admin"))


def routes(store: Store, access: Access, limits: Limits) -> APIRouter:
    """Log in and out."""
    router = APIRouter()
    logins = Buckets(limits.logins / 60, limits.logins)

    @router.post("/api/login")
    def log_in(body: LogIn, request: Request) -> Response:
        _hold_back(logins, request.client.host if request.client else "", "Too many logins at once.")
        found = people.log_in(store, body.token, replaces=request.cookies.get(access.cookie))
        if found is None:
            raise HTTPException(401, "This login link was used already, or has run out.")
        person, session = found
        return JSONResponse(
            {"ok": True, "role": person.role}, headers={"set-cookie": auth.cookie_header(access, session)}
        )

    @router.post("/api/logout")
    def log_out(body: Empty, request: Request) -> Response:
        session = request.cookies.get(access.cookie)
        if session:
            people.log_out(store, session)
        return JSONResponse({"ok": True}, headers={"set-cookie": auth.cookie_header(access, "")})

    return router


def _hold_back(buckets: Buckets, who: str, error: str) -> None:
    wait = buckets.take(who)
    if wait:
        raise HTTPException(429, error, {"retry-after": str(int(wait) + 1)})
