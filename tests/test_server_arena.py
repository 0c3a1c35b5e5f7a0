"""Battles and chats over HTTP: blind, streamed, kept once, stopped when the client leaves; and what becomes of them."""

from __future__ import annotations

import json
import os
import signal as signals
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("nh3")
import httpx2

from arena_models import Parrot, arena_client, bodies, events_of
from feedback_stores import compare_task, make_store
from label_pages import Site
from palate.feedback import chat_views, conversations, people
from palate.feedback.store import Store
from palate.feedback.upkeep import verify
from palate.server.arena import Arena
from palate.server.guard import Limits
from server_client import HOST, key


@pytest.fixture
def store(tmp_path) -> Store:
    return make_store(tmp_path, compare_task(), items=0)[0]


def battle(store: Store, *names: str, **options) -> Arena:
    return Arena(store, [Parrot(name) for name in names or ("alpha", "beta")], **options)


def post(browser, path: str, **body):
    return browser.post(f"/api/arena/{path}", json={"key": key()} | body)


def begin(browser) -> str:
    response = post(browser, "start")
    assert response.status_code == 200, response.text
    return response.json()["conversation"]


def say(browser, conversation: str, text: str, **more):
    response = post(browser, "turn", conversation=conversation, text=text, **more)
    assert response.status_code == 200, response.text
    return events_of(response.text)


# --- battles -----------------------------------------------------------------------------------------------------------


def test_both_sides_stream_then_the_turn_is_kept_then_it_is_voted_on(store) -> None:
    arena = battle(store)
    browser = arena_client(arena, "n0")
    conversation = begin(browser)
    told = say(browser, conversation, "hello there")
    names = [name for name, _ in told]
    assert names.count("piece") == 10 and names.count("side") == 2 and names[-1] == "done"  # 5 words a side
    pieces = {
        side: "".join(d["text"] for n, d in told if n == "piece" and d["side"] == side) for side in ("left", "right")
    }
    done = told[-1][1]
    assert {each["side"]: each["text"] for each in done["answers"]} == pieces
    assert sorted(pieces.values()) == ["ahpla heard 1: hello there", "ateb heard 1: hello there"]
    (kept,) = bodies(store, "turn")
    assert kept["answers"] == [pieces["left"], pieces["right"]] and kept["finished"] == [True, True]
    response = post(browser, "vote", conversation=conversation, turn=1, choice="right", seconds=3.5)
    assert response.status_code == 200 and response.json()["turns"][0]["vote"] == "right"
    assert bodies(store, "vote")[0]["seconds"] == 3.5
    assert verify(store).problems == []


def test_the_conversation_goes_on_with_each_sides_own_history(store) -> None:
    arena = battle(store)
    browser = arena_client(arena, "n0")
    conversation = begin(browser)
    say(browser, conversation, "one")
    post(browser, "vote", conversation=conversation, turn=1, choice="tie")
    say(browser, conversation, "two")
    for parrot in arena.models:
        own = parrot.about["name"][::-1]
        assert parrot.asked[1] == [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": f"{own} heard 1: one"},
            {"role": "user", "content": "two"},
        ]


def test_nothing_the_page_gets_names_a_model_before_or_after_the_vote(store) -> None:
    """Neither names, folders nor hashes are in any response, header or error; what they are is in the log."""
    arena = Arena(store, [Parrot("alpha", "first"), Parrot("beta", "second")])
    browser = arena_client(arena, "n0")
    seen = []
    conversation = begin(browser)
    for turn in (1, 2):
        seen.append(post(browser, "turn", conversation=conversation, text="hello"))
        seen.append(post(browser, "vote", conversation=conversation, turn=turn, choice="left"))
    seen += [browser.get("/api/arena"), browser.get("/api/me"), browser.get("/"), post(browser, "start")]
    seen += [post(browser, "turn", conversation="elsewhere", text="x")]
    assert all(response.status_code in (200, 404) for response in seen)
    for response in seen:
        text = response.text + json.dumps(dict(response.headers))
        assert not any(word in text for word in ("alpha", "beta", "secret", "hash-"))
    assert {model["name"] for model in bodies(store, "start")[0]["models"]} == {"alpha", "beta"}


def test_sides_are_drawn_for_each_battle_and_recorded(store) -> None:
    """40 battles of three models: every ordered pair of different ones comes up; P(one is missing) < 6 (5/6)^40 = 0.4 %."""
    arena = battle(store, "alpha", "beta", "gamma")
    browser = arena_client(arena, "n0")
    for _ in range(40):
        begin(browser)
    pairs = Counter(tuple(model["name"] for model in body["models"]) for body in bodies(store, "start"))
    assert all(left != right for left, right in pairs) and len(pairs) >= 5
    conversation = conversations.conversations(store)[-1]
    told = say(browser, conversation.id, "hello")[-1][1]["answers"]
    assert [each["text"].split()[0] for each in told] == [model["name"][::-1] for model in conversation.models]


def test_names_are_told_after_the_vote_only_where_the_server_reveals_and_the_battle_is_over_then(store) -> None:
    browser = arena_client(battle(store, reveal=True), "n0")
    conversation = begin(browser)
    before = say(browser, conversation, "hello")
    assert "alpha" not in json.dumps(before) and "models" not in browser.get("/api/arena").json()["current"]
    after = post(browser, "vote", conversation=conversation, turn=1, choice="left").json()
    assert sorted(after["models"].values()) == ["alpha", "beta"] and after["closed"]
    assert post(browser, "turn", conversation=conversation, text="more").status_code == 409


def test_a_turn_is_voted_on_once_and_before_the_next(store) -> None:
    browser = arena_client(battle(store), "n0")
    conversation = begin(browser)
    say(browser, conversation, "one")
    assert post(browser, "turn", conversation=conversation, text="two").status_code == 409
    once = key()
    votes = [post(browser, "vote", key=once, conversation=conversation, turn=1, choice="tie") for _ in range(3)]
    assert {v.status_code for v in votes} == {200} and len({v.json()["event"] for v in votes}) == 1
    assert post(browser, "vote", conversation=conversation, turn=1, choice="left").status_code == 409
    assert post(browser, "vote", key=once, conversation=conversation, turn=1, choice="left").status_code == 409
    assert post(browser, "vote", conversation=conversation, turn=2, choice="left").status_code == 404
    assert post(browser, "vote", conversation=conversation, turn=1, choice="best").status_code == 422
    assert len(bodies(store, "vote")) == 1


def test_a_resend_with_the_same_key_gets_what_was_kept_and_is_not_answered_again(store) -> None:
    arena = battle(store)
    browser = arena_client(arena, "n0")
    started = key()
    first, again = (post(browser, "start", key=started).json() for _ in range(2))
    assert first == again and len(bodies(store, "start")) == 1
    once = key()
    told = say(browser, first["conversation"], "hello", key=once)
    resent = say(browser, first["conversation"], "hello", key=once)
    assert [name for name, _ in resent] == ["done"] and resent[-1] == told[-1]
    assert [len(parrot.asked) for parrot in arena.models] == [1, 1] and len(bodies(store, "turn")) == 1
    other = post(browser, "turn", key=once, conversation=first["conversation"], text="something else")
    assert other.status_code == 409


# --- who may -----------------------------------------------------------------------------------------------------------


def test_nobody_talks_without_a_login_or_from_another_site(store) -> None:
    arena = battle(store)
    stranger, browser = arena_client(arena), arena_client(arena, "n0")
    conversation = begin(browser)
    body = {"key": key(), "conversation": conversation, "text": "hello"}
    assert stranger.get("/api/arena").status_code == 401
    assert stranger.post("/api/arena/turn", json=body).status_code == 401
    evil = {"origin": "https://evil.example"}
    assert browser.post("/api/arena/turn", json=body, headers=evil).status_code == 403
    assert browser.post("/api/arena/turn", json=body, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    form = {"content-type": "text/plain"}
    assert browser.post("/api/arena/turn", content=json.dumps(body), headers=form).status_code == 415
    assert browser.get("/api/arena", headers={"host": "evil.example"}).status_code == 421
    assert browser.get("/api/arena/turn").status_code == 405
    assert bodies(store, "turn") == [] and all(parrot.asked == [] for parrot in arena.models)


def test_somebody_elses_conversation_is_not_there(store) -> None:
    arena = battle(store)
    mine, theirs = arena_client(arena, "n0"), arena_client(arena, "n1")
    conversation = begin(mine)
    say(mine, conversation, "private")
    assert post(theirs, "turn", conversation=conversation, text="x").status_code == 404
    assert post(theirs, "vote", conversation=conversation, turn=1, choice="left").status_code == 404
    assert theirs.get("/api/arena").json()["current"] is None
    assert mine.get("/api/arena").json()["current"]["turns"][0]["text"] == "private"


@pytest.mark.parametrize(
    "body",
    [
        {"text": ""},
        {"text": "  \n"},
        {"text": "x" * 8001},
        {"text": 5},
        {},
        {"text": "x", "again": True},
        {"text": "x", "model": "alpha"},
        {"text": "x", "key": "short"},
        {"text": "half a character \ud800"},
    ],
    ids=range(9),
)
def test_what_cannot_be_a_message_is_refused(store, body) -> None:
    arena = battle(store)
    browser = arena_client(arena, "n0")
    body = {"key": key(), "conversation": begin(browser)} | body
    response = browser.post("/api/arena/turn", content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code in (400, 422), response.text
    assert response.json()["error"] and all(parrot.asked == [] for parrot in arena.models)


def test_requests_are_rate_limited(store) -> None:
    browser = arena_client(battle(store), "n0", Limits(rate=0.01, burst=3, logins=100))
    codes = [browser.get("/api/arena").status_code for _ in range(5)]
    assert codes == [200, 200, 200, 429, 429]


def test_a_model_that_fails_keeps_nothing_and_says_nothing_about_the_inside(store) -> None:
    class Broken(Parrot):
        def answer(self, turns, seed, ended):
            yield "a word"
            raise RuntimeError("/secret/path")

    arena = Arena(store, [Parrot("alpha"), Broken("beta")])
    browser = arena_client(arena, "n0")
    conversation = begin(browser)
    told = say(browser, conversation, "hello")
    assert told[-1][0] == "error" and "secret" not in json.dumps(told)
    assert bodies(store, "turn") == []
    assert say(browser, conversation, "hello")[-1][0] == "error"  # one is not locked out by it


def test_hidden_characters_in_what_is_kept_are_shown(store) -> None:
    arena = Arena(store, [Parrot("alpha", "pay\u202e now"), Parrot("beta", "ok")])
    browser = arena_client(arena, "n0")
    done = say(browser, begin(browser), "hi")[-1][1]
    assert sorted(each["text"] for each in done["answers"]) == ["ok", "pay\u21c4 now"]
    assert "pay\u202e now" in bodies(store, "turn")[0]["answers"]


# --- one at a time, stopped when nobody listens (a real server) --------------------------------------------------------


@pytest.fixture
def real(tmp_path) -> Iterator[Callable[..., Site]]:
    """A server on a port over a store of its own, for people n0, n1, n2."""
    opened: list[Site] = []

    def make(*parrots: Parrot) -> Site:
        names = {f"n{i}": "annotator" for i in range(3)}
        (tmp_path / "real").mkdir()
        opened.append(Site(tmp_path / "real", compare_task(), [], names, lambda store: Arena(store, parrots)))
        return opened[-1]

    yield make
    for each in opened:
        each.stop()
        assert verify(each.store).problems == []


def client_of(site: Site, name: str) -> httpx2.Client:
    found = httpx2.Client(base_url=site.url, headers={"origin": site.url}, timeout=20)
    assert found.post("/api/login", json={"token": people.issue_link(site.store, name)}).status_code == 200
    return found


def until(holds, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_a_client_that_leaves_stops_the_models_and_can_send_it_again(real) -> None:
    """1,000 words at 5 ms would take 5 s; after the client leaves nothing more is taken, the rest is sent anew."""
    parrots = [Parrot(name, "word " * 1000, pause=0.005) for name in ("alpha", "beta")]
    site = real(*parrots)
    client, store = client_of(site, "n0"), site.store
    conversation, once = begin(client), key()
    body = {"key": once, "conversation": conversation, "text": "hello"}
    with client.stream("POST", "/api/arena/turn", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line == "event: piece":
                break
    until(lambda: all(parrot.now == 0 for parrot in parrots), 3)
    assert all(0 < parrot.given < 500 for parrot in parrots)
    until(lambda: bodies(store, "stopped"))
    assert bodies(store, "turn") == []
    for parrot in parrots:
        parrot.says = "short answer"
    assert say(client, conversation, "hello", key=once)[-1][0] == "done"
    assert len(bodies(store, "turn")) == 1


def test_a_model_answers_one_at_a_time_in_the_order_of_asking(real) -> None:
    """Three people, the same two models: neither model ever gives two answers at once, and all are answered in order."""
    parrots = [Parrot("alpha", "one two three four", pause=0.1), Parrot("beta", "one two", pause=0.01)]
    site = real(*parrots)
    clients = [client_of(site, f"n{i}") for i in range(3)]
    held = [begin(client) for client in clients]
    done: list[str] = []

    def talk(i: int) -> None:
        done.append(say(clients[i], held[i], f"from {i}")[-1][0])

    threads = [threading.Thread(target=talk, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(20)
    assert done == ["done"] * 3
    for parrot in parrots:
        assert parrot.most == 1
        assert [turns[0]["content"] for turns in parrot.asked] == ["from 0", "from 1", "from 2"]


def test_one_person_has_one_turn_at_a_time(real) -> None:
    client = client_of(real(Parrot("alpha", "word " * 400, pause=0.005)), "n0")
    conversation = begin(client)
    with client.stream("POST", "/api/arena/turn", json={"key": key(), "conversation": conversation, "text": "a"}) as r:
        lines = r.iter_lines()  # kept: to drop it would close the stream
        next(lines)
        second = post(client, "turn", conversation=conversation, text="b")
        assert second.status_code == 429 and second.headers["retry-after"] == "1"
    until(lambda: post(client, "vote", conversation=conversation, turn=1, choice="left").status_code == 404)


SERVE = """
import sys
from arena_models import Parrot
from palate.feedback.store import Store
from palate.server.arena import Arena
from palate.cli.label.serving import Serving, run_server
store = Store.open(sys.argv[1])
arena = Arena(store, [Parrot("alpha", pause=0.02), Parrot("beta", pause=0.02)])
run_server(store, Serving("127.0.0.1", int(sys.argv[2]), None, None, 1000.0, True), arena=arena)
"""


def test_what_was_kept_is_there_after_the_server_is_killed(store, tmp_path) -> None:
    """Killed with SIGKILL in the middle of a second turn: the first turn and its vote are there, the page goes on, and the
    second turn, sent again with its key, is there once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(root / "src"), str(root / "tests")])

    def serve() -> subprocess.Popen:
        command = [sys.executable, "-c", SERVE, str(store.path), str(port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}, text=True)
        assert process.stdout is not None and "url" in process.stdout.readline()
        return process

    url = f"http://127.0.0.1:{port}"
    client = httpx2.Client(base_url=url, headers={"origin": url}, timeout=20, transport=httpx2.HTTPTransport(retries=5))
    process = serve()
    try:
        assert client.post("/api/login", json={"token": people.issue_link(store, "n0")}).status_code == 200
        conversation = begin(client)
        say(client, conversation, "one")
        post(client, "vote", conversation=conversation, turn=1, choice="left")
        once = key()
        with client.stream(
            "POST", "/api/arena/turn", json={"key": once, "conversation": conversation, "text": "two"}
        ) as r:
            lines = r.iter_lines()  # kept: to drop it would close the stream
            next(lines)
            process.send_signal(signals.SIGKILL)
            process.wait(10)
        process = serve()
        now = client.get("/api/arena").json()["current"]
        assert (now["conversation"], [turn["vote"] for turn in now["turns"]]) == (conversation, ["left"])
        assert say(client, conversation, "two", key=once)[-1][0] == "done"
        assert say(client, conversation, "two", key=once)[-1][0] == "done"
    finally:
        process.kill()
        process.wait(10)
    assert [body["text"] for body in bodies(store, "turn")] == ["one", "two"] and len(bodies(store, "vote")) == 1
    assert verify(store).problems == []


# --- chats: thumbs and signals -----------------------------------------------------------------------------------------


def test_thumbs_are_kept_changed_and_taken_back_and_become_judgements(store) -> None:
    browser = arena_client(Arena(store, [Parrot("alpha")]), "n0")
    conversation = begin(browser)
    say(browser, conversation, "one")
    say(browser, conversation, "two")
    say(browser, conversation, "three")
    for turn, up in ((1, True), (2, True), (2, False), (3, True), (3, None)):
        assert post(browser, "thumb", conversation=conversation, turn=turn, up=up).status_code == 200
    made = chat_views.thumbs(store)
    assert [(record.prompt, record.desirable) for record in made.records] == [
        ("one", True),
        (
            (
                {"role": "user", "content": "one"},
                {"role": "assistant", "content": "ahpla heard 1: one"},
                {"role": "user", "content": "two"},
            ),
            False,
        ),
    ]
    assert made.left_out == {"answers without a thumb": 1} and made.records[0].annotator == "p-0"
    assert [each["thumb"] for each in browser.get("/api/arena").json()["current"]["turns"]] == [True, False, None]


def test_an_answer_made_anew_keeps_the_one_before(store) -> None:
    arena = Arena(store, [Parrot("alpha", "first")])
    browser = arena_client(arena, "n0")
    conversation = begin(browser)
    say(browser, conversation, "hello")
    arena.models[0].says = "second"
    response = post(browser, "turn", conversation=conversation, again=True)
    done = events_of(response.text)[-1][1]
    assert (done["turn"], done["version"], done["answers"][0]["text"]) == (1, 2, "second")
    assert arena.models[0].asked[0] == arena.models[0].asked[1] == [{"role": "user", "content": "hello"}]
    say(browser, conversation, "and now")
    assert [m["content"] for m in arena.models[0].asked[2]] == ["hello", "second", "and now"]
    assert [b["answers"] for b in bodies(store, "turn")] == [["first"], ["second"], ["second"]]


def test_a_battle_has_no_thumbs_and_a_chat_no_votes(store) -> None:
    battles, chats = (arena_client(a, "n0") for a in (battle(store), Arena(store, [Parrot("alpha")])))
    held, chat = begin(battles), begin(chats)
    say(battles, held, "x")
    say(chats, chat, "x")
    assert post(battles, "thumb", conversation=held, turn=1, up=True).status_code == 404
    assert post(battles, "turn", conversation=held, again=True).status_code == 409
    assert post(chats, "vote", conversation=chat, turn=1, choice="left").status_code == 404
    assert post(chats, "turn", conversation=held, text="x").status_code == 409


def test_signals_are_kept_once_a_key(store) -> None:
    browser = arena_client(Arena(store, [Parrot("alpha")]), "n0")
    conversation = begin(browser)
    say(browser, conversation, "one")
    once = key()
    for _ in range(2):
        sent = post(browser, "signal", key=once, conversation=conversation, turn=1, signal="copy")
        assert sent.status_code == 200
    assert post(browser, "signal", conversation=conversation, turn=1, signal="dwell", seconds=4.0).status_code == 200
    assert post(browser, "signal", conversation=conversation, turn=1, signal="dwell").status_code == 422
    assert post(browser, "signal", conversation=conversation, turn=9, signal="copy").status_code == 404
    (found,) = conversations.conversations(store)[0].turns
    assert (found.copies, found.dwell) == (1, 4.0)
    assert verify(store).problems == []


def test_without_an_arena_the_server_has_none(store) -> None:
    from server_client import logged_in

    assert logged_in(store, "n0").get("/api/arena").status_code == 404
    assert HOST in str(logged_in(store, "n0").base_url)


# --- a real model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model with a tokenizer, as plain transformers saves them."""
    from tiny import tiny, tokenizer_of

    where = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = tokenizer_of()
    tiny(tokenizer=tokenizer, max_position_embeddings=64).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


def test_a_served_model_says_in_pieces_what_sample_says_at_once(folder) -> None:
    import palate
    from palate.generation.settings import SamplingSettings
    from palate.server.served import Served

    served = Served("tiny", str(folder), SamplingSettings(max_new_tokens=12, temperature=0))
    for text in ("a b c", "d", "k l m n"):
        ended: list[bool] = []
        found = list(served.answer([{"role": "user", "content": text}], 0, ended))
        (whole,) = palate.sample(folder, [text], max_new_tokens=12, temperature=0)
        assert "".join(found) == whole["response"] and ended == [whole["finished"]]
    assert len(found) > 1
    long = [{"role": "user", "content": "a b c d " * 40}]  # loses its beginning, as in palate chat
    assert len("".join(served.answer(long, 0, []))) > 0
    assert served.about["name"] == "tiny" and len(served.about["hash"]) == 64


def test_the_command_serves_two_models_that_can_be_talked_to(folder, tmp_path) -> None:
    """``palate label arena`` as one starts it: log in with the printed link, a turn, a vote, the table."""
    command = [sys.executable, "-m", "palate", "label", "arena", str(tmp_path / "f.db"), "--json", "--port", "0"]
    command += ["--model", f"one={folder}", "--model", f"two={folder.parent}/./tiny", "--max-new-tokens", "8"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "the server did not start"
        told = json.loads(line)
        client = httpx2.Client(base_url=told["url"], headers={"origin": told["url"]}, timeout=30)
        assert client.post("/api/login", json={"token": told["link"].split("#")[1]}).status_code == 200
        assert "arena.js" in client.get("/").text
        conversation = begin(client)
        done = say(client, conversation, "a b c")[-1]
        assert done[0] == "done" and [each["side"] for each in done[1]["answers"]] == ["left", "right"]
        assert post(client, "vote", conversation=conversation, turn=1, choice="tie").status_code == 200
    finally:
        process.terminate()
        process.wait(20)
    with Store.open(tmp_path / "f.db") as kept:
        assert bodies(kept, "vote")[0]["choice"] == "tie" and verify(kept).problems == []
        models = bodies(kept, "start")[0]["models"]
        assert {model["name"] for model in models} == {"one", "two"} and models[0]["settings"]["max_new_tokens"] == 8


def test_two_models_of_one_name_are_refused() -> None:
    from palate.errors import ConfigError
    from palate.generation.settings import SamplingSettings
    from palate.server.served import load_models

    with pytest.raises(ConfigError, match='two models with the name "ppo"'):
        load_models(["runs/ppo/model", "other/ppo"], SamplingSettings())
    with pytest.raises(ConfigError, match="two models with the folder"):
        load_models(["one=runs/ppo", "two=runs/ppo"], SamplingSettings())
