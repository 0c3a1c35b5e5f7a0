"""Distance and gain of a policy, measured from its own samples, and which of several points is on the front."""

from __future__ import annotations

import json
import math
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from palate.data.chat import Chat
from palate.data.encode import encode_records
from palate.data.kinds import Comparison, Prompt
from palate.errors import RunError
from palate.evaluation.frontier import less_is_better, means, pareto
from palate.models.forward import response_logprobs
from palate.models.load import load_policy, save_model
from palate.pipelines.frontier import trace
from palate.pipelines.measure import Yardstick, along, implicit, interval, last_held_out
from palate.types import Scored
from tiny import tiny, tokenizer_of, trained


def items_of(chat: Chat, *texts: str) -> list:
    items, _ = encode_records([Prompt(text) for text in texts], "prompts", chat, max_length=16)
    return items


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(tokenizer_of())


# -- the front -------------------------------------------------------------------------------------------------------


def slow_front(points: list[tuple[int, int]], less: tuple[bool, bool]) -> list[bool]:
    """By the words of the definition: beaten = somebody is as good in both and better in one."""

    def better(a: float, b: float, lower: bool) -> bool:
        return a < b if lower else a > b

    def beaten(p: tuple[int, int]) -> bool:
        for q in points:
            as_good = not any(better(p[i], q[i], less[i]) for i in (0, 1))
            if as_good and any(better(q[i], p[i], less[i]) for i in (0, 1)):
                return True
        return False

    return [not beaten(p) for p in points]


@pytest.mark.parametrize("less", [(True, False), (False, False), (True, True)])
def test_the_front_is_what_nobody_beats(less: tuple[bool, bool]) -> None:
    grid = list(product(range(4), repeat=2))
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [grid[i] for i in rng.integers(len(grid), size=6)]
        assert pareto(points, less) == slow_front(points, less)


def test_equal_points_are_both_on_the_front() -> None:
    assert pareto([(1.0, 2.0), (1.0, 2.0), (1.5, 2.0)], (True, False)) == [True, True, False]


def test_prices_and_gains_are_told_apart() -> None:
    prices = [
        name for name in ("kl", "length/no_eos", "loss", "nll", "score", "gold", "accuracy") if less_is_better(name)
    ]
    assert prices == ["kl", "length/no_eos", "loss", "nll"]


def test_intervals_go_by_prompt() -> None:
    """Four answers to each of two prompts that agree within a prompt: resamples give 0, 1/2 or 1 and nothing between."""
    found = means({"score": [0.0] * 4 + [1.0] * 4}, ["a"] * 4 + ["b"] * 4)["score"]
    assert found == (0.5, 0.0, 1.0)


# -- a policy --------------------------------------------------------------------------------------------------------


def test_the_kl_of_one_token_is_that_of_the_two_distributions(chat: Chat) -> None:
    """With one new token a response is a draw from softmax(logits): KL = sum p (log p - log q), exactly, by hand."""
    reference, policy = tiny(), trained(tiny())
    items = items_of(chat, "a b c")
    stick = Yardstick(chat, items, reference, max_new_tokens=1, samples_per_prompt=4000)
    ids = torch.tensor([items[0].rows[0].ids.tolist()])
    with torch.no_grad():
        p, q = (model(ids).logits[0, -1].double().log_softmax(-1) for model in (policy, reference))
    wanted = float((p.exp() * (p - q)).sum())
    spread = float(((p.exp() * (p - q) ** 2).sum() - wanted**2) ** 0.5) / math.sqrt(4000)
    assert wanted > 0.1  # a reference equal to the policy would prove nothing
    assert stick.measure(policy)["kl"][0] == pytest.approx(wanted, abs=4 * spread)


def test_the_reference_itself_is_at_distance_zero(chat: Chat) -> None:
    reference = tiny()
    found = Yardstick(chat, items_of(chat, "a b", "c d"), reference, max_new_tokens=4).measure(reference)
    assert found["kl"] == [0.0, 0.0, 0.0]


def test_scores_parts_and_gold_are_the_means_of_what_the_rewards_say(chat: Chat) -> None:
    """A reward of 1 for the first prompt and 0 for the second: mean 1/2 however often each is answered."""

    class First:
        def __call__(self, tokens):
            which = (tokens.group == 0).float()
            return Scored(which, {"twice": 2 * which})

    items = items_of(chat, "a b", "c d")
    found = Yardstick(chat, items, None, First(), First(), max_new_tokens=3, samples_per_prompt=5).measure(tiny())
    assert found["score"][0] == found["gold"][0] == 0.5 and found["score/twice"][0] == 1.0
    assert "kl" not in found and 1 <= found["length/response"][0] <= 3
    assert interval(found["diversity/distinct_2"]) is None and interval(found["score"]) is not None


def test_the_same_seed_measures_the_same(chat: Chat) -> None:
    policy, reference = trained(tiny()), tiny()
    stick = Yardstick(chat, items_of(chat, "a b", "c d", "e f"), reference, max_new_tokens=5, samples_per_prompt=2)
    assert stick.measure(policy) == stick.measure(policy)


def test_implicit_accuracy_and_margin_are_log_ratios_of_the_pair(chat: Chat) -> None:
    """Beside one pair at a time, summed by hand from ``response_logprobs`` of each side."""
    policy, reference = trained(tiny()), tiny()
    pairs = [Comparison("a b", "c d", "e"), Comparison("f g", "h", "i j k"), Comparison("l m", "n", "o")]
    items, _ = encode_records(pairs, "comparisons", chat, max_length=16)
    from palate.data.collate import collate

    leads = []
    for item in items:
        batch = collate([item], "comparisons")
        ratio = response_logprobs(policy, batch.tokens) - response_logprobs(reference, batch.tokens)
        leads.append(float((ratio[batch.chosen[0]] - ratio[batch.rejected[0]]).detach()))
    found = implicit(policy, reference, items, "comparisons")
    assert found["margin"][0] == pytest.approx(sum(leads) / 3, abs=1e-5)
    assert found["accuracy"][0] == sum(lead > 0 for lead in leads) / 3
    assert implicit(reference, reference, items, "comparisons")["accuracy"][0] == 0.5  # all ties


def test_by_a_soft_label_the_likelier_response_is_the_better_one(chat: Chat) -> None:
    """A label of 0.2 for (c d, e) is one of 0.8 for (e, c d); one of 1/2 says nothing."""
    policy, reference = trained(tiny()), tiny()

    def found(*pairs: Comparison) -> dict[str, list[float]]:
        items, _ = encode_records(list(pairs), "comparisons", chat, max_length=16)
        return implicit(policy, reference, items, "comparisons")

    turned = found(Comparison("a b", "c d", "e", probability=0.2))
    as_said, reversed_ = found(Comparison("a b", "e", "c d")), found(Comparison("a b", "c d", "e"))
    assert turned["accuracy"] == as_said["accuracy"] != reversed_["accuracy"]
    assert turned["margin"][0] == pytest.approx(as_said["margin"][0], rel=1e-5)
    assert found(Comparison("a b", "c d", "e", probability=0.5)) == {}


def test_checkpoints_are_walked_in_order_with_their_own_weights(tmp_path: Path) -> None:
    tokenizer = tokenizer_of()
    save_model(tiny(tokenizer=tokenizer), tokenizer, tmp_path / "model")
    for step in (10, 2):
        folder = tmp_path / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        moved = {f"policy.{n}": p + step for n, p in tiny(tokenizer=tokenizer).named_parameters()}
        save_file(moved | {"value.score": torch.zeros(1)}, folder / "weights.safetensors")
    policy = load_policy(tmp_path / "model", trainable=False)
    name, before = next((n, p.clone()) for n, p in policy.named_parameters())
    seen = [
        (step, float((dict(now.named_parameters())[name] - before).mean())) for step, now in along(tmp_path, policy)
    ]
    assert seen == [(2, pytest.approx(2.0, abs=1e-4)), (10, pytest.approx(10.0, abs=1e-4))]


def test_a_checkpoint_without_a_policy_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-1"
    folder.mkdir(parents=True)
    save_file({"reward.score": torch.zeros(1)}, folder / "weights.safetensors")
    with pytest.raises(RunError, match="holds no policy"):
        list(along(tmp_path, tiny()))


def test_the_last_evaluation_is_the_last(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "split": "validation", "loss": 2.0},
        {"step": 4, "split": "train", "loss": 9.0},
        {"step": 4, "split": "validation", "loss": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert last_held_out(tmp_path) == {"loss": 1.0}


# -- runs from one model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("best", "way"), [({}, [2, 4, 6]), ({"step": 4, "value": 0.5}, [2, 4])])
def test_the_last_point_of_a_run_is_the_model_that_it_saved(tmp_path: Path, best: dict, way: list[int]) -> None:
    """Checkpoints at 2, 4 and 6 whose weights tell them apart; the model has those of the last, or of the best, step."""
    tokenizer = tokenizer_of()
    save_model(tiny(), tokenizer, tmp_path / "start")
    (tmp_path / "gold.py").write_text("def length(prompts, responses):\n    return [len(r) for r in responses]\n")
    run = tmp_path / "run"
    for step in (2, 4, 6):
        now = trained(tiny(), seed=step)
        folder = run / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        save_file({f"policy.{n}": p.detach() for n, p in now.named_parameters()}, folder / "weights.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": step, "best": best if step > 2 else {}}))
        if step == way[-1]:
            save_model(now, tokenizer, run / "model")
    prompts = [Prompt("a b c"), Prompt("d e")]
    gold = f"{tmp_path / 'gold.py'}:length"
    found = trace(str(tmp_path / "start"), {"run": str(run)}, prompts, gold, max_new_tokens=4)["runs"]["run"]
    assert [(p["step"], p["final"]) for p in found] == [(step, step == way[-1]) for step in way]
    assert len({p["kl"][0] for p in found}) == len(found)  # or the next line would prove nothing
    # As a run of its own, without checkpoints, the model measures the same.
    shutil.rmtree(run / "checkpoints")
    (alone,) = trace(str(tmp_path / "start"), {"run": str(run)}, prompts, gold, max_new_tokens=4)["runs"]["run"]
    assert {**found[-1], "step": 0} == alone
