"""Every checkpoint folder has a README.md that the hub reads, and that tells how it was made."""

import json
import re
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from report_runs import run
from tiny_models import tiny_model

import tensorllm as tl
from tensorllm.compression.card import hub_id
from tensorllm.compression.citations import ALWAYS, citation

FORMATS = ("dense", "factored")


def saved(folder: Path, format: Any = "factored", strategy: Any = None) -> ModelCard:
    model = tiny_model("gptj")
    tl.compress(model, strategy or tl.Hybrid(ranks=(6, 4, 3), rho=0.2), layers=[1])
    tl.save(model, folder, format=format)
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("format", FORMATS)
def test_the_hub_reads_the_card(format: Any, tmp_path: Path) -> None:
    card = saved(tmp_path / "out", format)
    data = card.data.to_dict()
    assert data["library_name"] == ("transformers" if format == "dense" else "tensorllm")
    assert data["pipeline_tag"] == "text-generation"
    assert {"tensorllm", "hybrid", "tucker", "low-rank"} <= set(data["tags"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for site in report["sites"]:
        assert f"`{site['name']}`" in card.text
        assert f"{site['relative_error']:.4f}" in card.text
    for ratio in report["ratios"].values():
        assert f"{ratio:.3f}" in card.text
    assert "2501.15674" in card.text
    assert "2312.13558" in card.text


@pytest.mark.parametrize("mode", [*tl.COMPRESSORS, "https://example.org/of-a-plugin"])
def test_the_source_of_every_strategy_is_cited(mode: str) -> None:
    source = tl.COMPRESSORS[mode].source if mode in tl.COMPRESSORS else mode
    assert source in citation(source)
    assert all(paper in citation(source) for paper in ALWAYS)


def test_its_code_loads_the_folder(tmp_path: Path) -> None:
    """Run as it is written, in a fresh process; the tokenizer is not there in this test."""
    programs = []
    for format in FORMATS:  # dense first: once tensorllm is imported it is for both
        card = saved(tmp_path / format, format)
        (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
        code = code.replace("this folder or repository", str(tmp_path / format))
        programs += [line for line in code.splitlines() if not line.startswith("tokenizer")]
        programs.append("print(model.num_parameters())")
    done = forked.run(["-c", "\n".join(programs)], bare=True)
    assert done.returncode == 0, done.stderr
    dense, factored = map(int, done.stdout.split())
    assert dense > factored > 0


def test_its_recipe_makes_the_same_weights(tmp_path: Path) -> None:
    model = tiny_model("gptj")
    model.save_pretrained(tmp_path / "in")
    first = ("compress", "--model", tmp_path / "in", "--mode", "hybrid", "--ranks", "6,4,3")
    assert run(*first, "--rho", 0.2, "--layers", 1, "--out", tmp_path / "one") == 0
    card = ModelCard.load(tmp_path / "one" / "README.md")
    (recipe,) = re.findall(r"```yaml\n(.*?)```", card.text, re.DOTALL)
    (command,) = re.findall(r"^tensorllm (compress --config .*)$", card.text, re.MULTILINE)
    (tmp_path / "recipe.yaml").write_text(recipe)
    places = {"recipe.yaml": str(tmp_path / "recipe.yaml"), "FOLDER": str(tmp_path / "two")}
    assert run(*(places.get(word, word) for word in command.split())) == 0
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_licence_and_text_of_the_original_stay(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    tiny_model("gptj").save_pretrained(folder)
    (folder / "README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage: en\ntags: [story]\nwidget: []\n"
        "model-index: [{name: other, results: []}]\n---\n# The original\n\nDo not eat.\n"
    )
    compress = ("compress", "--model", folder, "--mode", "laser", "--rank", 2, "--layers", 0)
    assert run(*compress, "--out", tmp_path / "out") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    data = yaml.safe_load(text.split("---")[1])
    assert (data["license"], data["language"]) == ("apache-2.0", "en")
    assert "story" in data["tags"]
    assert "laser" in data["tags"]
    assert not {"model-index", "widget"} & data.keys()
    assert text.index("## Cite") < text.index("## The card of the original model")
    assert text.rstrip().endswith("Do not eat.")


def test_unreadable_card_of_the_original_is_no_obstacle(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    tiny_model("gptj").save_pretrained(folder)
    (folder / "README.md").write_bytes(b"---\n: [\n---\n\xff\xfe what is this")
    compress = ("compress", "--model", folder, "--mode", "laser", "--rank", 2, "--layers", 0)
    assert run(*compress, "--out", tmp_path / "out") == 0
    assert ModelCard.load(tmp_path / "out" / "README.md").data.library_name == "transformers"


def test_measurements_come_in_and_own_words_stay(tmp_path: Path) -> None:
    """`report --card`: twice gives the same, and what was written around our part is kept."""
    out, results = tmp_path / "out", tmp_path / "results"
    demo = ("--model", "demo")
    compress = ("compress", *demo, "--mode", "laser", "--limit", 10, "--format", "factored")
    assert run(*compress, "--out", out) == 0
    path = out / "README.md"
    path.write_text(path.read_text() + "\nMy own words.\n")
    evaluate = ("evaluate", *demo, "--dataset", "demo", "--limit", 50, "--compressed", out)
    assert run(*evaluate, "--out", results) == 0
    texts = []
    for _ in range(2):
        assert run("report", out, results, "--card", "--out", tmp_path / "page.html") == 0
        texts.append(path.read_text())
    assert texts[0] == texts[1]
    assert texts[0].rstrip().endswith("My own words.")
    found = json.loads((results / "results.json").read_text())
    low, high = found["intervals"]["accuracy"]
    accuracy = found["metrics"]["accuracy"]
    assert f"{accuracy:.2f} [{low:.2f}, {high:.2f}]" in texts[0]
    assert "50 examples, bootstrap seed 0" in texts[0]
    card = ModelCard(texts[0])
    measured = {
        (r.metric_type, r.dataset_args["examples"]): r.metric_value for r in card.data.eval_results
    }
    assert measured["accuracy", 50] == pytest.approx(accuracy, abs=1e-3)

    assert run("export", out, tmp_path / "dense") == 0
    dense = ModelCard.load(tmp_path / "dense" / "README.md")
    assert dense.data.library_name == "transformers"
    assert "import tensorllm" not in dense.text
    report = json.loads((tmp_path / "dense" / "report.json").read_text())
    size = sum(p.stat().st_size for p in (tmp_path / "dense").glob("*.safetensors"))
    assert (report["format"], report["totals"]["bytes_after"]) == ("dense", size)


def test_half_precision_export_says_so(tmp_path: Path) -> None:
    saved(tmp_path / "out")
    assert run("export", tmp_path / "out", tmp_path / "half", "--dtype", "bf16") == 0
    report = json.loads((tmp_path / "half" / "report.json").read_text())
    assert report["dtype"] == "bfloat16"
    assert tl.load(tmp_path / "half").dtype == torch.bfloat16


def test_base_model_is_named_where_the_hub_has_it(tmp_path: Path) -> None:
    assert hub_id("gptj") == "EleutherAI/gpt-j-6b"
    assert hub_id("owner/name") == "owner/name"
    assert hub_id("demo") is None
    assert hub_id(str(tmp_path)) is None
