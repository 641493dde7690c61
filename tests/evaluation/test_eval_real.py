"""A really trained model on 200 real rows of each dataset: the same verdicts and losses as the
naive way.
"""

from pathlib import Path

import pytest
from support.naive import naive
from transformers import AutoModelForCausalLM, AutoTokenizer

from tensorllm.evaluation.evaluate import evaluate_model, make_dataset, score
from tensorllm.evaluation.scorer import context_of
from tensorllm.evaluation.totals import metrics_of

FILES = {
    "hotpotqa": "hotpot_dev.jsonl",
    "fever": "fever_paper_dev.jsonl",
    "bios_profession": "bias_in_bios_1200.jsonl",
    "wikidata_qa": "qa_wikidata.jsonl",
}
ROWS = 200


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_real_rows_equal_naive(name: str, shared_dir: Path, tinystories: Path):
    model = AutoModelForCausalLM.from_pretrained(tinystories).eval()
    tokenizer = AutoTokenizer.from_pretrained(tinystories)
    data = make_dataset(name, data_file=shared_dir / "data" / FILES[name], split="all", limit=ROWS)
    data.connect(tokenizer)
    context = context_of(model.config, tokenizer)
    rows = score(model, tokenizer, data.examples, max_new_tokens=data.max_new_tokens)
    want = [naive(model, tokenizer, e, data.max_new_tokens, context=context) for e in data.examples]
    assert len(rows) == ROWS
    assert [r.correct for r in rows] == [w.correct for w in want]
    assert [r.answer_tokens for r in rows] == [w.answer_tokens for w in want]
    assert [r.loss for r in rows] == pytest.approx([w.loss for w in want], abs=1e-4)
    metrics = metrics_of(rows)
    assert metrics["accuracy"] == pytest.approx(100 * sum(w.correct for w in want) / ROWS)
    assert metrics["loss"] == pytest.approx(sum(w.loss for w in want) / ROWS, abs=1e-4)


def test_perplexity_of_real_stories(shared_dir: Path, tinystories: Path):
    """A model trained on such stories predicts them; the number is what one pass per block
    gives.
    """
    model = AutoModelForCausalLM.from_pretrained(tinystories).eval()
    tokenizer = AutoTokenizer.from_pretrained(tinystories)
    file = shared_dir / "data" / "tinystories_1000.json"
    data = make_dataset("text", data_file=file, split="val", limit=20, block=256)
    metrics = evaluate_model(model, tokenizer, data)
    assert "accuracy" not in metrics
    assert 3 < metrics["perplexity"] < 30


@pytest.mark.parametrize("protocol", ["strict", "paper"])
def test_the_demo_world_equals_naive(protocol: str):
    from dataclasses import replace

    from tensorllm.data.demo import MODEL_DIR
    from tensorllm.evaluation.protocol import PROTOCOLS

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    data = make_dataset("demo", split="val", limit=120)
    data.connect(tokenizer)
    rules = replace(PROTOCOLS[protocol], unmasked_padding=int(protocol == "paper"))
    rows = score(model, tokenizer, data.examples, rules, max_new_tokens=data.max_new_tokens)
    for e, row in zip(data.examples, rows, strict=True):
        want = naive(model, tokenizer, e, data.max_new_tokens, paper=protocol == "paper")
        assert (row.correct, row.answer_tokens) == (want.correct, want.answer_tokens), (e, row)
        assert row.loss == pytest.approx(want.loss, abs=1e-4)
