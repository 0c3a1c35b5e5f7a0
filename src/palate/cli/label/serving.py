"""``palate label serve``, and how a store is served, with or without models to talk to."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palate.cli.label.stores import StoreFile, TaskFile, open_or_make, open_store
from palate.cli.label.tokens import take_tokens
from palate.cli.options import JsonFlag
from palate.cli.output import print_json
from palate.errors import ConfigError

if TYPE_CHECKING:
    from palate.feedback.store import Store
    from palate.server.arena import Arena

PACKAGES = ("fastapi", "uvicorn", "nh3", "markdown_it", "PIL")
Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]
Port = Annotated[int, typer.Option("--port", "-p", min=0, max=65535, help="0 = any free one.")]
PublicUrl = Annotated[
    str | None, typer.Option("--public-url", help="Where people reach it, e.g. https://label.example.org.")
]
TokenFile = Annotated[
    Path | None, typer.Option("--token-file", help='Lines "name role token": log in once with each, from this start.')
]


@dataclass(frozen=True)
class Serving:
    """The options of every command that serves, as its help explains them."""

    host: str
    port: int
    public_url: str | None
    token_file: Path | None
    rate: float
    as_json: bool


def serve(
    store: StoreFile,
    task: TaskFile = None,
    host: Host = "127.0.0.1",
    port: Port = 8765,
    public_url: PublicUrl = None,
    token_file: TokenFile = None,
    rate: Annotated[float, typer.Option("--rate", min=0.1, help="Requests a second of one annotator.")] = 5.0,
    as_json: JsonFlag = False,
) -> None:
    """Serve the page on which annotators answer. Stop it at any time: what was acknowledged is on the disk."""
    need(*PACKAGES)
    # Without a task, a name that is not there is a name mistyped: an empty store would look like lost work.
    with open_store(store) if task is None else open_or_make(store, task) as opened:
        run_server(opened, Serving(host, port, public_url, token_file, rate, as_json))


def need(*packages: str) -> None:
    """Refuse to go on without packages of the extra ``label``."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"this needs the package {package}, which is not installed. Install: pip install 'palate[label]'"
            )


def run_server(opened: Store, how: Serving, *, title: str | None = None, arena: Arena | None = None) -> None:
    """Serve a store until Ctrl-C.

    Args:
        title: what is said to be served; None = the task.
        arena: models to talk to.
    """
    import uvicorn

    from palate.feedback import people
    from palate.server.app import make_app
    from palate.server.auth import access, check_listening, is_loopback
    from palate.server.guard import Limits

    if how.token_file is not None:
        take_tokens(opened, how.token_file)
    token = None
    if is_loopback(how.host) and not people.people(opened):
        token = people.issue_link(opened, people.add_person(opened, "admin", "admin").name)
    check_listening(opened, how.host)
    with listen(how.host, how.port) as listening:
        port = listening.getsockname()[1]
        names = access(how.host, port, how.public_url)
        _announce(opened, how, port, token, title or opened.task.title)
        if not names.secure and not is_loopback(how.host):
            typer.echo(
                "palate: without https everybody on the way can read along. Put a proxy with TLS before it.",
                err=True,
            )
        settings = uvicorn.Config(
            make_app(opened, names, Limits(rate=how.rate, burst=max(60, int(12 * how.rate))), arena),
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=None if arena is None else 3,  # an answer may take minutes
            limit_concurrency=500,
        )
        uvicorn.Server(settings).run(sockets=[listening])


def _announce(opened: Store, how: Serving, port: int, token: str | None, title: str) -> None:
    """Where it is, and how to log in; ``token``: of the first admin, in a store without people."""
    host = f"[{how.host}]" if ":" in how.host else how.host
    url = how.public_url.rstrip("/") if how.public_url else f"http://{host}:{port}"
    link = None if token is None else f"{url}/login#{token}"
    if how.as_json:
        print_json({"url": url, "link": link})
    typer.echo(f"{url}   {title}   (Ctrl-C stops)", err=True)
    if link is not None:
        typer.echo(f"Log in once as admin: {link}", err=True)
    else:
        typer.echo(f"Login links: palate label annotators link {opened.path} NAME --url {url}", err=True)


def listen(host: str, port: int) -> Any:
    """A listening socket: the port is known before anybody is told, and who comes before the server is ready waits."""
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # named TCP: asyncio turns Nagle's algorithm off for such sockets only, and with it each answer takes 40 ms more
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}. Choose another --port.") from None
    return listening
