"""Diversity: counts small enough to do by hand."""

import math

import pytest

from palate.evaluation.diversity import distinct, distinct_per_prompt, ngrams, self_bleu, unique_share, words


def test_words_are_lower_case_with_marks_of_their_own():
    assert words("Don't. Stop 2 day") == ("don't", ".", "stop", "2", "day")
    assert words((3, 1)) == (3, 1)


def test_ngrams_of_a_short_text_are_none():
    assert ngrams("a b c", 2) == [("a", "b"), ("b", "c")]
    assert ngrams("a", 2) == []


def test_distinct_counts_over_all_texts_together():
    """Bigrams ab, ba, ab | ab: two different of four."""
    assert distinct(["a b a b", "a b"]) == 0.5
    assert distinct(["a b", "a b"], 1) == 0.5
    assert distinct(["", "a"]) == 0.0


def test_distinct_per_prompt_sees_what_the_overall_figure_hides():
    """Two prompts, each always answered alike, but differently from each other: 1/2 within each."""
    texts, prompts = ["a b", "a b", "c d", "c d"], ["p", "p", "q", "q"]
    assert distinct_per_prompt(texts, prompts) == 0.5
    assert distinct_per_prompt(["a b", "c d", "a b", "c d"], prompts) == 1.0
    assert distinct(texts) == distinct(["a b", "c d", "a b", "c d"]) == 0.5
    with pytest.raises(ValueError, match="2 texts, 1 prompts"):
        distinct_per_prompt(["a", "b"], ["p"])


def test_unique_share_ignores_case_and_spaces():
    assert unique_share(["A b.", "a  b .", "c"]) == pytest.approx(2 / 3)
    assert unique_share([]) == 0.0


def test_self_bleu_is_one_for_copies_and_zero_for_strangers():
    assert self_bleu(["a b c d e"] * 3) == pytest.approx(1.0)
    assert self_bleu(["a b c d", "e f g h"]) == 0.0
    assert self_bleu(["a b"]) == 0.0


def test_self_bleu_by_hand():
    """a b c against a b d, up to bigrams: unigrams 2/3, bigrams (1 + 1)/(2 + 1); equal lengths, so no penalty."""
    assert self_bleu(["a b c", "a b d"], n=2) == pytest.approx(math.sqrt(2 / 3 * 2 / 3))


def test_self_bleu_punishes_the_shorter_one():
    """a against a b: precision 1, penalty exp(1 - 2/1). a b against a: precision 1/2, no penalty."""
    assert self_bleu(["a", "a b"], n=1) == pytest.approx((math.exp(-1) + 0.5) / 2)
