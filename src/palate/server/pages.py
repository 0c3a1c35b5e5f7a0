"""The pages and what belongs to them: files of ``static/``, by an exact name, and nothing else."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from fastapi import APIRouter, Response

STATIC = Path(__file__).resolve().parent / "static"
PAGES = {"/": "index.html", "/admin": "admin.html", "/arena": "arena.html", "/login": "login.html"}
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".woff2": "font/woff2",
}

router = APIRouter()


def static_file(name: str) -> Response:
    """A file of ``static/``; a name that is not exactly one of them is not found, so no path can lead out."""
    path = _files().get(name)
    if path is None:
        return Response('{"error": "There is no such page.", "do": "Go to /."}', 404, media_type="application/json")
    headers = {"cache-control": "no-cache", "content-type": TYPES[path.suffix]}
    return Response(path.read_bytes(), headers=headers)


@router.get("/static/{name:path}")
def static(name: str) -> Response:
    return static_file(name)


@router.get("/favicon.ico")
def favicon() -> Response:
    return Response(status_code=204)


for _path, _file in PAGES.items():
    router.add_api_route(_path, lambda file=_file: static_file(file), methods=["GET"], name=_file)


@lru_cache(maxsize=1)
def _files() -> dict[str, Path]:
    return {
        path.relative_to(STATIC).as_posix(): path
        for path in STATIC.rglob("*")
        if path.is_file() and not path.is_symlink() and path.suffix in TYPES
    }
