"""Reading shared beginnings once and branches side by side: against each row alone, as it is."""

import gc
from dataclasses import replace

import eval_world as world
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.naive import naive
from tiny_models import TINY, tiny_model
from transformers.activations import ACT2FN

from tensorllm.evaluation.activations import fuse_activations
from tensorllm.evaluation.causal import CausalBatch
from tensorllm.evaluation.encoding import Encoder
from tensorllm.evaluation.evaluate import score
from tensorllm.evaluation.forward import ModelForward
from tensorllm.evaluation.prompts import branched, read
from tensorllm.evaluation.scorer import make_scorer

CAUSAL = [name for name in TINY if TINY[name].task == "causal"]
ROWS = [[5, 9, 11, 4, 8, 7], [5, 9, 11, 6], [5, 9, 11, 4, 8, 7, 3]]
HEADS = [[[12, 4], [13]], [[20], [], [21, 22, 23]], [[9, 9]]]


class Counted(ModelForward):
    """A forward that notes how many tokens it was given."""

    def __init__(self, model):
        super().__init__(model)
        self.tokens = []

    def __call__(self, batch, **how):
        self.tokens.append(batch.ids_BT.numel())
        return super().__call__(batch, **how)


def alone(model, ids):
    """Logits of one sequence, as the model gives them without padding, cache or mask."""
    return model(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_a_shared_beginning_is_read_once_and_changes_no_logit(name):
    model = tiny_model(name)
    forward = Counted(model)
    found = read(forward, ROWS, keep=1, apart=9, grow=True)
    assert forward.tokens == [3, 3 * 4]  # not 3 * 7
    for row, ids in enumerate(ROWS):
        torch.testing.assert_close(
            found.logits[row, -1], alone(model, ids)[-1], rtol=1e-4, atol=1e-5
        )
        assert found.padded.ids_BT[row][found.padded.mask_BT[row]].tolist() == ids
        assert found.padded.positions_BT[row][found.padded.mask_BT[row]].tolist() == [
            *range(len(ids))
        ]
    assert found.cache.get_seq_length() == found.padded.ids_BT.shape[1]


@pytest.mark.parametrize("shared", [True, False], ids=["beginning", "whole"])
@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_branches_side_by_side_see_their_prompt_and_themselves(name, shared):
    model = tiny_model(name)
    forward = Counted(model)
    assert forward.obeys_masks(20)
    forward.tokens.clear()
    found = read(forward, ROWS, keep=5, apart=9 if shared else 0, branches=HEADS)
    assert len(forward.tokens) == 1 + shared
    for row, (ids, heads) in enumerate(zip(ROWS, HEADS, strict=True)):
        at = 5 - sum(map(len, heads))
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(found.logits[row, at - 1], alone(model, ids)[-1], **close)
        for head in heads:
            want = alone(model, ids + head)[len(ids) :]
            torch.testing.assert_close(found.logits[row, at : at + len(head)], want, **close)
            at += len(head)


@torch.no_grad()
def test_models_that_take_no_such_mask_are_told_from_others():
    assert not ModelForward(tiny_model("falcon", alibi=True)).obeys_masks(9)
    sliding = ModelForward(tiny_model("mistral", sliding_window=8))
    assert sliding.obeys_masks(8)
    assert not sliding.obeys_masks(9)


@pytest.mark.parametrize("model_type", ["gptj", "llama"])
def test_both_ways_to_score_choices_equal_the_naive_one(model_type, monkeypatch):
    model, tokenizer = world.model(model_type), world.tokenizer(bos=model_type == "llama")
    examples = [e for e in world.questions(60) if e.choices]
    long = [replace(e, choices=(*e.choices, f"{e.choices[0]} or {e.answer}")) for e in examples]
    plan = Encoder(tokenizer, 64, 0)(long)
    assert max(len(ids) - e.shared for e in plan for ids in e.full) > 2
    for obeys in (True, False):
        monkeypatch.setattr(ModelForward, "obeys_masks", lambda self, n, obeys=obeys: obeys)
        rows = score(model, tokenizer, long, max_new_tokens=0, batch_tokens=300)
        for e, row in zip(long, rows, strict=True):
            want = naive(model, tokenizer, e, 1, paper=False)
            assert row.choice_log_probabilities == pytest.approx(want.choices, abs=2e-4)
            assert row.correct == want.correct


def test_questions_of_one_template_cost_fewer_tokens():
    model, tokenizer = world.model("gptj"), world.tokenizer(bos=False)
    examples = [
        replace(e, prompt=f"the same long beginning {e.prompt}") for e in world.questions(9)
    ]
    examples = [e for e in examples if e.choices]
    forward = Counted(model)
    scorer = make_scorer(model, tokenizer, forward=forward)
    (batch,) = scorer.plan(examples)
    assert isinstance(batch, CausalBatch)
    scorer.score(batch)
    longest = max(e.length for e in batch.items)
    assert sum(forward.tokens) < 0.8 * len(batch.items) * longest


@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.lists(st.integers(0, 3), max_size=3)),
        min_size=1,
        max_size=3,
    )
)
def test_what_branches_see_is_what_a_loop_over_columns_says(rows):
    lengths = [length for length, _ in rows]
    heads = [[[7] * n for n in counts] for _, counts in rows]
    width = 1 + max(length + sum(counts) for length, counts in rows)
    places, sees = branched(lengths, heads, width)
    for row, (length, counts) in enumerate(rows):
        owner = [None] * (width - length - sum(counts)) + ["prompt"] * length
        wanted = [0] * (width - length - sum(counts)) + list(range(length))
        for branch, n in enumerate(counts):
            owner += [branch] * n
            wanted += range(length, length + n)
        assert places[row].tolist() == wanted
        for t in range(width):
            for s in range(width):
                allowed = s <= t and owner[s] is not None and owner[s] in ("prompt", owner[t])
                assert sees[row, t, s] == allowed
    assert sees.dtype == np.bool_


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_fused_activations_are_the_written_out_ones_while_the_owner_lives(name):
    class Owner:
        pass

    owner, model = Owner(), torch.nn.Sequential(ACT2FN[name])
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    want = model(x)
    fuse_activations(model, owner)
    assert "forward" in model[0].__dict__
    torch.testing.assert_close(model(x), want, rtol=1e-9, atol=1e-9)
    del owner
    gc.collect()
    assert "forward" not in model[0].__dict__
    assert torch.equal(model(x), want)
