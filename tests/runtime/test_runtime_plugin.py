"""A kind of factors from outside, in one file with its module, goes wherever the shipped ones go.

In processes of their own: what a plugin registers stays registered.
"""

import os
import re
from pathlib import Path

import forked
import pytest
from repository import ROOT
from tiny_models import tiny_model
from transformers import AutoTokenizer

PAGE = (ROOT / "docs" / "add_a_compressor.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
INFO = """\
[tensorllm.compressors]
mean-head = mean_head
"""
# Runs with the plugin installed and never imported by name: the registries and folders do all.
WITH = """
import json, sys
from pathlib import Path
import torch
import tensorllm as tl
from transformers import AutoModelForCausalLM
from tensorllm.checkpoint.loading import choices_of
from tensorllm.commands.bench import bench
from tensorllm.requests.others import BenchRequest
from tensorllm.commands.compress import run
from tensorllm.requests.compress import CompressRequest
from tensorllm.commands.generate import generate
from tensorllm.requests.others import GenerateRequest
from tensorllm.compression.export import export, quantise_folder

source = Path(sys.argv[1])
out, narrow, again, dense = (source.parent / n for n in ("out", "narrow", "again", "dense"))
run(CompressRequest(model=str(source), mode="mean-head", layers=(1,), out=out, format="factored",
                    settings={"rank": 8}))
kinds = {site["kind"] for site in json.loads((out / "tensorllm.json").read_text())["sites"]}
assert kinds == {"mean-and-residual"}
details = json.loads((out / "details.json").read_text())
assert [[s["mode"] for s in site["spectra"]] for site in details] == [[0, 1, 2]] * 4
assert "mean and residual factors of rank 8" in (out / "README.md").read_text()
assert all(s.bytes_after < s.bytes_before for s in quantise_folder(out, narrow, "int8"))
kinds = {site["kind"] for site in json.loads((narrow / "tensorllm.json").read_text())["sites"]}
assert kinds == {"int8-mean-and-residual"}
export(out, dense)

ids = torch.arange(3, 14)[None]
close = lambda a, b, tol: bool((a - b).abs().max() <= tol * b.abs().max())
with torch.no_grad():
    want = AutoModelForCausalLM.from_pretrained(dense)(ids).logits
    assert torch.equal(tl.load(out)(ids).logits, want)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    names = [type(m).__name__ for m in model.modules()]
    assert names.count("MeanAndResidualModule") == 4, names
    assert close(model(ids).logits, want, 1e-5)
    model.save_pretrained(again)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(again)(ids).logits, model(ids).logits)
    small = AutoModelForCausalLM.from_pretrained(narrow)
    assert {p.dtype for p in small.parameters()} == {torch.float32, torch.int8}
    assert close(small(ids).logits, tl.load(narrow)(ids).logits, 1e-5)
    auto = tl.load(out, policy="auto")
    choices = choices_of(auto)
    assert len(choices) == 4 and not any(c.factored for c in choices), choices
    assert {c.factors.operations for c in choices} == {3}  # the default of a module
    assert close(auto(ids).logits, want, 1e-5)
model.train()(ids, labels=ids).loss.backward()
site = next(m for m in model.modules() if type(m).__name__ == "MeanAndResidualModule")
assert all(p.grad.abs().sum() > 0 for p in (site.mean, site.u, site.v))

memory = AutoModelForCausalLM.from_pretrained(source).eval()
tl.compress(memory, tl.COMPRESSORS["mean-head"](rank=5), layers=[0])
with torch.no_grad():
    before = memory(ids).logits
    assert all(c.factored for c in tl.factorize(memory))
    assert close(memory(ids).logits, before, 1e-5)

texts = [
    generate(GenerateRequest(model=str(folder), prompts=("Once",), max_new_tokens=4))
    for folder in (out, dense)
]
assert texts[0] == texts[1]
found = bench(BenchRequest(model=out, prompt_tokens=8, new_tokens=2, repeats=1, peak=False))
assert found.ratios()["weights"] > 1
assert all(choice.factored for choice in found.choices)
print("done")
"""
# Runs where nobody knows the kind.
WITHOUT = """
import sys
from pathlib import Path
import tensorllm as tl
from tensorllm.commands.report import report

out = Path(sys.argv[1]).parent / "out"
report([out], out.with_name("page.html"))
assert "mean and residual factors of rank 8" in out.with_name("page.html").read_text()
try:
    tl.load(out)
except tl.UserError as error:
    print(error)
"""
DENSE = """
import sys, torch
from pathlib import Path
import tensorllm as tl
from transformers import AutoModelForCausalLM
from tensorllm.checkpoint.loading import choices_of

source = Path(sys.argv[1])
ids, out = torch.arange(3, 14)[None], source.parent / "out"
model = AutoModelForCausalLM.from_pretrained(source)
tl.compress(model, tl.COMPRESSORS["mean-head"](rank=8))
tl.save(model, out)
loaded = tl.load(out, policy="always")
assert torch.equal(loaded(ids).logits, tl.load(out)(ids).logits)
assert not any(choice.factored for choice in choices_of(loaded))
print(*{choice.why for choice in choices_of(loaded)})
"""


def run(packages: Path, lines: str, model: Path) -> str:
    done = forked.run(
        ["-c", lines, model],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(packages), str(ROOT)])},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder on the path that holds the page's file, installed as a package."""
    folder = tmp_path / "packages"
    info = folder / "mean_head-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "mean_head.py").write_text("\n\n".join(BLOCKS))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mean-head\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(INFO)
    return folder


@pytest.mark.slow
def test_a_kind_from_outside_runs_saves_exports_and_is_reported(
    packages: Path, tinystories: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tinystories)
    tiny_model("llama", vocab_size=len(tokenizer), **SIZES).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert run(packages, WITH, tmp_path / "model") == "done"
    said = run(tmp_path, WITHOUT, tmp_path / "model")
    assert said.startswith("Unknown factor kind 'mean-and-residual'.")
    assert said.endswith("import its module first (--plugin MODULE)")


@pytest.mark.slow
def test_a_kind_without_a_module_is_loaded_dense(packages: Path, tmp_path: Path) -> None:
    (packages / "mean_head.py").write_text("\n\n".join(b for b in BLOCKS if "@runs" not in b))
    tiny_model("llama", **SIZES).save_pretrained(tmp_path / "model")
    said = run(packages, DENSE, tmp_path / "model")
    assert said == "no module for 'mean-and-residual' factors stacked as 'head'"
