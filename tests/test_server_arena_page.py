"""The page for talking to models in a real browser: keys, votes, thumbs, streaming, and a server that goes away."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

for _package in ("fastapi", "uvicorn", "nh3", "markdown_it", "PIL", "playwright"):
    pytest.importorskip(_package, reason=f"the pages are tested in a browser, which needs the package {_package}")

import re

from arena_models import Parrot, bodies
from feedback_stores import compare_task
from label_pages import CHROMIUM, Site, browser
from palate.feedback.upkeep import verify
from palate.server.arena import Arena

if not CHROMIUM.exists():
    pytest.skip(f"the pages are tested in a browser, which is not at {CHROMIUM}", allow_module_level=True)

STATIC = Path(__file__).resolve().parents[1] / "src" / "palate" / "server" / "static"
EVIL = "<img src=x onerror=alert(1)> <script>alert(2)</script> pay\u202e"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    context = chromium.new_context(viewport={"width": 1200, "height": 800})
    opened = context.new_page()
    opened.set_default_timeout(30_000)
    wrong: list[str] = []
    opened.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    opened.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    opened.on("console", lambda said: "Content Security Policy" in said.text and wrong.append(said.text))
    yield opened
    context.close()
    assert wrong == []


@pytest.fixture
def site_of(tmp_path) -> Iterator[Callable[..., Site]]:
    made: list[Site] = []

    def make(*parrots: Parrot, **options: Any) -> Site:
        made.append(Site(tmp_path, compare_task(), [], None, lambda store: Arena(store, parrots, **options)))
        return made[-1]

    yield make
    for each in made:
        each.stop()
        assert verify(each.store).problems == []


def until(page: Any, holds: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        page.wait_for_timeout(20)


def write(page: Any, text: str) -> None:
    page.wait_for_selector("#field:enabled")
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def test_a_battle_by_keyboard_alone_is_stored_as_it_was_pressed(page, site_of) -> None:
    """Two turns and their votes; a model's markup is text; no name is anywhere in the page."""
    site = site_of(Parrot("alpha", EVIL), Parrot("beta"))
    site.log_in(page)
    write(page, "hello there")
    page.wait_for_selector(".votes")
    texts = page.locator(".response .body").all_inner_texts()
    assert sorted(texts) == [EVIL.replace("\u202e", "\u21c4"), "ateb heard 1: hello there"]
    assert page.locator(".response img, .response script").count() == 0
    page.keyboard.press("2")
    until(page, lambda: len(bodies(site.store, "vote")) == 1)
    write(page, "and now")
    page.wait_for_selector(".votes")
    page.keyboard.press("4")
    until(page, lambda: len(bodies(site.store, "vote")) == 2)
    assert [vote["choice"] for vote in bodies(site.store, "vote")] == ["right", "both_bad"]
    assert all(vote["seconds"] >= 0 for vote in bodies(site.store, "vote"))
    assert [turn["text"] for turn in bodies(site.store, "turn")] == ["hello there", "and now"]
    assert "alpha" not in page.content() and "beta" not in page.content()
    page.reload()
    page.wait_for_selector("[data-turn='2'] .voted")
    assert page.locator(".response.won").count() == 1


def test_answers_appear_while_they_are_written_and_stop_by_escape(page, site_of) -> None:
    site = site_of(*(Parrot(name, "word " * 2000, pause=0.01) for name in ("alpha", "beta")))
    site.log_in(page)
    write(page, "a long story")
    until(
        page, lambda: all("word word" in text for text in page.locator(".response .body").all_inner_texts()[:2] or [""])
    )
    assert page.locator(".votes").count() == 0
    page.keyboard.press("Escape")
    until(page, lambda: len(bodies(site.store, "stopped")) == 1)
    assert page.locator("#field").input_value() == "a long story" and bodies(site.store, "turn") == []


def test_a_turn_that_the_server_could_not_finish_is_sent_again(page, site_of) -> None:
    """The server is stopped in the middle of a turn and started again: one turn, one answer each, and it can be voted on."""
    parrots = [Parrot(name, "word " * 60, pause=0.02) for name in ("alpha", "beta")]
    site = site_of(*parrots)
    site.log_in(page)
    write(page, "hello")
    page.wait_for_selector(".response .body:has-text('word')")
    site.stop()
    page.wait_for_selector(".state.down")
    for parrot in parrots:
        parrot.says = "done now"
    site.start()
    page.wait_for_selector(".votes", timeout=20_000)
    assert page.locator(".response .body").all_inner_texts() == ["done now", "done now"]
    assert len(bodies(site.store, "turn")) == 1


def test_a_battle_that_is_over_is_followed_by_another_with_one_key(page, site_of) -> None:
    site = site_of(Parrot("alpha"), Parrot("beta"), reveal=True)
    site.log_in(page)
    write(page, "hello")
    page.wait_for_selector(".votes")
    page.keyboard.press("1")
    page.wait_for_selector(".response:has-text('This was alpha')")
    page.keyboard.press("Enter")
    write(page, "hello again")
    page.wait_for_selector(".votes")
    assert page.locator(".exchange").count() == 1


def test_a_digit_that_is_written_in_a_chat_is_no_thumb(page, site_of) -> None:
    site = site_of(Parrot("alpha"))
    site.log_in(page)
    write(page, "hello")
    page.wait_for_selector(".thumbs")
    page.keyboard.type("1 more")
    assert page.locator("#field").input_value() == "1 more"
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    page.keyboard.type("!")
    assert page.locator("#field").input_value() == "1 more!" and bodies(site.store, "thumb") == []


def test_thumbs_and_signals_of_a_chat(page, site_of) -> None:
    site = site_of(Parrot("alpha"))
    site.log_in(page)
    write(page, "hello")
    page.wait_for_selector(".thumbs")
    page.wait_for_timeout(700)
    page.keyboard.press("Escape")  # out of the field, in which one goes on writing
    page.keyboard.press("1")
    until(page, lambda: [thumb["up"] for thumb in bodies(site.store, "thumb")] == [True])
    page.keyboard.press("r")
    until(page, lambda: [turn["version"] for turn in bodies(site.store, "turn")] == [1, 2])
    until(page, lambda: [each["signal"] for each in bodies(site.store, "signal")] == ["dwell"])
    assert bodies(site.store, "signal")[0]["seconds"] >= 0.5
    page.wait_for_selector(".thumbs [aria-pressed='false'].down")
    page.locator(".thumbs .down").click()
    until(
        page,
        lambda: [(thumb["version"], thumb["up"]) for thumb in bodies(site.store, "thumb")] == [(1, True), (2, False)],
    )


def test_both_languages_have_the_same_words() -> None:
    source = (STATIC / "arena_words.js").read_text(encoding="utf-8")
    english, chinese = (dict(re.findall(r'(\w+): "((?:[^"\\]|\\.)*)"', part)) for part in source.split("const ZH"))
    assert english.keys() == chinese.keys() and len(english) > 30
    holes = {
        key: (set(re.findall(r"\{\w+\}", english[key])), set(re.findall(r"\{\w+\}", chinese[key]))) for key in english
    }
    assert {key: both for key, both in holes.items() if both[0] != both[1]} == {}
    asked = set(re.findall(r'\bword\("(\w+)"', (STATIC / "arena.js").read_text(encoding="utf-8")))
    assert asked <= set(english)


def test_a_phone_has_no_sideways_scrolling(page, site_of) -> None:
    site = site_of(Parrot("alpha", "x" * 400), Parrot("beta", "short"))
    page.set_viewport_size({"width": 360, "height": 700})
    site.log_in(page)
    write(page, "y" * 300)
    page.wait_for_selector(".votes")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_nothing_can_be_written_before_the_page_knows_what_the_talk_waits_for(page, site_of) -> None:
    """The server's answer is held back: what was typed meanwhile would be lost, or sent without the talk before it."""
    site = site_of(Parrot("alpha"), Parrot("beta"))
    held = []
    page.route(
        "**/api/arena", lambda route: held.append(route) if len(held) == 1 else (held.append(None), route.continue_())
    )
    site.log_in(page)
    page.wait_for_selector("#field")
    until(page, lambda: len(held) == 2)
    assert page.locator("#field:disabled").count() == page.locator("#send:disabled").count() == 1
    held[1].continue_()
    write(page, "hello")
    page.wait_for_selector(".votes")


def test_enter_pressed_once_more_does_not_vote(page, site_of) -> None:
    """No button has the focus when the votes appear: neither side is what a careless key chooses."""
    site = site_of(Parrot("alpha"), Parrot("beta"))
    site.log_in(page)
    write(page, "hello")
    page.wait_for_selector(".votes")
    page.keyboard.press("Enter")
    page.keyboard.press("Space")
    page.wait_for_timeout(300)
    assert bodies(site.store, "vote") == []
