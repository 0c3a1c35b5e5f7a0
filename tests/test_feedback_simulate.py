"""Simulated annotators through the HTTP interface, candidates for them to judge, and what comes next."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx2")
from typer.testing import CliRunner

from feedback_stores import answer_all, make_store, prefer_bad, prefer_good
from palate.cli import app
from palate.errors import ConfigError, DataError, FeedbackError
from palate.feedback import people, queue, views
from palate.feedback.items import Candidate, read_candidates
from palate.feedback.simulated_people import Character, answer_values, gold_of, impressions, simulate
from palate.feedback.store import Store
from palate.feedback.task import Task, task_of
from palate.feedback.upkeep import verify
from palate.models.load import save_model
from palate.texts.candidates import CHUNK, Plan, content_hash, sample_to_file, sample_to_store
from palate.texts.planning import plan_labels, set_next
from server_client import client
from tiny import tiny, tokenizer_of

CAREFUL = Character(temperature=0.0)
QUESTIONS: list[dict[str, Any]] = [
    {"id": "order", "type": "rank", "ties": True},
    {"id": "overall", "type": "rating", "scale": 7},
    {"id": "good", "type": "accept"},
    {"id": "flags", "type": "flags", "options": [{"id": "rude", "label": "Rude"}]},
    {"id": "errors", "type": "spans", "kinds": ["wrong"]},
    {"id": "fix", "type": "rewrite"},
    {"id": "why", "type": "text", "required": True},
]


def letters(prompts: list[Any], responses: list[str]) -> list[float]:
    """Longer is better: the gold preference of these tests."""
    return [float(len(text)) for text in responses]


def ranked_store(folder: Path, people: int = 3, items: int = 6, overlap: int = 3, seed: int = 0) -> Store:
    task = task_of({"questions": QUESTIONS, "distribution": {"overlap": overlap, "random_share": 0.0, "seed": seed}})
    texts = [Candidate(f"prompt {i}", ("x" * (i + 1), "y" * (i + 9), "z" * (i + 4))) for i in range(items)]
    return make_store(folder, task, texts, annotators=people)[0]


def act(store: Store, characters: dict[str, Character], answers: int, seed: int = 0, gold: Any = letters) -> Any:
    tokens = {name: people.issue_link(store, name) for name in characters}
    return simulate("http://here", tokens, gold, characters, answers=answers, seed=seed, client=lambda: client(store))


def test_careful_annotators_answer_every_question_by_the_gold_preference(tmp_path: Path) -> None:
    """6 items x 3 places: 18 answers of 3 people; y is longest, then z, then x, in every item."""
    store = ranked_store(tmp_path)
    acted = act(store, {f"n{i}": CAREFUL for i in range(3)}, answers=100)
    given = views.labels(store)
    assert acted.done and acted.answers == Counter({"n0": 6, "n1": 6, "n2": 6}) and len(given) == 18
    assert all(answer.values["order"] == [[1], [2], [0]] for answer in given)
    assert all(answer.values["overall"][1] == max(answer.values["overall"]) for answer in given)
    assert all(answer.values["good"] == [True] * 3 and answer.values["why"] == "simulated" for answer in given)
    assert all(answer.seconds is not None and answer.seconds > 0 for answer in given)
    assert verify(store).problems == []


def test_they_stop_at_the_number_of_answers(tmp_path: Path) -> None:
    store = ranked_store(tmp_path)
    acted = act(store, {f"n{i}": CAREFUL for i in range(3)}, answers=7)
    assert acted.answers == Counter({"n0": 3, "n1": 2, "n2": 2}) and not acted.done
    assert len(views.labels(store)) == 7


def test_the_same_seed_gives_the_same_answers(tmp_path: Path) -> None:
    """On two stores with the same pseudonyms, so that everybody sees the same; another seed says something else."""
    said = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        store = ranked_store(tmp_path / name)
        noisy = {f"n{i}": Character(temperature=5.0, side_bias=1.0, fatigue=1.0) for i in range(3)}
        act(store, noisy, answers=100, seed=seed)
        said.append([(a.annotator, a.prompt, a.shown, a.values, a.seconds) for a in views.labels(store)])
    assert said[0] == said[1] and said[0] != said[2]


def test_what_one_says_does_not_depend_on_who_else_is_there(tmp_path: Path) -> None:
    """p-0 alone, and after two others have taken places: the items come at other times, and are judged the same.

    Without side bias, so that the order on the screen does not matter.
    """
    said = []
    for names in (("n0",), ("n2", "n1", "n0")):
        (tmp_path / names[0]).mkdir()
        store = ranked_store(tmp_path / names[0], items=9, overlap=2)
        act(store, dict.fromkeys(names, Character(temperature=5.0)), answers=100)
        said.append({a.prompt: a.values["order"] for a in views.labels(store) if a.annotator == "p-0"})
    both = [prompt for prompt in said[0] if prompt in said[1]]
    assert len(both) >= 4 and [p for p in said[1] if p in both] != [p for p in said[0]][: len(both)]
    assert all(said[0][prompt] == said[1][prompt] for prompt in both)


def test_a_side_bias_beats_a_smaller_difference_of_gold_only() -> None:
    """x = 3 + 2 against 4: the first wins; against 6 it does not. Without noise."""
    biased = Character(temperature=0.0, side_bias=2.0)
    first = [impressions(biased, [3.0, other], ["a", "b"], ("n",), given=0) for other in (4.0, 6.0)]
    assert first == [[5.0, 4.0], [5.0, 6.0]]


def test_a_length_bias_counts_words() -> None:
    found = impressions(
        Character(temperature=0.0, length_bias=0.5), [1.0, 1.0], ["one", "one two three"], ("n",), given=0
    )
    assert found == [1.5, 2.5]


def test_noise_is_bradley_terry() -> None:
    """P(first above second) = sigmoid(difference / temperature) = sigmoid(1) = 0.731; 4,000 draws, three sd."""
    wins = 0
    for i in range(4000):
        x = impressions(Character(temperature=2.0), [3.0, 1.0], ["a", "b"], ("seed", i), given=0)
        wins += x[0] > x[1]
    expected = 1 / (1 + math.exp(-1))
    assert abs(wins / 4000 - expected) < 3 * math.sqrt(expected * (1 - expected) / 4000)


def test_fatigue_makes_answers_random_in_the_end() -> None:
    """exp(-2 * 100 / 100) = 0.135 of the items are looked at after 100 answers; the rest are right by chance."""
    tired = Character(temperature=0.0, fatigue=2.0)
    assert tired.attention(0) == 1.0 and tired.attention(100) == pytest.approx(math.exp(-2))
    right = [0, 0]
    for late in (0, 1):
        for i in range(2000):
            x = impressions(tired, [9.0, 0.0], ["a", "b"], ("s", i), given=100 * late)
            right[late] += x[0] > x[1]
    expected = math.exp(-2) + (1 - math.exp(-2)) / 2
    assert right[0] == 2000 and abs(right[1] / 2000 - expected) < 3 * math.sqrt(expected * (1 - expected) / 2000)


@pytest.mark.parametrize(
    ("x", "tie", "choice", "strength"),
    [([2.0, 1.5], 0.0, "a", 1), ([1.0, 2.5], 0.0, "b", 2), ([9.0, 1.0], 0.0, "a", 3), ([1.0, 1.2], 0.5, "tie", None)],
)
def test_comparisons_say_how_much_better(x: list[float], tie: float, choice: str, strength: int | None) -> None:
    question = {"id": "better", "type": "compare", "strengths": 3, "tie": True}
    found = answer_values([question], ["a", "b"], x, tie)["better"]
    assert (found["choice"], found.get("strength")) == (choice, strength)


def test_ties_are_made_only_where_the_task_has_them() -> None:
    def order(ties: bool) -> Any:
        return answer_values([{"id": "o", "type": "rank", "ties": ties}], "abc", [1.0, 1.1, 3.0], 0.5)["o"]

    assert order(True) == [["c"], ["b", "a"]] and order(False) == [["c"], ["b"], ["a"]]


def test_a_character_out_of_range_is_refused() -> None:
    for wrong in ({"reliability": 1.5}, {"temperature": -1.0}, {"fatigue": math.inf}, {"tie_width": -0.1}):
        with pytest.raises(FeedbackError, match="expected temperature"):
            Character(**wrong)


def test_gold_comes_from_a_file_of_scores_too(tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"
    file.write_text(json.dumps({"prompt": "p", "responses": ["a\u200b", "b"], "scores": [1, 0.5]}) + "\n")
    gold = gold_of(str(file))
    assert list(gold(["p", "p"], ["b", "a␣"])) == [0.5, 1.0]  # as the page shows it
    with pytest.raises(DataError, match="no score of the response 'c'"):
        gold(["p"], ["c"])
    file.write_text(json.dumps({"prompt": "p", "response": "a"}) + "\n")
    with pytest.raises(DataError, match='expected "responses" and "scores"'):
        gold_of(str(file))


def test_gold_that_is_no_number_is_said(tmp_path: Path) -> None:
    with pytest.raises(FeedbackError, match="gold gave"):
        act(ranked_store(tmp_path), {"n0": CAREFUL}, 1, gold=lambda prompts, responses: [math.nan] * len(responses))


def test_a_used_login_is_refused(tmp_path: Path) -> None:
    store = ranked_store(tmp_path)
    tokens = {"n0": people.issue_link(store, "n0")}
    for expected in (None, "was used already"):
        run: dict[str, Any] = {"characters": {"n0": CAREFUL}, "answers": 1, "client": lambda: client(store)}
        if expected is None:
            simulate("http://here", tokens, letters, **run)
        else:
            with pytest.raises(FeedbackError, match=expected):
                simulate("http://here", tokens, letters, **run)


def test_nobody_at_the_address_is_said(tmp_path: Path) -> None:
    store = ranked_store(tmp_path)
    (tmp_path / "taste.py").write_text("def long(prompts, responses):\n    return [len(r) for r in responses]\n")
    words = ["label", "simulate", str(store.path), "--gold", f"{tmp_path / 'taste.py'}:long", "--url"]
    # a port that was just given back: nobody listens there
    done = CliRunner().invoke(app, [*words, f"http://127.0.0.1:{_free_port()}"])
    assert done.exit_code == 2 and "no server answers there" in done.stderr


def _free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_token_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text(f"n0 annotator {'a1' * 32}\n")
    (tmp_path / "tokens.txt").chmod(0o644)
    words = ["label", "simulate", "--gold", "math:sqrt", "--token-file", str(tmp_path / "tokens.txt"), "-n", "1"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and "chmod 600" in done.stderr
    (tmp_path / "tokens.txt").chmod(0o600)
    done = CliRunner().invoke(app, [*words[:-1], "2"])
    assert done.exit_code == 2 and "expected at least 2" in done.stderr


# --- responses to judge --------------------------------------------------------------------------------------------

PROMPTS = [f"{a} {b} " for a, b in combinations("abcdefghij", 2)][: CHUNK + 4]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    found = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("models") / f"base{seed}"
        tokenizer = tokenizer_of()
        save_model(tiny(tokenizer=tokenizer, seed=seed), tokenizer, folder)
        found.append(str(folder))
    return found


def plan_of(bases: list[str], **more: Any) -> Plan:
    return Plan(bases, (0.7, 1.3), **({"k": 4, "decoding": {"max_new_tokens": 6}} | more))


def rank_task() -> Task:
    return task_of({"questions": [{"id": "order", "type": "rank"}]})


def test_candidates_are_different_and_dealt_over_models_and_temperatures(tmp_path: Path, bases: list[str]) -> None:
    out = tmp_path / "out.jsonl"
    done = sample_to_file(str(out), plan_of(bases), PROMPTS)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS and done.responses == sum(len(r["responses"]) for r in rows)
    assert all(len(set(row["responses"])) == len(row["responses"]) <= 4 for row in rows)
    full = [row for row in rows if len(row["responses"]) == 4]
    assert len(full) >= CHUNK / 2
    origins = Counter((s["model"], s["settings"]["temperature"]) for row in full for s in row["sources"])
    assert set(origins) == {(model, t) for model in bases for t in (0.7, 1.3)}
    assert {s["model_hash"] for row in rows for s in row["sources"]} == {content_hash(model) for model in bases}
    assert content_hash(bases[0]) != content_hash(bases[1]) and not list(tmp_path.glob("*.partial"))
    assert len(read_candidates(str(out))) == len(PROMPTS)


def test_an_interrupted_run_goes_on_and_gives_the_same(tmp_path: Path, bases: list[str]) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    sample_to_file(str(whole), plan_of(bases), PROMPTS)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_to_file(str(cut), plan_of(bases), PROMPTS, progress=stop)
    partial = tmp_path / "cut.jsonl.partial"
    assert not cut.exists() and len(partial.read_text().splitlines()) == 1 + CHUNK
    partial.write_text(partial.read_text() + '{"prompt": "half a li')
    done = sample_to_file(str(cut), plan_of(bases), PROMPTS)
    assert done.resumed == CHUNK and cut.read_bytes() == whole.read_bytes() and not partial.exists()


def test_a_partial_file_of_another_plan_is_begun_anew(tmp_path: Path, bases: list[str]) -> None:
    out = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.partial").write_text(json.dumps({"plan": "another"}) + "\n" + '{"prompt": "no"}\n' * CHUNK)
    done = sample_to_file(str(out), plan_of(bases[:1], k=2), PROMPTS[:2])
    assert done.resumed == 0 and [json.loads(line)["prompt"] for line in out.read_text().splitlines()] == PROMPTS[:2]


def test_sampling_into_a_store_resumes_and_adds_nothing_twice(tmp_path: Path, bases: list[str]) -> None:
    path = tmp_path / "f.db"
    calls = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 1:
            raise KeyboardInterrupt

    def make() -> Store:
        return Store.create(path, rank_task())

    with pytest.raises(KeyboardInterrupt):
        sample_to_store(path, plan_of(bases), PROMPTS, make=make, progress=stop)
    with Store.open(path) as store:
        before = _items(store)
    done = sample_to_store(path, plan_of(bases), PROMPTS, make=make, progress=stop)
    again = sample_to_store(path, plan_of(bases), PROMPTS, make=make)
    with Store.open(path) as store:
        after = _items(store)
    assert done.resumed == CHUNK and again.resumed == len(PROMPTS) and again.responses == 0
    assert after[: len(before)] == before and len({prompt for prompt, _ in after}) == len(after) <= len(PROMPTS)
    sample_to_file(str(tmp_path / "o.jsonl"), plan_of(bases), PROMPTS)
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert dict(after) == {row["prompt"]: row["responses"] for row in rows if len(row["responses"]) > 1}


def _items(store: Store) -> list[tuple[str, list[str]]]:
    with store.read() as tx:
        rows = tx.all("SELECT prompt, responses FROM item ORDER BY seq")
    return [(json.loads(prompt), [each["text"] for each in json.loads(texts)]) for prompt, texts in rows]


def test_what_repeats_is_drawn_again_and_then_counted(tmp_path: Path, bases: list[str]) -> None:
    """At a temperature near 0 the same text comes each time: one response stays, and prompts are counted as short."""
    cold = Plan(bases[:1], (1e-6,), k=3, decoding={"max_new_tokens": 4})
    done = sample_to_file(str(tmp_path / "out.jsonl"), cold, PROMPTS[:5])
    assert (done.responses, done.short) == (5, 5) and done.repeated >= 10  # 3 drawn of each, 1 kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"k": 10}, "1 to 9"), ({"temperatures": (0.0,), "k": 2}, "one response"), ({"models": []}, "no model")],
)
def test_plans_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan(**({"models": ["m"], "temperatures": (1.0,), "k": 4} | settings))


def test_the_command_says_counts_as_json(tmp_path: Path, bases: list[str]) -> None:
    words = [
        "sample",
        "-m",
        bases[0],
        "-m",
        bases[1],
        "--temperature",
        "0.7,1.3",
        "--max-new-tokens",
        "4",
        "-p",
        "a b ",
    ]
    done = CliRunner().invoke(app, [*words, "--k", "3", "--out", str(tmp_path / "out.jsonl"), "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["prompts"] == 1 and (tmp_path / "out.jsonl").exists()
    assert CliRunner().invoke(app, words).exit_code == 2  # two models without --k
    assert CliRunner().invoke(app, [*words, "--k", "3", "--samples", "2"]).exit_code == 2


# --- what next, and how much more ----------------------------------------------------------------------------------


def pair_store(folder: Path, items: int = 12, overlap: int = 4) -> tuple[Store, list[str]]:
    task = task_of(
        {
            "questions": [{"id": "better", "type": "compare", "strengths": 3}],
            "distribution": {"overlap": overlap, "random_share": 0.0},
        }
    )
    return make_store(folder, task, items, annotators=4)


def test_what_people_disagree_about_is_asked_first(tmp_path: Path) -> None:
    """Two people agree on 11 of 12 items and contradict each other on one: that one tells most, and comes first."""
    store, names = pair_store(tmp_path)
    answer_all(store, names[0], prefer_good)
    answer_all(store, names[1], lambda shown: (prefer_bad if shown.prompt == "prompt 3" else prefer_good)(shown))
    found = set_next(store.path, random_share=0.0)
    with store.read() as tx:
        (prompt,) = tx.one("SELECT prompt FROM item WHERE id = ?", found["first"][0]["item"])
    assert json.loads(prompt) == "prompt 3" and found["items"] == 12
    shown = queue.next_item(store, names[2])
    assert isinstance(shown, queue.Presentation) and shown.prompt == "prompt 3"


def test_a_dry_run_changes_nothing_and_the_random_share_is_kept(tmp_path: Path) -> None:
    store, _ = pair_store(tmp_path)
    before = store.last()
    found = set_next(store.path, count=10, random_share=0.3, dry_run=True)
    assert (found["items"], found["random"]) == (10, 3) and store.last() == before


def test_reward_models_that_disagree_say_what_comes_first(tmp_path: Path) -> None:
    """One likes long responses, one short ones: they disagree most where lengths differ most."""
    (tmp_path / "two.py").write_text(
        "def long(prompts, responses):\n    return [len(r.split()) for r in responses]\n\n\n"
        "def short(prompts, responses):\n    return [-len(r.split()) for r in responses]\n"
    )
    task = task_of({"questions": [{"id": "order", "type": "rank"}]})
    items = [Candidate(f"{w} ", ("a", "b" + " c d e" * i)) for i, w in enumerate("abcd")]
    store, _ = make_store(tmp_path, task, items)
    with pytest.raises(ConfigError, match="cannot disagree with itself"):
        set_next(store.path, rewards=["one"])
    rewards = [f"{tmp_path / 'two.py'}:long", f"{tmp_path / 'two.py'}:short"]
    tokenizer = tmp_path / "base"
    save_model(tiny(tokenizer=tokenizer_of()), tokenizer_of(), tokenizer)
    found = set_next(store.path, rewards=rewards, random_share=0.0, tokenizer=str(tokenizer))
    # margins +-3i: variance of two numbers m and -m with one degree of freedom is 2 m^2
    assert [each["value"] for each in found["first"]] == [2.0 * (3 * i) ** 2 for i in (3, 2, 1, 0)]


def test_a_plan_says_how_far_people_agree_and_what_that_allows(tmp_path: Path) -> None:
    """Two agree on 11 of 12 pairs: (1 + sqrt(2 * 11/12 - 1)) / 2 = 0.956."""
    store, names = pair_store(tmp_path, overlap=2)
    answer_all(store, names[0], prefer_good)
    answer_all(store, names[1], lambda shown: (prefer_bad if shown.prompt == "prompt 3" else prefer_good)(shown))
    done = CliRunner().invoke(app, ["label", "plan", str(store.path), "--json"])
    found = json.loads(done.stdout)
    assert (found["answers"], found["annotators"], found["pairs"]) == (24, 2, 12)
    assert found["agreement"][0] == pytest.approx(11 / 12) and found["limit"] == pytest.approx(0.9564, abs=1e-4)


def test_a_plan_with_too_few_runs_says_why_nothing_can_be_said(tmp_path: Path) -> None:
    task = task_of({"questions": [{"id": "better", "type": "compare"}]})
    store, (name, _) = make_store(tmp_path, task, [Candidate(f"{w} ", ("a b c", "d")) for w in "abcdef"])
    answer_all(store, name, lambda shown: {"better": {"choice": _long(shown), "strength": 1}})
    with pytest.raises(ConfigError, match="needs both"):
        plan_labels(store.path, runs=[(10, "x")])
    (tmp_path / "taste.py").write_text("def long(prompts, responses):\n    return [len(r) for r in responses]\n")
    tokenizer = tmp_path / "base"
    save_model(tiny(tokenizer=tokenizer_of()), tokenizer_of(), tokenizer)
    runs = [(10, f"{tmp_path / 'taste.py'}:long"), (20, f"{tmp_path / 'taste.py'}:long")]
    found = plan_labels(store.path, runs=runs, held_out=str(store.path), more=[100], tokenizer=str(tokenizer))
    assert found.curve is not None and found.curve.accuracies == (1.0, 1.0)  # the longer one was preferred
    assert "cannot be said" in found.found["100 more labels"] and found.why_not


def _long(shown: queue.Presentation) -> str:
    return max(shown.responses, key=lambda pair: len(pair[1]))[0]
