"""What an attacker would try: another site, another role, another's work, a poisoned text, too much of everything."""

from __future__ import annotations

import json
import re

import pytest
from starlette.testclient import TestClient

from arena_models import Parrot
from feedback_stores import compare_task, make_store
from palate.errors import ConfigError, DataError, FeedbackError
from palate.feedback import people
from palate.feedback.items import Candidate
from palate.feedback.task import template
from palate.feedback.upkeep import status, verify
from palate.server import auth, images, render
from palate.server.app import make_app
from palate.server.arena import Arena
from palate.server.auth import access
from palate.server.guard import Buckets, Limits
from server_client import FREE, HOST, ORIGIN, answer, client, good, key, logged_in, next_item, store_in

WRITES = ["login", "logout", "next", "answer", "undo", "skip", "flag", "adjudicate", "adjudicate/next", "admin/people"]
JSON = {"content-type": "application/json"}
READS = ["me", "admin/summary", "admin/people", "image/" + "0" * 64]


# --- who -------------------------------------------------------------------------------------------------------------


def test_nothing_is_written_without_a_session(tmp_path) -> None:
    store = store_in(tmp_path)
    before = store.last()
    act = {"key": key(), "presentation": "x"}
    bodies = {"next": {}, "answer": act | {"values": {}}, "undo": act, "skip": act, "flag": act | {"text": ""}}
    bodies |= {
        "adjudicate": act | {"values": {}},
        "adjudicate/next": {},
        "admin/people": {"name": "x", "role": "admin"},
    }
    assert {*bodies, "login", "logout"} == set(WRITES)
    for session in (None, "a" * 43, ""):
        browser = client(store)
        if session is not None:
            browser.cookies.set("palate-8765", session, domain="127.0.0.1")
        found = {path: browser.post(f"/api/{path}", json=body).status_code for path, body in bodies.items()}
        assert found == dict.fromkeys(bodies, 401)
    assert store.last() == before


@pytest.mark.parametrize("path", [f"/api/{name}" for name in READS])
def test_nothing_is_read_without_a_session(tmp_path, path: str) -> None:
    assert client(store_in(tmp_path)).get(path).status_code == 401


def test_every_route_there_is_asks_who_it_is(tmp_path) -> None:
    """Also one that nobody thought of here: found in the application, not in a list."""
    store = store_in(tmp_path)
    app = make_app(store, access("127.0.0.1", 8765), FREE, Arena(store, [Parrot("a"), Parrot("b")]))
    browser = TestClient(app, base_url=f"http://{HOST}", headers=ORIGIN)
    paths = app.app.openapi()["paths"]  # type: ignore[attr-defined]
    routes = {(verb, path) for path, verbs in paths.items() for verb in verbs if path.startswith("/api/")}
    assert {f"/api/{name}" for name in WRITES} | {"/api/me", "/api/arena/turn", "/api/image/{name}"} <= set(paths)
    open_to_all = {
        (verb, path)
        for verb, path in routes
        if browser.request(verb, path.format(name="x"), content="{}", headers=JSON).status_code != 401
    }
    assert open_to_all == {("post", "/api/login"), ("post", "/api/logout")}


@pytest.mark.parametrize(
    ("role", "allowed"),
    [("annotator", []), ("adjudicator", ["decide"]), ("admin", ["decide", "summary", "people", "add"])],
)
def test_a_role_may_do_its_own_and_no_more(tmp_path, role: str, allowed: list[str]) -> None:
    store = store_in(tmp_path)
    people.add_person(store, "x", role)
    browser = logged_in(store, "x")
    found = {
        "decide": browser.post("/api/adjudicate/next", json={}),
        "summary": browser.get("/api/admin/summary"),
        "people": browser.get("/api/admin/people"),
        "add": browser.post("/api/admin/people", json={"name": "y", "role": "annotator"}),
    }
    assert {name: r.status_code for name, r in found.items()} == {
        name: 200 if name in allowed else 403 for name in found
    }


def test_somebody_elses_presentation_is_not_found(tmp_path) -> None:
    store = store_in(tmp_path)
    anna, ben = logged_in(store, "n0"), logged_in(store, "n1")
    shown = next_item(anna)
    for path, more in (("answer", {"values": good(shown)}), ("undo", {}), ("skip", {}), ("flag", {"text": "x"})):
        body = {"key": key(), "presentation": shown["presentation"], **more}
        assert ben.post(f"/api/{path}", json=body).status_code == 404
    assert status(store)["answers"] == 0


def test_a_session_that_was_there_before_the_login_is_never_taken_over(tmp_path) -> None:
    """Session fixation: an attacker's session, planted in the browser, must not become the victim's."""
    store = store_in(tmp_path)
    planted = logged_in(store, "n1").cookies["palate-8765"]
    for before in (planted, "attackers-own-choice-of-a-session-000000000000"):
        browser = client(store)
        browser.cookies.set("palate-8765", before, domain="127.0.0.1")
        response = browser.post("/api/login", json={"token": people.issue_link(store, "n0")})
        fresh = re.match(r"palate-8765=([^;]+);", response.headers["set-cookie"])[1]
        assert fresh != before and len(fresh) >= 43
        for value, name in ((before, None), (fresh, "n0")):
            other = client(store)
            other.cookies.set("palate-8765", value, domain="127.0.0.1")
            me = other.get("/api/me")
            assert (me.json()["name"] if me.status_code == 200 else None) == name


def test_the_cookie_cannot_be_read_by_a_script_or_sent_from_elsewhere(tmp_path) -> None:
    store = store_in(tmp_path)
    response = client(store).post("/api/login", json={"token": people.issue_link(store, "n0")})
    parts = response.headers["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(parts)
    behind_tls = access("127.0.0.1", 8765, "https://label.example.org")
    assert auth.cookie_header(behind_tls, "s").startswith("__Host-palate=s; Path=/;")
    assert auth.cookie_header(behind_tls, "s").endswith("; Secure")


def test_a_login_link_works_once_over_http_too(tmp_path) -> None:
    store = store_in(tmp_path)
    token = people.issue_link(store, "n0")
    assert [client(store).post("/api/login", json={"token": token}).status_code for _ in range(2)] == [200, 401]
    assert client(store).get(f"/login?token={people.issue_link(store, 'n0')}").cookies == {}  # reading uses nothing up


def test_somebody_put_out_is_out_at_once(tmp_path) -> None:
    store = store_in(tmp_path)
    browser = logged_in(store, "n0")
    people.change_person(store, "n0", active=False)
    assert browser.get("/api/me").status_code == 401


# --- where from ------------------------------------------------------------------------------------------------------

FOREIGN = {
    "another site's origin": {"origin": "http://evil.example"},
    "another port of this machine": {"origin": "http://127.0.0.1:9999"},
    "https in place of http": {"origin": f"https://{HOST}"},
    "a sandboxed frame": {"origin": "null"},
    "fetch metadata of another site": {**ORIGIN, "sec-fetch-site": "cross-site"},
    "fetch metadata of a sister site": {**ORIGIN, "sec-fetch-site": "same-site"},
    "neither of both": {},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_write_from_another_site_is_refused(tmp_path, name: str) -> None:
    store = store_in(tmp_path, items=1)
    people.add_person(store, "boss", "admin")
    session = logged_in(store, "boss").cookies["palate-8765"]
    before = store.last()
    app = make_app(store, access("127.0.0.1", 8765), FREE)
    browser = TestClient(app, base_url=f"http://{HOST}", headers=FOREIGN[name], cookies={"palate-8765": session})
    found = {path: browser.post(f"/api/{path}", json={}).status_code for path in WRITES}
    assert found == dict.fromkeys(WRITES, 403)
    assert store.last() == before


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_a_form_cannot_write(tmp_path, kind: str) -> None:
    """A form of another site can send these types without asking first; JSON it cannot."""
    browser = logged_in(store_in(tmp_path), "n0")
    response = browser.post("/api/next", content=b"{}", headers={"content-type": kind})
    assert response.status_code == 415


def test_a_read_of_data_from_another_site_is_refused(tmp_path) -> None:
    browser = logged_in(store_in(tmp_path), "n0")
    assert browser.get("/api/me", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert browser.get("/api/me", headers={"sec-fetch-site": "same-origin"}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example:8765", "127.0.0.1:80", "127.0.0.1", "", "127.0.0.1:8765.evil.example", "localhost:8766"]
)
def test_another_name_that_leads_here_is_refused(tmp_path, host: str) -> None:
    """DNS rebinding: the page of evil.example, whose name now points to 127.0.0.1, is of the same origin for a browser."""
    browser = logged_in(store_in(tmp_path), "n0")
    headers = {"host": host, "origin": f"http://{host}"}
    for path in ("/", "/api/me", "/static/login.js"):
        assert browser.get(path, headers=headers).status_code == 421
    assert browser.post("/api/next", json={}, headers=headers).status_code == 421


@pytest.mark.parametrize("host", ["127.0.0.1:8765", "localhost:8765", "[::1]:8765", "LOCALHOST:8765"])
def test_its_own_names_are_answered(tmp_path, host: str) -> None:
    assert client(store_in(tmp_path)).get("/login", headers={"host": host}).status_code == 200


def test_two_host_headers_are_none(tmp_path) -> None:
    from palate.server.guard import _headers

    scope = {"headers": [(b"host", HOST.encode()), (b"Host", b"evil.example")]}
    assert _headers(scope)["host"] not in access("127.0.0.1", 8765).hosts


# --- where it listens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["192.0.2.7", "0.0.0.0", "::", "2001:db8::1"])
def test_it_does_not_listen_beyond_this_machine_without_tokens(tmp_path, host: str) -> None:
    store, _ = make_store(tmp_path, compare_task(), annotators=0)
    with pytest.raises(ConfigError, match="nobody has a login token"):
        auth.check_listening(store, host)
    people.add_person(store, "a", "admin")
    with pytest.raises(ConfigError, match="nobody has a login token"):
        auth.check_listening(store, host)  # a name is no token
    people.issue_link(store, "a")
    auth.check_listening(store, host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.5", "::1", "localhost"])
def test_this_machine_alone_needs_no_token_to_listen(tmp_path, host: str) -> None:
    store, _ = make_store(tmp_path, compare_task(), annotators=0)
    auth.check_listening(store, host)
    assert client(store).get("/api/me").status_code == 401  # but one to be let in


def test_a_wildcard_address_needs_the_name_that_people_use() -> None:
    with pytest.raises(ConfigError, match="--public-url"):
        access("0.0.0.0", 8765)
    assert access("0.0.0.0", 8765, "https://label.example.org").hosts == {"label.example.org:443", "label.example.org"}
    for wrong in ("label.example.org", "ftp://x", "https://x/path", "https://"):
        with pytest.raises(ConfigError, match="public URL"):
            access("0.0.0.0", 8765, wrong)


# --- too much, and malformed -------------------------------------------------------------------------------------------


def test_a_body_that_is_too_long_is_refused_announced_or_not(tmp_path) -> None:
    store = store_in(tmp_path)
    browser = logged_in(store, "n0", limits=Limits(body=10_000, rate=1e6, burst=10**6, logins=1e6))
    headers = {"content-type": "application/json"}
    assert browser.post("/api/next", content=b" " * 10_001, headers=headers).status_code == 413
    pieces = iter([b" " * 5_000] * 3)  # chunked: no Content-Length
    assert browser.post("/api/next", content=pieces, headers=headers).status_code == 413
    assert browser.post("/api/next", content=b"{}" + b" " * 9_000, headers=headers).status_code == 200


MALFORMED = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"x"',
    b"{}}",
    b"\xff\xfe",
    b'{"key": 1}',
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"key": "0123456789abcdef", "presentation": "P", "values": {"better": NaN}}',
    b'{"key": "0123456789abcdef", "presentation": "P", "values": {"better": {"choice": 1e999}}}',
    b'{"key": "0123456789abcdef", "presentation": "P", "values": {"better": ' + b"9" * 5_000 + b"}}",
    b'{"key": "0123456789abcdef", "presentation": "P", "values": {"better": {"choice": "\\ud800"}}}',
    b'{"key": "0123456789abcdef", "presentation": "P", "values": {"\\ud800": 1}}',
    b'{"key": "0123456789abcdef", "presentation": "P", "values": {}, "seconds": -1}',
    b'{"key": "0123456789abcdef", "presentation": "P", "values": {}, "seconds": NaN}',
    b'{"key": "0123456789abcdef", "presentation": "P", "values": {}, "changed": "yes"}',
    b'{"key": "0123456789abcdef", "presentation": "P", "values": {}, "extra": 1}',
    b'{"key": "item:0123456789abcdef", "presentation": "P", "values": {}}',
    b'{"key": "short", "presentation": "P", "values": {}}',
    b'{"key": "0123456789abcdef", "presentation": "\\ud800", "values": {}}',
    b'{"key": "0123456789abcdef", "presentation": {"$ne": null}, "values": {}}',
    b'{"key": "0123456789abcdef", "presentation": "P\' OR 1=1 --", "values": {}}',
]


@pytest.mark.parametrize("body", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_answer_is_refused_with_a_reason_and_nothing_happens(tmp_path, body: bytes) -> None:
    store = store_in(tmp_path)
    browser = logged_in(store, "n0", raises=False)
    shown = next_item(browser)
    before = store.last()
    sent = body.replace(b'"P"', json.dumps(shown["presentation"]).encode())
    response = browser.post("/api/answer", content=sent, headers={"content-type": "application/json"})
    assert response.status_code in (400, 404, 422), response.text
    assert set(response.json()) == {"error", "do"} and "Traceback" not in response.text
    assert store.last() == before
    assert answer(browser, shown, good(shown)).status_code == 200  # and it goes on


def test_text_with_half_a_character_is_refused_everywhere(tmp_path) -> None:
    store = store_in(tmp_path, task=template("rewrite"), items=[Candidate("p", ("a",))])
    browser = logged_in(store, "n0", raises=False)
    shown = next_item(browser)
    head = f'{{"key": "{key()}", "presentation": "{shown["presentation"]}", '
    one = shown["responses"][0]["id"]
    half = "\\ud800"
    for path, rest in (
        ("answer", f'"values": {{"correction": {{"{one}": "a{half}"}}}}}}'),
        ("answer", f'"values": {{"notes": "{half}", "correction": {{}}}}}}'),
        ("flag", f'"text": "{half}"}}'),
        ("skip", f'"reason": "{half}"}}'),
    ):
        response = browser.post(f"/api/{path}", content=head + rest, headers={"content-type": "application/json"})
        assert response.status_code in (200, 422), (path, response.text)
    assert verify(store).problems == []


def test_one_annotator_cannot_ask_without_end(tmp_path) -> None:
    store = store_in(tmp_path)
    limits = Limits(rate=0.001, burst=5, logins=1e6)
    app = make_app(store, access("127.0.0.1", 8765), limits)
    browsers = []
    for name in ("n0", "n1"):
        browsers.append(TestClient(app, base_url=f"http://{HOST}", headers=ORIGIN))
        browsers[-1].post("/api/login", json={"token": people.issue_link(store, name)})
    statuses = [browsers[0].get("/api/me").status_code for _ in range(7)]
    assert statuses == [200] * 5 + [429] * 2
    refused = browsers[0].get("/api/me")
    assert int(refused.headers["retry-after"]) > 1 and set(refused.json()) == {"error", "do"}
    assert browsers[1].get("/api/me").status_code == 200  # others are not touched


def test_logins_are_limited_by_address(tmp_path) -> None:
    store = store_in(tmp_path)
    browser = client(store, limits=Limits(logins=3))
    assert [browser.post("/api/login", json={"token": "x"}).status_code for _ in range(5)] == [401] * 3 + [429] * 2


def test_a_bucket_fills_again_at_its_rate() -> None:
    """2 at once, then one each half second."""
    bucket = Buckets(rate=2.0, burst=2)
    assert [bucket.take("a", now=0.0) for _ in range(3)] == [0, 0, 0.5]
    assert bucket.take("a", now=0.4) > 0 and bucket.take("a", now=0.51) == 0 and bucket.take("b", now=0.51) == 0


# --- what is shown -------------------------------------------------------------------------------------------------------

SECRETS = {
    "model": "zephyr-secret-7b",
    "score": 0.987654321,
    "settings": {"temperature": 0.731},
    "seed": 424243,
    "model_hash": "deadbeefcafe",
}


def test_no_response_says_which_model_score_or_test_it_is(tmp_path) -> None:
    """Blinding: every body that annotator gets, over a whole project with gold, attention and repeats, is searched.

    The words "gold", "purpose", "item", "source", "model" and "repeat" may not be in it either, nor what others said.
    """
    known = {"better": {"choice": 0, "strength": 1}}
    sources = (SECRETS, SECRETS | {"model": "other-secret-13b"})
    items = [
        Candidate(f"prompt {i}", ("good", "bad"), sources=sources, meta={"source": "hidden.jsonl:3"}) for i in range(25)
    ]
    tests = [
        Candidate(f"question {i}", ("good", "bad"), sources=sources, kind=kind, gold=known, meta={"note": "tricky"})
        for kind in ("gold", "attention")
        for i in range(10)
    ]
    task = compare_task(overlap=2, gold_share=0.2, attention_share=0.2, repeat_share=0.2, repeat_after=2)
    store, (anna, ben) = make_store(tmp_path, task, items=[*items, *tests])
    bodies = []
    browsers = [logged_in(store, "n0"), logged_in(store, "n1")]
    shapes = set()
    for _ in range(60):
        for browser in browsers:
            response = browser.post("/api/next", json={})
            shown = response.json()
            if shown.get("done"):
                continue
            shapes.add(json.dumps({k: type(v).__name__ for k, v in shown.items()}))
            given = answer(browser, shown, good(shown))
            undone = browser.post("/api/undo", json={"key": key(), "presentation": shown["presentation"]})
            again = answer(browser, shown, good(shown))
            bodies += [response.text, given.text, undone.text, again.text, browser.get("/api/me").text]
    purposes = {e.body["purpose"] for e in store.events() if e.kind == "presented"}
    assert purposes == {"task", "gold", "attention", "repeat"} and len(shapes) == 1
    text = "\n".join(bodies)
    with store.read() as tx:
        ids = [row[0] for row in tx.all("SELECT id FROM item")]
    others = ["secret", "0.987654321", "424243", "deadbeefcafe", "0.731", "hidden.jsonl", "tricky", *ids]
    words = ["gold", "purpose", "attention", "repeat", "score", "source", "model", "meta", "item", "priority"]
    for secret in [*others, *(f'"{word}' for word in words)]:
        assert secret not in text, secret
    me = [json.loads(body) for body in bodies[4::5]]
    assert all(ben not in json.dumps(each) for each in me if each["name"] == "n0")
    assert anna != ben


def test_a_model_s_words_cannot_do_anything_in_the_page() -> None:
    """Whatever tags a text has, in what comes out are allowed tags with allowed attributes only."""
    poison = [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "![x](http://evil.example/pixel.png)",
        "[x](javascript:alert(1))",
        "[x](data:text/html;base64,PHNjcmlwdD4=)",
        "[x](vbscript:x) <a href='javascript:alert(1)'>y</a>",
        "<iframe src=//evil.example></iframe><style>*{display:none}</style>",
        "<svg/onload=alert(1)><math><mtext></table><mglyph><style><img src onerror=alert(1)>",
        '"><b onmouseover=alert(1)>',
        "`</code><script>alert(1)</script>`",
        "```html\n</pre><script>alert(1)</script>\n```",
        "<form action=//evil.example><input name=token></form>",
        "[a]: javascript:alert(1)\n\n[a]",
        '<http://ok.example/"onclick=alert(1)>',
        "# x {onclick=alert(1)}",
        "java&#115;cript:alert(1) [y](java&#115;cript:alert(1))",
    ]
    for text in poison:
        for how in ("text", "markdown"):
            html = render.as_html(text, how)
            for tag, attributes in re.findall(r"<\s*/?\s*([a-zA-Z0-9]+)([^>]*)>", html):
                assert tag in render.TAGS | {"div"}, (text, html)
                for name, value in re.findall(r"""([^\s=]+)\s*=\s*["']([^"']*)""", attributes):
                    assert name in ("href", "rel", "target", "start", "class"), (text, html)
                    assert name != "href" or re.match(r"(https?|mailto):", value), (text, html)


def test_links_tell_nothing_and_pictures_are_not_fetched() -> None:
    html = render.as_html("[x](https://a.example/) ![y](https://b.example/z.png)", "markdown")
    assert 'rel="noopener noreferrer nofollow"' in html and "<img" not in html


def test_very_long_text_is_not_rendered_as_markdown() -> None:
    assert "<h1>" not in render.as_html("# x\n" * 20_000, "markdown")


def test_every_response_carries_the_headers(tmp_path) -> None:
    browser = logged_in(store_in(tmp_path), "n0")
    for response in (
        browser.get("/"),
        browser.get("/api/me"),
        browser.get("/none"),
        browser.post("/api/answer", json={}),
    ):
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'") and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy and "*" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
    assert browser.get("/api/me").headers["cache-control"] == "no-store"


def test_pages_hold_no_inline_script_or_style() -> None:
    """They would not run under the policy; here to say so before a browser does."""
    from palate.server.pages import STATIC

    for page in STATIC.glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<script(?![^>]*\bsrc=)[^>]*>\s*\S", text), page.name
        assert not re.search(r"<style|\bstyle=|\son[a-z]+=", text), page.name


# --- files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/static/../app.py",
        "/static/%2e%2e/app.py",
        "/static/..%2fapp.py",
        "/static/%2e%2e%2f%2e%2e%2f%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/static//etc/passwd",
        "/static/....//app.py",
        "/static/..\\app.py",
        "/static/login.js%00.html",
        "/static/",
        "/static/./login.js",
        "/api/image/../../app.py",
        "/api/image/..%2f..%2fapp.py",
        "/api/image/" + "0" * 63 + "g",
        "/api/image/" + "0" * 64 + "%0a",
        "/openapi.json",
        "/docs",
    ],
)
def test_no_path_leads_out(tmp_path, path: str) -> None:
    """Also as raw bytes, because a client tidies paths up before it sends them."""
    import asyncio

    store = store_in(tmp_path)
    session = logged_in(store, "n0").cookies["palate-8765"]
    app = make_app(store, access("127.0.0.1", 8765), FREE)
    from urllib.parse import unquote

    sent: list[dict] = []

    async def ask() -> None:
        async def receive() -> dict:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: dict) -> None:
            sent.append(message)

        headers = [(b"host", HOST.encode()), (b"cookie", f"palate-8765={session}".encode())]
        scope = {"type": "http", "method": "GET", "path": unquote(path), "raw_path": path.encode(), "query_string": b""}
        scope |= {
            "headers": headers,
            "scheme": "http",
            "http_version": "1.1",
            "root_path": "",
            "client": ("127.0.0.1", 1),
        }
        await app(scope, receive, send)

    asyncio.run(ask())
    assert sent[0]["status"] == 404
    assert b"make_app" not in sent[1]["body"] and b"root:" not in sent[1]["body"]


def test_pictures_come_from_their_folder_and_are_pictures(tmp_path) -> None:
    image = pytest.importorskip("PIL.Image")
    store = store_in(tmp_path, items=0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "text.png").write_text("<svg onload=alert(1)>")
    (folder / "vector.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")
    for path, said in (
        ("../outside.png", "outside"),
        (str(tmp_path / "outside.png"), "outside"),
        ("link.png", "outside"),
        ("http://evil.example/a.png", "not from URLs"),
        ("file:///etc/passwd", "not from URLs"),
        ("text.png", "no picture"),
        ("vector.svg", "no picture"),
        ("none.png", "no such picture"),
    ):
        with pytest.raises(DataError, match=said):
            images.add_image(store, path, folder)


def test_a_picture_that_explodes_is_refused() -> None:
    """A PNG of 8,000 x 8,000 equal pixels is small as a file and 256 MB in memory."""
    image = pytest.importorskip("PIL.Image")
    import io

    buffer = io.BytesIO()
    image.new("1", (8_000, 8_000)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 100_000
    with pytest.raises(DataError, match="pixels|bomb|exceeds"):
        images.reencode(buffer.getvalue())


def test_a_token_file_that_others_can_read_is_refused(tmp_path) -> None:
    from palate.cli.label.tokens import take_tokens

    store = store_in(tmp_path)
    path = tmp_path / "tokens"
    path.write_text("zoe annotator " + "0123456789abcdef" * 4 + "\n")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        take_tokens(store, path)
    path.chmod(0o600)
    take_tokens(store, path)
    assert client(store).post("/api/login", json={"token": "0123456789abcdef" * 4}).status_code == 200
    path.write_text("yan annotator 1234\n")
    with pytest.raises(FeedbackError, match="guessed"):
        take_tokens(store, path)


def test_nothing_of_a_missing_setting_becomes_a_default_secret(tmp_path) -> None:
    """Two stores made alike have different pseudonyms, links and sessions."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    one, two = store_in(tmp_path / "a"), store_in(tmp_path / "b")
    assert people.add_person(one, "x").pseudonym != people.add_person(two, "x").pseudonym
    assert people.issue_link(one, "n0") != people.issue_link(two, "n0")
    assert client(two).post("/api/login", json={"token": people.issue_link(one, "n0")}).status_code == 401
