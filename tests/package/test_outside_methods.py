"""A method in one file outside the package goes through every command: three of them do.

Each in a process of its own, in which the file is installed as a package with an entry point and
never imported by name.
"""

import os
from pathlib import Path

import forked
import pytest

from tensorllm.data.demo import MODEL_DIR, questions

SOURCE = Path(__file__).with_name("outside_methods.py")
INFO = """\
[tensorllm.compressors]
outside = outside_methods
"""
EVERY_COMMAND = """
import contextlib, io, json, sys
from pathlib import Path
import torch
import tensorllm as tl
from transformers import AutoModelForCausalLM
from tensorllm_cli.app import main
from tensorllm.calibration import read_calibration
from tensorllm.checkpoint.loader import Loader
from tensorllm.compressors.settings import make_compressor

mode, model, text, work = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
needs_text = tl.COMPRESSORS[mode].needs != "weights"

def tensorllm(*arguments, fails=None):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(a) for a in arguments])
        except SystemExit as ended:
            code = ended.code
    said = " ".join((out.getvalue() + err.getvalue()).split())
    assert code == (0 if fails is None else 2), (arguments, code, said)
    assert fails is None or fails in said, said
    return out.getvalue()

given = ["--calibration", text, "--sequences", 24, "--allow-overlap"] if needs_text else []
compress = ["compress", "--model", model, "--mode", mode, "--layers", "1,2", *given]
at = ["--set", "rank=6"]
tensorllm(*compress, fails=f"mode {mode!r} needs rank")

if needs_text:
    tensorllm(*compress[:7], *at, fails="give --calibration FILE")
else:
    tensorllm(*compress, *at, "--calibration", text, fails="takes no calibration text")
plan = json.loads(tensorllm(*compress, *at, "--dry-run", "--json"))
assert len(plan["sites"]) == 4
tensorllm(*compress, "--set", "rank=0", fails="rank must be 1 or more, got 0")

# in memory and from folder to folder: the same weights, bit for bit
for form in ("dense", "factored"):
    tensorllm(*compress, *at, "--out", work / form, "--format", form)
loader = Loader(Path(model))
held = loader()
whole = {}
if needs_text:
    whole["calibration"] = read_calibration(
        text, loader.tokenizer(), sequences=24, length=min(512, held.config.n_positions)
    )
tl.compress(held, make_compressor(mode, {"rank": 6}), [1, 2], **whole)
made = AutoModelForCausalLM.from_pretrained(work / "dense")
for (name, a), b in zip(held.named_parameters(), made.parameters(), strict=True):
    assert torch.equal(a, b), name
tl.save(held, work / "saved", format="factored")
for file in sorted((work / "factored").glob("*.safetensors")):
    assert file.read_bytes() == (work / "saved" / file.name).read_bytes(), file

# it runs in its factors, exports, quantises, and is reported
ids = torch.arange(3, 12)[None]
with torch.no_grad():
    want = made(ids).logits
    runs = AutoModelForCausalLM.from_pretrained(work / "factored")
    assert torch.allclose(runs(ids).logits, want, atol=1e-4 * float(want.abs().max()))
    assert sum(p.numel() for p in runs.parameters()) < sum(p.numel() for p in made.parameters())
tensorllm("export", work / "factored", work / "exported")
again = AutoModelForCausalLM.from_pretrained(work / "exported")
assert all(torch.equal(a, b) for a, b in zip(again.parameters(), made.parameters(), strict=True))
tensorllm("export", work / "factored", work / "narrow", "--quantize", "int8")
narrow = AutoModelForCausalLM.from_pretrained(work / "narrow")(ids).logits
assert float((narrow.detach() - want).norm() / want.norm()) < 0.1
card = (work / "factored" / "README.md").read_text()
assert f"compressed: {mode}" in card
tensorllm("report", work / "factored", "--out", work / "page.html")
assert mode in (work / "page.html").read_text()

# a target size is met
report = json.loads(
    tensorllm(*compress, "--target-ratio", "2", "--out", work / "half", "--json")
)
assert 2 <= report["ratios"]["matrices_compressed"] < 2.2, report["ratios"]

# its curves list every rank: no matrix gets one at which it would store more than as it is
report = json.loads(tensorllm(*compress, "--target-ratio", "1.1", "--json"))
assert 1.1 <= report["ratios"]["matrices_compressed"], report["ratios"]
larger = [s for s in report["sites"] if s["parameters_after"] >= s["parameters_before"]]
assert not larger, larger
SEARCH
print("went through every command")
"""
SEARCH = """
# a search finds ranks for it
asked = ["search-ranks", "--model", model, "--mode", mode, "--layers", "1,2", "--limit", 40,
         "--dataset", "demo"]
if needs_text:  # questions of the demo, too
    asked += ["--allow-overlap"]
found = json.loads(tensorllm(*asked, *given[:2], "--trials", 3, "--json"))
assert found["trials"]["examined"] == 3, found["trials"]
assert 2 <= found["winner"]["rank"] <= 24, found["winner"]  # of its own values, between them
assert found["winner"]["mode"] == mode
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["centred", "two-sided", "chasing"])
def test_a_method_in_one_file_goes_through_every_command(mode: str, tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "outside_methods-1.0.dist-info").mkdir(parents=True)
    (site / "outside_methods.py").write_text(SOURCE.read_text())
    info = site / "outside_methods-1.0.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(INFO)
    text = tmp_path / "text.txt"
    text.write_text(
        "\n".join(" ".join(reversed(q.prompt.split())) for q in questions()[:1500]) + "\n"
    )
    done = forked.run(
        [
            "-c",
            EVERY_COMMAND.replace("SEARCH\n", SEARCH),
            mode,
            MODEL_DIR,
            text,
            tmp_path,
        ],
        env={**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
        timeout=280,
    )
    assert "went through every command" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
