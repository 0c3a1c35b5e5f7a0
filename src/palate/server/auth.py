"""Where the server may listen, under which names it answers, and who somebody is.

Nothing listens beyond this machine before somebody has a login token. There is no password and no default secret: a
login link holds 256 random bits after a ``#``, so it is in no server's log and in no Referer, and a program that
previews links cannot use it up. The page sends it by POST, and a fresh session in a cookie comes back (HttpOnly,
SameSite=Strict): a session that was in the browser before is ended, never taken over.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

from palate.errors import ConfigError
from palate.feedback import people
from palate.feedback.people import Person
from palate.feedback.store import Store

WILDCARDS = ("0.0.0.0", "::", "")
DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Access:
    """Under which names the server answers.

    Attributes:
        hosts: allowed Host headers; any other name that leads here is DNS rebinding.
        origins: allowed Origin headers of writes.
        secure: the page is reached by https, so the cookie is for https only.
        cookie: its name; with the port in it, because cookies of two ports of a machine are mixed up otherwise.
    """

    hosts: frozenset[str]
    origins: frozenset[str]
    secure: bool
    cookie: str


def access(host: str, port: int, public_url: str | None = None) -> Access:
    """The names of a server that listens on ``host``:``port``.

    Args:
        public_url: where people reach it, e.g. "https://label.example.org" behind a proxy that does TLS; None = directly.
    Raises:
        ConfigError: the address is a wildcard and no public URL is given, or the URL is malformed.
    """
    if public_url is not None:
        parts = urlsplit(public_url)
        if parts.scheme not in DEFAULT_PORTS or not parts.hostname or parts.path not in ("", "/"):
            raise ConfigError(f"public URL {public_url!r}: expected something like https://label.example.org, no path.")
        names = set(_with_port(parts.hostname, parts.port or DEFAULT_PORTS[parts.scheme], parts.scheme))
        secure = parts.scheme == "https"
        cookie = "__Host-palate" if secure else f"palate-{port}"
        return Access(frozenset(names), frozenset(f"{parts.scheme}://{name}" for name in names), secure, cookie)
    if host in WILDCARDS:
        raise ConfigError(
            f"host {host!r} is every address of this machine. Give the one that people will use: "
            "--public-url https://label.example.org, or --host with one address."
        )
    hosts = ["127.0.0.1", "localhost", "::1"] if is_loopback(host) else [host]
    names = {name for each in hosts for name in _with_port(each, port, "http")}
    return Access(frozenset(names), frozenset(f"http://{name}" for name in names), False, f"palate-{port}")


def check_listening(store: Store, host: str) -> None:
    """That listening on ``host`` is safe.

    Raises:
        ConfigError: it is reachable from other machines, and nobody has a login token yet.
    """
    if is_loopback(host):
        return
    with store.read() as tx:
        known = tx.one("SELECT 1 FROM link UNION SELECT 1 FROM session LIMIT 1")
    if not known:
        raise ConfigError(
            f"host {host!r} can be reached from other machines, and nobody has a login token. First: "
            f"palate label annotators add {store.path} NAME --role admin"
        )


def is_loopback(host: str) -> bool:
    """Only this machine can reach it. A name counts when all its addresses do."""
    if host in WILDCARDS:
        return False
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        pass
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        raise ConfigError(f"host {host!r} has no address here. Give one of this machine's, e.g. 127.0.0.1.") from None
    return bool(found) and all(ipaddress.ip_address(each.split("%")[0]).is_loopback for each in found)


def cookie_header(given: Access, session: str) -> str:
    """The Set-Cookie of a session; an empty one takes it away."""
    age = int(people.SESSION_DAYS * 86_400) if session else 0
    secure = "; Secure" if given.secure else ""
    return f"{given.cookie}={session}; Path=/; Max-Age={age}; HttpOnly; SameSite=Strict{secure}"


def person_of(store: Store, session: str | None) -> Person | None:
    """Who a session cookie belongs to."""
    return people.who(store, session) if session else None


def _with_port(host: str, port: int, scheme: str) -> list[str]:
    name = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return [f"{name}:{port}".lower(), *([name.lower()] if port == DEFAULT_PORTS[scheme] else [])]
