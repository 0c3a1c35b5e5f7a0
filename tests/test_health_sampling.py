"""Alarms of methods that sample: each rule on metrics made by hand. Real runs that go wrong: ``test_health_runs.py``."""

from __future__ import annotations

import random
from typing import Any

import pytest

from made_runs import PPO, RISING, Course, asked, gold, ramp, ran
from palate.health import collapse, kl, results, reward_hacking, updates
from palate.health.alarm import History
from palate.health.rewards import is_mastered, kinds, says_right_or_wrong, watched

# -- the distance to the reference -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "length", "alarmed"),
    [(19, 30, False), (22, 30, True), (22, 100, False), (60, 100, True), (300, 1000, False)],
)
def test_kl_explosion_is_above_20_nats_a_response_and_half_a_nat_a_token(
    level: float, length: float, alarmed: bool
) -> None:
    made = ran(kl__reference=level, length__response=length)
    assert (kl.kl_explosion(made) is not None) == alarmed


def test_one_batch_that_is_far_away_is_noise() -> None:
    for noisy in ({39}, {38, 39}):
        assert kl.kl_explosion(ran(kl__reference=lambda n, at=noisy: 500.0 if n in at else 3.0)) is None
    assert asked(kl.kl_explosion, ran(kl__reference=lambda n: 500.0 if n > 36 else 3.0)).numbers["kl_before"] < 5


def test_kl_explosion_names_the_setting_that_let_it_happen() -> None:
    far: dict[str, Course] = {"kl__reference": ramp(0, 90)}
    alarm = asked(kl.kl_explosion, ran(settings=PPO | {"method.kl_coef": 0.0}, **far))
    assert alarm.causes[0].startswith("nothing holds the policy back (method.kl_coef = 0)")
    assert {"method.kl_coef=0.05", "training.learning_rate=1e-05", "method.adaptive_kl_target=6"} <= set(alarm.remedies)
    alarm = asked(kl.kl_explosion, ran(score__std=8.0, noise=0.0, **far))
    assert "scores are large" in alarm.causes[1] and "standard deviation is 8" in alarm.causes[1]
    online = {"method.name": "online_dpo", "method.beta": 0.1, "training.learning_rate": 1e-6}
    assert "method.beta=0.2" in asked(kl.kl_explosion, ran(settings=online, **far)).remedies
    trpo = {"method.name": "trpo", "method.kl_coef": 0.05, "method.delta": 0.03}  # whose step knows no learning rate
    assert "method.delta=0.01" in asked(kl.kl_explosion, ran(settings=trpo, **far)).remedies


def test_an_adaptive_coefficient_may_overshoot_its_target_twice() -> None:
    settings = PPO | {"method.adaptive_kl_target": 15.0, "method.adaptive_kl_horizon": 10000.0}
    assert kl.kl_explosion(ran(kl__reference=25.0, settings=settings)) is None
    alarm = asked(kl.kl_explosion, ran(kl__reference=40.0, kl__coef=ramp(0.1, 0.4), settings=settings, noise=0.0))
    assert alarm.causes[0] == "the coefficient follows too slowly: kl/coef went from 0.1 to 0.4"
    assert alarm.remedies[0] == "method.adaptive_kl_horizon=2500"


def test_a_kl_that_scatters_about_zero_is_none_below_it() -> None:
    """Between batches 0.5 nats apart, the mean of ten has an error of 0.16: -0.1 is nothing, -1 is something."""
    noise = random.Random(3)
    about = [noise.gauss(0, 0.5) for _ in range(40)]
    assert kl.kl_negative(ran(kl__reference=lambda n: about[n] - 0.1)) is None
    assert kl.kl_negative(ran(kl__reference=-0.05)) is None  # surely below 0, and by nothing
    alarm = asked(kl.kl_negative, ran(kl__reference=lambda n: about[n] - 1.0, settings=PPO | {"sampling.top_p": 0.9}))
    assert "sampling.top_p = 0.9" in alarm.causes[0] and alarm.remedies[0] == "sampling.top_p=1"


def test_sampler_and_trainer_may_differ_by_rounding() -> None:
    rule = kl.sampler_disagrees
    assert rule(ran(kl__sampler=1e-5)) is None and asked(rule, ran(kl__sampler=1e-3))
    assert rule(ran(kl__sampler=lambda n: 1.0 if n == 38 else 0.0)) is None
    bfloat16 = PPO | {"dtype": "bfloat16", "engine": "vllm"}
    assert rule(ran(kl__sampler=1e-2, settings=bfloat16)) is None
    assert asked(rule, ran(kl__sampler=0.1, settings=bfloat16)).remedies == ["engine=embedded", "dtype=float32"]
    by_trainer = PPO | {"training.old_logprobs": "trainer"}
    assert "training.old_logprobs=trainer" not in asked(rule, ran(kl__sampler=1e-3, settings=by_trainer)).remedies
    assert rule(ran(kl__sampler=1e-3, settings=PPO | {"training.rollouts_ahead": 1})) is None  # one update behind


# -- reward hacking --------------------------------------------------------------------------------------------------


def test_gold_that_comes_down_from_its_best_while_the_score_rises() -> None:
    rule = reward_hacking.over_optimisation
    alarm = asked(rule, ran(score=RISING, score__gold=gold(2.0, -1.0), kl__reference=ramp(0, 12)))
    assert "score/gold, which is measured and not trained on, rose from" in alarm.evidence
    assert alarm.numbers["best"] > 1.3 and alarm.numbers["now"] < 0
    budget = next(remedy for remedy in alarm.remedies if remedy.startswith("method.kl_budget="))
    assert 3 < float(budget.partition("=")[2].partition(",")[0]) < 6  # the KL of batches 11 to 20 of 40
    assert "training.best_metric=score/gold training.best_is=highest, which keeps the best checkpoint" in alarm.remedies


@pytest.mark.parametrize(
    ("why", "courses"),
    [
        ("it lost a little of what it gained", {"score": RISING, "score__gold": gold(2.0, 1.6)}),
        ("the score falls with it", {"score": gold(2.0, -1.0), "score__gold": gold(2.0, -1.0)}),
        ("the score never rose", {"score": 0.2, "score__gold": gold(2.0, -1.0)}),
        ("it is flat", {"score": RISING, "score__gold": 0.5}),
        ("both rise", {"score": RISING, "score__gold": RISING}),
    ],
)
def test_what_is_no_over_optimisation(why: str, courses: dict[str, Course]) -> None:
    assert reward_hacking.over_optimisation(ran(**courses)) is None


def test_gold_that_is_lower_than_before_training_needs_no_best() -> None:
    falling = ran(score=RISING, score__gold=ramp(1.0, -1.0))
    assert "in the first batch and is -0." in asked(reward_hacking.over_optimisation, falling).evidence


def test_of_another_watched_part_less_may_be_better_unless_it_rose_with_the_score() -> None:
    other = {key.replace("gold", "rude"): value for key, value in PPO.items()}
    rule = reward_hacking.over_optimisation
    assert rule(ran(score=RISING, score__rude=ramp(1.0, -1.0), settings=other)) is None
    assert asked(rule, ran(score=RISING, score__rude=gold(2.0, -1.0), settings=other)).evidence.startswith("score/rude")
    cost = other | {"method.cost": "rude"}
    assert rule(ran(score=RISING, score__rude=gold(2.0, -1.0), settings=cost)) is None
    trained = PPO | {"reward.gold.weight": 1}  # a part of what is maximised is a trade, not a witness
    assert rule(ran(score=RISING, score__gold=gold(2.0, -1.0), settings=trained)) is None


def test_an_ensemble_that_no_longer_agrees() -> None:
    rule = reward_hacking.ensemble_disagrees
    assert asked(rule, ran(score=RISING, score__ensemble_std=ramp(0.2, 0.6))).numbers["now"] > 0.4
    assert rule(ran(score=RISING, score__ensemble_std=ramp(0.2, 0.3))) is None
    assert rule(ran(score=0.2, score__ensemble_std=ramp(0.2, 0.6))) is None


def test_a_reward_models_score_that_rises_by_more_than_five_standard_deviations() -> None:
    rule = reward_hacking.score_out_of_range
    assert asked(rule, ran(score=ramp(0, 8))).numbers["limit"] == pytest.approx(5.0, rel=0.2)
    assert rule(ran(score=ramp(0, 4))) is None
    assert rule(ran(score=ramp(0, 8), score__std=2.0)) is None  # a scale of its own
    function = {**PPO, "reward.judge.function": "rules.py:points"}
    del function["reward.judge.model"]
    assert rule(ran(score=ramp(0, 8), settings=function)) is None  # a program has seen everything


def test_length_hacking() -> None:
    rule = reward_hacking.length_hacking
    alarm = asked(rule, ran(score=RISING, length__response=ramp(30, 90), length__no_eos=0.3))
    assert "read samples.jsonl" in alarm.evidence and any("{length: -0.0" in remedy for remedy in alarm.remedies)
    assert "method.missing_eos_penalty=1" in alarm.remedies
    assert "the shorter ones" in asked(rule, ran(score=RISING, length__response=ramp(60, 20))).evidence
    assert rule(ran(score=RISING, length__response=ramp(30, 42))) is None
    assert rule(ran(score=0.2, length__response=ramp(30, 90))) is None
    assert rule(ran(score=RISING, length__response=ramp(3, 9))) is None  # too few tokens to speak of
    assert (
        rule(ran(score=RISING, score__gold=RISING, length__response=ramp(30, 90))) is None
    )  # gold says they are better
    checked = {"method.name": "grpo", "reward.check": "number"}
    assert rule(ran(score=ramp(0.1, 0.8), length__response=ramp(30, 90), settings=checked)) is None  # longer thought


# -- what becomes of the variety -------------------------------------------------------------------------------------


def test_mode_collapse_counts_pairs_of_tokens_as_a_share_and_as_a_number() -> None:
    rule = collapse.mode_collapse
    assert asked(rule, ran(diversity__distinct_2=ramp(0.4, 0.05))).numbers["number"] < 0.5
    assert rule(ran(diversity__distinct_2=ramp(0.4, 0.3))) is None
    # Twice the text of as many different pairs halves their share; half of it halves their number. Neither is collapse.
    assert (
        rule(
            ran(
                diversity__distinct_2=lambda n: 0.4 if n < 20 else 0.15, length__response=lambda n: 30 if n < 20 else 90
            )
        )
        is None
    )
    assert (
        rule(
            ran(diversity__distinct_2=lambda n: 0.4 if n < 20 else 0.9, length__response=lambda n: 30 if n < 20 else 8)
        )
        is None
    )


def test_a_collapse_in_the_second_batch_is_seen_against_the_first() -> None:
    alarm = asked(collapse.mode_collapse, ran(12, diversity__distinct_2=lambda n: 0.4 if n == 0 else 0.02))
    assert alarm.numbers["distinct_first"] == pytest.approx(0.4, rel=0.1)


def test_batches_without_a_pair_of_tokens_say_nothing_of_variety() -> None:
    """0 stands where no response has two tokens, as of yes and no; it is not "none differs"."""
    assert collapse.mode_collapse(ran(diversity__distinct_2=lambda n: 0.4 if n < 25 else 0.0)) is None
    assert collapse.mode_collapse(ran(diversity__distinct_2=0.0, length__response=1.0)) is None


def test_a_policy_that_knows_the_right_answer_is_sure_of_it_and_has_not_collapsed() -> None:
    rule = collapse.mode_collapse
    sure: dict[str, Course] = {"entropy": ramp(1.0, 0.01, over=25), "noise": 0.0}
    assert "method.entropy_coef=0.01" in asked(rule, ran(**sure)).remedies
    assert rule(ran(entropy=ramp(1.0, 0.2, over=25))) is None
    share = ramp(0.3, 0.95)
    right: dict[str, Course] = {"score": share, "score__std": lambda n: (share(n) * (1 - share(n))) ** 0.5}
    assert rule(ran(settings={}, **sure, **right)) is None
    alike: dict[str, Course] = {"diversity__distinct_2": ramp(0.4, 0.05, over=25), "noise": 0.0}
    assert rule(ran(settings={}, **alike, **right)) is None  # "The answer is 12."
    half: dict[str, Course] = {"score": 0.3, "score__std": 0.21**0.5}
    assert rule(ran(settings={}, **alike, **half)) and rule(
        ran(settings={}, **sure, **half)
    )  # alike, and no more right
    mastered: dict[str, Course] = {"score": 0.95, "score__std": (0.95 * 0.05) ** 0.5}
    assert rule(ran(settings={}, **sure, **mastered)) is None
    assert rule(ran(entropy=0.0)) is None  # as sure as in the beginning


def test_entropy_that_rises_without_a_better_score() -> None:
    rule = collapse.entropy_rises
    alarm = asked(rule, ran(entropy=ramp(1.0, 4.0), settings=PPO | {"method.entropy_coef": 0.05}))
    assert "method.entropy_coef = 0.05" in alarm.causes[0] and alarm.remedies[0] == "method.entropy_coef=0.005"
    assert rule(ran(entropy=ramp(1.0, 4.0), score=RISING)) is None  # it explores, and is paid for it
    assert rule(ran(entropy=ramp(0.1, 0.4))) is None
    assert rule(ran(entropy=ramp(1.0, 1.6))) is None


GRPO = {"method.name": "grpo", "samples_per_prompt": 4, "reward.check": "number", "sampling.temperature": 1.0}


def test_nothing_to_learn_from_groups_that_are_all_alike() -> None:
    rule = collapse.nothing_to_learn
    never: dict[str, Course] = {"score": 0.01, "score__std": 0.0995}
    alarm = asked(rule, ran(groups__all_equal=0.99, settings=GRPO, noise=0.0, **never))
    assert alarm.causes[0].startswith("the prompts are too hard") and "easier prompts" in alarm.remedies
    assert any(remedy.startswith("samples_per_prompt=8") for remedy in alarm.remedies)
    assert rule(ran(groups__all_equal=0.9, settings=GRPO, noise=0.0, **never)) is None
    mastered: dict[str, Course] = {"score": 0.98, "score__std": 0.14}
    assert rule(ran(groups__all_equal=0.99, settings=GRPO, noise=0.0, **mastered)) is None
    assert rule(ran(9, groups__all_equal=0.99, settings=GRPO, noise=0.0, **never)) is None  # not ten batches yet


def test_nothing_to_learn_from_scores_that_are_all_the_same() -> None:
    rule = collapse.nothing_to_learn
    assert "tell the responses apart" in asked(rule, ran(score__std=lambda n: 1.0 if n < 5 else 0.0)).causes[0]
    assert asked(rule, ran(score__std=0.0))  # from the start
    assert rule(ran(score__std=ramp(1.0, 0.1))) is None
    assert rule(ran(score__std=lambda n: 0.5 if n else float("nan"))) is None


def test_what_a_reward_is_made_of_is_read_from_the_settings() -> None:
    def of(**settings: Any) -> History:
        return History(10, {f"reward.{key}": value for key, value in settings.items()})

    assert kinds(of(model="a")) == {"model"} and watched(of(model="a")) == []
    both = History(10, {"reward": [{"model": "a"}, {"function": "f:g", "weight": 0, "name": "gold"}, "runs/b"]})
    assert kinds(both) == {"model"} and watched(both) == ["gold"]
    assert kinds(of(**{"a.ensemble": ["b", "c"], "brief.length": -0.1})) == {"ensemble", "length"}
    assert watched(History(10)) == ["gold"]  # a loop of one's own
    assert kinds(History(10, {"reward": len})) == set()  # and a function in it
    bonus = of(**{"right.check": "number", "form.check": "regex", "form.weight": 0.2})
    assert says_right_or_wrong(bonus, [])
    assert not says_right_or_wrong(of(length=0.1), [])  # no length is right
    assert is_mastered(bonus, [{"score": 1.1}]) and not is_mastered(bonus, [{"score": 1.0}])


# -- updates ---------------------------------------------------------------------------------------------------------


def test_updates_that_are_too_large() -> None:
    rule = updates.updates_too_large
    alarm = asked(rule, ran(clip_fraction=0.4, settings=PPO | {"training.rollouts_ahead": 1}))
    assert {"method.epochs=2", "method.target_kl=0.02", "training.rollouts_ahead=0"} <= set(alarm.remedies)
    assert "clip_fraction 0.40" in alarm.evidence
    assert asked(rule, ran(kl__old=0.2)).numbers["kl_old"] == pytest.approx(0.2, rel=0.1)
    assert rule(ran(clip_fraction=0.25, kl__old=0.04)) is None
    assert rule(ran(kl__old=lambda n: 0.3 if n == 39 else 0.005)) is None  # one batch of ten
    gspo = {"method.name": "gspo", "method.clip_low": 3e-4, "method.clip_high": 4e-4}
    assert rule(ran(clip_fraction=0.6, settings=gspo)) is None and asked(rule, ran(kl__old=0.2, settings=gspo))


def test_samples_that_are_too_old() -> None:
    assert asked(updates.samples_too_old, ran(importance__effective=0.4))
    assert updates.samples_too_old(ran(importance__effective=0.6)) is None


def test_a_value_model_that_foresees_nothing() -> None:
    rule = updates.value_not_learning
    alarm = asked(rule, ran(value__explained_variance=-0.3))
    assert "method.value_clip=null" in alarm.remedies and "training.value_learning_rate=9e-05" in alarm.remedies[0]
    assert rule(ran(29, value__explained_variance=-0.3)) is None  # a new value model takes a few dozen batches
    assert rule(ran(49, 100, value__explained_variance=-0.3)) is None  # half of the run is not done
    assert rule(ran(30, value__explained_variance=lambda n: -9.0 if n < 12 else 0.2)) is None  # it took a while
    assert rule(ran(value__explained_variance=lambda n: -50.0 if n % 4 == 0 else 0.4)) is None  # single batches
    assert rule(ran(value__explained_variance=0.0)) is None  # the returns are all equal: nothing to foresee


def test_a_trust_region_that_takes_no_step() -> None:
    trpo = {"method.name": "trpo", "method.delta": 0.01, "method.damping": 0.1, "training.batch_size": 8}
    alarm = asked(
        updates.steps_refused, ran(trust_region__accepted=lambda n: float(n % 3 == 0), settings=trpo, noise=0.0)
    )
    assert alarm.remedies == ["method.damping=0.3", "method.delta=0.0033", "training.batch_size=16"]
    assert updates.steps_refused(ran(trust_region__accepted=lambda n: float(n % 3 > 0), noise=0.0)) is None


# -- results ---------------------------------------------------------------------------------------------------------


def test_a_score_that_training_makes_worse() -> None:
    rule = results.score_falls
    assert asked(rule, ran(score=ramp(1.0, 0.2))).numbers["now"] < 0.5
    assert rule(ran(score=ramp(1.0, 0.9))) is None  # less than a fifth of a standard deviation
    assert rule(ran(19, score=ramp(1.0, -1.0, over=19))) is None  # the first ten and the last would overlap
    assert rule(ran(score=ramp(1.0, 0.2), lagrange__multiplier=RISING)) is None  # another score in every batch


@pytest.mark.parametrize("name", ["preference__reference", "preference__mixture"])
def test_a_policy_that_loses_to_what_it_began_as(name: str) -> None:
    rule = results.loses_to_opponent
    assert asked(rule, ran(**{name: 0.42})).numbers["preference"] == pytest.approx(0.42, rel=0.05)
    assert rule(ran(**{name: 0.48})) is None
    assert rule(ran(noise=0.3, **{name: 0.45})) is None  # it swings


def test_responses_that_no_longer_end() -> None:
    rule = results.responses_cut
    alarm = asked(rule, ran(length__no_eos=ramp(0.05, 0.95)))
    assert "sampling.max_new_tokens=128" in alarm.remedies
    assert rule(ran(length__no_eos=ramp(0.05, 0.4))) is None
    assert rule(ran(length__no_eos=1.0)) is None  # texts that are continued up to a length


def test_a_cost_that_no_price_brings_down() -> None:
    rule = results.cost_out_of_reach
    settings = {"method.name": "ppo_lagrangian", "method.multiplier_max": 100.0, "method.cost_limit": 0.5}
    at_bound: dict[str, Course] = {"lagrange__multiplier": lambda n: min(100.0, 10.0 * n), "noise": 0.001}
    assert "method.multiplier_max=1000" in asked(rule, ran(settings=settings, cost=0.8, **at_bound)).remedies
    assert rule(ran(settings=settings, cost=0.5, **at_bound)) is None
    assert rule(ran(settings=settings, cost=0.8, lagrange__multiplier=50.0)) is None
