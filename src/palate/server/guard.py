"""What every request passes before it reaches the application, and what every response carries.

    Host               one of the server's own names                              421   DNS rebinding
    writes             Origin or Sec-Fetch-Site says: from our own page           403   cross-site request forgery
                       Content-Type is application/json                           415   (a form cannot send it)
    reads of /api      not from another site                                      403
    body               at most ``Limits.body`` bytes, within ``Limits.seconds``    413, 408
    response           Content-Security-Policy without anything from elsewhere, no sniffing, no framing, no referrer

A write with neither Origin nor Sec-Fetch-Site is refused too: every browser sends one of them; another client can.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from palate.server.auth import Access

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; font-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
)


@dataclass(frozen=True)
class Limits:
    """How much one client may ask.

    Attributes:
        body: bytes of a request.
        seconds: until a request must have arrived.
        rate: requests a second of one annotator, in the long run.
        burst: requests at once before that counts.
        logins: login attempts a minute from one address.
    """

    body: int = 1_000_000
    seconds: float = 30.0
    rate: float = 5.0
    burst: int = 60
    logins: float = 30.0


class Guard:
    """ASGI middleware; see the module."""

    def __init__(self, app: App, access: Access, limits: Limits) -> None:
        self.app, self.access, self.limits = app, access, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no websockets here
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = _headers(scope)
        guarded = _with_headers(send, api=scope["path"].startswith("/api/"))
        refusal = self._refusal(scope["method"], scope["path"], headers)
        body: bytes | None = None
        if refusal is None:
            try:
                body = await asyncio.wait_for(self._body(receive, headers), self.limits.seconds)
            except TimeoutError:
                refusal = (408, "The request took too long to arrive.", "Send it again.")
            else:
                if body is None:
                    refusal = (413, f"The request has more than {self.limits.body:,} bytes.", "Send less at once.")
        if refusal is not None:
            await _refuse(guarded, *refusal)
            return
        await self.app(scope, _replay(body or b"", receive), guarded)

    def _refusal(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str, str] | None:
        if headers.get("host", "").lower() not in self.access.hosts:
            return (
                421,
                "This server does not answer under that name.",
                "Use the address that palate label serve printed.",
            )
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        foreign = (origin is not None and origin.lower() not in self.access.origins) or site not in (
            None,
            "same-origin",
        )
        if method in ("GET", "HEAD"):
            if path.startswith("/api/") and foreign:
                return 403, "This was asked by a page of another site.", "Open the labelling page itself."
            return None
        if foreign or (origin is None and site is None):
            return 403, "A write must come from the labelling page itself.", "Send Origin or Sec-Fetch-Site with it."
        if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            return 415, "A write must be JSON.", "Send it with Content-Type: application/json."
        return None

    async def _body(self, receive: Receive, headers: dict[str, str]) -> bytes | None:
        """The whole body, or None for one that is too long."""
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self.limits.body:
            return None
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b""
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.limits.body:
                return None
            if not message.get("more_body"):
                return b"".join(parts)


class Buckets:
    """Token buckets by name: ``burst`` at once, ``rate`` a second in the long run."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst = rate, burst
        self._full: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def take(self, name: str, *, now: float | None = None) -> float:
        """0 when the request is allowed, else the seconds to wait."""
        now = time.monotonic() if now is None else now
        with self._lock:
            level, since = self._full.get(name, (self.burst, now))
            level = min(self.burst, level + (now - since) * self.rate)
            if len(self._full) > 10_000:  # names that are full again say nothing
                self._full = {k: v for k, v in self._full.items() if v[0] + (now - v[1]) * self.rate < self.burst}
            if level >= 1:
                self._full[name] = (level - 1, now)
                return 0.0
            self._full[name] = (level, now)
            return (1 - level) / self.rate


def _headers(scope: Scope) -> dict[str, str]:
    """Names in small letters. Of a header that is sent twice both count: they are joined, and so fit nothing."""
    found: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


def _with_headers(send: Send, *, api: bool) -> Send:
    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            names = {name.lower() for name, _ in headers}
            extra = [(name, value) for name, value in HEADERS if name not in names]
            if api and b"cache-control" not in names:
                extra.append((b"cache-control", b"no-store"))
            message = {**message, "headers": headers + extra}
        await send(message)

    return guarded


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replayed


async def _refuse(send: Send, status: int, error: str, do: str) -> None:
    body = json.dumps({"error": error, "do": do}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
