"""Fast scoring equals the naive way: verdicts, losses and generated text, one example at a time."""

import logging
from dataclasses import replace
from typing import Any

import eval_world as world
import pytest
import torch
from support.naive import generated, naive
from support.naive import masked as naive_masked

from tensorllm.data.example import Example
from tensorllm.data.questions import Questions
from tensorllm.errors import Incomplete, UserError
from tensorllm.evaluation.causal import CausalScorer
from tensorllm.evaluation.evaluate import evaluate_model, score
from tensorllm.evaluation.forward import ModelForward
from tensorllm.evaluation.generation import Greedy
from tensorllm.evaluation.protocol import PAPER, STRICT
from tensorllm.evaluation.scorer import eos_of, make_scorer

NEW = 8
ALONE = replace(PAPER, unmasked_padding=1, single_token_choices=False)  # one by one: no padding
CAUSAL = [("gptj", False), ("llama", True), ("gpt2", False)]


def said_by(model: Any, tokenizer: Any, examples: list[Example]) -> list[Example]:
    """Open questions whose gold answer is how the model's own greedy answer begins."""
    made = []
    for i, e in enumerate(x for x in examples if not x.choices):
        words = generated(model, tokenizer, e, NEW).generation.split()
        if words:
            answer = " ".join(words[: 1 + i % 4])
            made.append(replace(e, answer=answer, index=1000 + e.index))
    return made


@pytest.mark.parametrize("paper", [False, True], ids=["strict", "paper"])
@pytest.mark.parametrize(("model_type", "bos"), CAUSAL)
def test_equals_naive(model_type: str, bos: bool, paper: bool):
    model, tokenizer = world.model(model_type), world.tokenizer(bos=bos)
    examples = world.questions(45)
    examples += said_by(model, tokenizer, examples)
    rows = score(
        model,
        tokenizer,
        examples,
        ALONE if paper else STRICT,
        max_new_tokens=NEW,
        batch_tokens=200,
    )
    assert sum(bool(row.correct) for row in rows) > 15  # said_by makes sure that some are right
    for e, row in zip(examples, rows, strict=True):
        want = naive(model, tokenizer, e, NEW, paper=paper)
        assert row.index == e.index
        assert row.correct == want.correct, (e, row, want)
        assert row.answer_tokens == want.answer_tokens
        assert row.log_probability == pytest.approx(want.log_probability, abs=2e-4)
        assert row.choice_log_probabilities == pytest.approx(want.choices, abs=2e-4)
        assert want.generation.startswith(row.generation) or e.choices


@pytest.mark.parametrize(("model_type", "bos"), CAUSAL)
def test_whole_generations_equal_generate(model_type: str, bos: bool):
    model, tokenizer = world.model(model_type, seed=3), world.tokenizer(bos=bos)
    examples = [e for e in world.questions(30) if not e.choices]
    examples += said_by(model, tokenizer, examples)
    scorer = make_scorer(model, tokenizer, max_new_tokens=NEW, batch_tokens=150, stop_early=False)
    rows = {row.index: row for batch in scorer.plan(examples) for row in scorer.score(batch)}
    for e in examples:
        assert rows[e.index].generation == generated(model, tokenizer, e, NEW).generation


def test_generation_ends_at_eos_but_does_not_begin_with_it():
    tokenizer = world.tokenizer()
    ended = 0
    for seed in range(4):
        model = world.model("gptj", seed=seed)
        # an end that is likely, also as the very first token
        model.lm_head.bias.data[1] += 12.0
        examples = [e for e in world.questions(18) if not e.choices]
        scorer = make_scorer(model, tokenizer, max_new_tokens=NEW, stop_early=False)
        rows = {r.index: r for batch in scorer.plan(examples) for r in scorer.score(batch)}
        for e in examples:
            want = generated(model, tokenizer, e, NEW).generation
            assert rows[e.index].generation == want
            ended += len(tokenizer(want).input_ids) < NEW
    assert ended > 10


@pytest.mark.parametrize("paper", [False, True], ids=["strict", "paper"])
def test_masked_equals_naive(paper: bool):
    model, tokenizer = world.model("roberta"), world.tokenizer(masked=True)
    examples = world.questions(30)
    examples.append(Example("the cat is <mask> in Paris", "poet", ("poet", "true dog"), 100))
    for i, e in enumerate(world.questions(12, seed=5)):
        if not e.choices:
            said = naive_masked(model, tokenizer, e, paper=paper).generation.split()
            examples.append(replace(e, answer=said[0] if said else "x", index=200 + i))
    rules = replace(PAPER, single_token_choices=False) if paper else STRICT
    rows = score(model, tokenizer, examples, rules, batch_tokens=300)
    assert any(row.correct for row in rows)
    for e, row in zip(examples, rows, strict=True):
        want = naive_masked(model, tokenizer, e, paper=paper)
        assert (row.correct, row.answer_tokens) == (want.correct, want.answer_tokens), (e, row)
        assert row.log_probability == pytest.approx(want.log_probability, abs=2e-4)


def test_long_prompts_lose_their_beginning_but_not_the_bos():
    model = world.model("llama", max_position_embeddings=32)
    tokenizer = world.tokenizer(bos=True)
    examples = [replace(e, prompt=f"{e.prompt} {e.prompt} {e.prompt}") for e in world.questions(18)]
    rows = score(model, tokenizer, examples, max_new_tokens=NEW)
    assert any(row.truncated for row in rows)
    for e, row in zip(examples, rows, strict=True):
        want = naive(model, tokenizer, e, NEW, context=32)
        assert row.correct == want.correct
        assert row.log_probability == pytest.approx(want.log_probability, abs=2e-4)


class Counting(ModelForward):
    """Counts passes and refuses batches beyond a size, as a full device would."""

    def __init__(self, model: Any, most: int = 10**9) -> None:
        super().__init__(model)
        self.passes = self.rows = 0
        self.most = most

    def __call__(self, batch: Any, **options: Any) -> Any:
        if len(batch.ids_BT) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.passes += 1
        self.rows += len(batch.ids_BT)
        return super().__call__(batch, **options)


def test_nothing_is_generated_where_the_answer_is_proved():
    model, tokenizer = world.model("gptj", seed=3), world.tokenizer()
    open_ones = [e for e in world.questions(30) if not e.choices]
    proved = []
    for e in open_ones:
        text = generated(model, tokenizer, e, NEW).generation
        answer = " ".join(text.split()[:-1])  # whole words, and a word after them
        ids = tokenizer(f"{e.prompt} {answer}").input_ids
        told = model.generate(
            torch.tensor([tokenizer(e.prompt).input_ids]), max_new_tokens=NEW, do_sample=False
        )[0].tolist()
        if text.startswith(f" {answer}") and told[: len(ids)] == ids and answer:
            proved.append(replace(e, answer=answer))
    assert len(proved) >= 3
    forward = Counting(model)
    scorer = make_scorer(model, tokenizer, max_new_tokens=NEW, forward=forward)
    rows = [row for batch in scorer.plan(proved) for row in scorer.score(batch)]
    assert all(row.correct for row in rows)
    assert forward.passes == 1


def test_out_of_memory_halves_the_batch_and_says_so(caplog: pytest.LogCaptureFixture):
    model, tokenizer = world.model("gptj"), world.tokenizer()
    examples = world.questions(24)
    want = score(model, tokenizer, examples, max_new_tokens=NEW)
    scorer = make_scorer(model, tokenizer, max_new_tokens=NEW, forward=Counting(model, most=5))
    with caplog.at_level(logging.WARNING):
        rows = {r.index: r for batch in scorer.plan(examples) for r in scorer.score(batch)}
    assert "out of memory: going on with" in caplog.text
    for row in want:
        assert rows[row.index].correct == row.correct
        assert rows[row.index].log_probability == pytest.approx(row.log_probability, abs=2e-4)


def test_out_of_memory_for_one_example_ends_with_a_clear_error():
    model, tokenizer = world.model("gptj"), world.tokenizer()
    scorer = make_scorer(model, tokenizer, max_new_tokens=NEW, forward=Counting(model, most=0))
    with pytest.raises(Incomplete, match="out of memory for a single example"):
        scorer.score(scorer.plan(world.questions(4))[0])


def test_running_text_equals_one_pass():
    model, tokenizer = world.model("llama"), world.tokenizer(bos=True)
    texts = [tokenizer(s).input_ids for s in world.sentences(9)]
    examples = [Example("", "", (), i, tuple(ids)) for i, ids in enumerate(texts)]
    for e, row in zip(examples, score(model, tokenizer, examples), strict=True):
        ids = torch.tensor([e.tokens])
        with torch.inference_mode():
            loss = model(ids, labels=ids).loss.item()
        assert row.correct is None
        assert row.answer_tokens == len(e.tokens) - 1
        assert row.loss == pytest.approx(loss, abs=1e-4)


def test_the_rank_counts_more_probable_tokens():
    model, tokenizer = world.model("gpt2"), world.tokenizer()
    examples = world.questions(12)
    for e, row in zip(examples, score(model, tokenizer, examples, max_new_tokens=2), strict=True):
        ids = tokenizer(f"{e.prompt} {e.answer}").input_ids
        before = tokenizer(e.prompt).input_ids
        with torch.inference_mode():
            logits = model(torch.tensor([before])).logits[0, -1]
        assert row.rank == int((logits > logits[ids[len(before)]]).sum()) + 1


def test_paper_wants_single_tokens():
    tokenizer = world.tokenizer()
    scorer = make_scorer(world.model("gptj"), tokenizer, protocol=PAPER)
    with pytest.raises(UserError, match=r"needs choices of one token each.*'architect' is \d"):
        scorer.plan([Example("Anna is", "poet", ("poet", "architect"))])
    scorer.plan([Example("Anna is", "true", ("true", "false"))])


def test_masked_models_need_a_mask_token():
    with pytest.raises(UserError, match="needs a tokenizer with a mask token"):
        make_scorer(world.model("roberta"), world.tokenizer())


def test_plans_keep_every_example_once_and_waste_little():
    model, tokenizer = world.model("gptj"), world.tokenizer()
    examples = world.questions(200)
    scorer = make_scorer(model, tokenizer, max_new_tokens=NEW, batch_tokens=256)
    batches = scorer.plan(examples)
    assert sorted(e.example.index for b in batches for e in b.items) == list(range(200))
    used = sum(e.length for b in batches for e in b.items)
    padded = sum(len(b.items) * max(e.length for e in b.items) for b in batches)
    assert padded <= 1.15 * used


def test_stopping_early_reads_less():
    model, tokenizer = world.model("gptj", seed=3), world.tokenizer()
    examples = said_by(model, tokenizer, world.questions(60))
    examples = [replace(e, answer=e.answer.split()[0]) for e in examples]
    read = []
    for early in (True, False):
        forward = Counting(model)
        eos = eos_of(model)
        scorer = CausalScorer(
            Greedy(forward, tokenizer, STRICT, max_new_tokens=30, eos=eos, stop_early=early)
        )
        plan = make_scorer(model, tokenizer, max_new_tokens=30).plan(examples)
        verdicts = [row.correct for batch in plan for row in scorer(batch)]
        read.append((forward.rows, verdicts))
    assert read[0][0] < 0.8 * read[1][0]
    assert read[0][1] == read[1][1]


def test_a_model_in_training_is_given_back_as_it_was(tmp_path):
    """Its owner may hold one part in evaluation mode."""
    model, tokenizer = world.model("gptj"), world.tokenizer()
    model.train()
    model.get_input_embeddings().eval()
    before = {name: module.training for name, module in model.named_modules()}
    questions = world.save_questions(tmp_path / "questions.jsonl", 10, choices=True)
    evaluate_model(model, tokenizer, Questions(questions), limit=2)
    assert {name: module.training for name, module in model.named_modules()} == before
