"""A factored folder opens, runs and saves itself through transformers' own functions."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
from tiny_models import TINY, tiny_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    pipeline,
)

import tensorllm as tl
from tensorllm.checkpoint import loading, saving
from tensorllm.compression.factorize import factorize
from tensorllm.compressors import PlainSVD
from tensorllm.errors import UserError
from tensorllm.runtime.attention import FactoredAttention
from tensorllm.runtime.cost import choose_all
from tensorllm.tensors.factors import Factors, LowRank

HYBRID = tl.Hybrid(ranks=(20, 3, 2), rho=0.4, matrices=("in", "out"))
IDS = torch.randint(3, 100, (2, 11), generator=torch.Generator().manual_seed(1))


def auto(name: str) -> Any:
    return AutoModelForMaskedLM if TINY[name].task == "masked" else AutoModelForCausalLM


def saved(name: str, folder: Path, compressor: Any = HYBRID, **config: Any) -> Any:
    """A factored folder, and the dense model that it stands for."""
    dense = tiny_model(name, **config)
    tl.compress(dense, compressor)
    tl.save(dense, folder)
    return dense


@torch.no_grad()
def same(got: Any, want: Any, tol: float = 1e-5) -> None:
    a, b = got(IDS).logits, want(IDS).logits
    assert (a - b).abs().max() <= tol * b.abs().max()


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("compressor", [HYBRID, tl.Trawl(rank=9, across_layers=True)])
def test_a_folder_opens_factored_and_saves_itself(name: str, compressor: Any, tmp_path: Path):
    dense = saved(name, tmp_path / "out", compressor)
    model, info = auto(name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    same(model, dense)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense.parameters())

    model.save_pretrained(tmp_path / "again")
    again = auto(name).from_pretrained(tmp_path / "again")
    same(again, model, tol=0)
    same(tl.load(tmp_path / "again"), dense)


def test_what_was_factored_in_memory_saves_itself(tmp_path: Path):
    model = tiny_model("phi3")
    tl.compress(model, tl.LaserSVD(rho=0.5, matrices=("in", "q")))
    factorize(model)
    model.save_pretrained(tmp_path / "out")
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)
    same(tl.load(tmp_path / "out"), model)


@pytest.mark.parametrize(
    "compressor", [PlainSVD(kept=0.5), tl.LaserSVD(rho=0.4, matrices=("in", "out"))]
)
def test_what_a_folder_holds_is_run_as_it_lies_there(compressor: Any, tmp_path: Path):
    """A turned copy would be in memory beside the pages of the file that it was made from."""
    saved("llama", tmp_path / "out", compressor)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert any("role_out" in name for name, _ in opened.named_parameters())
    turned = [
        order
        for rule in opened._weight_conversions
        for permute in getattr(rule, "operations", ())
        for _, order in permute.orders.values()
    ]
    assert set(turned) == {None}


def test_folders_from_before_output_factors_were_turned_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(LowRank, "as_run", Factors.as_run)
    dense = saved("llama", tmp_path / "out", PlainSVD(kept=0.5))
    monkeypatch.undo()
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), dense)


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dense = saved("gptj", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    def stopped(path: Path) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "sha256", stopped)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path / "out")
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), dense)


def test_the_manifest_comes_from_where_the_weights_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """transformers fetches only what it knows; the branch or cache may not be the default one."""
    folder = tmp_path / "cache" / "models--someone--small" / "snapshots" / "c0ffee"
    dense = saved("llama", tmp_path / "out")
    shutil.copytree(tmp_path / "out", folder)
    (folder / "tensorllm.json").unlink()

    def cached_file(repo: str, name: str, *, revision: str, cache_dir: Path, **_: Any) -> str:
        assert (revision, Path(cache_dir)) == ("c0ffee", tmp_path / "cache")
        return str(shutil.copy(tmp_path / "out" / name, folder))

    monkeypatch.setattr("transformers.utils.hub.cached_file", cached_file)
    same(AutoModelForCausalLM.from_pretrained(folder), dense)


def test_a_model_that_runs_factored_says_how_it_is_saved(tmp_path: Path):
    model = tiny_model("llama")
    tl.compress(model, HYBRID)
    factorize(model)
    with pytest.raises(UserError, match="save_pretrained"):
        tl.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out")
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)


def test_what_is_pushed_to_the_hub_is_a_factored_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dense = saved("llama", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    pushed = tmp_path / "pushed"

    class Hub:
        """Stands in for the hub: what is uploaded lands in a folder."""

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return SimpleNamespace(repo_id=repo_id, url=f"https://hub/{repo_id}")

        def create_commit(self, repo_id: str, operations: Any, **kwargs: Any) -> Any:
            for operation in operations:
                path = pushed / operation.path_in_repo
                path.parent.mkdir(parents=True, exist_ok=True)
                with operation.as_file() as content:
                    path.write_bytes(content.read())
            return SimpleNamespace(oid="1", commit_url="https://hub/commit")

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: None

    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda *a, **k: Hub())
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *a, **k: Card())
    model.push_to_hub("someone/small")
    assert {"tensorllm.json", "config.json", "factored.safetensors"} <= {
        path.name for path in pushed.iterdir()
    }
    same(AutoModelForCausalLM.from_pretrained(pushed), dense)


class Card:
    """A model card that is written nowhere."""

    def save(self, path: Any) -> None:
        Path(path).write_text("---\n---\n")


def test_nothing_is_expanded_and_attention_is_ours(tmp_path: Path):
    dense = saved("llama", tmp_path / "out", tl.SharedTucker4D(ranks=(20, 3, 2)))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    attention = model.model.layers[0].self_attn
    assert isinstance(attention, FactoredAttention)
    assert isinstance(attention, type(dense.model.layers[0].self_attn))
    core_and_factors = 20 * 3 * 2 * 2 + 32 * 20 + 8 * 3 + 6 * 2
    biases = 32 + 16 + 16 + 32
    assert sum(p.numel() for p in attention.parameters()) == core_and_factors + biases


def test_trained_weights_are_what_is_saved(tmp_path: Path):
    saved("gptj", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").train()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval().save_pretrained(tmp_path / "tuned")
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned"), model, tol=0)


def test_without_the_import_it_fails_clearly(tmp_path: Path):
    saved("llama", tmp_path / "out")
    lines = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    run = forked.run(["-c", lines, tmp_path / "out"], bare=True)
    assert run.returncode != 0
    assert "first-import-tensorllm" in run.stderr.strip().splitlines()[-1]
    assert "import tensorllm" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("first", ["tensorllm", "transformers", "transformers.modeling_utils"])
def test_the_order_of_imports_does_not_matter(first: str, tmp_path: Path):
    saved("llama", tmp_path / "out")
    lines = (
        f"import {first}, sys, tensorllm\n"
        f"assert {first!r} != 'tensorllm' or 'torch' not in sys.modules\n"
        "from transformers import AutoModelForCausalLM as A\n"
        "print(type(A.from_pretrained(sys.argv[1]).model.layers[1].self_attn).__name__)"
    )
    if first == "tensorllm":  # torch, too, comes after it
        words = [sys.executable, "-c", lines, str(tmp_path / "out")]
        run = subprocess.run(words, capture_output=True, text=True)
    else:
        run = forked.run(["-c", lines, tmp_path / "out"], bare=True)
    assert run.stdout.strip() == "FactoredLlamaAttention", run.stderr


def test_dtype_device_map_and_headless(tmp_path: Path):
    pytest.importorskip("accelerate")
    pytest.importorskip("psutil", reason="accelerate measures memory with it")
    dense = saved("llama", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, device_map="auto"
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    same(model.float(), dense, tol=5e-2)  # an ordinary model: it can be cast
    base = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(
        base(IDS).last_hidden_state, dense.model(IDS).last_hidden_state, rtol=0, atol=1e-4
    )


def test_weights_stay_on_the_disk_without_a_folder_to_write_to(tmp_path: Path):
    """transformers writes what a converter took, and refuses if no folder is given."""
    pytest.importorskip("accelerate")
    dense = saved("llama", tmp_path / "out", PlainSVD(kept=0.5))
    places = {name: "cpu" for name, module in dense.named_modules() if not any(module.children())}
    places |= {name: "disk" for name in places if name.startswith("model.layers.0.self_attn.q")}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map=places)
    assert any(p.is_meta for p in model.parameters())
    same(model, dense)


def test_factors_that_a_device_map_leaves_on_the_disk_are_refused(tmp_path: Path):
    """A site reads its modules' weights at once; those that are fetched on a call were NaN."""
    pytest.importorskip("accelerate")
    dense = saved("llama", tmp_path / "out")
    places = {"model.layers.0": "disk", "model.layers.1": "cpu", "lm_head": "cpu"}
    places |= {f"model.{name}": "cpu" for name, _ in dense.model.named_children()}
    del places["model.layers"]
    with pytest.raises(UserError, match=r"the device map leaves 1 of 2 factored modules on the d"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", device_map=places, offload_folder=tmp_path / "away"
        )


def test_pipeline_and_assisted_decoding(tinystories: Path, tmp_path: Path):
    dense = AutoModelForCausalLM.from_pretrained(tinystories, dtype=torch.float32).eval()
    tl.compress(dense, tl.SharedTucker4D(ranks=(96, 12, 4)))
    tokenizer = AutoTokenizer.from_pretrained(tinystories)
    tl.save(dense, tmp_path / "out", tokenizer=tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 12, "do_sample": False}
    story = writer("Once upon a time", **settings)[0]["generated_text"]
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    want = dense.generate(ids, **settings)
    assert story == tokenizer.decode(want[0], skip_special_tokens=True)
    assert torch.equal(model.generate(ids, assistant_model=dense, **settings), want)


def broken(folder: Path, what: str) -> None:
    """Damage a factored folder."""
    manifest = folder / "tensorllm.json"
    weights = folder / "factored.safetensors"
    if what == "no manifest":
        manifest.unlink()
    elif what == "no weights":
        weights.unlink()
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    else:
        values = json.loads(manifest.read_text())
        if what == "newer":
            values["format_version"] = 99
        elif what == "a tensor missing":
            values["sites"][0]["tensors"]["core"] = "factors.elsewhere"
        elif what == "another layer":
            values["sites"][0]["layers"] = [7]
        manifest.write_text(json.dumps(values))


BROKEN = {
    "no manifest": "has no tensorllm.json",
    "no weights": "factored.safetensors",
    "truncated": "truncated",
    "newer": "update tensorllm",
    "a tensor missing": "lacks the tensor factors.elsewhere",
    "another layer": "layers must be in",
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_folders_are_refused(what: str, tmp_path: Path):
    saved("llama", tmp_path / "out")
    broken(tmp_path / "out", what)
    with pytest.raises((ValueError, OSError), match=BROKEN[what]):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_config_of_other_sizes_is_refused(tmp_path: Path):
    saved("llama", tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 48}))
    with pytest.raises(UserError, match="the config says"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_authors_layout_says_what_to_do(tmp_path: Path):
    saved("bert", tmp_path / "out", tl.SharedTucker4D(ranks=(20, 4, 2), layout="official"))
    with pytest.raises(UserError, match="export --format dense"):
        AutoModelForMaskedLM.from_pretrained(tmp_path / "out")


def test_save_pretrained_refuses_what_it_cannot(tmp_path: Path):
    saved("gpt2", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(UserError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "x", push_to_hub=True)
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("factored-*.safetensors"))) > 1
    shutil.rmtree(tmp_path / "out")
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "many"), model, tol=0)


@torch.no_grad()
def test_a_model_loads_partly_dense_and_saves_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where q, k and v are one parameter, one of them in factors and the others dense."""
    dense = saved("phi3", tmp_path / "out", tl.LaserSVD(rho=0.4, matrices=("q", "v", "in")))
    wanted = {"layers.0.q", "layers.1.in"}

    def chosen(sites: Any, geometry_of: Any, policy: Any, dtype: Any, **given: Any) -> Any:
        choices = choose_all(sites, geometry_of, "always", dtype, **given)
        return [replace(choice, factored=choice.site in wanted) for choice in choices]

    monkeypatch.setattr(loading, "choose_all", chosen)
    model = loading.load(tmp_path / "out", policy="auto")
    assert {c.site for c in loading.choices_of(model) if c.factored} == wanted
    assert {site.name for site in model.tensorllm_manifest.sites} == wanted
    factored = [n for n, m in model.named_modules() if type(m).__name__ == "FactoredLinear"]
    assert factored == ["model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.gate_up_proj"]
    same(model, dense)
    model.save_pretrained(tmp_path / "again")
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model, tol=0)
    same(tl.load(tmp_path / "again"), dense)
    with pytest.raises(UserError, match="policy must be one of always, auto, dense"):
        tl.load(tmp_path / "out", policy="fast")
