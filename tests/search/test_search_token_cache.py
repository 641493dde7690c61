"""Answers of edited models whose unedited layers are not run again: token for token those of the
naive greedy loop.
"""

import random

import pytest
import torch
from edits import Edit
from tiny_models import tiny_model

from tensorllm.data.example import Example
from tensorllm.evaluation.causal import CausalBatch, CausalScorer
from tensorllm.evaluation.encoding import Encoded
from tensorllm.evaluation.forward import ModelForward
from tensorllm.evaluation.generation import Greedy
from tensorllm.evaluation.protocol import STRICT
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.search.activation_cache import CacheBudget
from tensorllm.search.forwards import PrefixForward
from tensorllm.search.prefix import EditExtent, Prefix

NEW = 5
# Rotary and learned positions, ALiBi, sliding windows, capped logits, parallel blocks.
MODELS: dict[str, dict] = {name: {} for name in ("gptj", "llama", "gpt2", "opt", "qwen3")}
MODELS |= {"gemma2": {"tie_word_embeddings": False}}
MODELS |= {"mistral, window 6": {"sliding_window": 6}, "falcon, alibi": {"alibi": True}}
# Edits: what agrees with the original always, mostly, hardly, and what was seen before.
EDITS = ((2, "out", 1.0), (2, "out", 1.1), (1, "o", 1.3), (2, "out", -3.0), (1, "o", 1.3))


class Numbers:
    """A tokenizer whose text is its tokens."""

    def batch_decode(self, sequences, **_):
        return [" ".join(map(str, ids)) for ids in sequences]


def make(name):
    model = tiny_model(name.partition(",")[0], num_hidden_layers=3, **MODELS[name])
    with torch.no_grad():  # so that the most probable token is clearly so
        for weight in model.parameters():
            weight.mul_(1.5 if weight.ndim > 1 else 1.0)
    return model, RoleMatrices(model.config, parameters_of(model)), parameters_of(model)


def scorer_of(forward, eos=frozenset()):
    """Nothing ends before its last token but by `eos`."""
    greedy = Greedy(forward, Numbers(), STRICT, max_new_tokens=NEW, eos=eos, stop_early=False)
    return CausalScorer(greedy)


def naive(model, prompt, eos):
    """One token at a time, everything computed anew."""
    new: list[int] = []
    while len(new) < NEW and not (new and new[-1] in eos):
        logits = model(torch.tensor([[*prompt, *new]])).logits[0, -1]
        if not new:
            logits[sorted(eos)] = -torch.inf
        new.append(int(logits.argmax()))
    return new


def questions(model):
    """Prompts of 1 to 11 tokens, some of which begin alike; gold answers that the model gives not
    at all, in part, or in full; and an end that stands in the middle of many.
    """
    rng, items = random.Random(0), []
    prompts = [[rng.randrange(3, 100) for _ in range(rng.randint(1, 9))] for _ in range(8)]
    prompts[::3] = [[7, 8, *prompt] for prompt in prompts[::3]]
    said = [naive(model, prompt, frozenset()) for prompt in prompts]
    within = [token for new in said for token in new[1:-1]]
    eos = frozenset({max(set(within), key=within.count)})
    for index, (prompt, new) in enumerate(zip(prompts, said, strict=True)):
        answer = new[: index % 4] + [rng.randrange(3, 100)] * (index % 2)
        full = prompt + (answer or [9])
        if index == 5:  # the answer changes how the prompt's end is cut into tokens
            full = [*prompt[:-1], 99, 98, *answer]
        start = min(len(prompt), len(full) - 1)
        items.append(Encoded(Example("", "x", (), index), prompt, (full,), 1, start, 0))
    return tuple(items), eos


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_answers_are_those_of_the_naive_loop_whatever_is_known(name):
    model, roles, weights = make(name)
    items, eos = questions(model)
    prefix = Prefix(model, roles, CacheBudget(2**24), candidates={1, 2})
    scorers = [scorer_of(f, eos) for f in (PrefixForward(model, prefix), ModelForward(model))]
    ends, answers = 0, []
    for edit in (None, *EDITS):
        with Edit(roles, weights, *(edit or (2, "out", 1.0))):
            with prefix.editing(EditExtent(edit and edit[0], ffn=bool(edit) and edit[1] == "out")):
                rows = scorers[0](CausalBatch(0, items))
            plain = scorers[1](CausalBatch(0, items))
            wanted = [naive(model, item.prompt, eos) for item in items]
        answers.append(wanted)
        ends += sum(len(new) < NEW for new in wanted)
        for row, other, new in zip(rows, plain, wanted, strict=True):
            assert row.generation == other.generation == " ".join(map(str, new)), (edit, row.index)
            assert row.log_probability == pytest.approx(other.log_probability, abs=1e-4)
    assert ends
    agree = [sum(a == b for a, b in zip(answers[0], one, strict=True)) for one in answers]
    assert agree[1] == len(items) > min(agree)


@torch.no_grad()
def test_unedited_layers_of_a_known_answer_are_not_run():
    model, roles, weights = make("llama")
    items = tuple(i for i in questions(model)[0] if i.full[0][: len(i.prompt)] == i.prompt)
    prefix = Prefix(model, roles, CacheBudget(2**24), candidates={1, 2})
    forward = PrefixForward(model, prefix)
    scorer = scorer_of(forward)
    computed = []
    steps = NEW - 1
    for lowest, scale in ((None, 1.0), (2, 1.0), (1, -3.0), (1, -3.0), (2, 1.0)):
        before = prefix.computed
        with (
            Edit(roles, weights, lowest or 2, "out", scale),
            prefix.editing(EditExtent(lowest, ffn=True)),
        ):
            scorer(CausalBatch(0, items))
        computed.append(prefix.computed - before)
    # Unedited layers read the original's answers once, up to the highest that may be edited; the
    # layers above are run on them once more.
    assert computed[:2] == [3 * (1 + steps), 1 + steps]
    assert computed[3:] == [2 * (1 + steps), 1 + steps]
    assert computed[2] > computed[3]


@torch.no_grad()
def test_where_there_is_no_room_nothing_is_known():
    model, roles, _ = make("llama")
    items, _ = questions(model)
    prefix = Prefix(model, roles, CacheBudget(2**16), candidates={1, 2})
    forward = PrefixForward(model, prefix)
    scorer = scorer_of(forward)
    for _ in range(2):
        with prefix.editing(EditExtent(2, ffn=True)):
            rows = scorer(CausalBatch(0, items))
        wanted = [naive(model, item.prompt, frozenset()) for item in items]
        assert [row.generation.split() for row in rows] == [list(map(str, new)) for new in wanted]
    assert prefix.tokens.bytes <= 2**15
    assert prefix.store.bytes["memory"] <= 2**16


@pytest.mark.parametrize("room", [2**24, 2**17, 0])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_edits_side_by_side_answer_as_one_by_one(name, room):
    """Each lane as the naive loop on a model with that edit in its weights; texts that end at
    different times, unlike beginnings, and memory for all, some and nothing of what is read.
    """
    model, roles, weights = make(name)
    items, eos = questions(model)
    prefix = Prefix(model, roles, CacheBudget(room), candidates={1, 2})
    forward = PrefixForward(model, prefix)
    scorer = scorer_of(forward, eos)
    plain = scorer_of(ModelForward(model), eos)
    edits = [(2, "out", 1.0), (2, "o", -1.5), (1, "o", 1.3), (2, "out", -3.0), (0, "out", 1.2)]
    edits.sort(key=lambda edit: -edit[0])
    changed, wanted, losses = [], [], []
    for edit in edits:
        with Edit(roles, weights, *edit):
            weight = roles.name(*edit[:2])
            changed.append({weight: weights[weight].clone()})
            wanted.append([naive(model, item.prompt, eos) for item in items])
            losses.append([row.log_probability for row in plain(CausalBatch(0, items))])
    marks = [EditExtent(layer, ffn=role == "out") for layer, role, _ in edits]
    for lanes in ([0, 1, 2, 3, 4], [1, 3], [0, 1, 2, 3, 4]):  # the last time much is known
        with prefix.editing(*marks), forward.weights.installed(changed):
            found = scorer.side_by_side(CausalBatch(0, items), lanes)
        assert sorted(found) == lanes
        for lane in lanes:
            for row, new, loss in zip(found[lane], wanted[lane], losses[lane], strict=True):
                assert row.generation == " ".join(map(str, new)), (edits[lane], row.index)
                assert row.log_probability == pytest.approx(loss, abs=1e-4)
    assert len({str(one) for one in wanted}) > 2
    assert prefix.tokens.bytes <= room / 2
    assert not any(
        "forward" in m.__dict__ for m in model.modules() if isinstance(m, torch.nn.Linear)
    )
