"""A generation is ended only when no choice of the tokens that are left could make it right."""

from itertools import product

import eval_world as world
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorllm.evaluation.matching import NEVER, TokenBound, holds_answer
from tensorllm.evaluation.protocol import STRICT

TOKENS = [" ", "a", "b", " ab", "ba ", "the", " the a", ".", "A b"]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(TOKENS), max_size=5).map("".join),
    st.text("ab the.", min_size=1, max_size=6),
    st.booleans(),
)
def test_the_bound_is_sound(text: str, answer: str, spanning: bool):
    tokens = TOKENS if spanning else [t for t in TOKENS if len(t.split()) < 2]
    missing = TokenBound(tokens).missing(text, answer)
    for more in range(min(missing, 4)):
        for chosen in product(tokens, repeat=more):
            assert not holds_answer(text + "".join(chosen), answer, STRICT), (chosen, missing)


def test_the_bound_is_of_use():
    reach = TokenBound(["Par", "is", " ", " New", "York", "x"])
    assert reach.missing("", "Paris") == 2
    assert reach.missing("it is Par", "Paris") == 1
    assert reach.missing("it is Pa", "Paris") == 2
    assert reach.missing("New", "New York") == 1
    assert reach.missing("new the ", "New York") == 1
    assert reach.missing("Paris x", "Paris") == 0
    assert reach.missing("", "Zürich") == 0  # not bounded
    assert reach.missing("", "Quito") >= NEVER


@pytest.mark.parametrize("word", ["Paris", "north", "teacher"])
def test_a_real_tokenizer_spells_its_words_in_as_few_tokens(word: str):
    tokenizer = world.tokenizer()
    reach = TokenBound(tokenizer.batch_decode([[i] for i in range(len(tokenizer))]))
    assert 1 <= reach.tokens(word.lower()) <= len(tokenizer(f" {word}").input_ids)
