"""`reproduce`: cells of the published tables, kept one by one, the weights restored between."""

import json
import shutil
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from tensorllm.commands import reproduce as reproduce_module
from tensorllm.commands.reproduce import rehearse, reproduce
from tensorllm.compression.engine import compress, compressed, compression_of
from tensorllm.compressors import Hybrid
from tensorllm.data.demo import MODEL_DIR
from tensorllm.errors import Incomplete, UserError
from tensorllm.evaluation.evaluate import evaluate_model, make_dataset
from tensorllm.model_names import short_names
from tensorllm.recipes import parse_recipe
from tensorllm.reproduction import inputs as inputs_module
from tensorllm.reproduction import published as published_module
from tensorllm.reproduction.inputs import missing
from tensorllm.reproduction.published import cells
from tensorllm.reproduction.rehearsal import rows
from tensorllm.requests.reproduce import ReproduceRequest

RECIPE = """
model: small
dataset: wikidata_qa
mode: {mode}
layers: {layers}
{settings}
published: {{before: {{accuracy: 10.0, loss: 3.0}}, after: {{accuracy: 20.0, loss: 2.0}}}}
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A published table of a model small enough to run: its recipes, weights and data."""
    recipes = [
        RECIPE.format(mode="hybrid", layers="[1]", settings="ranks: [8, 4, 2]\nrho: 0.1"),
        RECIPE.format(mode="laser", layers="null", settings="rho: 0.1\nmatrices: [in]"),
    ]
    parsed = {f"small/wikidata_qa/{i}": parse_recipe(r, f"r/{i}") for i, r in enumerate(recipes)}
    monkeypatch.setattr(published_module, "shipped", lambda: parsed)
    monkeypatch.setitem(short_names(), "small", {"model_type": "gptj", "sizes": {"layers": 2}})
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    weights, data = tmp_path / "weights", tmp_path / "data"
    tiny_model("gptj", vocab_size=len(tokenizer)).save_pretrained(weights)
    tokenizer.save_pretrained(weights)
    data.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows())
    (data / "wikidata_qa.jsonl").write_text(text)
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


def test_a_refused_block_leaves_an_earlier_compression_alone():
    model = tiny_model("gptj")
    compress(model, Hybrid(ranks=(8, 4, 2), rho=0.1), [1])
    done = compression_of(model)
    with (
        pytest.raises(UserError, match="compressed already"),
        compressed(model, Hybrid(ranks=(8, 4, 2), rho=0.1), [0]),
    ):
        pass
    assert compression_of(model) is done  # it can still be saved


def test_cells_are_run_once_kept_and_not_run_again(small):
    first = reproduce(small)
    assert [(o.cell.name, o.origin, o.metrics["examples"]) for o in first] == [
        ("original", "", 8),
        ("0 (official)", "published", 8),
        ("0 (paper)", "published", 8),
        ("1", "searched", 8),
    ]
    assert first[0].cell.published == {"accuracy": 10.0, "loss": 3.0}
    losses = [o.metrics["loss"] for o in first[:3]]
    assert len(set(losses)) == 3  # the two layouts are two approximations
    kept = {p: p.stat().st_mtime_ns for p in small.out.rglob("*")}
    assert [o.metrics for o in reproduce(small)] == [o.metrics for o in first]
    assert {p: p.stat().st_mtime_ns for p in small.out.rglob("*")} == kept


@pytest.mark.parametrize(
    ("kind", "layers"), [("llama", 2), ("gptj", 3)], ids=["another type", "another depth"]
)
def test_weights_of_another_model_are_refused_before_any_work(small, kind, layers, tmp_path):
    """The folder of weights is typed by hand; else the first cells would be kept."""
    weights = tmp_path / "other"
    tiny_model(kind, num_hidden_layers=layers).save_pretrained(weights)
    said = f"other has {layers} layers of type '{kind}', and small 2 layers of type 'gptj'"
    with pytest.raises(UserError, match=f"{said}.*To have its weights"):
        reproduce(replace(small, weights=str(weights)))
    assert not list(small.out.rglob("*.json"))


def test_a_layer_that_was_not_published_is_the_best_on_validation(small):
    """Every layer scored by hand on the validation part; figures are the test part's."""
    cell = cells("small")[3]
    searched = reproduce(small)[3].metrics
    by_hand = {}
    for layer in (0, 1):
        given = replace(small, layer=layer, out=small.out / str(layer))
        by_hand[layer] = reproduce(given)[3]
        assert (by_hand[layer].origin, by_hand[layer].metrics["layers"]) == ("given", [layer])
    (layer,) = searched["layers"]
    for name in ("accuracy", "loss", "perplexity", "top_10"):
        assert searched[name] == pytest.approx(by_hand[layer].metrics[name], rel=1e-4), name
    model = AutoModelForCausalLM.from_pretrained(small.weights)
    tokenizer = AutoTokenizer.from_pretrained(small.weights)
    validation = {}
    for candidate in (0, 1):
        with compressed(model, cell.recipe.compressor(), [candidate]):
            data = make_dataset(
                "wikidata_qa", data_file=small.data / "wikidata_qa.jsonl", split="val"
            )
            found = evaluate_model(model, tokenizer, data, "paper")
        validation[candidate] = (found["accuracy"], -found["loss"])
    assert layer == max(validation, key=validation.__getitem__)


@pytest.mark.parametrize("run", [reproduce, rehearse])
def test_a_layer_that_no_cell_can_take_is_refused_before_any_work(small, run):
    for layer in (-1, 2):
        with pytest.raises(UserError, match=rf"--layer must be in 0\.\.1, got {layer}"):
            run(replace(small, layer=layer))
    assert not small.out.exists()


@pytest.mark.parametrize("run", [reproduce, rehearse])
def test_a_layer_is_refused_where_all_were_published(tmp_path, run):
    asked = ReproduceRequest(model="gptj", datasets=["fever"], layer=3, out=tmp_path)
    with pytest.raises(UserError, match="--layer does nothing here"):
        run(asked)


def test_a_folder_that_cannot_be_made_is_refused_before_any_work(small, monkeypatch):
    monkeypatch.setattr(reproduce_module, "_run", lambda *_: pytest.fail("worked"))
    (small.data / "file").touch()
    with pytest.raises(UserError, match="cannot write to"):
        reproduce(replace(small, out=small.data / "file"))


def test_a_killed_run_goes_on_from_its_finished_cells(small, monkeypatch):
    want = reproduce(replace(small, out=small.out / "whole"))
    score = reproduce_module.score_cell
    ran: list[str] = []

    def dies(cell, *rest, **how):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(cell.name)
        return score(cell, *rest, **how)

    monkeypatch.setattr(reproduce_module, "score_cell", dies)
    with pytest.raises(KeyboardInterrupt):
        reproduce(small)
    assert len(ran) == 2
    ran.clear()
    monkeypatch.setattr(
        reproduce_module, "score_cell", lambda c, *r, **how: ran.append(c) or score(c, *r, **how)
    )
    got = reproduce(small)
    assert len(ran) == 1  # the search and two cells were done
    assert [o.metrics["loss"] for o in got] == pytest.approx([o.metrics["loss"] for o in want])


def test_results_of_other_settings_are_not_mixed(small):
    reproduce(small)
    with pytest.raises(UserError, match="of another run: limit was None and is 2; give another"):
        reproduce(replace(small, limit=2))


def test_a_damaged_cell_is_told(small):
    reproduce(small)
    (small.out / "small/wikidata_qa/original.json").write_text('{"request"')
    with pytest.raises(UserError, match=r"original.json is not a result of reproduce"):
        reproduce(small)


def test_a_full_disk_ends_the_run_with_one_line(small, tmp_path):
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises((Incomplete, UserError)):
        reproduce(small)


def test_missing_data_says_where_to_put_it_before_anything_runs(small, tmp_path):
    request = replace(small, data=tmp_path, out=tmp_path / "other")
    with pytest.raises(UserError, match=r"has no wikidata_qa.jsonl .*tasksource/bigbench.*--data"):
        reproduce(request)
    assert not (tmp_path / "other").exists()


def test_missing_weights_say_what_to_fetch(tmp_path):
    wanted = ReproduceRequest(model="gptj", weights=str(tmp_path), out=tmp_path / "out")
    with pytest.raises(UserError, match=r"no config.json .*gpt-j-6b.*hf download EleutherAI/gpt-j"):
        reproduce(wanted)


@pytest.mark.parametrize("layout", ["cache", "home", "plain"])
def test_weights_and_data_are_found_in_the_hubs_layouts(small, tmp_path, monkeypatch, layout):
    facts = {"hub": "Owner/Small", "revision": "main", "model_type": "gptj", "sizes": {"layers": 2}}
    monkeypatch.setattr(inputs_module, "short_names", lambda: {"small": facts})
    root = tmp_path / "copies"
    folders = {
        "cache": ("models--Owner--Small/snapshots/1", "datasets--tasksource--bigbench/snapshots/2"),
        "home": (
            "hub/models--Owner--Small/snapshots/1",
            "hub/datasets--tasksource--bigbench/snapshots/2",
        ),
        "plain": ("Owner/Small", "tasksource/bigbench"),
    }[layout]
    shutil.copytree(small.weights, root / folders[0])
    data = root / folders[1] / "qa_wikidata"
    data.mkdir(parents=True)
    made = rows()
    for split, part in (("validation", made[:4]), ("train", made[4:])):
        table = pa.Table.from_pylist(
            [{"inputs": r["input"], "targets": [r["target"]]} for r in part]
        )
        pq.write_table(table, data / f"{split}-00000-of-00001.parquet")
    assert missing("small", ["wikidata_qa"], str(root), root) == []
    found = reproduce(replace(small, weights=str(root), data=root, out=tmp_path / "other"))
    for one, other in zip(found, reproduce(small), strict=True):
        assert one.metrics["loss"] == other.metrics["loss"]


@pytest.mark.parametrize(
    "model", ["roberta", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gptj", "llama2"))]
)
def test_every_published_cell_runs_on_a_tiny_model(model, tmp_path):
    steps = []
    plan = rehearse(
        ReproduceRequest(model=model, datasets=["fever"], data=tmp_path),
        lambda *step: steps.append(step[:2]),
    )
    assert len(cells(model)) == 4 * len(plan.rehearsals)
    assert steps == [(done, len(plan.rehearsals)) for done in range(len(plan.rehearsals) + 1)]
    assert [line.split(":")[0] for line in plan.missing] == ["weights", "fever"]
    for told in plan.rehearsals:
        assert told.searched == (told.cell.searched and told.cell.recipe is not None)
        assert told.seconds > 1
        assert told.peak_bytes > 10**8


def test_a_plan_counts_local_examples_and_takes_the_limit(tmp_path):
    (tmp_path / "fever.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    asked = ReproduceRequest(model="roberta", datasets=["fever"], data=tmp_path)
    told = rehearse(asked).rehearsals[0]
    assert (told.examples, told.counted) == (8, True)


def test_unknown_names_are_answered_with_the_closest():
    with pytest.raises(UserError, match=r"Did you mean 'gptj'.*--study claims takes any"):
        cells("gptjj")
    with pytest.raises(UserError, match=r"on 'fevr'. Did you mean 'fever'"):
        cells("gptj", ["fevr"])
