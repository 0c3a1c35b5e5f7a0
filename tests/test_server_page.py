"""The pages in a real browser: what is pressed is what is stored, nothing is lost, no text of a model ever runs."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

for _package in ("fastapi", "uvicorn", "nh3", "markdown_it", "PIL", "playwright"):
    pytest.importorskip(_package, reason=f"the pages are tested in a browser, which needs the package {_package}")

from label_pages import CHROMIUM, Site, browser, picture, ready, task_with
from palate.feedback import people, queue
from palate.feedback.items import Candidate
from palate.feedback.task import Task, template
from palate.feedback.upkeep import verify

if not CHROMIUM.exists():
    pytest.skip(f"the pages are tested in a browser, which is not at {CHROMIUM}", allow_module_level=True)

STATIC = Path(__file__).resolve().parents[1] / "src" / "palate" / "server" / "static"
COMPARE = {"id": "better", "type": "compare", "strengths": 3, "tie": True, "both_bad": True}
TWO = [Candidate(f"prompt {i}", (f"good {i}", f"bad {i}")) for i in range(4)]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


class Seen(list):
    """What must not happen on a page: errors, dialogs, refused scripts."""


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """A page of a browser without history; it fails the test when anything in it went wrong."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    opened = context.new_page()
    opened.set_default_timeout(30_000)
    opened.wrong = watch(opened)
    yield opened
    context.close()
    assert opened.wrong == []


def watch(page: Any) -> Seen:
    wrong = Seen()
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("console", lambda said: said.type == "error" and wrong.append(f"console: {said.text}"))
    return wrong


@pytest.fixture
def site_of(tmp_path) -> Iterator[Any]:
    made: list[Site] = []

    def make(task: Task, items: list[Candidate], **more: Any) -> Site:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Site(folder, task, items, **more))
        return made[-1]

    yield make
    for each in made:
        each.stop()
        assert verify(each.store).problems == []


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def submitted(page: Any, site: Site, *keys: str) -> dict[str, Any]:
    """Press keys, and wait for the answer to be acknowledged; the values stored, with letters in place of numbers."""
    before = len(site.answers())
    press(page, *keys)
    until(page, lambda: len(site.answers()) == before + 1)
    ready_or_done(page)
    return site.answers()[-1]


def until(page: Any, holds: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for something that no selector says (the policy forbids the browser to evaluate text)."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        page.wait_for_timeout(20)


def ready_or_done(page: Any) -> None:
    page.wait_for_selector("main:not(.busy) .item, main:not(.busy) .nothing")


def by_letter(answer: Any, question: str) -> dict[str, Any]:
    """Of a question per response: {letter on the screen: stored value}."""
    return {"ABCDEFGHI"[i]: answer.values[question][number] for i, number in enumerate(answer.shown)}


# --- every question, by keyboard alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "side", "strength"),
    [
        (["a", "2"], 0, 2),
        (["b", "3"], 1, 3),
        (["b", "3", "a"], 0, 3),
        (["t"], "tie", None),
        (["x"], "both_bad", None),
        (["ArrowLeft"], 0, 1),
        (["ArrowLeft", "ArrowLeft", "ArrowLeft"], 0, 3),
        (["ArrowRight", "ArrowRight"], 1, 2),
        (["b", "1", "ArrowLeft"], "tie", None),
        (["Tab", "Space", "ArrowRight"], 0, 2),  # as the browser itself does it, for screen readers
    ],
    ids=str,
)
def test_a_comparison_is_stored_as_it_was_pressed(page, site_of, keys, side, strength) -> None:
    site = site_of(task_with(COMPARE), TWO[:1])
    site.log_in(page)
    ready(page)
    answer = submitted(page, site, *keys, "Enter")
    choice = answer.shown[side] if isinstance(side, int) else side
    assert answer.values == {"better": {"choice": choice} | ({} if strength is None else {"strength": strength})}


def test_a_side_without_a_strength_is_no_answer_yet(page, site_of) -> None:
    site = site_of(task_with(COMPARE), TWO[:1])
    site.log_in(page)
    ready(page)
    press(page, "a", "Enter")
    page.wait_for_selector("#state.warn")
    assert site.answers() == [] and page.locator(".cell.missing").count() == 1
    assert submitted(page, site, "1", "Enter").values["better"]["strength"] == 1


def test_one_strength_needs_one_key(page, site_of) -> None:
    site = site_of(task_with({"id": "better", "type": "compare"}), TWO[:1])
    site.log_in(page)
    ready(page)
    answer = submitted(page, site, "b", "Enter")
    assert answer.values == {"better": {"choice": answer.shown[1], "strength": 1}}


FOUR = [Candidate("p", ("one one", "two two", "three three", "four four"))]
ORDERS = [
    (["d", "1", "c", "2"], ["D", "C", "A", "B"]),  # d to place 1: D A B C; c to place 2
    (["c", "="], ["A", "BC", "D"]),
    (["b", "Shift+ArrowUp"], ["AB", "C", "D"]),
    (["b", "Shift+ArrowUp", "Shift+ArrowUp"], ["B", "A", "C", "D"]),
    (["a", "]", "]", "]"], ["B", "AC", "D"]),
    (["ArrowDown", "ArrowDown", "="], ["A", "BC", "D"]),
    (["b", "=", "c", "=", "d", "="], ["ABCD"]),
]


@pytest.mark.parametrize(("keys", "tiers"), ORDERS, ids=str)
def test_an_order_is_stored_as_it_was_pressed(page, site_of, keys, tiers) -> None:
    site = site_of(task_with({"id": "order", "type": "rank"}), FOUR)
    site.log_in(page)
    ready(page)
    answer = submitted(page, site, *keys, "Enter")
    letters = [{"ABCD"[answer.shown.index(number)] for number in tier} for tier in answer.values["order"]]
    assert letters == [set(tier) for tier in tiers] and answer.changed


def test_without_ties_a_step_changes_places(page, site_of) -> None:
    site = site_of(task_with({"id": "order", "type": "rank", "ties": False}), FOUR)
    site.log_in(page)
    ready(page)
    answer = submitted(page, site, "c", "=", "Shift+ArrowUp", "Enter")
    assert [answer.shown.index(tier[0]) for tier in answer.values["order"]] == [0, 2, 1, 3]


def test_an_order_can_be_dragged(page, site_of) -> None:
    """C onto A makes a tie; then D before them: D | A C | B."""
    site = site_of(task_with({"id": "order", "type": "rank"}), FOUR)
    site.log_in(page)
    ready(page)

    def drag(letter: int, to: int, share: float) -> None:
        chip = page.locator(".chip", has=page.locator(f".letter:text-is('{'ABCD'[letter]}')")).locator(".gist")
        box, row = chip.bounding_box(), page.locator(".tier").nth(to).bounding_box()
        page.mouse.move(box["x"] + 20, box["y"] + 5)
        page.mouse.down()
        page.mouse.move(row["x"] + 120, row["y"] + row["height"] * share, steps=6)
        page.mouse.up()

    drag(2, 0, 0.5)
    drag(3, 0, 0.05)
    page.locator("#submit").click()
    page.wait_for_selector("#state.good")
    (answer,) = site.answers()
    assert [[answer.shown.index(n) for n in tier] for tier in answer.values["order"]] in (
        [[3], [0, 2], [1]],
        [[3], [2, 0], [1]],
    )


def test_an_unchanged_order_is_asked_about_and_marked(page, site_of) -> None:
    site = site_of(task_with({"id": "order", "type": "rank"}), FOUR)
    site.log_in(page)
    ready(page)
    press(page, "b", "Shift+ArrowUp", "Shift+ArrowDown", "Enter")  # there and back is unchanged too
    page.wait_for_selector("dialog[open]")
    press(page, "Escape")
    page.wait_for_selector("dialog", state="detached")
    assert site.answers() == []
    press(page, "Enter")
    page.wait_for_selector("dialog[open]")
    answer = submitted(page, site, "Enter")
    assert not answer.changed and [tier[0] for tier in answer.values["order"]] == list(answer.shown)


def test_the_default_form_is_answered_with_keys_alone(page, site_of) -> None:
    """Ratings go on by themselves; flags take Enter: 7 for A, flags 1 and 3 for B, D first, a note at the end."""
    site = site_of(template(), FOUR)
    site.log_in(page)
    ready(page)
    rated = ["7", "Enter", "2", "1", "3", "Enter", "4", "0", "Enter", "5", "Enter"]
    press(page, *rated, "d", "1", "j")
    page.keyboard.type("quick note, j k u s ?")
    answer = submitted(page, site, "Control+Enter")
    assert by_letter(answer, "overall") == {"A": 7, "B": 2, "C": 4, "D": 5}
    assert by_letter(answer, "flags") == {
        "A": [],
        "B": ["wrong_task", "hallucination"],
        "C": ["moral_judgement"],
        "D": [],
    }
    assert [answer.shown.index(tier[0]) for tier in answer.values["order"]] == [3, 0, 1, 2]
    assert answer.values["notes"] == "quick note, j k u s ?"


def test_ten_is_a_rating_too(page, site_of) -> None:
    site = site_of(task_with({"id": "r", "type": "rating", "scale": 10}, show=1), [Candidate("p", ("a",))])
    site.log_in(page)
    ready(page)
    press(page, "0")
    assert submitted(page, site, "Enter").values == {"r": [10]}


def test_thumbs_are_two_keys(page, site_of) -> None:
    site = site_of(template("thumbs"), [Candidate("p", ("a",)), Candidate("q", ("b",))])
    site.log_in(page)
    ready(page)
    assert submitted(page, site, "y", "Enter").values == {"good": [True]}
    assert submitted(page, site, "n", "Enter").values == {"good": [False]}


def test_spans_are_marked_by_words_with_keys(page, site_of) -> None:
    """Offsets count code points: the emoji before them is one, though two units of a browser's text."""
    text = "The 🗼 tower stands in London, not here."
    site = site_of(template("spans"), [Candidate("Where?", (text,))])
    site.log_in(page)
    ready(page)
    # words: The tower stands in London not here. First: "London", not true (1), major (2), with a comment.
    press(page, *["ArrowRight"] * 5, "1", "2", "c")
    page.keyboard.type("It is Paris")
    press(page, "Escape")
    # then the next word and the one after it: "not here", off topic (3), minor (1); then a third one that is removed
    press(page, "ArrowRight", "Shift+ArrowRight", "3", "1", "ArrowLeft", "5", "3", "Delete")
    press(page, "j", "n")
    (spans,) = submitted(page, site, "Enter").values["errors"]
    points = list(text)
    assert [("".join(points[s["start"] : s["end"]]), s["kind"], s["severity"], s.get("comment")) for s in spans] == [
        ("London", "not true", "major", "It is Paris"),
        ("not here", "off topic", "minor", None),
    ]


def test_spans_can_be_selected_with_the_mouse(page, site_of) -> None:
    """Selecting "🗼 tower" backwards and forwards gives the same code points, 4 to 11."""
    site = site_of(template("spans"), [Candidate("Where?", ("The 🗼 tower stands.",))])
    site.log_in(page)
    ready(page)
    page.evaluate(
        """() => { const node = document.querySelector('.spans').firstChild;
        getSelection().setBaseAndExtent(node, 12, node, 3);
        document.querySelector('.spans').dispatchEvent(new PointerEvent('pointerup', { bubbles: true })); }"""
    )
    page.wait_for_selector(".chosen")
    page.locator(".spanbar button").nth(0).click()
    page.locator(".spanbar button").nth(2).click()
    page.locator(".choice.yes").click()
    page.locator("#submit").click()
    page.wait_for_selector("#state.good")
    assert site.answers()[0].values["errors"] == [[{"start": 4, "end": 11, "kind": "not true", "severity": "critical"}]]


def test_a_rewrite_is_stored_and_its_difference_shown(page, site_of) -> None:
    site = site_of(template("rewrite"), [Candidate("Capital of France?", ("It is London, I think.",))])
    site.log_in(page)
    ready(page)
    press(page, "Tab", "Control+a")
    page.keyboard.type("It is Paris, I think.")
    until(page, lambda: page.locator(".body del").all_inner_texts() == ["London"])  # it is also shown half-way
    until(page, lambda: page.locator(".body ins").all_inner_texts() == ["Paris"])
    assert submitted(page, site, "Control+Enter").values == {"correction": ["It is Paris, I think."]}


def test_a_response_left_as_it_was_is_no_rewrite(page, site_of) -> None:
    """Also with line ends of the other kind, which a text field changes."""
    site = site_of(template("rewrite"), [Candidate("q", ("a\r\nb",))])
    site.log_in(page)
    ready(page)
    assert submitted(page, site, "Control+Enter").values == {"correction": [None]}


def test_the_word_difference_is_shortest_and_gives_both_texts_back(page, site_of) -> None:
    """Against the slow definition: insertions + deletions of the longest common subsequence, by words."""
    site = site_of(task_with(COMPARE), [])
    page.goto(f"{site.url}/login")
    words = ["a", "b", "c"]
    pairs = [
        (" ".join(x), " ".join(y))
        for x in itertools.product(words, repeat=3)
        for y in itertools.product(words, repeat=4)
    ]
    found = page.evaluate(
        """async (pairs) => { const { difference, pieces, readable } = await import('/static/words.js');
        const plain = (parts) => parts.map((part) => [part.kind, part.text]);
        const words = (text) => pieces(text).map((piece) => piece.text);
        return pairs.map(([x, y]) => [plain(difference(x, y)), plain(readable(difference(x, y))), words(x), words(y)]); }""",
        pairs,
    )
    for (before, after), (parts, shown, one, two) in zip(pairs, found, strict=True):
        for each in (parts, shown):
            assert "".join(text for kind, text in each if kind != "in") == before
            assert "".join(text for kind, text in each if kind != "out") == after
        assert all(text.strip() for kind, text in shown[1:-1] if kind == "same")  # no mosaic of spaces
        kept = sum(len(text) for kind, text in parts if kind == "same")
        assert len(one) + len(two) - 2 * longest_common(one, two) == len(before) + len(after) - 2 * kept


def longest_common(one: list[str], two: list[str]) -> int:
    table = [[0] * (len(two) + 1) for _ in range(len(one) + 1)]
    for i, j in itertools.product(range(len(one)), range(len(two))):
        table[i + 1][j + 1] = table[i][j] + 1 if one[i] == two[j] else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


# --- hostile text --------------------------------------------------------------------------------------------------------

ATTACKS = [
    "<script>window.ran = 1</script>",
    "<img src=x onerror='window.ran = 1'>",
    "<svg onload='window.ran = 1'><script>window.ran = 1</script></svg>",
    "<svg><animate onbegin=window.ran=1 attributeName=x dur=1s></svg>",
    "<a href='javascript:window.ran=1'>x</a> [x](javascript:window.ran=1) [y](<java\nscript:window.ran=1>)",
    "[data](data:text/html,<script>window.ran=1</script>) ![p](https://example.org/x.png) ![q](javascript:window.ran=1)",
    "</textarea></script><script>window.ran = 1</script><textarea>",
    "\"><iframe srcdoc='<script>parent.ran=1</script>'></iframe>",
    "'-alert(1)-' ${window.ran = 1} {{constructor.constructor('window.ran=1')()}} `${window.ran=1}`",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.ran=1></style></mglyph></table></mtext></math>",
    "<style>* { display: none }</style><link rel=stylesheet href=//example.org/x.css><base href=//example.org>",
    "<form action=//example.org><input name=x><button formaction=javascript:window.ran=1>go</button></form>",
    "<details open ontoggle=window.ran=1><summary>x</summary></details><body onload=window.ran=1>",
]
TRICKS = "pay \u202e001\u202c to\u200b you\u2066\u00ad\ufeff"
SHOWN = "pay ⇄001⇄ to␣ you⇄␣␣"
HOSTILE = "\n\n".join(ATTACKS) + "\n\n" + TRICKS


@pytest.mark.parametrize("render", ["text", "markdown"])
def test_hostile_text_never_runs_and_tricks_are_shown(chromium, site_of, render) -> None:
    """In prompt, responses, instructions, title, question texts, options, comments and names; on every page."""
    questions = [
        {"id": "better", "type": "compare", "text": HOSTILE[:280], "help": HOSTILE},
        {"id": "rated", "type": "rating", "labels": [ATTACKS[0], ATTACKS[1]], "required": False},
        {"id": "wrong", "type": "flags", "options": [{"id": "one", "label": ATTACKS[1]}]},
        {"id": "marks", "type": "spans", "kinds": [ATTACKS[0]], "severities": [ATTACKS[2]]},
        {"id": "again", "type": "rewrite", "text": ATTACKS[3]},
        {"id": "notes", "type": "text", "text": ATTACKS[4]},
    ]
    task = task_with(
        *questions,
        title=HOSTILE[:290],
        instructions=HOSTILE,
        render=render,
        distribution={"overlap": 2, "contested_above": 0.3},
    )
    prompt = [{"role": "system", "content": HOSTILE}, {"role": "user", "content": HOSTILE}]
    item = Candidate(prompt, (f"one {HOSTILE}", f"two {HOSTILE}"))
    attack = '"><img src=x onerror=window.ran=1>'
    site = site_of(task, [item], names={attack: "annotator", "b": "annotator", "boss": "admin"})
    everybody = people.people(site.store)
    for number, person in enumerate(each for each in everybody if each.role == "annotator"):
        shown = queue.next_item(site.store, person.pseudonym)
        ids = [key for key, _ in shown.responses]
        first = next(key for key, text in shown.responses if text.startswith("one" if number else "two"))
        comment = [{"start": 0, "end": 3, "kind": ATTACKS[0], "severity": ATTACKS[2], "comment": HOSTILE}]
        values = {
            "better": {"choice": first, "strength": 1},
            "marks": {ids[0]: comment},
            "again": {ids[1]: HOSTILE + " changed"},
            "notes": HOSTILE,
        }
        if number:
            queue.answer(site.store, person.pseudonym, f"key-{number:016d}", shown.id, values, seconds=1.0)
    context = chromium.new_context()
    page = context.new_page()
    page.set_default_timeout(30_000)
    wrong, asked = watch(page), []
    page.on("request", lambda request: asked.append(request.url))
    first = next(each.name for each in everybody if each.name != "boss" and not _answered(site, each.pseudonym))
    site.log_in(page, first)
    ready(page)
    _unharmed(page)
    assert SHOWN in page.locator(".prompt").inner_text() and SHOWN in page.locator(".response").first.inner_text()
    assert SHOWN in page.locator("#aside").inner_text() and "\u202e" not in page.content()
    if render == "markdown":
        links = page.eval_on_selector_all("main a", "all => all.map((a) => a.getAttribute('href'))")
        assert all(re.match(r"https?://|mailto:", link) for link in links) and page.locator(".item img").count() == 0
    press(page, "?")
    page.wait_for_selector("dialog[open]")
    _unharmed(page)
    press(page, "Escape")
    page.locator("textarea").first.fill(HOSTILE)
    side = "left" if "two <" in page.locator(".response").first.inner_text() else "right"
    page.locator(f".choice.{side}").first.click()  # the other annotator preferred the other one
    page.locator("#submit").click()
    page.wait_for_selector(".nothing")
    press(page, "u")  # and shown again, from the store
    ready(page)
    _unharmed(page)
    page.locator("#submit").click()
    page.wait_for_selector(".nothing")
    context.clear_cookies()
    site.log_in(page, "boss", to="/admin")
    page.wait_for_selector(".contested")
    _unharmed(page)
    assert "\u202e" not in page.content()
    page.locator(".people input").first.fill("<img src=x onerror=window.ran=1>")
    page.locator(".people form button").click()
    page.wait_for_selector(".people [role=status] input")
    _unharmed(page)
    page.locator("#decide").click()
    page.wait_for_selector(".item")
    _unharmed(page)
    assert SHOWN in page.locator(".others").inner_text()
    context.close()
    assert wrong == []  # no error, no dialog, and nothing for the CSP to refuse
    assert [url for url in asked if not url.startswith(site.url)] == []


def _answered(site: Site, pseudonym: str) -> bool:
    return any(each.annotator == pseudonym for each in site.answers())


def _unharmed(page: Any) -> None:
    page.wait_for_timeout(50)
    found = page.evaluate(
        """() => ({ ran: window.ran === undefined, inner: document.querySelectorAll(
            'main script, main style, main iframe, main object, main svg script, main form[action], main base, main link, aside script').length,
        handlers: [...document.querySelectorAll('*')].filter((e) => [...e.attributes].some((a) => a.name.startsWith('on'))).length,
        urls: [...document.querySelectorAll('[href], [src]')].filter((e) => /^\\s*(javascript|data|vbscript):/i.test(e.getAttribute('href') || e.getAttribute('src'))).length })"""
    )
    assert found == {"ran": True, "inner": 0, "handlers": 0, "urls": 0}


def test_a_page_that_could_run_scripts_would_be_noticed(page, site_of) -> None:
    """The tests above can fail: markup put in as markup sets the flag or meets the policy."""
    site = site_of(task_with(COMPARE), TWO)
    site.log_in(page)
    ready(page)
    page.evaluate("document.querySelector('main').innerHTML = \"<img src=x onerror='window.ran = 1'>\"")
    page.wait_for_timeout(100)
    with pytest.raises(AssertionError):
        _unharmed(page)
    assert any("Content Security Policy" in each for each in page.wrong)
    page.wrong.clear()


def test_the_page_shows_hidden_characters_as_the_server_does(page, site_of) -> None:
    from palate.feedback.hidden import visible

    texts = [
        TRICKS,
        "می\u200cخواهم",
        "a\u200cb",
        "👨\u200d👩",
        "tab\tnew\nline",
        "\u2800x\u3164",
        "\x00\x1b[31m",
        "plain",
        "\U000e0041tag",
    ]
    site = site_of(task_with(COMPARE), [])
    page.goto(f"{site.url}/login")
    script = "async (texts) => { const { visible } = await import('/static/dom.js'); return texts.map(visible); }"
    assert page.evaluate(script, texts) == [visible(text) for text in texts]


def test_the_page_never_holds_where_a_response_comes_from(page, site_of) -> None:
    secrets = {"model": "secretmodel-7b", "score": 0.98765, "model_hash": "deadbeefcafe", "seed": 424243}
    task = task_with(COMPARE, distribution={"gold_share": 0.5})
    items = [
        Candidate(
            f"p{i}",
            ("x", "y"),
            sources=(secrets, secrets),
            kind="task" if i else "gold",
            gold=None if i else {"better": {"choice": 0, "strength": 1}},
        )
        for i in range(6)
    ]
    site = site_of(task, items)
    seen: list[str] = []

    def read_along(route: Any) -> None:
        answer = route.fetch()
        seen.append(f"{answer.headers} {answer.text()}")
        route.fulfill(response=answer)

    for path in ("me", "next", "answer"):
        page.route(f"**/api/{path}", read_along)
    site.log_in(page)
    for _ in range(4):
        ready(page)
        seen.append(page.content())
        seen.append(page.evaluate("JSON.stringify(localStorage)"))
        press(page, "a", "1")
        press(page, "Enter")
        page.wait_for_selector("main:not(.busy)")
    text = "\n".join(seen)
    assert "presentation" in text and "lease_until" in text
    for secret in ("secretmodel", "0.98765", "deadbeef", "424243", "gold", '"purpose"', '"item":', "prompt_key"):
        assert secret not in text, secret


# --- nothing lost, nothing doubled ------------------------------------------------------------------------------------


def test_a_server_stopped_in_the_middle_loses_and_doubles_nothing(page, site_of) -> None:
    site = site_of(task_with(COMPARE), TWO)
    site.log_in(page)
    ready(page)
    press(page, "a", "2")
    site.stop()
    press(page, "Enter")
    page.wait_for_selector("#state.down")
    said = page.locator("#state").inner_text()
    assert "Not saved yet" in said and "kept in this browser" in said and "Saved" not in said
    kept = json.loads(page.evaluate("Object.entries(localStorage).find(([k]) => k.startsWith('palate:outbox'))[1]"))
    assert len(kept) == 1 and kept[0]["path"] == "answer" and len(kept[0]["body"]["key"]) == 36
    assert site.answers() == []
    site.start()
    page.locator("#state button").click()
    page.wait_for_selector("#state.good")
    assert "Saved" in page.locator("#state").inner_text()
    ready(page)
    (answer,) = site.answers()
    assert answer.event == kept[0]["body"]["key"] and answer.values["better"]["strength"] == 2
    assert page.evaluate("Object.entries(localStorage).find(([k]) => k.startsWith('palate:outbox'))[1]") == "[]"
    page.wrong[:] = [each for each in page.wrong if "ERR_CONNECTION_REFUSED" not in each]


def test_an_answer_whose_acknowledgement_was_lost_is_stored_once(page, site_of) -> None:
    """The server had it and the way back broke: the page says "not saved yet", sends it again, and it counts once."""
    site = site_of(task_with(COMPARE), TWO)
    site.log_in(page)
    ready(page)
    sent: list[str] = []

    def lose_the_first(route: Any) -> None:
        sent.append(json.loads(route.request.post_data)["key"])
        if len(sent) == 1:
            route.fetch()
            route.abort()
        else:
            route.continue_()

    page.route("**/api/answer", lose_the_first)
    press(page, "b", "1", "Enter")
    page.wait_for_selector("#state.down")
    assert len(site.answers()) == 1
    page.locator("#state button").click()
    page.wait_for_selector("#state.good")
    assert len(sent) == 2 and sent[0] == sent[1] and len(site.answers()) == 1
    page.wrong.clear()


def test_an_answer_survives_the_page_being_closed_while_the_server_is_down(page, site_of) -> None:
    site = site_of(task_with(COMPARE), TWO)
    site.log_in(page)
    ready(page)
    site.stop()
    press(page, "t", "Enter")
    page.wait_for_selector("#state.down")
    page.goto("about:blank")
    site.start()
    page.goto(site.url)
    ready(page)
    assert [answer.values for answer in site.answers()] == [{"better": {"choice": "tie"}}]
    page.wrong.clear()


def test_an_unfinished_answer_is_back_after_a_reload(page, site_of) -> None:
    site = site_of(template(), FOUR)
    site.log_in(page)
    ready(page)
    press(page, "7", "2", "c", "Enter", "3")
    page.wait_for_timeout(400)
    page.reload()
    ready(page)
    assert "back" in page.locator("#state").inner_text()
    assert page.locator(".rating :checked").count() == 2 and page.locator(".flags :checked").count() == 1
    assert site.answers() == []


def test_a_session_that_ended_keeps_the_answer_and_sends_it_after_login(page, site_of) -> None:
    site = site_of(task_with(COMPARE), TWO)
    site.log_in(page)
    ready(page)
    page.context.clear_cookies()
    press(page, "x", "Enter")
    page.wait_for_url(f"{site.url}/login")
    assert "kept" in page.locator("#said").inner_text() and site.answers() == []
    page.locator("input").fill(f"{site.url}/login#{people.issue_link(site.store, 'anna')}")
    press(page, "Enter")
    ready(page)
    assert [answer.values for answer in site.answers()] == [{"better": {"choice": "both_bad"}}]
    page.wrong[:] = [each for each in page.wrong if "401" not in each]


def test_a_used_login_link_says_so(page, site_of) -> None:
    site = site_of(task_with(COMPARE), TWO)
    token = people.issue_link(site.store, "anna")
    site.log_in(page)
    page.goto(f"{site.url}/login#{token}x")
    page.wait_for_selector("#said:has-text('used already')")
    assert page.evaluate("location.href") == f"{site.url}/login"  # the token is not in the address any more
    page.wrong[:] = [each for each in page.wrong if "401" not in each]


# --- undo, skip, report, time ---------------------------------------------------------------------------------------------


def test_undo_shows_the_answer_again_and_it_can_be_changed(page, site_of) -> None:
    site = site_of(task_with(COMPARE), TWO)
    site.log_in(page)
    ready(page)
    first = submitted(page, site, "a", "3", "Enter")
    press(page, "u")
    page.wait_for_selector(".scale :checked")
    assert site.answers() == [] and first.prompt in page.locator(".prompt").inner_text()
    assert page.locator("#count").inner_text().startswith("0 ")
    again = submitted(page, site, "b", "Enter")
    assert again.presentation == first.presentation
    assert again.values == {"better": {"choice": again.shown[1], "strength": 3}}
    assert page.locator("#count").inner_text() == "1 of 4"


def test_undo_works_after_a_reload_and_for_a_skip_and_at_the_end(page, site_of) -> None:
    site = site_of(task_with(COMPARE), TWO[:1])
    site.log_in(page)
    ready(page)
    press(page, "s", "2")
    page.wait_for_selector(".nothing")
    page.reload()
    page.wait_for_selector(".nothing")
    press(page, "u")
    ready(page)
    submitted(page, site, "t", "Enter")
    assert [event["reason"] for event in site.events("skip")] == ["The text is broken or empty"]
    assert len(site.events("undo")) == 1


def test_nothing_to_undo_is_said(page, site_of) -> None:
    site = site_of(task_with(COMPARE), TWO)
    site.log_in(page)
    ready(page)
    press(page, "u")
    page.wait_for_selector("#state.warn")
    assert site.events("undo") == []


def test_skip_takes_a_reason_in_own_words_and_escape_takes_none(page, site_of) -> None:
    site = site_of(task_with(COMPARE), TWO)
    site.log_in(page)
    ready(page)
    before = page.locator(".prompt").inner_text()
    press(page, "s", "Escape")
    assert site.events("skip") == []
    press(page, "s")
    page.locator("dialog input").focus()
    page.keyboard.type("12 is no number here")
    press(page, "Enter")
    page.wait_for_selector("#state.good")
    ready(page)
    assert [event["reason"] for event in site.events("skip")] == ["Another reason: 12 is no number here"]
    assert page.locator(".prompt").inner_text() != before and site.answers() == []


def test_a_dialog_is_gone_at_the_key_stroke_that_closes_it(page, site_of) -> None:
    """Else the next key opens another beside it, before the browser has told of the first."""
    site = site_of(task_with(COMPARE), TWO)
    site.log_in(page)
    ready(page)
    dialogs = page.evaluate(
        "() => ['s', 'Escape', 'p', 'Escape', 's'].map((key) => { document.activeElement.dispatchEvent("
        "new KeyboardEvent('keydown', { key, bubbles: true, cancelable: true })); "
        "return document.querySelectorAll('dialog').length; })"
    )
    assert dialogs == [1, 0, 1, 0, 1]
    press(page, "Escape")
    assert page.locator("dialog").count() == 0 and site.events("skip") == []


def test_a_report_leaves_the_item_and_what_was_chosen(page, site_of) -> None:
    site = site_of(task_with(COMPARE), TWO)
    site.log_in(page)
    ready(page)
    press(page, "b", "2", "p")
    page.keyboard.type("The prompt holds a phone number.")
    press(page, "Control+Enter")
    page.wait_for_selector("#state.good")
    assert [event["text"] for event in site.events("flag")] == ["The prompt holds a phone number."]
    assert site.answers() == []
    assert submitted(page, site, "Enter").values["better"]["strength"] == 2


def test_idle_time_is_not_counted(page, site_of) -> None:
    """20 s at work, then an hour away (60 s of it count), then 10 s at work: 90 s."""
    site = site_of(task_with(COMPARE), TWO)
    page.clock.install()
    site.log_in(page)
    ready(page)
    press(page, "v")
    for seconds in (10, 10, 3600, 10):
        page.clock.fast_forward(1000 * seconds)
        press(page, "v")
    press(page, "a", "1", "Enter")
    page.wait_for_selector("#state.good")
    (answer,) = site.answers()
    assert 88 <= answer.seconds <= 94


def test_a_late_answer_is_said_to_be_kept_and_not_counted(page, site_of) -> None:
    site = site_of(task_with(COMPARE), TWO[:1], names={"anna": "annotator", "ben": "annotator"})
    site.log_in(page)
    ready(page)
    ben = next(each.pseudonym for each in people.people(site.store) if each.name == "ben")
    later = time.time() + 86_400
    shown = queue.next_item(site.store, ben, now=later)
    assert isinstance(shown, queue.Presentation)
    values = {"better": {"choice": "tie"}}
    queue.answer(site.store, ben, "ben-0123456789abcdef", shown.id, values, now=later)
    with site.store.write() as tx:
        tx.run("UPDATE lease SET until = 0")
    press(page, "a", "1", "Enter")
    page.wait_for_selector(".nothing")
    assert "not counted" in page.locator("#state").inner_text() and len(site.events("late")) == 1
    page.wrong[:] = [each for each in page.wrong if "409" not in each]


# --- how it looks, and for whom ---------------------------------------------------------------------------------------------

ALL_TYPES = [
    {"id": "rated", "type": "rating", "text": "Overall", "labels": ["very bad", "perfect"]},
    {
        "id": "wrong",
        "type": "flags",
        "options": [{"id": "a", "label": "Does not follow the instruction at all"}, {"id": "b", "label": "Unsafe"}],
    },
    {"id": "good", "type": "accept"},
    {"id": "marks", "type": "spans", "kinds": ["not true", "off topic"], "severities": ["minor", "major"]},
    {"id": "again", "type": "rewrite"},
    COMPARE,
    {"id": "order", "type": "rank"},
    {"id": "notes", "type": "text"},
]
LONG = [
    Candidate(
        [
            {"role": "user", "content": "A long_word_" + "x" * 300 + " and more"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "And?"},
        ],
        ("w" * 400, "Wide\ttabs\tand   spaces, a table | a | b |\n" * 4),
    )
]


def with_picture(site_of: Any, **more: Any) -> Site:
    from palate.server.images import add_image

    site = site_of(
        task_with(*ALL_TYPES, **more), [], names={"anna": "annotator", "Boss Bartholomew the Very Long Named": "admin"}
    )
    folder = Path(site.store.path).parent
    (folder / "scene.png").write_bytes(picture())
    from palate.feedback.items import add_items

    name = add_image(site.store, "scene.png", folder)
    add_items(site.store, [Candidate(LONG[0].prompt, LONG[0].responses, images=(name,))])
    return site


SIZES = {
    "phone": (360, 740),
    "small phone": (320, 568),
    "200 % zoom of 1280 x 800": (640, 400),
    "400 % zoom": (320, 256),
    "desk": (1280, 800),
}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_nothing_has_to_be_scrolled_sideways(page, site_of, language) -> None:
    """Zooming by 200 % halves the width in CSS pixels, which is what the layout sees."""
    site = with_picture(site_of, language=language)
    for name, to in (("anna", "/"), ("Boss Bartholomew the Very Long Named", "/admin")):
        page.context.clear_cookies()
        site.log_in(page, name, to=to)
        page.wait_for_selector(".item, .figures")
        for size, (width, height) in SIZES.items():
            page.set_viewport_size({"width": width, "height": height})
            for action in ("", "?"):
                if action:
                    press(page, action)
                found = page.evaluate(
                    """() => ({ room: document.documentElement.clientWidth, needs: document.documentElement.scrollWidth,
                    wide: [...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1
                      && !e.closest('.scroll, pre, .unseen, .skiplink') && getComputedStyle(e).position !== 'fixed').map((e) => `${e.tagName}.${e.className}`).slice(0, 5) })"""
                )
                assert found["needs"] <= found["room"], (size, to, found)
                assert found["wide"] == [], (size, to, found)
                if action:
                    press(page, "Escape")
    page.context.clear_cookies()


CONTRAST = """() => {
  const numbers = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => { const f = (c) => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
    return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b); };
  const ground = (e) => { for (; e; e = e.parentElement) { const c = numbers(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] === 1) return c; if (c[3] > 0) throw new Error('half transparent ground'); } return [255, 255, 255]; };
  const low = []; let seen = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !e.checkVisibility({ visibilityProperty: true }) || e.closest(':disabled, .unseen, noscript, svg')) continue;
    seen += 1;
    const [a, b] = [light(numbers(getComputedStyle(e).color)), light(ground(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push([ratio.toFixed(2), e.className || e.tagName, walker.currentNode.data.slice(0, 30)]);
  }
  return { low, seen };
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_a_contrast_of_4_5_in_both_themes(chromium, site_of, theme) -> None:
    """By the formula of WCAG 2.2 (1.4.3): (L1 + 0.05) / (L2 + 0.05) of relative luminances; every text that is seen."""
    site = with_picture(site_of)
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, color_scheme=theme, reduced_motion="reduce")
    page = context.new_page()
    site.log_in(page)
    ready(page)
    seen = []

    def check() -> None:
        page.wait_for_timeout(30)
        found = page.evaluate(CONTRAST)
        assert found["low"] == []
        seen.append(found["seen"])

    check()
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 200) == (theme == "dark")
    for selector in (".choice.left", ".choice.right", ".choice.tie", ".choice.both_bad"):
        page.locator(selector).first.click()
        check()
    for each in ("1", "2"):  # everything else that can be chosen
        page.locator(".likert .choice").nth(int(each)).click()
        page.locator(".flags .choice").nth(int(each) - 1).click()
        page.locator(".accept .choice").nth(int(each) - 1).click()
    page.locator("textarea.rewrite").first.fill("another text")
    page.locator(".spans").first.focus()
    press(page, "ArrowRight", "1", "2", "ArrowRight")
    check()
    press(page, "?")
    check()
    press(page, "Escape", "s")
    check()
    press(page, "Escape")
    page.locator("summary").last.click()
    check()
    page.goto(f"{site.url}/login")
    page.wait_for_selector("form:not([hidden])")
    check()
    site.log_in(page, "Boss Bartholomew the Very Long Named", to="/admin")
    page.wait_for_selector(".figures")
    check()
    context.close()
    assert min(seen) >= 5 and max(seen) > 60


def test_a_picture_is_shown_and_enlarged_and_instructions_folded(page, site_of) -> None:
    site = with_picture(site_of, instructions="Look **closely**.")
    site.log_in(page)
    ready(page)
    page.wait_for_selector(".picture img")
    assert (
        page.eval_on_selector(".picture img", "async (img) => { await img.decode(); return img.naturalWidth; }") == 480
    )
    page.locator(".picture").focus()
    press(page, "Enter")
    page.wait_for_selector("dialog img.large")
    press(page, "Escape")
    assert page.locator("#aside strong").is_visible()
    press(page, "v")
    assert not page.locator("#aside strong").is_visible()
    page.reload()
    ready(page)
    assert not page.locator("#aside strong").is_visible()


def test_folding_the_instructions_is_remembered_at_the_key_stroke(page, site_of) -> None:
    site = site_of(task_with(COMPARE), TWO)
    site.log_in(page)
    ready(page)
    kept = page.evaluate(
        "() => ['v', 'v'].map((key) => { document.body.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true })); "
        "return localStorage.getItem('palate:instructions'); })"
    )
    assert kept == ["false", "true"]


def test_the_theme_that_is_chosen_stays(page, site_of) -> None:
    site = site_of(task_with(COMPARE), TWO)
    site.log_in(page)
    ready(page)
    page.locator(".menu summary").click()
    page.locator(".menu select").first.select_option("dark")
    page.reload()
    ready(page)
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_the_chinese_page_speaks_chinese(page, site_of) -> None:
    site = site_of(
        task_with(*ALL_TYPES, title="哪个更好", instructions="请仔细阅读。", language="zh"),
        [Candidate("法国的首都是哪里？", ("是巴黎。", "是伦敦。"))],
    )
    site.log_in(page)
    ready(page)
    assert page.evaluate("document.documentElement.lang") == "zh-Hans"
    text = page.locator("body").inner_text()
    assert "提交" in text and "说明" in text and "从最好到最差排序" in text
    # what is left in Latin letters: the names of keys, the product, the annotator, and the task's own words
    own = {
        "palate",
        "anna",
        "Overall",
        "very",
        "bad",
        "perfect",
        "Does",
        "not",
        "follow",
        "the",
        "instruction",
        "at",
        "all",
        "Unsafe",
        "Enter",
        "Esc",
        "Space",
    }
    assert set(re.findall(r"[A-Za-z]{3,}", text)) <= own
    press(page, "?")
    assert "按键" in page.locator("dialog").inner_text()
    press(page, "Escape")
    page.locator(".spans").first.focus()
    press(page, "ArrowRight", "ArrowRight")
    assert page.locator(".chosen").first.inner_text() in ("巴黎", "伦敦")  # a word, without spaces around it


def test_both_languages_have_the_same_words(page, site_of) -> None:
    site = site_of(task_with(COMPARE), [])
    page.goto(f"{site.url}/login")
    script = "async () => (await import('/static/i18n.js')).missingWords()"
    assert page.evaluate(script) == []
    source = (STATIC / "i18n.js").read_text(encoding="utf-8")
    english = dict(re.findall(r'(\w+): "((?:[^"\\]|\\.)*)"', source.split("const ZH")[0]))
    chinese = dict(re.findall(r'(\w+): "((?:[^"\\]|\\.)*)"', source.split("const ZH")[1]))
    holes = {
        key: (set(re.findall(r"\{\w+\}", english[key])), set(re.findall(r"\{\w+\}", chinese[key]))) for key in english
    }
    assert {key: both for key, both in holes.items() if both[0] != both[1]} == {}
    asked = set()
    for path in sorted({*STATIC.rglob("*.js")} - {STATIC / "i18n.js"}):
        asked |= set(re.findall(r'\bt\("(\w+)"', path.read_text(encoding="utf-8")))
    assert asked - set(english) == set()


def test_everything_that_can_be_focused_has_a_name_and_a_visible_focus(page, site_of) -> None:
    site = with_picture(site_of)
    site.log_in(page)
    ready(page)
    seen = set()
    for _ in range(120):
        press(page, "Tab")
        found = page.evaluate(
            """() => { const e = document.activeElement; if (e === document.body) return null;
            const at = e.classList.contains('hidden-input') ? e.nextElementSibling : e; const style = getComputedStyle(at);
            const name = e.getAttribute('aria-label') || e.labels?.[0]?.textContent || e.textContent || e.title;
            return [e.tagName + '.' + e.className, Boolean(name.trim()), style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2]; }"""
        )
        if found is None:  # from the end of the page to its beginning
            continue
        assert found[1:] == [True, True], found
        seen.add(found[0])
    assert len(seen) > 8


def test_nothing_on_the_pages_comes_from_elsewhere_or_stands_inline() -> None:
    for path in STATIC.rglob("*"):
        if path.suffix in (".html", ".js", ".css"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), path
        if path.suffix == ".html":
            assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", text), path
        if path.suffix == ".js":
            assert text.count("innerHTML") == (1 if path.name == "dom.js" else 0), path
            assert not re.search(r"\beval\(|new Function|document\.write|insertAdjacentHTML|outerHTML", text), path


# --- admins ------------------------------------------------------------------------------------------------------------


def test_an_admin_sees_the_project_and_decides_with_keys(page, site_of) -> None:
    """Anna and Ben contradict each other on every item; the decision is stored as it was pressed."""
    task = task_with(COMPARE, distribution={"overlap": 2, "contested_above": 0.3})
    site = site_of(task, TWO, names={"anna": "annotator", "ben": "annotator", "boss": "admin"})
    pseudonyms = {each.name: each.pseudonym for each in people.people(site.store)}
    for name, wanted in (("anna", "good"), ("ben", "bad")):
        for i in range(4):
            shown = queue.next_item(site.store, pseudonyms[name])
            choice = next(key for key, text in shown.responses if text.startswith(wanted))
            queue.answer(
                site.store,
                pseudonyms[name],
                f"{name}-{i:016d}",
                shown.id,
                {"better": {"choice": choice, "strength": 1}},
                seconds=3.0,
            )
    site.log_in(page, "boss", to="/admin")
    page.wait_for_selector(".contested")
    text = page.locator("main").inner_text()
    assert "8 / 8" in text and "anna" in text and "ben" in text and page.locator(".contested > li").count() == 4
    assert page.locator(".interval svg").count() == 1 and page.locator(".chart svg").count() >= 2
    page.locator("#decide").click()
    page.wait_for_selector(".item")
    assert page.locator(".others > div").count() == 2
    press(page, "b", "2", "Enter")
    page.wait_for_selector("#undo:not(:disabled)")
    (decision,) = site.events("adjudicate")
    presented = next(each for each in site.events("presented") if each["presentation"] == decision["presentation"])
    assert decision["values"] == {"better": {"choice": presented["shown"][1][1], "strength": 2}}
    press(page, "u")
    page.wait_for_selector(".scale :checked")
    assert len(site.events("undo")) == 1
    press(page, "t", "Enter")
    page.wait_for_selector("main:not(.busy)")
    assert [each["values"]["better"]["choice"] for each in site.events("adjudicate")][1:] == ["tie"]


def test_an_adjudicator_decides_and_sees_no_overview(page, site_of) -> None:
    site = site_of(task_with(COMPARE), TWO, names={"judge": "adjudicator"})
    site.log_in(page, "judge", to="/admin")
    page.wait_for_selector(".nothing")
    assert page.locator(".figures").count() == 0 and "Nothing to decide" in page.locator("main").inner_text()


def test_an_annotator_is_told_that_the_page_is_not_theirs(page, site_of) -> None:
    site = site_of(task_with(COMPARE), TWO)
    site.log_in(page, "anna", to="/admin")
    page.wait_for_selector("main .card")
    assert "adjudicators and admins" in page.locator("main").inner_text()
