"""The kitchen: its text, its gold preference (every number derived from the list in ``tastes``), its tokenizer."""

import random

import pytest

from palate.errors import DataError
from palate.pipelines.kitchen import (
    all_prompts,
    draw_prompts,
    gold,
    gold_reward,
    mixed_response,
    perfect_response,
    split_prompts,
    tastes,
)
from palate.pipelines.kitchen.facts import KINDS
from palate.pipelines.kitchen.grammar import read_prompt, read_sentence, sentences

PROMPT = "What goes well with grilled salmon?"
PLAIN = "Try cucumber salad with the grilled salmon."


def test_the_world_is_large_enough_to_hold_prompts_out():
    prompts = list(all_prompts())
    assert len(prompts) == len(set(prompts)) > 3000
    train, held_out = split_prompts(1000, 200, seed=3)
    assert len(set(train)) == 1000
    assert len(set(held_out)) == 200
    assert not set(train) & set(held_out)
    assert draw_prompts(50, seed=1) == draw_prompts(50, seed=1) != draw_prompts(50, seed=2)


def test_every_prompt_is_understood():
    for prompt in all_prompts():
        task = read_prompt(prompt)
        assert task.subject in prompt
        assert task.wish in task.kind.wishes


def test_wishes_are_heard():
    assert read_prompt("Hello there. What goes well with pea soup? I cannot eat dairy.").wish == "dairy"
    assert read_prompt("My basil goes bad. What can I do?").wish == ""
    task = read_prompt("How do I keep brioche fresh? My fridge is broken.")
    assert (task.kind.name, task.family, task.subject, task.wish) == ("storage", "bakery", "brioche", "fridge")


def test_every_choice_is_told_apart_by_its_name_within_a_kind():
    for kind in KINDS:
        names = [choice.name for family in kind.choices.values() for choice in family]
        assert len(names) == len(set(names))
        assert set(kind.subjects) == set(kind.choices)


def test_every_prompt_has_several_perfect_answers():
    """+1.4 answer, +0.8 reason, +1.3 manners, at most a few words too many."""
    rng = random.Random(0)
    for prompt in draw_prompts(400, seed=0):
        task = read_prompt(prompt)
        assert sum(task.fits(c) for c in task.kind.choices[task.family]) >= 2
        assert 3.1 <= gold(prompt, perfect_response(prompt, rng)) <= 3.5


def test_ordinary_answers_leave_room():
    rng = random.Random(0)
    values = [gold(p, mixed_response(p, rng)) for p in draw_prompts(2000, seed=0)]
    assert 0.8 < sum(values) / len(values) < 1.6
    assert sum(v > 3.2 for v in values) / len(values) < 0.03


def test_ordinary_sentences_are_all_of_this_world_but_for_slips():
    rng = random.Random(1)
    texts = [mixed_response(p, rng) for p in draw_prompts(1000, seed=1)]
    broken = sum(any(read_sentence(s).role == "broken" for s in sentences(t)) for t in texts)
    assert 0 < broken < 60


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (PLAIN, 1.4),
        ("Try rye bread with the grilled salmon.", 1.0),
        ("Try cucumber salad with the grilled salmon because it cuts the fat.", 1.4 + 0.8),
        ("Try cucumber salad with the grilled salmon because it adds some crunch.", 1.4 + 0.5),
        (f"With pleasure. {PLAIN} Enjoy your meal.", 1.4 + 0.8 + 0.5),
        (f"Enjoy your meal. {PLAIN} With pleasure.", 1.4),
        (f"Not again. {PLAIN}", 1.4 - 1.2),
        (f"{PLAIN} Food is a matter of taste.", 1.4 - 0.4),
        ("Try cucumber salad with the baked cod.", -0.5),
        ("Pour mint water with the grilled salmon.", -0.5),
        ("Pour cucumber salad with the grilled salmon.", -1 - 1 - 0.1 * 2),
        (f"{PLAIN} Serve dill cream with the grilled salmon.", 1.4 - 0.5 - 0.2 * 2),
        (f"{PLAIN} {PLAIN}", 1.4 - 0.5 - 0.2 * 5),
        ("With pleasure.", -1 + 0.8),
        ("Try cucumber salad with the grilled", -1 - 1 - 1 - 0.1 * 1),
        ("", -1 - 3),
        ("the the the the the the", -1 - 0.2 * 3 - 1 - 1 - 0.1 * 1),
    ],
)
def test_gold_by_hand(response, expected):
    assert gold(PROMPT, response) == pytest.approx(expected)


def test_a_wish_rules_out_one_choice():
    answer = "Try dill cream with the grilled salmon."
    assert gold(PROMPT, answer) == 1.4
    assert gold(PROMPT + " No dairy, please.", answer) == 1.0
    assert gold(PROMPT + " No nuts, please.", answer) == 1.4


def test_words_after_the_twenty_second_cost():
    """4 + 7 + 9 words: none over. The next filler makes it 29: 7 over. Each filler is an empty sentence."""
    first = f"I hope this helps. {PLAIN} Some people like it and some people do not."
    assert tastes(PROMPT, first)["brief"] == pytest.approx(-0.4)
    second = first + " My grandmother spent her whole life in a kitchen."
    assert len(second.split()) == 29
    assert tastes(PROMPT, second)["brief"] == pytest.approx(-0.8 - 0.06 * 7)


def test_no_kind_of_rubbish_beats_a_plain_answer():
    rng = random.Random(0)
    words = PLAIN.lower().split() + ["because", "please", "mild", "soup", "kitchen", "enjoy", "thank"]
    rubbish = [" ".join(rng.choices(words, k=rng.randrange(1, 40))) + rng.choice(["", "."]) for _ in range(200)]
    rubbish += [" ".join([PLAIN] * n) for n in range(2, 8)] + ["Enjoy your meal. " * n for n in range(1, 8)]
    rubbish += [PLAIN[:n] for n in range(len(PLAIN))] + ["asdf qwer", "!!!", "...", "\n", "I think, therefore I am."]
    assert max(gold(PROMPT, r) for r in rubbish) < gold(PROMPT, PLAIN)
    assert gold(PROMPT, "word " * 500) == -10.0


def test_gold_as_a_reward_function():
    assert gold_reward([PROMPT, PROMPT], [PLAIN, ""], answer=["unused"] * 2) == [1.4, -4.0]


def test_a_question_of_another_world_is_refused():
    with pytest.raises(DataError, match="not a question of the kitchen"):
        gold("What is the capital of France?", PLAIN)


def test_the_tokenizer_gives_every_text_back():
    from palate.pipelines.kitchen.tokenizer import kitchen_tokenizer

    tokenizer = kitchen_tokenizer()
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    rng = random.Random(0)
    for text in [*(mixed_response(p, rng) for p in draw_prompts(50, seed=0)), "Ein Gruß, 你好!  two  spaces"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(PLAIN)["input_ids"]) <= 10
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": PLAIN}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert whole == asked + PLAIN + tokenizer.eos_token
