"""`reproduce`: cells of the published tables, kept one by one, the weights restored between."""

import json

import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoTokenizer

from tensorllm.compression.model import compressed, compression_of
from tensorllm.compressors import Hybrid
from tensorllm.data.demo import MODEL_DIR
from tensorllm.errors import UserError
from tensorllm.pipeline import cells as cells_module
from tensorllm.pipeline.cells import cells
from tensorllm.pipeline.rehearse import ROWS, rehearse
from tensorllm.pipeline.reproduce import ReproduceRequest, reproduce
from tensorllm.recipes import parse_recipe

RECIPE = """
model: small
dataset: wikidata_qa
mode: {mode}
layers: {layers}
{settings}
published: {{before: {{accuracy: 10.0, loss: 3.0}}, after: {{accuracy: 20.0, loss: 2.0}}}}
"""


def quiet(done: int, total: int, what: str) -> None:
    del done, total, what


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A published table of a model small enough to run: its recipes, weights and data."""
    recipes = [
        RECIPE.format(mode="hybrid", layers="[1]", settings="ranks: [8, 4, 2]\nrho: 0.1"),
        RECIPE.format(mode="laser", layers="null", settings="rho: 0.1"),
    ]
    parsed = {f"small/wikidata_qa/{i}": parse_recipe(r, f"r/{i}") for i, r in enumerate(recipes)}
    monkeypatch.setattr(cells_module, "shipped", lambda: parsed)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    weights, data = tmp_path / "weights", tmp_path / "data"
    tiny_model("gptj", vocab_size=len(tokenizer)).save_pretrained(weights)
    tokenizer.save_pretrained(weights)
    data.mkdir()
    rows = [json.dumps(row) + "\n" for row in ROWS * 5]
    (data / "wikidata_qa.jsonl").write_text("".join(rows))
    return ReproduceRequest(model="small", weights=str(weights), data=data, out=tmp_path / "out")


def test_a_model_is_itself_again_after_the_block():
    model = tiny_model("gptj")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with compressed(model, Hybrid(ranks=(8, 4, 2), rho=0.1), [1]):
        changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert len(changed) == 5  # q, k, v, o and the first FFN matrix
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert compression_of(model) is None


def test_a_model_is_itself_again_after_a_failure():
    model = tiny_model("gptj")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with (
        pytest.raises(RuntimeError, match="midway"),
        compressed(model, Hybrid(ranks=(8, 4, 2), rho=0.1), [1]),
    ):
        raise RuntimeError("midway")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_cells_are_run_once_kept_and_not_run_again(small):
    first = reproduce(small, quiet)
    assert [(o.cell.name, o.metrics is None) for o in first] == [
        ("original", False),
        ("0 (official)", False),
        ("0 (paper)", False),
        ("1", True),
    ]
    assert "not published" in first[3].note
    assert first[0].cell.published == {"accuracy": 10.0, "loss": 3.0}
    losses = [o.metrics["loss"] for o in first[:3]]
    assert len(set(losses)) == 3  # the two layouts are two approximations
    kept = {p: p.stat().st_mtime_ns for p in small.out.rglob("*.json")}
    assert [o.metrics for o in reproduce(small, quiet)] == [o.metrics for o in first]
    assert {p: p.stat().st_mtime_ns for p in small.out.rglob("*.json")} == kept


def test_results_of_other_settings_are_not_mixed(small):
    reproduce(small, quiet)
    other = ReproduceRequest(
        model="small", weights=small.weights, data=small.data, out=small.out, limit=2
    )
    with pytest.raises(UserError, match="of another run"):
        reproduce(other, quiet)


def test_missing_data_says_where_to_put_it(small, tmp_path):
    request = ReproduceRequest(
        model="small", weights=small.weights, data=tmp_path, out=tmp_path / "other"
    )
    with pytest.raises(UserError, match=r"has no wikidata_qa.jsonl .* put the rows"):
        reproduce(request, quiet)


@pytest.mark.parametrize("model", ["gptj", "llama2", "roberta"])
def test_every_published_cell_runs_on_a_tiny_model(model):
    rehearsals = rehearse(ReproduceRequest(model=model, datasets=["fever"]))
    assert len(cells(model)) == 4 * len(rehearsals)
    assert all(r.peak_bytes > 10**8 for r in rehearsals)


def test_unknown_names_are_answered_with_the_closest():
    with pytest.raises(UserError, match=r"nothing was published for 'gptjj'. Did you mean 'gptj'"):
        cells("gptjj")
    with pytest.raises(UserError, match=r"on 'fevr'. Did you mean 'fever'"):
        cells("gptj", ["fevr"])
