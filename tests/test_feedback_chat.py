"""Conversations with models as records, and the table of models: what becomes of votes, thumbs and signals."""

from __future__ import annotations

import json
import math
import random
import re

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from feedback_stores import compare_task, make_store
from palate.cli import app
from palate.data.records import read_records
from palate.errors import ConfigError, FeedbackError
from palate.feedback import chat_views, conversations
from palate.feedback.chat_views import Share
from palate.feedback.columns import wide
from palate.feedback.leaderboard import PRIOR_SD, Battle, _design, _fit, battles_of, leaderboard
from palate.feedback.store import Conflict, Store
from palate.feedback.upkeep import merge, verify


@pytest.fixture
def store(tmp_path) -> Store:
    return make_store(tmp_path, compare_task(), items=0)[0]


class Talk:
    """A conversation that is written straight into a store."""

    def __init__(self, store: Store, *names: str, who: str = "p-0") -> None:
        self.store, self.who = store, who
        mode = "battle" if len(names) == 2 else "chat"
        models = [{"name": name, "hash": f"hash-{name}"} for name in names]
        self.id = conversations.start(store, who, self.key(), mode, models)
        self.turns = 0

    @staticmethod
    def key() -> str:
        return f"{random.getrandbits(64):020d}"

    def turn(self, text: str, *answers: str, again: bool = False) -> Talk:
        with self.store.read() as tx:
            _, turn, version = conversations.next_turn(tx, self.who, self.id, again=again)
        ends, seeds = [True] * len(answers), [0] * len(answers)
        conversations.record_turn(
            self.store,
            self.who,
            self.key(),
            self.id,
            text,
            place=(turn, version),
            answers=answers,
            finished=ends,
            seeds=seeds,
        )
        self.turns = turn
        return self

    def vote(self, choice: str) -> Talk:
        conversations.vote(self.store, self.who, self.key(), self.id, self.turns, choice)
        return self

    def thumb(self, up: bool | None, version: int = 1) -> Talk:
        conversations.thumb(self.store, self.who, self.key(), self.id, self.turns, version, up)
        return self

    def signal(self, name: str, seconds: float | None = None, version: int = 1) -> Talk:
        conversations.signal(self.store, self.who, self.key(), self.id, self.turns, version, name, seconds)
        return self


# --- battles -----------------------------------------------------------------------------------------------------------


def test_a_vote_is_a_comparison_whose_chosen_is_the_winner(store) -> None:
    Talk(store, "a", "b").turn("hello", "left text", "right text").vote("right")
    Talk(store, "a", "b").turn("hi", "one", "two").vote("left")
    (first, second) = chat_views.battles(store).records
    assert (first.prompt, first.chosen, first.rejected) == ("hello", "right text", "left text")
    assert (second.prompt, second.chosen, second.rejected) == ("hi", "one", "two")
    assert first.annotator == "p-0" and first.probability is None
    seq = next(event.seq for event in store.events() if event.body.get("what") == "vote")
    assert first.source == f"feedback.db:{seq}"


def test_what_gives_no_comparison_is_counted_by_reason(store) -> None:
    Talk(store, "a", "b").turn("1", "x", "y").vote("tie")
    Talk(store, "a", "b").turn("2", "x", "y").vote("both_bad")
    Talk(store, "a", "b").turn("3", "same", "same").vote("left")
    Talk(store, "a", "b").turn("4", "x", "y")
    made = chat_views.battles(store)
    assert made.records == [] and made.left_out == {
        "ties": 1,
        "both bad": 1,
        "turns with equal answers": 1,
        "turns without a vote": 1,
    }
    half = chat_views.battles(store, ties="half")
    assert [(each.prompt, each.probability) for each in half.records] == [("1", 0.5)]


def test_later_turns_have_two_histories_and_give_a_comparison_only_when_asked(store) -> None:
    """Turn 2: the right side's answer was to "R1"; it is chosen, so with "winner" the prompt is its conversation."""
    Talk(store, "a", "b").turn("one", "L1", "R1").vote("left").turn("two", "L2", "R2").vote("right")
    made = chat_views.battles(store)
    assert [each.prompt for each in made.records] == ["one"]
    assert made.left_out == {"later turns, where each side had its own history": 1}
    later = chat_views.battles(store, histories="winner").records[1]
    assert [message["content"] for message in later.prompt] == ["one", "R1", "two"]
    assert (later.chosen, later.rejected) == ("R2", "L2")
    Talk(store, "a", "b").turn("x", "same", "same").vote("tie").turn("y", "L", "R").vote("left")
    assert [message["content"] for message in chat_views.battles(store).records[1].prompt] == ["x", "same", "y"]


def test_a_merged_store_keeps_its_conversations(store, tmp_path) -> None:
    Talk(store, "a", "b").turn("hello", "x", "y").vote("left")
    (tmp_path / "other").mkdir()
    other = make_store(tmp_path / "other", compare_task(), items=0)[0]
    Talk(other, "a", "b").turn("hi", "x", "y").vote("right")
    merge(store, other)
    assert sorted(each.prompt for each in chat_views.battles(store).records) == ["hello", "hi"]
    assert verify(store).problems == []


def test_somebody_elses_word_about_a_conversation_is_ignored(store) -> None:
    talk = Talk(store, "a", "b").turn("hello", "x", "y")
    body = {"what": "vote", "conversation": talk.id, "turn": 1, "choice": "left", "seconds": None}
    store.append("message", "p-1", body)
    assert chat_views.battles(store).left_out == {"turns without a vote": 1}


# --- thumbs and signals ------------------------------------------------------------------------------------------------


def test_the_last_thumb_counts_also_of_an_answer_that_was_made_anew(store) -> None:
    Talk(store, "a").turn("hello", "bad one").thumb(True).thumb(False).turn("hello", "good one", again=True).thumb(
        True, 2
    )
    made = chat_views.thumbs(store)
    assert [(each.response, each.desirable) for each in made.records] == [("bad one", False), ("good one", True)]


def test_signals_become_judgements_that_say_how_sure_they_are(store) -> None:
    """By the assumed shares 0.7 and 0.3: copied alone 0.7; made anew alone 0.3, so undesirable with 0.7; both cancel out."""
    Talk(store, "a").turn("1", "copied").signal("copy")
    Talk(store, "a").turn("2", "left behind").turn("2", "new", again=True)
    Talk(store, "a").turn("3", "both").signal("copy").turn("3", "newer", again=True)
    Talk(store, "a").turn("4", "rated").signal("copy").thumb(False)
    made = chat_views.signals(store)
    found = [(n.judgement.response, n.judgement.desirable, round(n.probability, 3), n.signals) for n in made.records]
    assert found == [("copied", True, 0.7, ("copy",)), ("left behind", False, 0.7, ("regenerate",))]
    assert made.left_out == {
        "answers without a signal that says anything": 2,
        "answers whose signals are not sure enough": 1,
        "answers with a thumb": 1,
    }
    assert chat_views.signals(store, least=0.75).records == []
    with pytest.raises(ConfigError, match="least"):
        chat_views.signals(store, least=1.5)


def test_signals_are_put_together_as_independent_evidence(store) -> None:
    """q = 0.6, copy 0.8, dwell_long 0.7: logit = l(.8) + l(.7) - l(.6), and of three answers of equal length the longest
    look is the long one."""
    Talk(store, "a").turn("1", "xxxx").signal("dwell", 1.0).turn("2", "xxxx").signal("dwell", 2.0).turn(
        "3", "xxxx"
    ).signal("dwell", 9.0).signal("copy")
    shares = {"all": Share(0.6, 50), "copy": Share(0.8, 50), "dwell_long": Share(0.7, 50)}
    (found,) = chat_views.signals(store, shares=shares).records
    logit = math.log(0.8 / 0.2) + math.log(0.7 / 0.3) - math.log(0.6 / 0.4)
    assert found.probability == pytest.approx(1 / (1 + math.exp(-logit))) and found.signals == ("copy", "dwell_long")


def test_shares_are_measured_where_thumbs_stand_beside_signals(store) -> None:
    """24 copied answers, 20 of them good: (20 + 1)/(24 + 2); of all 30 with a thumb 20 are good: 21/32; others as assumed."""
    talk = Talk(store, "a")
    for i in range(30):
        talk.turn(str(i), "answer").thumb(i < 20)
        if i < 24:
            talk.signal("copy")
    shares = chat_views.measured_shares(store)
    assert shares["copy"] == Share(21 / 26, 24) and shares["all"] == Share(21 / 32, 30)
    assert shares["regenerate"] == Share(0.3, 0) and "dwell_long" not in shares


# --- the table ---------------------------------------------------------------------------------------------------------


def drawn(scores: dict[str, float], votes: int, seed: int = 0, bias: float = 0.0, log_nu: float = 0.0) -> list[Battle]:
    """Votes by the model's own rule, three turns a conversation."""
    rng, names, found = np.random.default_rng(seed), sorted(scores), []
    for i in range(votes):
        left, right = rng.choice(names, 2, replace=False)
        z = scores[left] - scores[right] + bias
        weights = np.exp([z / 2, -z / 2, log_nu])
        found.append(
            Battle(
                str(left), str(right), ["left", "right", "tie"][rng.choice(3, p=weights / weights.sum())], str(i // 3)
            )
        )
    return found


def test_the_fit_is_the_mode_of_the_written_posterior() -> None:
    """Newton against L-BFGS on the formula of the module, written once more with autograd."""
    votes = drawn({"a": 1.0, "b": 0.0, "c": -0.5}, 200, bias=0.4, log_nu=-0.5)
    cells = sorted({(each.left, each.right, each.outcome) for each in votes})
    counts = np.array([sum((v.left, v.right, v.outcome) == cell for v in votes) for cell in cells], dtype=float)
    found, _ = _fit(_design([("abc".index(x), "abc".index(y), o) for x, y, o in cells], 3), counts)
    theta = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        total = (theta**2).sum() / (2 * PRIOR_SD**2)
        for vote in votes:
            z = theta["abc".index(vote.left)] - theta["abc".index(vote.right)] + theta[3]
            logits = torch.stack([z / 2, -z / 2, theta[4]])
            total = total - logits.log_softmax(0)[["left", "right", "tie"].index(vote.outcome)]
        total.backward()
        return total

    optimiser.step(loss)
    assert found == pytest.approx(theta.detach().numpy(), abs=1e-5)


def test_the_table_does_not_depend_on_the_order_of_the_votes() -> None:
    votes = drawn({"a": 0.5, "b": 0.0, "c": -0.5}, 150)
    shuffled = votes[:]
    random.Random(1).shuffle(shuffled)
    renamed = [Battle(v.left, v.right, v.outcome, f"x{hash(v.cluster) % 1000}-{v.cluster}") for v in reversed(votes)]
    table = leaderboard(votes, resamples=200)
    assert leaderboard(shuffled, resamples=200) == table == leaderboard(renamed, resamples=200)


def test_models_that_differ_are_ranked_and_a_left_bias_is_not_theirs() -> None:
    """Distances of 1.5 logits and 1,200 votes: all ranks settle; the truth 1.5 x 174 points is inside each interval."""
    table = leaderboard(drawn({"a": 1.5, "b": 0.0, "c": -1.5}, 1200, bias=1.0), resamples=300)
    assert [(each.name, each.best, each.worst) for each in table.standings] == [("a", 1, 1), ("b", 2, 2), ("c", 3, 3)]
    assert table.ranked and len(table.separated) == 3
    for each, truth in zip(table.standings, (1.5, 0.0, -1.5), strict=True):
        assert each.low < 1000 + 400 / math.log(10) * truth < each.high
    assert table.left_share == pytest.approx(1 / (1 + math.exp(-1.0)), abs=0.07)


def test_equal_models_are_not_ranked() -> None:
    """Four equal models, 10 tables of 90 votes: at a joint level of 95 % a false separation is rare (at most 2 of 10 has
    probability 0.99 at 5 % each)."""
    wrong = 0
    for seed in range(10):
        table = leaderboard(drawn(dict.fromkeys("abcd", 0.0), 90, seed), resamples=150)
        wrong += bool(table.separated)
    assert wrong <= 2


def won(i: int, *, by_a: bool, cluster: int) -> Battle:
    """A vote between a and b, who change sides from one to the next."""
    left, right = ("a", "b") if i % 2 else ("b", "a")
    return Battle(left, right, "left" if (left == "a") == by_a else "right", str(cluster))


@pytest.mark.parametrize("wins", [1, 3, 5])
def test_a_few_wins_without_a_loss_settle_nothing(wins) -> None:
    """A bootstrap alone would say so: every resample of n wins is n wins. Two-sided sign test of 5 of 5: p = 0.06."""
    table = leaderboard([won(i, by_a=True, cluster=i) for i in range(wins)], resamples=200)
    assert table.separated == () and [(each.best, each.worst) for each in table.standings] == [(1, 2), (1, 2)]


def test_turns_of_one_conversation_are_not_so_many_independent_votes() -> None:
    """The same 60 votes: as 60 conversations they separate the models, as 4 conversations of 15 equal votes they do not."""
    apart = [won(i, by_a=i < 45, cluster=i) for i in range(60)]
    together = [won(i, by_a=i < 45, cluster=i // 15) for i in range(60)]
    one, other = (leaderboard(votes, resamples=300) for votes in (apart, together))
    assert one.separated == (("a", "b"),) and other.separated == ()
    assert one.standings[0].score == pytest.approx(other.standings[0].score)


def test_a_model_that_always_stood_on_the_left_is_not_ranked_by_that() -> None:
    """45 of 60 for the left side: it may be the side; with the sides changing (above) it is the model."""
    votes = [Battle("a", "b", "left" if i < 45 else "right", str(i)) for i in range(60)]
    assert leaderboard(votes, resamples=200).separated == ()


def test_models_that_never_met_are_not_put_into_one_table() -> None:
    with pytest.raises(FeedbackError, match="c, d never met a, b"):
        leaderboard([Battle("a", "b", "left", "1"), Battle("c", "d", "left", "2")])
    with pytest.raises(FeedbackError, match="no vote"):
        leaderboard([])


def test_one_name_for_two_models_is_told_apart_by_content(store) -> None:
    Talk(store, "a", "b").turn("hello", "x", "y").vote("both_bad")
    new = [{"name": "a", "hash": "other-content"}, {"name": "b", "hash": "hash-b"}]
    name = conversations.start(store, "p-0", Talk.key(), "battle", new)
    place = {"place": (1, 1), "answers": ["x", "y"], "finished": [True] * 2, "seeds": [0, 0]}
    conversations.record_turn(store, "p-0", Talk.key(), name, "hi", **place)
    conversations.vote(store, "p-0", Talk.key(), name, 1, "left")
    found = battles_of(conversations.conversations(store), by="annotator")
    assert [(each.left, each.right, each.outcome, each.cluster) for each in found] == [
        ("a@hash-a", "b", "tie", "p-0"),
        ("a@other-co", "b", "left", "p-0"),
    ]


def test_a_turn_that_came_elsewhere_meanwhile_is_not_overwritten(store) -> None:
    talk = Talk(store, "a").turn("one", "x")
    with pytest.raises(Conflict, match="went on elsewhere"):
        conversations.record_turn(
            store, "p-0", talk.key(), talk.id, "late", place=(1, 1), answers=["y"], finished=[True], seeds=[0]
        )


# --- commands ----------------------------------------------------------------------------------------------------------


def test_the_table_has_straight_columns_where_a_model_has_a_chinese_name(store) -> None:
    Talk(store, "微调", "new").turn("q", "fine", "poor").vote("left")
    said = CliRunner().invoke(app, ["label", "arena-table", str(store.path)]).output
    *table, counts, _ = said.splitlines()
    up_to_the_score = [re.match(r"\S+ +\S+ +\S+", line) for line in table]
    assert len(table) == 3 and len({wide(found[0]) for found in up_to_the_score if found}) == 1
    assert counts.startswith("1 vote in 1 conversation;")


def test_exports_and_the_table_by_command(store, tmp_path) -> None:
    for i in range(3):
        Talk(store, "good", "bad").turn(f"q{i}", "fine", "poor").vote("left")
    Talk(store, "good").turn("hello", "fine").thumb(True).turn("more", "copied").signal("copy")
    run = CliRunner()
    path = str(store.path)
    for kind, read_as in (("battles", "comparisons"), ("thumbs", "judgements"), ("signals", "judgements")):
        out = tmp_path / f"{kind}.jsonl"
        result = run.invoke(app, ["label", "export", path, "--as", kind, "-o", str(out)])
        assert result.exit_code == 0, result.output
        assert len(read_records(str(out), read_as)) == {"battles": 3, "thumbs": 1, "signals": 1}[kind]
    noisy = json.loads((tmp_path / "signals.jsonl").read_text())
    assert (noisy["desirable"], noisy["probability"], noisy["signals"]) == (True, 0.7, ["copy"])
    about = json.loads((tmp_path / "signals.jsonl.provenance.json").read_text())
    assert about["options"]["shares"]["copy"] == {"share": 0.7, "measured_on": 0}
    table = run.invoke(app, ["label", "arena-table", path])
    assert table.exit_code == 0 and "1-2" in table.output and "not settled" in table.output, table.output
    assert "3 votes in 3 conversations" in table.output
    as_json = json.loads(run.invoke(app, ["label", "arena-table", path, "--json"]).output)
    assert as_json["ranked"] is False and [each["name"] for each in as_json["standings"]] == ["good", "bad"]
    wrong = run.invoke(app, ["label", "export", path, "--as", "thumbs", "--ties", "half"])
    assert wrong.exit_code == 2
    one = run.invoke(app, ["label", "arena", path, "--model", "somewhere"])
    assert one.exit_code == 2 and "two models" in one.output
