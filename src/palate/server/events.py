"""Server-sent events: what a page hears while something is still going on."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

ALIVE = ": waiting\n\n"  # a comment: the connection is there, and nothing has happened


def event(name: str, data: Any) -> str:
    """One event, as it goes over the wire."""
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


async def once(name: str, data: Any) -> AsyncGenerator[str]:
    """A source of one event."""
    yield event(name, data)


class Events(StreamingResponse):
    """Events, whose source is closed before anything else goes on, also when the client has left.

    Args:
        source: events as ``event`` writes them.
        after: called when the source is closed.
    """

    def __init__(self, source: AsyncGenerator[str], after: Callable[[], None] = lambda: None) -> None:
        # a proxy that waits for the whole of it would take the streaming away
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(source, media_type="text/event-stream", headers=headers)
        self._source, self._after = source, after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            try:
                await self._source.aclose()
            finally:
                self._after()
