"""Training a factored model further: by transformers' Trainer, and with LoRA by peft."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from docs_blocks import ROOT, blocks
from tiny_models import tiny_model
from torch import nn
from training import learn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import tensorllm as tl
from tensorllm.calibration import Calibration, fit
from tensorllm.commands.export import run as export
from tensorllm.compressors import ActivationHybrid
from tensorllm.data.demo import MODEL_DIR
from tensorllm.evaluation.evaluate import make_dataset
from tensorllm.requests.others import ExportRequest
from tensorllm.runtime.sites import TransposedLinear

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.*:FutureWarning",  # transformers' and peft's
    "ignore:.*pin_memory.*:UserWarning",
)
DRAWS = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 100, (2, 11), generator=DRAWS)
ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(3, 100, (8, 12)).tolist()]


def pivoted(**sizes: int) -> Any:
    model = tiny_model("llama", **sizes)
    rows = torch.randint(3, 101, (20, 16), generator=torch.Generator().manual_seed(0)).tolist()
    text = Calibration(tuple(map(tuple, rows)), source="random", seed=0)
    tl.compress(model, fit(ActivationHybrid(target_ratio=3.0), model, text))
    return model


def tucker() -> Any:
    model = tiny_model("llama")
    tl.compress(model, tl.Hybrid(ranks=(20, 3, 6), rho=0.4, matrices=("in", "out")))
    return model


MADE = {"pivoted": pivoted, "tucker": tucker}


@pytest.fixture(scope="module", params=MADE)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A factored folder of each of the two ways to run attention."""
    out = tmp_path_factory.mktemp("factored") / request.param
    tl.save(MADE[request.param](), out)
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pivoted factors."""
    out = tmp_path_factory.mktemp("factored") / "pivoted"
    tl.save(pivoted(), out)
    return out


def opened(folder: Path, **given: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **given)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of a few tokens, at once."""
    return model.eval()(IDS).logits


def trainer(model: Any, out: Path, steps: int = 4, **given: Any) -> Trainer:
    arguments = TrainingArguments(
        str(out), per_device_train_batch_size=2, max_steps=steps, save_steps=2, learning_rate=0.01,
        use_cpu=True, report_to="none", disable_tqdm=True, logging_steps=1, **given,
    )  # fmt: skip
    kept = [tl.FactoredCheckpoints()]
    return Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:2], callbacks=kept)


@torch.no_grad()
def loss_of(model: Any) -> float:
    """On what it is trained on."""
    rows = torch.tensor([row["labels"] for row in ROWS])
    return float(model.eval()(rows, labels=rows).loss)


def losses(made: Trainer) -> list[float]:
    return [float(row["loss"]) for row in made.state.log_history if "loss" in row]


def test_a_trainer_goes_on_and_the_folder_holds_what_was_learnt(folder: Path, tmp_path: Path):
    model = opened(folder)
    before = loss_of(model)
    whole = trainer(model, tmp_path / "run")
    whole.train()
    assert loss_of(model) < before
    halfway = tmp_path / "run" / "checkpoint-2"
    assert not torch.equal(logits(opened(halfway)), logits(model))
    again = opened(folder)  # a new process: the weights from before
    rest = trainer(again, tmp_path / "run")
    rest.train(resume_from_checkpoint=str(halfway))
    assert losses(rest)[-1] == losses(whole)[-1]
    assert torch.equal(logits(again), logits(model))

    model.save_pretrained(tmp_path / "tuned")
    assert {"config.json", "tensorllm.json", "factored.safetensors"} <= {
        path.name for path in (tmp_path / "tuned").iterdir()
    }
    assert not list((tmp_path / "tuned").glob("model*"))
    assert torch.equal(logits(opened(tmp_path / "tuned")), logits(model))
    export(ExportRequest(folder=tmp_path / "tuned", out=tmp_path / "dense"))
    dense = opened(tmp_path / "dense")
    assert type(dense.model.layers[0].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(logits(dense), logits(model), rtol=0, atol=1e-4)


def test_the_best_checkpoint_is_loaded(small: Path, tmp_path: Path):
    model = opened(small)
    best = trainer(
        model,
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="loss",
        greater_is_better=True,
    )  # fmt: skip  the greatest loss is that of the first checkpoint
    best.train()
    assert best.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert torch.equal(logits(model), logits(opened(tmp_path / "checkpoint-2")))
    assert not torch.equal(logits(model), logits(opened(tmp_path / "checkpoint-4")))


@pytest.mark.parametrize(
    "given", [{"gradient_checkpointing": True}, {"bf16": True}], ids=lambda given: next(iter(given))
)
def test_it_trains_alike_in_less_memory(folder: Path, tmp_path: Path, given: dict[str, bool]):
    plain, other = (trainer(opened(folder), tmp_path, 3, **some) for some in ({}, given))
    plain.train()
    other.train()
    tolerance = 1e-5 if "bf16" not in given else 2e-2
    assert losses(other) == pytest.approx(losses(plain), rel=tolerance)


def test_in_bfloat16_every_factor_learns(folder: Path, tmp_path: Path):
    model = opened(folder, dtype=torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer(model, tmp_path, 2).train()
    same = [n for n, p in model.named_parameters() if p.numel() and torch.equal(p, before[n])]
    assert [n for n in same if not n.endswith(("norm.weight", ".u_MS"))] == []
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_only_the_factors_are_trained(folder: Path):
    model = opened(folder)
    before = {name: p.clone() for name, p in model.named_parameters()}
    wanted = [p for n, p in model.named_parameters() if ".parts." in n or ".factors." in n]
    frozen = sum(p.numel() for p in wanted if not p.requires_grad)  # a stack factor in the core
    count = tl.train_only_factors(model)
    assert count == sum(p.numel() for p in wanted) - frozen
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) is not (p.requires_grad and p.numel() > 0), name


def test_a_dense_model_has_no_factors_to_train():
    with pytest.raises(tl.UserError, match="no factors to train"):
        tl.train_only_factors(tiny_model("llama"))


@pytest.mark.parametrize("kept", [["shards"], []], ids=["fewer files", "as many"])
def test_an_older_save_is_replaced(small: Path, tmp_path: Path, kept: list[str]):
    model = opened(small)
    given = {"max_shard_size": "20KB"} if kept else {}
    model.save_pretrained(tmp_path / "out", **given)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > (1 if kept else 0)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors*")] == ["factored.safetensors"]
    assert torch.equal(logits(opened(tmp_path / "out")), logits(model))


def adapted(model: Any, **given: Any) -> Any:
    peft = pytest.importorskip("peft")
    settings = {"r": 3, "target_modules": "all-linear", "fan_in_fan_out": True}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings | given))


def test_lora_on_pivoted_factors_is_what_its_paper_says(small: Path):
    """W + B A on both factors: held to the factors written anew, before and after merging."""
    model = opened(small)
    plain = copy.deepcopy(model)
    with_lora = adapted(model)
    assert torch.allclose(logits(with_lora), logits(plain), atol=1e-5)  # B begins as zero
    learn(with_lora, IDS, 4)
    linears = {n: m for n, m in with_lora.base_model.model.named_modules() if hasattr(m, "lora_A")}
    own = {n: m for n, m in plain.named_modules() if isinstance(m, TransposedLinear)}
    assert linears.keys() == own.keys()
    for name, linear in own.items():
        a, b = (getattr(linears[name], part)["default"].weight for part in ("lora_A", "lora_B"))
        assert b.abs().sum() > 0, name
        linear.weight.data += (linears[name].scaling["default"] * b @ a).mT.detach()
    want = logits(plain)
    assert (logits(with_lora) - want).abs().max() < 1e-4
    with torch.inference_mode():
        step = with_lora(IDS[:1, :1]).logits  # one token: the path of decoding
    assert (step - plain(IDS[:1, :1]).logits).abs().max() < 1e-4
    merged = with_lora.merge_and_unload()
    assert (logits(merged) - want).abs().max() < 1e-4
    assert own.keys() == {n for n, m in merged.named_modules() if isinstance(m, TransposedLinear)}


def test_all_linears_of_a_factored_model_take_lora_and_it_is_merged_back(
    folder: Path, tmp_path: Path
):
    peft = pytest.importorskip("peft")
    model = opened(folder)
    start = logits(model)
    with_lora = adapted(model, fan_in_fan_out="pivoted" in str(folder))
    learn(with_lora, IDS, 4)
    assert (logits(with_lora) - start).abs().max() > 1e-3
    with_lora.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(opened(folder), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(with_lora))
    want = logits(with_lora)
    merged = with_lora.merge_and_unload()
    merged.save_pretrained(tmp_path / "tuned")
    assert (logits(opened(tmp_path / "tuned")) - want).abs().max() < 1e-4
    assert (logits(tl.load(tmp_path / "tuned")) - want).abs().max() < 1e-4


def test_a_trainer_goes_on_with_lora(small: Path, tmp_path: Path):
    models = [adapted(opened(small)) for _ in range(2)]
    trainer(models[0], tmp_path).train()
    halfway = tmp_path / "checkpoint-2"
    assert (halfway / "adapter_model.safetensors").is_file()
    assert not (halfway / "model.safetensors").exists()
    trainer(models[1], tmp_path).train(resume_from_checkpoint=str(halfway))
    assert torch.equal(logits(models[1]), logits(models[0]))


def test_an_adapter_of_transformers_is_saved_alone(small: Path, tmp_path: Path):
    peft = pytest.importorskip("peft")
    model = opened(small)
    model.add_adapter(peft.LoraConfig(target_modules=r".*factors\.basis", fan_in_fan_out=True))
    learn(model, IDS, 4)
    model.save_pretrained(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names
    assert not any("factored" in name for name in names)
    again = opened(small)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(model))


# Some matrices are left whole, and are ordinary linears: peft says that it sees them.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize("safe_merge", [False, True])
def test_lora_stays_beside_quantised_factors(tmp_path: Path, safe_merge: bool):
    pytest.importorskip("torchao")
    large = pivoted(hidden_size=64, intermediate_size=256, num_attention_heads=4)
    tl.save(large, tmp_path / "factored")
    export(ExportRequest(folder=tmp_path / "factored", out=tmp_path / "narrow", quantize="int8"))
    model = opened(tmp_path / "narrow")
    start = loss_of(model)
    with_lora = adapted(model)
    learn(with_lora, IDS, 4)
    assert with_lora(IDS, labels=IDS).loss < start
    with pytest.raises(tl.UserError, match="cannot be merged into quantised factors"):
        with_lora.merge_and_unload(safe_merge=safe_merge)


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo model in factors and a text, where the page's scripts look for them."""
    model, tokenizer = opened(MODEL_DIR), AutoTokenizer.from_pretrained(MODEL_DIR)
    tl.compress(model, tl.Hybrid(ranks=(96, 24, 3), rho=0.3, matrices=("in", "out")))
    tl.save(model, tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    rows = make_dataset("demo", limit=400).examples
    (tmp_path / "stories.txt").write_text(" ".join(f"{row.prompt} {row.answer}" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:::lightning", "ignore:.*fan_in_fan_out", "ignore:.*treespec.*")
@pytest.mark.parametrize("number", [0, 1], ids=["Trainer", "Lightning and LoRA"])
def test_the_scripts_of_the_page_run(beside: Path, number: int):
    if number == 1:
        pytest.importorskip("peft")
    program = blocks((ROOT / "docs" / "fine_tuning.md").read_text(), "python")[number].text
    smaller = {"=200": "=6", "save_steps=50": "save_steps=3", "_steps=20": "_steps=1"}
    for old, new in (smaller | {"128": "16", "127": "15"}).items():
        program = program.replace(old, new)
    found: dict[str, Any] = {}
    exec(compile(program, "fine_tuning.md", "exec"), found)
    ids = torch.as_tensor(found["blocks"][:8])
    start, tuned = (opened(beside / name)(ids, labels=ids).loss for name in ("small", "tuned"))
    assert tuned < start
    dense = tl.load(beside / "tuned")
    torch.testing.assert_close(dense(ids, labels=ids).loss, tuned, rtol=1e-4, atol=0)
    assert (
        AutoTokenizer.from_pretrained(beside / "tuned").vocab_size == found["tokenizer"].vocab_size
    )
    made = "run/checkpoint-3/model.safetensors", "adapter/adapter_model.safetensors"
    assert (beside / made[number]).is_file()
