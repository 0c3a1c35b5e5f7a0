"""The pictures in docs/labelling.md: every page, in light and dark, on a phone, in Chinese.

    python docs/screenshots.py [NAME ...]

Made from a small project of its own with Chromium; writes docs/images/label-*.png with a palette of 128 colours.
"""

from __future__ import annotations

import io
import random
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

from PIL import Image

from label_pages import Site, browser, picture, task_with
from palate.feedback import people, queue
from palate.feedback.items import Candidate, add_items
from palate.feedback.task import template
from palate.server.images import add_image

DESK, PHONE = {"width": 1280, "height": 700}, {"width": 390, "height": 844}
BREAD = Candidate(
    "How do I keep a loaf of bread fresh for a week? I have no bread box.",
    (
        (
            "Keep the cut side down on a board for the first two days. After that, slice what is left and freeze it; toast "
            "the slices straight from the freezer."
        ),
        "Put it into the fridge in its bag. Cold air stops it from going stale.",
        "Wrap it in a clean cotton towel, and keep it in a cool cupboard. Bread with a hard crust keeps best.",
        "Bread is best on the day it is baked, so buy less of it.",
    ),
)
PAIR = Candidate(
    "My colleague takes the credit for my work in meetings. How do I bring it up with her?",
    (
        (
            "Ask for ten minutes alone, name one recent meeting, and say what you felt without guessing at her reasons: "
            '"On Tuesday the figures that I had made were shown as yours; I would like my name to be on them." Then agree '
            "on how you will both do it next time."
        ),
        (
            "You should report her to your manager at once. People like that never change, and talking to them is a waste "
            "of time."
        ),
    ),
)
SCENE = "What stands to the right of the red ball, and what colour is it?"
CLAIMS = "A blue pyramid stands to the right of the ball. The scene also has a box at the left, which is blue."
CHINESE = Candidate("怎样把一条面包保鲜一周？", ("切片冷冻，吃的时候直接烤。", "放进冰箱冷藏，这样不容易变硬。"))


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        for name, take in TAKES.items():
            if not names or name in names:
                own = Path(folder) / name
                own.mkdir()
                take(chromium, own, name)


def save(page: Any, name: str, full: bool = False) -> None:
    page.wait_for_timeout(350)
    picture_ = Image.open(io.BytesIO(page.screenshot(full_page=full))).convert("RGB")
    path = HERE / "images" / f"label-{name}.png"
    path.parent.mkdir(exist_ok=True)
    picture_.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size:,} bytes")


def open_page(
    chromium: Any, site: Site, who: str = "anna", to: str = "/", *, dark: bool = False, size: Any = None
) -> Any:
    scheme = "dark" if dark else "light"
    context = chromium.new_context(
        viewport=size or DESK, color_scheme=scheme, has_touch=size is PHONE, is_mobile=size is PHONE
    )
    page = context.new_page()
    site.log_in(page, who, to=to)
    page.wait_for_selector("main:not(.busy) .item, main:not(.busy) .nothing, .figures")
    return page


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def compare(chromium: Any, folder: Path, name: str) -> None:
    site = Site(folder, template("compare"), [PAIR])
    page = open_page(chromium, site, dark="dark" in name, size=PHONE if "phone" in name else None)
    press(page, "a", "2")
    if "phone" in name:
        page.locator(".whole").scroll_into_view_if_needed()
        page.evaluate("scrollBy(0, 300)")
    save(page, name)
    site.stop()


def form(chromium: Any, folder: Path, name: str) -> None:
    site = Site(folder, template(), [BREAD])
    page = open_page(
        chromium, site, dark="dark" in name, size=PHONE if "phone" in name else {"width": 1280, "height": 1900}
    )
    press(page, "6", "Enter", "3", "3", "Enter", "5", "Enter", "4", "Enter", "c", "=", "a")
    page.evaluate("scrollTo(0, 0)")
    save(page, name)
    site.stop()


def rank(chromium: Any, folder: Path, name: str) -> None:
    site = Site(folder, template("rank"), [BREAD])
    page = open_page(chromium, site, size=PHONE if "phone" in name else {"width": 1280, "height": 820})
    press(page, "c", "=", "d", "1")
    page.locator(".tiers").scroll_into_view_if_needed()
    save(page, name)
    site.stop()


def spans(chromium: Any, folder: Path, name: str) -> None:
    site = Site(folder, template("spans"), [])
    (folder / "scene.png").write_bytes(picture())
    add_items(site.store, [Candidate(SCENE, (CLAIMS,), images=(add_image(site.store, "scene.png", folder),))])
    page = open_page(chromium, site, dark="dark" in name, size={"width": 1280, "height": 860})
    press(page, "ArrowRight", "ArrowRight", "1", "3", "c")
    page.keyboard.type("It is green.")
    press(page, "Escape", *["ArrowRight"] * 9, "Shift+ArrowRight")
    save(page, name)
    site.stop()


def rewrite(chromium: Any, folder: Path, name: str) -> None:
    site = Site(folder, template("rewrite"), [Candidate(BREAD.prompt, BREAD.responses[1:2])])
    page = open_page(chromium, site)
    page.locator("textarea.rewrite").fill(
        "Do not put it into the fridge: it goes stale faster there. Freeze it in slices instead."
    )
    save(page, name)
    site.stop()


def unsent(chromium: Any, folder: Path, name: str) -> None:
    site = Site(folder, template("thumbs"), [BREAD_ONE])
    page = open_page(chromium, site)
    site.stop()
    press(page, "y", "Enter")
    page.wait_for_selector("#state.down")
    save(page, name)


BREAD_ONE = Candidate(BREAD.prompt, BREAD.responses[:1])


def keys(chromium: Any, folder: Path, name: str) -> None:
    site = Site(folder, template(), [BREAD])
    page = open_page(chromium, site)
    press(page, "?")
    save(page, name)
    site.stop()


def chinese(chromium: Any, folder: Path, name: str) -> None:
    from palate.feedback.task import task_of

    settings = template("compare").model_dump(mode="json")
    settings |= {
        "language": "zh",
        "title": "哪个回答更好？",
        "instructions": "请选择您更愿意得到的回答，并说明好多少。",
    }
    settings["questions"][0]["text"] = "哪个回答更好？"
    site = Site(folder, task_of(settings), [CHINESE], names={"小安": "annotator"})
    page = open_page(chromium, site, "小安")
    press(page, "b", "1")
    save(page, name)
    site.stop()


def admin(chromium: Any, folder: Path, name: str) -> None:
    site = project(folder)
    page = open_page(
        chromium,
        site,
        "maria",
        "/admin",
        dark="dark" in name,
        size=PHONE if "phone" in name else {"width": 1280, "height": 1500},
    )
    if name == "admin":
        page.locator("button.small").click()
        page.wait_for_selector("th:has-text('Reliability')")
    if name == "adjudicate":
        page.set_viewport_size({"width": 1280, "height": 760})
        page.locator("#decide").click()
        page.wait_for_selector(".item")
        press(page, "b", "1")
    save(page, name)
    site.stop()


def login(chromium: Any, folder: Path, name: str) -> None:
    site = Site(folder, template("compare"), [PAIR])
    page = chromium.new_context(viewport={"width": 900, "height": 560}).new_page()
    page.goto(f"{site.url}/login")
    page.wait_for_selector("form:not([hidden])")
    save(page, name)
    site.stop()


def project(folder: Path) -> Site:
    """Four people over five weeks: two who agree mostly, one who likes the left side, and one who guesses."""
    import palate.feedback.store as module

    task = task_with(
        {"id": "better", "type": "compare", "text": "Which answer is better?", "strengths": 3, "tie": True},
        title="Which answer is better?",
        distribution={"overlap": 3, "gold_share": 0.1, "contested_above": 0.3},
    )
    subjects = ["bread", "tomatoes", "a bicycle chain", "wool", "a blog", "house plants", "a camera", "leather shoes"]
    items = [
        Candidate(
            f"How do I look after {each}? ({i + 1})",
            (f"A careful answer about {each}, with steps.", f"A short answer about {each}.")[
                :: 1 if (i + len(each)) % 2 else -1
            ],
        )
        for i in range(6)
        for each in subjects
    ]
    gold = [
        Candidate(
            f"Known: what is {i} + {i}?",
            (f"It is {2 * i}.", f"It is {2 * i + 1}."),
            kind="gold",
            gold={"better": {"choice": 0, "strength": 3}},
        )
        for i in range(3, 9)
    ]
    site = Site(
        folder,
        task,
        [*items, *gold],
        names={"anna": "annotator", "ben": "annotator", "chen": "annotator", "dora": "annotator", "maria": "admin"},
    )
    rng = random.Random(3)
    pseudonyms = {each.name: each.pseudonym for each in people.people(site.store)}
    real, n = module.now, 0
    try:
        for step in range(36):
            week = step // 8
            module.now = lambda week=week, step=step: (
                f"2026-{'09' if week < 2 else '10'}-{(15, 22, 1, 8, 15)[week]:02d}T1{step % 8}:20:00.000000Z"
            )
            for who in ("anna", "ben", "chen", "dora"):
                shown = queue.next_item(site.store, pseudonyms[who])
                if isinstance(shown, queue.Nothing):
                    continue
                better = [key for key, text in shown.responses if "careful" in text or _right(shown.prompt, text)]
                left, right = [key for key, _ in shown.responses]
                good = better[0] if better else left
                skill = {"anna": 0.96, "ben": 0.93, "chen": 0.8, "dora": 0.6}[who]
                choice = good if rng.random() < skill else (left if who == "chen" else rng.choice([left, right]))
                tie = who != "chen" and rng.random() < 0.08
                value = {"choice": "tie"} if tie else {"choice": choice, "strength": rng.choice([1, 2, 2, 3])}
                n += 1
                seconds = rng.uniform(12, 45) * (0.25 if who == "dora" else 1)
                queue.answer(
                    site.store,
                    pseudonyms[who],
                    f"{who}-{n:016d}",
                    shown.id,
                    {"better": value},
                    seconds=round(seconds, 1),
                )
    finally:
        module.now = real
    return site


def _right(prompt: Any, text: str) -> bool:
    """ "It is 6." to "Known: what is 3 + 3?"."""
    return prompt.startswith("Known") and sum(map(int, re.findall(r"\d+", prompt))) == int(text[6:-1])


TAKES = {
    "compare": compare,
    "compare-dark": compare,
    "compare-phone": compare,
    "form": form,
    "form-dark": form,
    "form-phone": form,
    "rank": rank,
    "rank-phone": rank,
    "spans": spans,
    "spans-dark": spans,
    "rewrite": rewrite,
    "unsent": unsent,
    "keys": keys,
    "zh": chinese,
    "admin": admin,
    "admin-dark": admin,
    "admin-phone": admin,
    "adjudicate": admin,
    "login": login,
}

if __name__ == "__main__":
    main(sys.argv[1:])
