"""Rankings and comparisons as judgements, ratings as rankings and judgements: the rules, the command, the said line."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from palate.cli import app
from palate.data.kinds import Comparison, Ranking
from palate.data.ranking import comparison_to_judgements, ranking_to_judgements
from palate.data.ratings import Rated, ratings_to_judgements, ratings_to_rankings
from palate.data.records import Judgement, read_records
from palate.errors import ConfigError, DataError

RANKED = {"prompt": "Hi", "responses": ["a", "b", "c", "d"], "ranks": [2, 1, 4, 2]}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(name: str, *records: dict[str, Any]) -> str:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return name


def convert(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["convert", *(str(a) for a in arguments)])
    assert result.exit_code == code, f"{result.exit_code}\n{result.stdout}\n{result.stderr}\n{result.exception}"
    return result


def kept(ranks: tuple[int, ...], **more: int) -> str:
    """One sign a response: + desirable, - undesirable, . left out."""
    names = "abcdefgh"[: len(ranks)]
    found = {j.response: j.desirable for j in ranking_to_judgements(Ranking("Hi", tuple(names), ranks), **more)}
    return "".join("+" if found.get(n) else "." if n not in found else "-" for n in names)


@pytest.mark.parametrize(
    ("ranks", "more", "wanted"),
    [
        ((1, 2, 3, 4), {}, "+..-"),
        ((1, 1, 2), {}, "++-"),
        ((1, 2, 2), {}, "+--"),
        ((1, 1, 1), {}, "..."),
        ((1, 2, 3, 4), {"top": 2}, "++.-"),
        ((1, 2, 3, 4), {"top": 2, "bottom": 2}, "++--"),
        ((1, 2, 3), {"top": 2, "bottom": 2}, "+.-"),  # the middle is both, and says nothing
        ((5, 90), {}, "+-"),  # ranks are an order, not a distance
    ],
)
def test_best_is_desirable_and_worst_is_not(ranks: tuple[int, ...], more: dict[str, int], wanted: str) -> None:
    assert kept(ranks, **more) == wanted


def test_turning_a_ranking_round_exchanges_good_and_bad() -> None:
    for ranks in product((1, 2, 3), repeat=3):
        turned = tuple(4 - rank for rank in ranks)
        assert kept(turned) == kept(ranks).translate(str.maketrans("+-", "-+"))


def test_a_comparison_is_two_judgements_unless_it_says_more() -> None:
    found = comparison_to_judgements(Comparison("Hi", "a", "b", annotator="ann", source="f:3"))
    assert [(j.response, j.desirable, j.annotator, j.source) for j in found] == [
        ("a", True, "ann", "f:3"),
        ("b", False, "ann", "f:3"),
    ]
    with pytest.raises(DataError, match='f:3.*"probability"'):
        comparison_to_judgements(Comparison("Hi", "a", "b", probability=0.5, source="f:3"))


def test_ratings_of_one_prompt_and_annotator_make_a_ranking() -> None:
    """Ann rated three answers, one of them twice (2 and 4: 3); Ben's scale is his own; one answer stands alone."""
    rated = [
        Rated("Hi", "a", 2, "ann"),
        Rated("Hi", "b", 3, "ann"),
        Rated("Hi", "c", 5, "ann"),
        Rated("Hi", "a", 4, "ann"),
    ]
    rated += [Rated("Hi", "a", 5, "ben"), Rated("Hi", "b", 1, "ben"), Rated("You", "a", 1, "ann", "f:9")]
    rankings, alone = ratings_to_rankings(rated)
    assert [(r.annotator, r.responses, r.ranks) for r in rankings] == [
        ("ann", ("a", "b", "c"), (2, 2, 1)),
        ("ben", ("a", "b"), (1, 2)),
    ]
    assert alone == ["f:9"]


def test_thresholds_belong_to_both_sides() -> None:
    rated = [Rated("Hi", str(r), r, None, f"f:{r}") for r in (1, 2, 3, 4, 5)]
    found, between = ratings_to_judgements(rated, good=4, bad=2)
    assert [(j.response, j.desirable) for j in found] == [("1", False), ("2", False), ("4", True), ("5", True)]
    assert between == ["f:3"]
    with pytest.raises(ConfigError, match="not below"):
        ratings_to_judgements(rated, good=3, bad=3)


def test_convert_makes_judgements_of_rankings_and_comparisons(here: Path) -> None:
    tied = {"prompt": "You", "responses": ["x", "y"], "ranks": [1, 1]}
    said = convert(lines("r.jsonl", RANKED, tied), "out.jsonl", "--kind", "judgements").stderr
    found = read_records("out.jsonl", "judgements")
    assert [(j.response, j.desirable) for j in found if isinstance(j, Judgement)] == [("b", True), ("c", False)]
    assert "2 read (palate), 2 judgements; skipped 1: 1: all responses are tied (r.jsonl:2)" in said
    pair = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    shown = convert(lines("p.jsonl", pair), "-", "--kind", "judgements").stdout.splitlines()
    assert [json.loads(line)["desirable"] for line in shown] == [True, False]


def test_convert_takes_the_best_two(here: Path) -> None:
    convert(lines("r.jsonl", RANKED), "out.jsonl", "--kind", "judgements", "--top", 2)
    assert sum(json.loads(line)["desirable"] for line in Path("out.jsonl").read_text().splitlines()) == 3  # a tie at 2


def test_judgements_stay_what_they_are(here: Path) -> None:
    record = {"prompt": "Hi", "response": "a", "desirable": False}
    assert json.loads(convert(lines("j.jsonl", record), "-", "--kind", "judgements").stdout) == record
    assert "--top" in convert("j.jsonl", "-", "--kind", "judgements", "--top", 2, code=2).stderr


def test_convert_reads_both_shapes_of_ratings(here: Path) -> None:
    together = {"prompt": "Hi", "responses": ["a", "b", "c"], "ratings": [3, 5, 3]}
    apart = [{"prompt": "Hi", "response": r, "rating": n} for r, n in zip("abc", (3, 5, 3), strict=True)]
    for name, records in (("one.jsonl", [together]), ("three.jsonl", apart)):
        shown = convert(lines(name, *records), "-", "--from", "ratings", "--kind", "rankings").stdout
        assert json.loads(shown) == {"prompt": "Hi", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]}
        shown = convert(name, "-", "--from", "ratings", "--kind", "judgements", "--good", 5, "--bad", 3).stdout
        assert [json.loads(line)["desirable"] for line in shown.splitlines()] == [False, True, False]


@pytest.mark.parametrize(
    ("record", "arguments", "code", "words"),
    [
        (
            {"prompt": "Hi", "response": "a", "rating": "5"},
            ["--kind", "rankings"],
            1,
            "r.jsonl:1: a rating is a string",
        ),
        ({"prompt": "Hi", "response": "a"}, ["--kind", "rankings"], 1, 'r.jsonl:1: no "rating" field'),
        ({"prompt": "Hi", "responses": ["a"], "ratings": [1, 2]}, ["--kind", "rankings"], 1, "equal length"),
        ({"prompt": "Hi", "response": "a", "rating": 5}, ["--kind", "rankings"], 1, "the only response"),
        ({"prompt": "Hi", "response": "a", "rating": 5}, ["--kind", "judgements"], 2, "--good and --bad"),
        ({"prompt": "Hi", "response": "a", "rating": 5}, ["--kind", "prompts"], 2, "cannot become prompts"),
    ],
)
def test_what_cannot_become_anything_is_said(
    here: Path, record: dict[str, Any], arguments: list[str], code: int, words: str
) -> None:
    assert words in convert(lines("r.jsonl", record), "out.jsonl", "--from", "ratings", *arguments, code=code).stderr
    assert not Path("out.jsonl").exists()


def test_a_stage_reads_rankings_as_judgements_and_says_by_which_rule(here: Path) -> None:
    from palate.config import load_config
    from palate.stage.records import read_sides

    where = lines("r.jsonl", RANKED, {"prompt": "You", "responses": ["x", "y"], "ranks": [2, 1]})
    config = load_config("kto", flags={"model": "m", "data.train": where, "out": "o", "data.validation_fraction": 0.0})
    with pytest.warns(
        UserWarning, match="2 rankings are read as 4 judgements: the best is desirable.*2 responses between"
    ):
        sides = read_sides(config)
    assert [(j.prompt, j.response, j.desirable) for j in sides.train] == [
        ("Hi", "b", True),
        ("Hi", "c", False),
        ("You", "x", False),
        ("You", "y", True),
    ]


def test_methods_are_listed_by_what_they_read(here: Path) -> None:
    def names(*arguments: str) -> set[str]:
        result = CliRunner().invoke(app, ["methods", "--json", *arguments])
        assert result.exit_code == 0
        return {each["name"] for each in json.loads(result.stdout)}

    assert "dpo" in names("--reads", "comparisons") and "sft" not in names("--reads", "comparisons")
    of_rankings = names("--data", lines("r.jsonl", RANKED))
    assert {"reward", "reward_listwise", "dpo", "kto", "ppo"} <= of_rankings and "sft" not in of_rankings
    assert names("--data", lines("d.jsonl", {"prompt": "a", "response": "b"})) == names(
        "--reads", "demonstrations"
    ) | names("--reads", "prompts")
