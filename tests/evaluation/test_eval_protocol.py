"""Each quirk of the papers' scripts, switched alone, does what it says; strict does what is
right.
"""

from dataclasses import fields, replace

import eval_world as world
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.naive import find_answer_len

from tensorllm.data.example import Example
from tensorllm.errors import UserError
from tensorllm.evaluation.evaluate import score
from tensorllm.evaluation.matching import (
    holds_answer,
    normalised,
    surely_holds_answer,
    token_f1,
)
from tensorllm.evaluation.protocol import PAPER, PROTOCOLS, STRICT, Protocol

SUBSTRING = replace(STRICT, substring=True)


def test_strict_has_no_quirk_and_paper_has_all():
    assert not any(STRICT.quirks().values())
    assert all(PAPER.quirks().values())
    assert set(PAPER.quirks()) == {f.name for f in fields(Protocol)} - {"name"}
    with pytest.raises(UserError, match="Did you mean 'paper'"):
        PROTOCOLS["papr"]


@pytest.mark.parametrize(
    ("text", "answer", "strict", "substring"),
    [
        ("it lies in the north", "no", False, True),
        ("No, it does not", "no", True, True),
        ("The Beatles!", "beatles", True, True),
        ("he lives in the U.S. now", "US", True, False),
        ("in Paris,France", "Paris", False, True),  # SQuAD joins what only a sign divides
        ("an answer", "the answer", True, False),
        ("new  York", "New York", True, False),
        ("Parisian", "Paris", False, True),
        ("what?", "?", False, True),
        ("who ? me", "?", True, True),
        ("the", "The", True, True),
        ("", "x", False, False),
    ],
)
def test_matching(text: str, answer: str, strict: bool, substring: bool):
    assert holds_answer(text, answer, STRICT) is strict
    assert holds_answer(text, answer, SUBSTRING) is substring


@given(st.text("ab. nothe", max_size=20), st.text("ab. nothe", min_size=1, max_size=4), st.data())
def test_a_certain_verdict_stays(text: str, answer: str, data: st.DataObject):
    more = data.draw(st.text("ab. nothe", max_size=8))
    for protocol in (STRICT, SUBSTRING):
        if answer.strip() and surely_holds_answer(text, answer, protocol):
            assert holds_answer(text + more, answer, protocol)


def test_normalisation_and_f1_are_those_of_squad():
    assert normalised("The  U.S. of an Apple, a day!") == ["us", "of", "apple", "day"]
    assert token_f1("the cat sat", "a cat") == pytest.approx(2 * 1 / 3)
    assert token_f1("dog", "cat") == 0
    assert token_f1("cat cat", "cat cat cat") == pytest.approx(4 / 5)


def test_search_prompt_counts_an_answer_in_the_question():
    model, tokenizer = world.model("gptj"), world.tokenizer()
    example = Example("who likes Paris more than Otto likes", "Paris")
    quirk = replace(STRICT, search_prompt=True)
    assert score(model, tokenizer, [example], max_new_tokens=4)[0].correct is False
    assert score(model, tokenizer, [example], quirk, max_new_tokens=4)[0].correct is True


def test_masked_extra_token_divides_by_one_more():
    model, tokenizer = world.model("roberta"), world.tokenizer(masked=True)
    example = Example("the cat sings in", "Paris north")
    (plain,) = score(model, tokenizer, [example])
    (quirk,) = score(model, tokenizer, [example], replace(STRICT, masked_extra_token=True))
    assert quirk.log_probability == plain.log_probability
    assert quirk.answer_tokens == plain.answer_tokens + 1
    assert quirk.loss < plain.loss


def test_masked_bare_loss_leaves_the_special_tokens_out():
    model, tokenizer = world.model("roberta"), world.tokenizer(masked=True)
    example = Example("the cat sings in", "Paris")
    (quirk,) = score(model, tokenizer, [example], replace(STRICT, masked_bare_loss=True))
    ids = tokenizer("the cat sings in Paris", add_special_tokens=False).input_ids
    gold = ids[-1]
    with torch.inference_mode():
        logits = model(torch.tensor([[*ids[:-1], tokenizer.mask_token_id]])).logits[0, -1]
    assert quirk.log_probability == pytest.approx(float(logits.log_softmax(-1)[gold]), abs=1e-4)
    (plain,) = score(model, tokenizer, [example])
    assert plain.log_probability != pytest.approx(quirk.log_probability, abs=1e-3)


def test_unmasked_padding_is_the_batched_scripts_loss():
    """Groups of so many examples in order, padded on the left, no mask, positions from the pads
    on.
    """
    model, tokenizer = world.model("gptj"), world.tokenizer()
    examples = [e for e in world.questions(60) if not e.choices]
    examples = [replace(e, index=100 + i) for i, e in enumerate(examples)]  # groups cut at 102, 105
    quirk = replace(STRICT, unmasked_padding=3)
    rows = score(model, tokenizer, examples, quirk, max_new_tokens=4, batch_tokens=200)
    plain = score(model, tokenizer, examples, max_new_tokens=4)
    changed = 0
    for number in {e.index // 3 for e in examples}:
        group = [i for i, e in enumerate(examples) if e.index // 3 == number]
        full = [tokenizer(f"{examples[i].prompt} {examples[i].answer}").input_ids for i in group]
        width = max(map(len, full))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(f)) + f for f in full])
        with torch.inference_mode():
            log_p = model(ids).logits.log_softmax(-1)
        for row_of, i in enumerate(group):
            n = find_answer_len(full[row_of], examples[i].prompt, examples[i].answer, tokenizer)
            picked = log_p[row_of, -n - 1 : -1].gather(1, ids[row_of, -n:, None]).sum()
            assert rows[i].log_probability == pytest.approx(float(picked), abs=2e-4)
            assert rows[i].correct == plain[i].correct
            padded = len(full[row_of]) < width
            changed += padded and abs(rows[i].loss - plain[i].loss) > 1e-3
    assert changed > 5


def test_single_token_choices_is_about_the_tokenizer():
    tokenizer = world.tokenizer()
    long = Example("Anna is", "architect", ("architect", "poet"))
    quirk = replace(STRICT, single_token_choices=True)
    with pytest.raises(UserError, match=r"'architect' is \d"):
        score(world.model("gptj"), tokenizer, [long], quirk)
    assert score(world.model("gptj"), tokenizer, [long])[0].correct in (True, False)
    masked = world.tokenizer(masked=True)
    with pytest.raises(UserError, match=r"'architect' is \d"):
        score(world.model("roberta"), masked, [long], quirk)
