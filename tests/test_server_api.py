"""The server as its page sees it: log in, answer, undo, skip, decide, and what an admin gets."""

from __future__ import annotations

import json

import pytest

from feedback_stores import COMPARE, answer_all, compare_task, make_store, prefer_bad
from palate.feedback import people
from palate.feedback.items import Candidate
from palate.feedback.task import task_of, template
from palate.feedback.upkeep import status, verify
from server_client import answer, client, good, key, logged_in, next_item, store_in


def test_an_annotator_logs_in_once_and_answers_everything(tmp_path) -> None:
    store = store_in(tmp_path, items=4)
    browser = logged_in(store, "n0")
    me = browser.get("/api/me").json()
    assert (me["name"], me["role"], me["progress"]) == (
        "n0",
        "annotator",
        {"done": 0, "wanted": 2},
    )  # 4 items, 2 people
    assert me["task"]["questions"][0]["id"] == "better"
    for done in range(1, 5):
        shown = next_item(browser)
        response = answer(browser, shown, good(shown))
        assert response.status_code == 200 and response.json()["progress"]["done"] == done
    assert next_item(browser) == {"done": True, "why": "every item has all its answers. Thank you."}
    assert status(store)["complete"] == 4 and verify(store).problems == []
    assert browser.post("/api/logout", json={}).json() == {"ok": True}
    assert browser.get("/api/me").status_code == 401


def test_a_reload_shows_the_same_and_a_retry_changes_nothing(tmp_path) -> None:
    store = store_in(tmp_path)
    browser = logged_in(store, "n0")
    shown = next_item(browser)
    again = next_item(browser)
    assert {**again, "lease_until": ""} == {**shown, "lease_until": ""}
    once = key()
    answers = [answer(browser, shown, good(shown), key=once) for _ in range(3)]
    assert {(a.status_code, a.json()["event"], a.json()["progress"]["done"]) for a in answers} == {(200, once, 1)}
    assert answer(browser, shown, good(shown)).status_code == 409  # another key: it is answered already
    assert status(store)["answers"] == 1


def test_undo_brings_the_item_back_with_what_was_said(tmp_path) -> None:
    store = store_in(tmp_path)
    browser = logged_in(store, "n0")
    shown = next_item(browser)
    answer(browser, shown, good(shown))
    response = browser.post("/api/undo", json={"key": key(), "presentation": shown["presentation"]})
    assert response.status_code == 200 and response.json()["progress"]["done"] == 0
    again = next_item(browser)
    assert (again["presentation"], again["previous"]) == (shown["presentation"], good(shown))


def test_skipping_and_flagging(tmp_path) -> None:
    store = store_in(tmp_path, items=1)
    browser = logged_in(store, "n0")
    shown = next_item(browser)
    flagged = {"key": key(), "presentation": shown["presentation"], "text": "names a person"}
    assert browser.post("/api/flag", json=flagged).status_code == 200
    assert next_item(browser)["presentation"] == shown["presentation"]
    skipped = {"key": key(), "presentation": shown["presentation"], "reason": "cannot judge"}
    assert browser.post("/api/skip", json=skipped).status_code == 200
    assert next_item(browser)["done"] is True
    assert (status(store)["flags"], status(store)["done"]) == (1, 0)
    people.add_person(store, "boss", "admin")
    said = logged_in(store, "boss").get("/api/admin/summary").json()["remarks"]
    assert [(each["kind"], each["text"]) for each in said] == [("skip", "cannot judge"), ("flag", "names a person")]


def test_too_late_is_said_and_kept(tmp_path) -> None:
    store = store_in(tmp_path, items=1)
    anna, ben = logged_in(store, "n0"), logged_in(store, "n1")
    shown = next_item(anna)
    with store.write() as tx:
        tx.run("UPDATE lease SET until = 0")
    theirs = next_item(ben)
    response = answer(anna, shown, good(shown))
    assert response.status_code == 409 and response.json()["recorded"] is True
    assert answer(ben, theirs, good(theirs)).status_code == 200
    assert (status(store)["late"], status(store)["done"]) == (1, 1)


def test_a_contested_item_is_decided(tmp_path) -> None:
    store, (anna, ben) = make_store(tmp_path, compare_task(overlap=2), items=1)
    people.add_person(store, "carl", "adjudicator")
    answer_all(store, anna), answer_all(store, ben, prefer_bad)
    carl = logged_in(store, "carl")
    shown = carl.post("/api/adjudicate/next", json={}).json()
    texts = {each["id"]: each["text"] for each in shown["responses"]}
    said = {each["annotator"]: texts[each["values"]["better"]["choice"]] for each in shown["answers"]}
    assert said == {anna: "good 0", ben: "bad 0"}
    decided = {"key": key(), "presentation": shown["presentation"], "values": good(shown)}
    assert carl.post("/api/adjudicate", json=decided).status_code == 200
    assert carl.post("/api/adjudicate/next", json={}).json()["done"] is True
    assert status(store)["contested"] == 0


def test_an_admin_sees_the_summary_and_adds_people(tmp_path) -> None:
    store, (anna, _) = make_store(tmp_path, compare_task(), items=3)
    people.add_person(store, "boss", "admin")
    answer_all(store, anna)
    boss = logged_in(store, "boss")
    found = boss.get("/api/admin/summary").json()
    assert found["progress"]["done"] == 3 and found["annotators"][0]["answers"] == 3
    assert found["names"][anna] == "n0"
    added = boss.post("/api/admin/people", json={"name": "Zoë", "role": "annotator"}).json()
    token = added["link"].removeprefix("/login#")
    assert client(store).post("/api/login", json={"token": token}).json() == {"ok": True, "role": "annotator"}
    assert "Zoë" in {person["name"] for person in boss.get("/api/admin/people").json()}
    assert boss.post("/api/admin/people", json={"name": "Zoë", "role": "annotator"}).status_code == 422
    assert boss.post("/api/admin/people", json={"name": "Yan", "role": "owner"}).status_code == 422


EVERY = task_of(
    {
        "questions": [
            COMPARE,
            {"id": "stars", "type": "rating", "scale": 5, "required": False},
            {"id": "flags", "type": "flags", "options": [{"id": "rude", "label": "Rude"}]},
            {"id": "spans", "type": "spans", "kinds": ["wrong"]},
            {"id": "better_text", "type": "rewrite"},
            {"id": "ok", "type": "accept", "required": False},
            {"id": "notes", "type": "text"},
        ]
    }
)


def test_every_type_of_question_goes_through(tmp_path) -> None:
    store = store_in(tmp_path, task=EVERY, items=1)
    browser = logged_in(store, "n0")
    shown = next_item(browser)
    ids = {each["text"]: each["id"] for each in shown["responses"]}
    values = good(shown) | {
        "stars": {ids["good 0"]: 5, ids["bad 0"]: 1},
        "flags": {ids["bad 0"]: ["rude"]},
        "spans": {ids["bad 0"]: [{"start": 0, "end": 3, "kind": "wrong", "comment": "no"}]},
        "better_text": {ids["bad 0"]: "less bad 0"},
        "ok": {ids["good 0"]: True, ids["bad 0"]: False},
        "notes": "hm 中文",
    }
    assert answer(browser, shown, values).status_code == 200
    (stored,) = [dict(e.body["values"]) for e in store.events() if e.kind == "answer"]
    assert stored == {
        "better": {"choice": 0, "strength": 2},
        "stars": [5, 1],
        "flags": [[], ["rude"]],
        "spans": [[], [{"start": 0, "end": 3, "kind": "wrong", "comment": "no"}]],
        "better_text": [None, "less bad 0"],
        "ok": [True, False],
        "notes": "hm 中文",
    }


def test_a_conversation_is_shown_turn_by_turn(tmp_path) -> None:
    prompt = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?"},
    )
    store = store_in(tmp_path, items=[Candidate(prompt, ("good", "bad"))])
    shown = next_item(logged_in(store, "n0"))
    assert [(turn["role"], turn["text"]) for turn in shown["prompt"]] == [(t["role"], t["content"]) for t in prompt]


def test_markdown_is_rendered_where_the_task_says_so(tmp_path) -> None:
    task = template("rewrite").model_copy(update={"render": "markdown"})
    store = store_in(tmp_path, task=task, items=[Candidate("p", ("**bold** `x`\n\n| a |\n|---|\n| b |",))])
    html = next_item(logged_in(store, "n0"))["responses"][0]["html"]
    assert "<strong>bold</strong>" in html and "<code>x</code>" in html and "<td>b</td>" in html


def test_offsets_are_those_of_the_stored_text(tmp_path) -> None:
    """The text that is sent has a visible character for each hidden one: the same length in code points."""
    hidden = "a\u202eb\u200bc 👩\u200d🔬 é"
    store = store_in(tmp_path, task=template("rewrite"), items=[Candidate("p", (hidden,))])
    shown = next_item(logged_in(store, "n0"))["responses"][0]
    assert len(shown["text"]) == len(hidden) and shown["text"] == "a⇄b␣c 👩\u200d🔬 é"
    assert "\u202e" not in json.dumps(shown, ensure_ascii=False)


def test_pictures_are_served_by_hash_made_anew(tmp_path) -> None:
    image = pytest.importorskip("PIL.Image")
    from palate.server.images import add_image

    store = store_in(tmp_path, items=0)
    picture = image.new("RGB", (40, 30), (200, 10, 10))
    exif = picture.getexif()
    exif[0x010E] = "secret place"
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert b"secret place" in (tmp_path / "a.jpg").read_bytes()
    from palate.feedback.items import add_items

    add_items(store, [Candidate("p", ("good", "bad"), images=(add_image(store, "a.jpg", tmp_path),))])
    browser = logged_in(store, "n0")
    (where,) = next_item(browser)["images"]
    found = browser.get(where)
    assert (found.status_code, found.headers["content-type"]) == (200, "image/jpeg")
    assert b"secret place" not in found.content
    (tmp_path / "served.jpg").write_bytes(found.content)
    assert image.open(tmp_path / "served.jpg").size == (40, 30)
    assert client(store).get(where).status_code == 401
    assert verify(store).problems == []
