"""Text that a model writes as its own calibration set."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoTokenizer

import tensorllm as tl
from tensorllm.calibration.sampled import sampled_text
from tensorllm.calibration.sequences import read_calibration
from tensorllm.commands.compress import run as compress
from tensorllm.commands.sample import sample
from tensorllm.compression.report import CompressionReport
from tensorllm.errors import UserError
from tensorllm.requests.compress import CompressRequest
from tensorllm.requests.others import SampleRequest


@pytest.fixture
def model() -> Any:
    """Sure of little, with tokens that end a text and settings of its own for generation."""
    made: Any = tiny_model("llama", vocab_size=6, initializer_range=0.5)
    made.generation_config.eos_token_id = 3
    made.generation_config.top_k = 2
    made.generation_config.repetition_penalty = 3.0
    made.generation_config.num_beams = 2
    made.generation_config.num_return_sequences = 2
    made.generation_config.stop_strings = ["the"]
    return made


def test_tokens_come_as_often_as_the_model_says_whatever_its_own_settings_are(model: Any) -> None:
    text = sampled_text(model, sequences=3000, length=2, seed=1)
    pairs_N2 = torch.tensor(text.sequences)
    with torch.inference_mode():
        wanted_VV = model(torch.arange(6)[:, None]).logits[:, 0].softmax(-1).double()
    found_VV = torch.zeros(6, 6, dtype=torch.float64)
    found_VV.index_put_(tuple(pairs_N2.T), torch.ones(3000, dtype=torch.float64), accumulate=True)
    first_V = found_VV.sum(1)
    assert (first_V - 500).abs().max() < 5 * (500 * 5 / 6) ** 0.5  # all of the vocabulary alike
    spread_VV = (first_V[:, None] * wanted_VV * (1 - wanted_VV)).sqrt()
    assert ((found_VV - first_V[:, None] * wanted_VV).abs() < 5 * spread_VV + 1).all()


def test_a_seed_says_it_all_and_no_text_ends(model: Any) -> None:
    state = torch.get_rng_state()
    seen: list[tuple[int, int]] = []
    text = sampled_text(
        model, sequences=40, length=20, seed=2, progress=lambda a, b, what: seen.append((a, b))
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert text == sampled_text(model, sequences=40, length=20, seed=2)
    assert text.sequences != sampled_text(model, sequences=40, length=20, seed=3).sequences
    assert {len(s) for s in text.sequences} == {20}
    assert any(3 in s[:-1] for s in text.sequences)  # what ends a text, not at the end
    assert seen == sorted(seen)
    assert seen[-1] == (800, 800)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"sequences": 0}, "1 or more sequences"),
        ({"length": 1}, "2 or more tokens, got 40 × 1"),
        ({"length": 10**6}, "at most the model's"),
    ],
)
def test_what_cannot_be_written_is_refused(model: Any, wrong: dict[str, int], line: str) -> None:
    with pytest.raises(UserError, match=line):
        sampled_text(model, **({"sequences": 40, "length": 20} | wrong))


def test_a_masked_model_writes_no_text() -> None:
    with pytest.raises(UserError, match="fills masks"):
        sampled_text(tiny_model("bert"))


def test_a_sample_adds_to_a_text_from_file_to_file(tinystories: Path, tmp_path: Path) -> None:
    file, stories = tmp_path / "sampled.jsonl", tmp_path / "mine.json"
    asked = SampleRequest(model=str(tinystories), out=file, sequences=6, length=100)
    done = sample(asked)
    assert (done.sequences, done.tokens) == (6, 600)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [set(row) for row in rows] == [{"text", "model", "seed"}] * 6
    with pytest.raises(UserError, match="is there already"):
        sample(asked)
    tokenizer = AutoTokenizer.from_pretrained(tinystories)
    stories.write_text(json.dumps([f"Once there was a cat number {n}. " * 12 for n in range(8)]))
    both = read_calibration(stories, tokenizer, sequences=5).with_all_of(
        read_calibration(file, tokenizer, sequences=None)
    )
    assert len(both.sequences) >= 11
    request = CompressRequest(
        model=str(tinystories),
        mode="activation-hybrid",
        target_ratio=1.2,
        calibration=stories,
        sampled=file,
        sequences=5,
        settings={"refit_epochs": 0},
        out=tmp_path / "out",
    )
    report = compress(request)
    assert isinstance(report, CompressionReport)
    facts = report.settings["calibration"]
    assert (facts["source"], facts["sequences"]) == ("mine.json", 5)  # as they were asked for
    added = len(both.sequences) - 5
    assert facts["added"] == {"source": "sampled.jsonl", "sequences": added}
    assert (facts["tokens"], facts["sha256"]) == (both.tokens, both.sha256)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--calibration FILE --sequences 5 --seed 0 --sampled SAMPLED" in card
    assert f"SAMPLED `sampled.jsonl`, with {added}" in card


def test_what_is_distilled_on_is_named_and_kept_apart(tinystories: Path, tmp_path: Path) -> None:
    stories, other = tmp_path / "mine.json", tmp_path / "other.txt"
    stories.write_text(json.dumps([f"Once there was a cat number {n}. " * 12 for n in range(8)]))
    other.write_text("A dog ran to the sea. " * 40)
    request = CompressRequest(
        model=str(tinystories),
        mode="activation-hybrid",
        target_ratio=1.2,
        calibration=stories,
        distill_text=other,
        settings={"refit_epochs": 0},
        out=tmp_path / "out",
    )
    with pytest.raises(UserError, match="--distill-text does nothing without --distill-steps"):
        compress(request)
    scored = replace(request, distill_steps=2, evaluate="text", data_file=other)
    with pytest.raises(UserError, match=r"stand in the calibration text \(other.txt\)"):
        compress(scored)
    assert not (tmp_path / "out").exists()
    report = compress(replace(request, distill_steps=2))
    assert isinstance(report, CompressionReport)
    facts = report.settings["calibration"]
    tokenizer = AutoTokenizer.from_pretrained(tinystories)
    alone = read_calibration(stories, tokenizer)
    assert facts["sha256"] == alone.sha256
    assert facts["to_distill"] == read_calibration(other, tokenizer, sequences=None).facts()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--seed 0 --distill-text DISTILLED" in card
    assert "DISTILLED was `other.txt`, all of its" in card


def test_what_is_asked_wrongly_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tensorllm.checkpoint.loader.Loader.__call__", None)
    with pytest.raises(UserError, match="at most the model's 32 tokens, got 999"):
        sample(SampleRequest(model="demo", out=tmp_path / "own.jsonl", length=999))
    with pytest.raises(UserError, match=r"named \*\.jsonl"):
        sample(SampleRequest(model="demo", out=tmp_path / "a.txt"))
    with pytest.raises(UserError, match="is not there"):
        sample(SampleRequest(model="demo", out=tmp_path / "no" / "a.jsonl"))
    request = CompressRequest(
        model="demo", mode="activation-hybrid", target_ratio=1.5, sampled=tmp_path / "a.jsonl"
    )
    with pytest.raises(UserError, match="give it as --calibration"):
        compress(request)


def test_it_is_there_from_the_package() -> None:
    assert tl.sampled_text is sampled_text
