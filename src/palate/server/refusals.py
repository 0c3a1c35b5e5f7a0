"""Every error of the server is {"error", "do"}, and says nothing about the inside."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from palate.errors import FeedbackError, PalateError
from palate.feedback.questions import BadAnswer
from palate.feedback.store import Conflict, NotFound

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
STATUS = {BadAnswer: 422, Conflict: 409, NotFound: 404, FeedbackError: 422}  # the first that fits; other errors: 400


def refused(status: int, error: str, headers: Any = None, **more: Any) -> Response:
    """What the page is told; ``more``: fields beside the two."""
    said = error.encode("utf-8", "replace").decode("utf-8")  # what was sent may be quoted in it
    return JSONResponse({"error": said, "do": DO.get(status, DO[400])} | more, status, headers=headers)


def register(app: FastAPI) -> None:
    """Answer every exception of the application so."""

    @app.exception_handler(RequestValidationError)
    def malformed(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return refused(422, f"{where or 'body'}: {first['msg']}.")

    @app.exception_handler(HTTPException)
    def http(_: Request, error: HTTPException) -> Response:
        return refused(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(PalateError)
    def known(_: Request, error: PalateError) -> Response:
        return refused(next((status for kind, status in STATUS.items() if isinstance(error, kind)), 400), str(error))

    @app.exception_handler(RecursionError)
    def deep(*_: Any) -> Response:
        return refused(422, "The request is nested too deeply.")

    @app.exception_handler(Exception)
    def unknown(*_: Any) -> Response:
        return refused(500, "Something went wrong here.")
