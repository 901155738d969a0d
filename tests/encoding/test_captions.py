"""Captions: tags in another order, a trigger word, and nothing left of them, each a function of seed, step and global row."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import pytest
import torch

from immiscible.encoding.arguments import CaptionArguments
from immiscible.encoding.captions import CaptionRules
from immiscible.errors import UserError
from immiscible.randomness import Draws

CPU = torch.device("cpu")


def draws(step=0, first_row=0, seed=0):
    return Draws(seed, step, first_row, CPU)


def test_captions_are_told_as_they_are_unless_a_rule_says_otherwise():
    captions = ["a, b ,c", "", "d"]
    assert CaptionRules().told(CaptionRules().drawn(captions, draws())) == captions


def test_each_order_of_the_tags_but_the_kept_ones_comes_equally_often():
    rules = CaptionRules(shuffled=True, kept=1)
    found = Counter(rules.drawn(["first, a,b ,  c"] * 6000, draws()))
    assert found.keys() == {", ".join(("first", *order)) for order in permutations("abc")}
    assert all(abs(count - 1000) < 5 * (1000 * 5 / 6) ** 0.5 for count in found.values())


def test_an_order_is_of_its_seed_step_and_row_whatever_the_split_over_ranks():
    rules, captions = CaptionRules(shuffled=True, empty=0.3), ["a, b, c, d, e, f, g, h"] * 24
    whole = rules.drawn(captions, draws())
    assert whole == [text for row in range(0, 24, 8) for text in rules.drawn(captions[:8], draws(first_row=row))]
    assert len(set(whole)) > 10 and "" in whole
    assert rules.drawn(captions, draws(step=1)) != whole != rules.drawn(captions, draws(seed=1))


def test_dropping_draws_what_it_drew_before_there_were_rules():
    dropped = draws().uniform("empty_prompt", 64) < 0.25
    found = CaptionRules(empty=0.25).drawn(["a, b"] * 64, draws())
    assert found == ["" if drop else "a, b" for drop in dropped.tolist()] and CaptionRules(empty=0.25, shuffled=True).drawn(
        ["a"] * 64, draws()
    ) == ["" if drop else "a" for drop in dropped.tolist()]


@pytest.mark.parametrize(
    ("caption", "told"),
    [
        ("a dog", "sks, a dog"),
        ("a photo of sks dog", "a photo of sks dog"),
        ("dog,sks,tree", "dog,sks,tree"),
        ("sksy dog", "sks, sksy dog"),
        ("", ""),
    ],
)
def test_a_trigger_word_stands_first_where_it_is_not_there(caption, told):
    rules = CaptionRules(trigger="sks")
    assert rules.told([caption]) == [told] == rules.told([told])


def test_other_separators_and_triggers_of_several_words():
    rules = CaptionRules(shuffled=True, separator=" |", kept=2, trigger="my dog")
    assert rules.drawn(["a |b |c"], draws()) == ["a | b | c"]
    assert rules.told(["a | b", "x | my dog | y", "my  dog"]) == ["my dog | a | b", "x | my dog | y", "my  dog"]
    assert CaptionRules(trigger="sks, dog").told(["red", "sks, dog, red"]) == ["sks, dog, red"] * 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"keep_tokens": 2}, "--keep_tokens 2 is of --shuffle_captions"),
        ({"trigger_word": " sks"}, "--trigger_word ' sks' must not begin or end with blanks"),
    ],
)
def test_what_does_not_go_together_is_one_line(flags, says):
    with pytest.raises(UserError, match=says):
        CaptionArguments(**flags).check()
