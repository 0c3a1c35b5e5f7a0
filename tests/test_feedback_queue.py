"""Dealing out the work: exact overlap, leases, tests among the work, and what an annotator never sees."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from feedback_stores import answer_all, compare_task, make_store, prefer_bad, prefer_good
from palate.feedback import deal, people, queue
from palate.feedback.hidden import name_of, visible
from palate.feedback.items import Candidate
from palate.feedback.questions import BadAnswer
from palate.feedback.queue import Nothing
from palate.feedback.store import Conflict, NotFound, Store
from palate.feedback.task import task_of, template
from palate.feedback.upkeep import status, verify

MINUTE = 60.0


def events(store: Store, kind: str) -> list:
    return [event for event in store.events() if event.kind == kind]


def answers_per_item(store: Store) -> dict[str, int]:
    """Counted from the events, not from the queue's own tables."""
    purpose = {e.body["presentation"]: e.body["purpose"] for e in events(store, "presented")}
    counts = Counter(e.body["item"] for e in events(store, "answer") if purpose[e.body["presentation"]] == "task")
    for undone in events(store, "undo"):
        counts[undone.body["item"]] -= undone.body["undone"] == "answered"
    return dict(counts)


def test_ten_at_once_give_every_item_its_answers_and_not_one_more(tmp_path) -> None:
    """10 annotators in threads, 4 connections, 40 items with 3 places: 120 answers, each item exactly 3."""
    store, names = make_store(tmp_path, compare_task(overlap=3, random_share=0.5), items=40, annotators=10)
    others = [Store.open(store.path) for _ in range(3)]
    with ThreadPoolExecutor(10) as pool:
        list(pool.map(lambda n: answer_all([store, *others][n % 4], names[n]), range(10)))
    assert answers_per_item(store) == {f: 3 for f in answers_per_item(store)}
    assert len(answers_per_item(store)) == 40 and status(store)["complete"] == 40
    by_one = Counter((e.actor, e.body["item"]) for e in events(store, "answer"))
    assert set(by_one.values()) == {1}  # nobody twice
    assert verify(store).problems == []
    for other in others:
        other.close()


def test_a_place_is_kept_while_somebody_thinks_and_free_afterwards(tmp_path) -> None:
    store, (anna, ben) = make_store(tmp_path, compare_task(lease_minutes=30), items=1)
    shown = queue.next_item(store, anna, now=0.0)
    assert isinstance(queue.next_item(store, ben, now=29 * MINUTE), Nothing)
    taken = queue.next_item(store, ben, now=31 * MINUTE)
    assert taken.item == shown.item and taken.id != shown.id


def test_the_same_item_comes_again_after_a_reload(tmp_path) -> None:
    store, (anna, _) = make_store(tmp_path, compare_task())
    first = queue.next_item(store, anna)
    again = queue.next_item(store, anna)
    assert (again.id, again.responses) == (first.id, first.responses)
    assert len(events(store, "presented")) == 1


def test_an_answer_after_its_lease_counts_while_the_place_is_free(tmp_path) -> None:
    store, (anna, _) = make_store(tmp_path, compare_task(lease_minutes=30), items=1)
    shown = queue.next_item(store, anna, now=0.0)
    assert queue.answer(store, anna, "k", shown.id, prefer_good(shown), now=99 * MINUTE).counted


@pytest.mark.parametrize("answered", [True, False])
def test_an_answer_after_its_place_was_given_away_is_kept_and_not_counted(tmp_path, answered: bool) -> None:
    """Ben holds or filled the only place: Anna's answer is an event of kind late, overlap stays 1."""
    store, (anna, ben) = make_store(tmp_path, compare_task(lease_minutes=30), items=1)
    shown = queue.next_item(store, anna, now=0.0)
    theirs = queue.next_item(store, ben, now=31 * MINUTE)
    if answered:
        queue.answer(store, ben, "b", theirs.id, prefer_good(theirs), now=32 * MINUTE)
    receipt = queue.answer(store, anna, "a", shown.id, prefer_bad(shown), now=33 * MINUTE)
    assert not receipt.counted and receipt.event.kind == "late"
    assert queue.answer(store, anna, "a", shown.id, prefer_bad(shown), now=34 * MINUTE) == receipt
    queue.next_item(store, ben, now=35 * MINUTE) if answered else queue.answer(
        store, ben, "b", theirs.id, prefer_good(theirs), now=35 * MINUTE
    )
    assert answers_per_item(store) == {shown.item: 1} and status(store)["late"] == 1
    assert verify(store).problems == []


def test_a_skip_is_not_done_and_frees_the_place_for_others_only(tmp_path) -> None:
    store, (anna, ben) = make_store(tmp_path, compare_task(), items=1)
    shown = queue.next_item(store, anna)
    queue.skip(store, anna, "s", shown.id, "not my field")
    assert status(store)["done"] == 0
    assert isinstance(queue.next_item(store, anna), Nothing)
    assert queue.next_item(store, ben).item == shown.item


def test_an_undone_answer_comes_back_with_what_was_said_and_its_place(tmp_path) -> None:
    store, (anna, ben) = make_store(tmp_path, compare_task(), items=1)
    shown = queue.next_item(store, anna)
    given = prefer_bad(shown)
    queue.answer(store, anna, "a", shown.id, given)
    undone = queue.undo(store, anna, "u", shown.id)
    assert queue.undo(store, anna, "u", shown.id) == undone
    assert status(store)["done"] == 0
    assert isinstance(queue.next_item(store, ben), Nothing)  # the place is kept for Anna
    again = queue.next_item(store, anna)
    assert (again.id, again.responses, again.previous) == (shown.id, shown.responses, given)
    queue.answer(store, anna, "a2", shown.id, prefer_good(shown))
    assert answers_per_item(store) == {shown.item: 1} and verify(store).problems == []
    assert len(events(store, "answer")) == 2  # nothing is ever removed from the log


def test_an_undone_skip_comes_back_unless_others_took_it(tmp_path) -> None:
    store, (anna, ben) = make_store(tmp_path, compare_task(), items=1)
    shown = queue.next_item(store, anna)
    queue.skip(store, anna, "s", shown.id)
    queue.undo(store, anna, "u", shown.id)
    assert queue.next_item(store, anna).id == shown.id
    queue.skip(store, anna, "s2", shown.id)
    queue.next_item(store, ben)
    with pytest.raises(Conflict, match="others have taken"):
        queue.undo(store, anna, "u2", shown.id)


def test_what_is_done_cannot_be_done_again_under_another_key(tmp_path) -> None:
    store, (anna, ben) = make_store(tmp_path, compare_task(overlap=2), items=1)
    shown = queue.next_item(store, anna)
    with pytest.raises(Conflict, match="nothing to undo"):
        queue.undo(store, anna, "u", shown.id)
    queue.answer(store, anna, "a", shown.id, prefer_good(shown))
    for act in (
        lambda: queue.answer(store, anna, "b", shown.id, prefer_good(shown)),
        lambda: queue.skip(store, anna, "c", shown.id),
    ):
        with pytest.raises(Conflict, match="answered already"):
            act()
    with pytest.raises(NotFound):
        queue.answer(store, ben, "d", shown.id, prefer_good(shown))  # not Ben's


def test_nobody_judges_a_text_of_their_own(tmp_path) -> None:
    store, (anna, ben) = make_store(tmp_path, compare_task(), items=0)
    from palate.feedback.items import add_items

    add_items(store, [Candidate("p", ("good", "bad"), sources=({"annotator": anna}, {"model": "m"}))])
    assert isinstance(queue.next_item(store, anna), Nothing)
    assert isinstance(queue.next_item(store, ben), queue.Presentation)


def test_the_order_is_drawn_by_the_seed_and_recorded(tmp_path) -> None:
    """Order follows from seed, annotator and number of presentations; each side is first about half of the time.

    100 fair draws have a standard deviation of 5: 30 to 70 is four of them.
    """
    store, (anna,) = make_store(tmp_path, compare_task(), items=100, annotators=1)
    shown = answer_all(store, anna)
    first_good = sum(each.responses[0][1].startswith("good") for each in shown)
    assert 30 <= first_good <= 70
    recorded = {e.body["presentation"]: e.body["shown"] for e in events(store, "presented")}
    for each in shown:
        texts = ["good", "bad"]
        assert [key for key, _ in recorded[each.id]] == [key for key, _ in each.responses]
        assert [texts[number] for _, number in recorded[each.id]] == [t.split()[0] for _, t in each.responses]


def test_the_same_seed_deals_the_same_cards(tmp_path) -> None:
    def orders(folder: str, seed: int) -> list[str]:
        (tmp_path / folder).mkdir()
        store, _ = make_store(tmp_path / folder, compare_task(seed=seed, random_share=0.5), items=30, annotators=0)
        with store.write() as tx:
            tx.append("annotator", "admin", {"pseudonym": "p-same", "role": "annotator", "active": True})
        return [each.responses[0][1] for each in answer_all(store, "p-same")]

    assert orders("a", 0) == orders("b", 0) != orders("c", 1)


def test_response_ids_are_new_in_every_presentation(tmp_path) -> None:
    store, names = make_store(tmp_path, compare_task(overlap=2), items=10)
    seen = [key for name in names for each in answer_all(store, name) for key, _ in each.responses]
    assert len(set(seen)) == len(seen) == 40


def test_gold_and_attention_come_in_their_share_and_not_among_the_places(tmp_path) -> None:
    """200 items, shares 1/4 gold and 1/8 attention: of about 320 presentations 80 +- 4 sd (31) are gold."""
    known = {"better": {"choice": 0, "strength": 1}}
    gold = [Candidate(f"gold {i}", ("good", "bad"), kind="gold", gold=known) for i in range(150)]
    tests = [Candidate(f"test {i}", ("good", "bad"), kind="attention", gold=known) for i in range(80)]
    items = [Candidate(f"prompt {i}", ("good", "bad")) for i in range(200)]
    task = compare_task(gold_share=0.25, attention_share=0.125)
    store, (anna,) = make_store(tmp_path, task, items=[*items, *gold, *tests], annotators=1)
    shown = Counter(each.purpose for each in answer_all(store, anna))
    assert shown["task"] == 200
    assert 49 <= shown["gold"] <= 111 and 18 <= shown["attention"] <= 62
    assert set(answers_per_item(store).values()) == {1} and len(answers_per_item(store)) == 200


def test_a_repeat_is_an_earlier_item_of_ones_own_with_the_sides_swapped(tmp_path) -> None:
    store, (anna, ben) = make_store(tmp_path, compare_task(repeat_share=0.3, repeat_after=5), items=60)
    answer_all(store, ben, most=30)
    shown = answer_all(store, anna)
    repeats = [(i, each) for i, each in enumerate(shown) if each.purpose == "repeat"]
    assert len(repeats) >= 3
    for i, each in repeats:
        earlier = [(j, other) for j, other in enumerate(shown[:i]) if other.item == each.item]
        assert len(earlier) == 1 and i - earlier[0][0] >= 5
        first, second = earlier[0][1].responses, each.responses
        assert [text for _, text in first] == [text for _, text in reversed(second)]
        assert not {key for key, _ in first} & {key for key, _ in second}
    assert set(answers_per_item(store).values()) == {1}


def test_what_was_begun_is_finished_first_and_priority_before_that(tmp_path) -> None:
    store, (anna, ben) = make_store(tmp_path, compare_task(overlap=2), items=5)
    begun = answer_all(store, anna, most=1)[0].item
    assert queue.next_item(store, ben).item == begun
    with store.read() as tx:
        wanted = next(row[0] for row in tx.all("SELECT id FROM item ORDER BY id") if row[0] != begun)
    queue.prioritise(store, {wanted: 2.0})
    assert queue.next_item(store, anna).item == wanted
    with pytest.raises(BadAnswer):
        queue.prioritise(store, {wanted: float("nan")})


def test_a_random_share_reaches_items_that_need_would_not(tmp_path) -> None:
    """With random_share 1 the first 30 of 60 items are no prefix of the order by need."""
    store, (anna,) = make_store(tmp_path, compare_task(random_share=1.0), items=60, annotators=1)
    with store.read() as tx:
        by_need = [row[0] for row in tx.all("SELECT id FROM item ORDER BY shuffle")]
    drawn = [each.item for each in answer_all(store, anna, most=30)]
    assert len(set(drawn)) == 30 and set(drawn) != set(by_need[:30])


def test_contested_items_go_to_an_adjudicator_who_did_not_answer_them(tmp_path) -> None:
    """Two answers that contradict disagree by 1/2 > 0.4. The decision then stands and nobody else is asked."""
    store, (anna, ben) = make_store(tmp_path, compare_task(overlap=2), items=2)
    carl, dora = (people.add_person(store, name, "adjudicator").pseudonym for name in ("carl", "dora"))
    answer_all(store, anna, prefer_good)
    mine = answer_all(
        store, ben, lambda each: prefer_bad(each) if each.responses[0][1][-1] == "0" else prefer_good(each)
    )
    contested = next(each.item for each in mine if each.responses[0][1][-1] == "0")
    assert isinstance(queue.next_contested(store, anna), Nothing)  # answered it herself
    shown, given = queue.next_contested(store, carl)
    assert shown.item == contested
    texts = dict(shown.responses)
    assert {(who, texts[values["better"]["choice"]]) for who, values in given} == {(anna, "good 0"), (ben, "bad 0")}
    assert isinstance(queue.next_contested(store, dora), Nothing)  # Carl holds it
    with pytest.raises(Conflict, match="adjudication"):
        queue.answer(store, carl, "x", shown.id, prefer_good(shown))
    event = queue.adjudicate(store, carl, "d", shown.id, prefer_good(shown))
    assert queue.adjudicate(store, carl, "d", shown.id, prefer_good(shown)) == event
    assert isinstance(queue.next_contested(store, dora), Nothing)
    before = next(e.body["presentation"] for e in events(store, "answer") if e.body["item"] == contested)
    with pytest.raises(Conflict, match="decided"):
        queue.undo(store, anna, "u", before)
    assert verify(store).problems == []


def test_the_first_decision_stands_when_two_adjudicators_had_the_item(tmp_path) -> None:
    """Carl's lease runs out, Dora decides, Carl is too late, and is not shown the item again."""
    store, (anna, ben) = make_store(tmp_path, compare_task(overlap=2, lease_minutes=30), items=1)
    carl, dora = (people.add_person(store, name, "adjudicator").pseudonym for name in ("carl", "dora"))
    answer_all(store, anna, prefer_good), answer_all(store, ben, prefer_bad)
    theirs, _ = queue.next_contested(store, carl, now=0.0)
    shown, _ = queue.next_contested(store, dora, now=31 * MINUTE)
    queue.adjudicate(store, dora, "d", shown.id, prefer_good(shown))
    with pytest.raises(Conflict, match="somebody else has decided"):
        queue.adjudicate(store, carl, "c", theirs.id, prefer_bad(theirs))
    assert isinstance(queue.next_contested(store, carl), Nothing)
    assert len(events(store, "adjudicate")) == 1 and verify(store).problems == []


def test_more_answers_wanted_opens_what_was_complete(tmp_path) -> None:
    store, (anna, ben) = make_store(tmp_path, compare_task(overlap=1), items=3)
    answer_all(store, anna)
    assert isinstance(queue.next_item(store, ben), Nothing)
    store.set_task(compare_task(overlap=2))
    assert len(answer_all(store, ben)) == 3 and status(store)["complete"] == 3
    store.set_task(compare_task(overlap=1))
    assert isinstance(queue.next_item(store, ben), Nothing) and verify(store).problems == []


def test_progress_moves_by_one_whatever_was_shown(tmp_path) -> None:
    """A count that stood still at gold items would betray them."""
    known = {"better": {"choice": 0, "strength": 1}}
    gold = [Candidate(f"gold {i}", ("good", "bad"), kind="gold", gold=known) for i in range(20)]
    items = [Candidate(f"prompt {i}", ("good", "bad")) for i in range(20)]
    task = compare_task(gold_share=0.3, repeat_share=0.2, repeat_after=3)
    store, (anna,) = make_store(tmp_path, task, items=[*items, *gold], annotators=1)
    seen = [queue.progress(store, anna)]
    purposes = set()
    for i in range(20):
        shown = queue.next_item(store, anna)
        purposes.add(shown.purpose)
        queue.answer(store, anna, f"k{i}", shown.id, prefer_good(shown))
        seen.append(queue.progress(store, anna))
    assert purposes == {"task", "gold", "repeat"}
    assert [p["done"] for p in seen] == list(range(21)) and len({p["wanted"] for p in seen}) == 1


def test_only_active_annotators_are_served(tmp_path) -> None:
    store, (anna, _) = make_store(tmp_path, compare_task())
    people.change_person(store, "n0", active=False)
    for name in (anna, "p-unknown"):
        with pytest.raises(NotFound, match="no active annotator"):
            queue.next_item(store, name)


ASKED = task_of(
    {
        "questions": [
            {"id": "order", "type": "rank", "ties": True},
            {"id": "overall", "type": "rating", "scale": 7, "required": False},
            {
                "id": "flags",
                "type": "flags",
                "options": [{"id": "rude", "label": "Rude"}, {"id": "false", "label": "F"}],
            },
            {"id": "spans", "type": "spans", "kinds": ["wrong"], "severities": ["minor", "major"]},
            {"id": "rewrite", "type": "rewrite"},
            {"id": "good", "type": "accept", "required": False},
            {"id": "notes", "type": "text"},
        ]
    }
)
IDS, TEXTS = ["x", "y", "z"], ["one", "two \u202e", "three"]
ORDER = {"order": [["y"], ["x", "z"]]}


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ({}, {}),
        ({"overall": {"x": 1, "y": 7, "z": 4}}, {"overall": [1, 7, 4]}),
        ({"flags": {"z": ["false", "rude"]}}, {"flags": [[], [], ["rude", "false"]]}),
        (
            {"spans": {"y": [{"start": 0, "end": 3, "kind": "wrong", "severity": "major"}]}},
            {"spans": [[], [{"start": 0, "end": 3, "kind": "wrong", "severity": "major"}], []]},
        ),
        ({"rewrite": {"x": "One.", "y": "two \u202e", "z": " "}}, {"rewrite": ["One.", None, None]}),
        ({"rewrite": {"y": "two \u21c4"}}, {"rewrite": [None, None, None]}),  # as it was shown: unchanged
        ({"good": {"x": True, "y": False, "z": True}}, {"good": [True, False, True]}),
        ({"notes": "ok"}, {"notes": "ok"}),
    ],
)
def test_answers_are_stored_by_number_and_shown_again_by_id(given, stored) -> None:
    values = ASKED.canonical(ORDER | given, IDS, TEXTS)
    assert values == {"order": [[1], [0, 2]]} | stored
    again = ASKED.shown_values(values, IDS)
    assert ASKED.canonical(again, IDS, TEXTS) == values
    assert json.loads(json.dumps(again)) == again


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "object"),
        ({}, '"order" has no answer'),
        ({"order": [["x"], ["y"]]}, "exactly once"),
        ({"order": [["x"], ["y"], ["z", "z"]]}, "exactly once"),
        ({"order": [["x"], ["y"], ["w"]]}, "unknown response"),
        ({"order": [["x"], [], ["y", "z"]]}, "tiers"),
        ({"order": [[["x"]], ["y"], ["z"]]}, "unknown response"),
        (ORDER | {"stars": 5}, 'no question "stars"'),
        (ORDER | {"overall": {"x": 8}}, "from 1 to 7"),
        (ORDER | {"overall": {"x": True}}, "from 1 to 7"),
        (ORDER | {"overall": {"x": 2.5}}, "from 1 to 7"),
        (ORDER | {"flags": {"x": ["nice"]}}, "list of flags"),
        (ORDER | {"flags": {"x": [["rude"]]}}, "list of flags"),
        (ORDER | {"spans": {"x": [{"start": 0, "end": 4, "kind": "wrong", "severity": "minor"}]}}, "from 1 to 3"),
        (ORDER | {"spans": {"x": [{"start": 1, "end": 1, "kind": "wrong", "severity": "minor"}]}}, "from 2 to 3"),
        (ORDER | {"spans": {"x": [{"start": 0, "end": 2, "kind": "odd", "severity": "minor"}]}}, "kind"),
        (ORDER | {"spans": {"x": [{"start": 0, "end": 2, "kind": "wrong"}]}}, "severity"),
        (ORDER | {"spans": {"x": [{"start": 0, "end": 2, "kind": "wrong", "html": "<b>"}]}}, "expected start"),
        (ORDER | {"rewrite": {"x": "a" * 100_001}}, "100,001"),
        (ORDER | {"rewrite": {"x": 3}}, "expected text"),
        (ORDER | {"good": {"x": 1}}, "true or false"),
        (ORDER | {"notes": ["a"]}, "expected text"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused_with_the_reason(given, said: str) -> None:
    with pytest.raises(BadAnswer, match=said):
        ASKED.canonical(given, IDS, TEXTS)


@pytest.mark.parametrize("value", [{"choice": "tie"}, {"choice": "both_bad"}])
def test_ties_are_allowed_where_the_task_says_so(value) -> None:
    free = task_of({"questions": [{"id": "q", "type": "compare", "tie": True, "both_bad": True}]})
    strict = task_of({"questions": [{"id": "q", "type": "compare", "tie": False, "both_bad": False}]})
    assert free.canonical({"q": value}, ["x", "y"], ["a", "b"]) == {"q": value}
    with pytest.raises(BadAnswer, match="expected one of"):
        strict.canonical({"q": value}, ["x", "y"], ["a", "b"])


def test_half_a_character_is_refused_before_it_is_written(tmp_path) -> None:
    store, (anna,) = make_store(tmp_path, template("rewrite"), items=[Candidate("p", ("a",))], annotators=1)
    shown = queue.next_item(store, anna)
    with pytest.raises(BadAnswer, match="half a character"):
        queue.answer(store, anna, "k", shown.id, {"correction": {shown.responses[0][0]: "a\ud800"}})
    assert queue.answer(store, anna, "k", shown.id, {"correction": {shown.responses[0][0]: "b"}}).counted


@pytest.mark.parametrize(
    ("choices", "expected"),
    [("AA", 0), ("AB", 1 / 2), ("AAB", 1 / 3), ("ABT", 2 / 3), ("AABB", 1 / 2), ("A", 0), ("ATT", 1 / 3)],
)
def test_disagreement_is_the_share_outside_the_majority(choices: str, expected: float) -> None:
    said = {"A": {"choice": 0, "strength": 1}, "B": {"choice": 1, "strength": 1}, "T": {"choice": "tie"}}
    assert compare_task().disagreement([{"better": said[c]} for c in choices], 2) == pytest.approx(expected)


SEEN = "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"  # format characters with ink


def test_every_character_that_is_not_seen_is_shown() -> None:
    """Against Unicode's own categories: control (Cc) and format (Cf), but for line ends, tab and those with ink."""
    for code in range(0x110000):
        character = chr(code)
        if unicodedata.category(character) not in ("Cc", "Cf") or character in "\n\r\t" or character in SEEN:
            continue
        if 0x13430 <= code <= 0x13440:  # Egyptian hieroglyph controls: part of the picture
            continue
        assert visible(f"a{character}b") in ("a␣b", "a⇄b"), name_of(character)
    for kept in ("plain", "日本語", "é\n\t", "نمی\u200cخواهم", "👩\u200d🔬", SEEN):
        assert visible(kept) == kept


@pytest.mark.parametrize("sql", ["BY_NEED", "BY_CHANCE"])
def test_the_next_item_is_found_by_an_index_without_sorting_all(tmp_path, sql: str) -> None:
    """With 50,000 items a sort of all took 32 ms for each item; from the index the first that fits is taken."""
    store, (anna, _) = make_store(tmp_path, compare_task())
    values = (1, 0.0, anna, *([5] if sql == "BY_CHANCE" else []))
    with store.read() as tx:
        plan = [row[3] for row in tx.all("EXPLAIN QUERY PLAN " + getattr(deal, sql), *values)]
    assert "item_by" in plan[0] and not any("TEMP B-TREE" in step for step in plan)
