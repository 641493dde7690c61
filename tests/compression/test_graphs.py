"""A graph that runs without our code computes what the factored model does, from as few numbers."""

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from calibration_text import text
from huggingface_hub import ModelCard
from tiny_models import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import tensorllm as tl
from tensorllm.checkpoint.loading import load
from tensorllm.commands.export import run
from tensorllm.compression import graph
from tensorllm.compression.graph import export_graph, trace
from tensorllm.compressors import SVDLLM, ActivationHybrid, MoDeGPT, PlainSVD
from tensorllm.errors import UserError
from tensorllm.requests.others import ExportRequest

FFN = ("in", "gate", "out")
KINDS = {  # two linears, the shared tensor, chosen rows that q, k and v share, kept channels
    "svd": lambda: PlainSVD(kept=0.5),
    "tucker": lambda: tl.SharedTucker4D(ranks=(20, 3, 2)),
    "svd-llm": lambda: SVDLLM(kept=0.5),
    "pivoted": lambda: ActivationHybrid(target_ratio=2.0),
    "modegpt": lambda: MoDeGPT(kept=0.4, matrices=FFN),
}
CALIBRATED = {"svd-llm", "pivoted", "modegpt"}


def saved(folder: Path, kind: str = "svd", architecture: str = "llama", **config: Any) -> Path:
    """A factored folder of a tiny model."""
    model = tiny_model(architecture, **config)
    given = {"calibration": text()} if kind in CALIBRATED else {}
    tl.compress(model, KINDS[kind](), **given)
    tl.save(model, folder)
    return folder


def prompts(texts: int, tokens: int) -> dict[str, torch.Tensor]:
    """Tokens, and a mask that pads the first text on the left."""
    ids = torch.randint(3, 100, (texts, tokens), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, : tokens // 3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def in_onnxruntime(folder: Path) -> Callable[..., torch.Tensor]:
    runtime = pytest.importorskip("onnxruntime", reason="tensorllm[onnx]")
    session = runtime.InferenceSession(str(folder / "model.onnx"))

    def logits(**given: torch.Tensor) -> torch.Tensor:
        numbers = {name: value.numpy() for name, value in given.items()}
        return torch.from_numpy(session.run(["logits"], numbers)[0])

    return logits


def in_torch(folder: Path) -> Any:
    return torch.export.load(folder / "model.pt2").module()


def agree(graph: Callable[..., torch.Tensor], source: Path) -> None:
    """For texts of any number and length, one token too, where tokens are read."""
    model = load(source, policy="always")
    for texts, tokens in [(3, 21), (1, 1), (1, 40), (2, 1)]:
        given = prompts(texts, tokens)
        with torch.no_grad():
            want, got = model(**given).logits, graph(**given)
        read = given["attention_mask"].bool()
        assert (got - want)[read].abs().max() <= 1e-4 * want[read].abs().max()


def bytes_of(model: Any) -> int:
    return sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize(
    "kind",
    ["svd", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if not k.startswith("svd"))],
)  # svd-llm: as svd
def test_onnxruntime_computes_the_factored_model(kind: str, tmp_path: Path):
    pytest.importorskip("onnxscript", reason="tensorllm[onnx]")
    source = saved(tmp_path / "source", kind, hidden_size=64)
    run(ExportRequest(folder=source, out=tmp_path / "out", format="onnx"))
    agree(in_onnxruntime(tmp_path / "out"), source)
    factored = bytes_of(load(source, policy="always"))
    assert factored < 0.8 * bytes_of(load(source))
    # Chosen rows of small ranks are put among the mixed ones once and for all: R² more numbers.
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size < 1.15 * factored


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_program_computes_the_factored_model(kind: str, tmp_path: Path):
    source = saved(tmp_path / "source", kind, hidden_size=64)
    run(ExportRequest(folder=source, out=tmp_path / "out", format="exported-program"))
    agree(in_torch(tmp_path / "out"), source)
    with zipfile.ZipFile(tmp_path / "out" / "model.pt2") as archive:
        files = {info.filename: info.file_size for info in archive.infolist()}
        contents = {name: archive.read(name) for name in files}
    weights = sum(size for name, size in files.items() if "/weights/weight_" in name)
    assert weights < 1.02 * bytes_of(load(source, policy="always"))
    # A pickle of torch.save is a zip in the zip; one alone begins with 0x80 and the protocol.
    assert [name for name, data in contents.items() if data[:2] in (b"PK", b"\x80\x02")] == []
    assert str(Path(tl.__file__).parents[1]).encode() not in b"".join(contents.values())


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_other_architectures_trace_too(architecture: str, tmp_path: Path):
    source = saved(tmp_path / "source", "tucker", architecture)
    export_graph(source, tmp_path / "out", "exported-program")
    agree(in_torch(tmp_path / "out"), source)


@pytest.mark.parametrize("kind", ["exported-program", pytest.param("onnx", marks=pytest.mark.slow)])
def test_the_code_on_the_card_runs(kind: str, tmp_path: Path):
    if kind == "onnx":
        pytest.importorskip("onnxruntime", reason="tensorllm[onnx]")
    source, out = saved(tmp_path / "source", vocab_size=300), tmp_path / "out"
    words = {f"w{n}": n for n in range(120)}
    fast = Tokenizer(WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="w0").save_pretrained(source)
    export_graph(source, out, kind)
    text = (out / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace('"this folder', f'"{out}') + "\nprint(tuple(logits.shape))"
    done = forked.run(["-c", code], bare=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["(1,", "1,", "300)"]  # one unknown word


def test_the_folder_is_whole_and_runs_without_our_package(tmp_path: Path):
    source, out = saved(tmp_path / "source"), tmp_path / "out"
    (source / "tokenizer.json").write_text("{}")
    out.mkdir()
    (out / "old").write_text("")
    (out / "config.json").write_text('{"model_type": "x"}')  # else it is no model's
    done = run(ExportRequest(folder=source, out=out, format="exported-program", overwrite=True))
    assert done.to_json()["format"] == "exported-program"
    assert done.to_json()["bytes"] == (out / "model.pt2").stat().st_size
    beside = {"config.json", "tokenizer.json", "report.json", "details.json", "README.md"}
    assert {p.name for p in out.iterdir()} >= {"model.pt2"} | beside
    report = json.loads((out / "report.json").read_text())
    assert report["format"] == "exported-program"
    assert report["totals"]["bytes_after"] == done.to_json()["bytes"]
    assert report["sites"] == json.loads((source / "report.json").read_text())["sites"]
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "pytorch"
    assert "tensorllm export FACTORED FOLDER --format exported-program" in card.text
    assert not (out / "old").exists()
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["model_type"] == "llama"
    code = (
        "import sys; sys.modules['tensorllm'] = sys.modules['transformers'] = None\n"
        "import torch; ids = torch.ones(1, 5, dtype=torch.long)\n"
        "program = torch.export.load(sys.argv[1]).module()\n"
        "print(tuple(program(input_ids=ids, attention_mask=ids).shape))"
    )
    ran = forked.run(["-c", code, out / "model.pt2"], bare=True, check=True)
    assert ran.stdout.strip() == "(1, 5, 101)"


def test_onnx_takes_no_bfloat16(tmp_path: Path):
    pytest.importorskip("onnxscript", reason="tensorllm[onnx]")
    assert graph.GRAPHS["onnx"].dtype(torch.bfloat16) == torch.float32
    with pytest.raises(UserError, match=r"takes no --dtype bf16; give fp32 or fp16"):
        export_graph(saved(tmp_path / "source"), tmp_path / "out", "onnx", dtype=torch.bfloat16)
    nothing_is_left(tmp_path, "source")


def test_a_latent_that_several_projections_share_is_made_once(tmp_path: Path):
    """No compiler behind an export takes out equal products."""
    program = trace(load(saved(tmp_path / "source", "pivoted"), policy="always"))
    readers = {
        node.name: len(node.users)
        for node in program.graph.nodes
        if node.op == "placeholder" and "basis" in node.name
    }
    assert set(readers.values()) == {1}, readers


def nothing_is_left(folder: Path, *names: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_an_existing_folder_stays(tmp_path: Path):
    source = saved(tmp_path / "source")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="give --overwrite"):
        export_graph(source, tmp_path / "out", "exported-program")
    nothing_is_left(tmp_path, "source", "out")


def test_a_dense_folder_is_refused(tmp_path: Path):
    tiny_model("llama").save_pretrained(tmp_path / "source")
    with pytest.raises(UserError, match="is not factored"):
        export_graph(tmp_path / "source", tmp_path / "out", "exported-program")
    nothing_is_left(tmp_path, "source")


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graph, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match=r"needs onnxscript: pip install 'tensorllm\[onnx\]'"):
        export_graph(saved(tmp_path / "source"), tmp_path / "out", "onnx")
    nothing_is_left(tmp_path, "source")


def test_a_model_that_cannot_be_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def branches(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return input_ids if input_ids.sum() > 0 else attention_mask  # on the tokens themselves

    monkeypatch.setattr(graph._Logits, "forward", branches)
    with pytest.raises(UserError, match=r"^torch.export cannot trace LlamaForCausalLM: .*\Z") as e:
        export_graph(saved(tmp_path / "source"), tmp_path / "out", "exported-program")
    assert "\n" not in str(e.value)
    nothing_is_left(tmp_path, "source")


def test_a_graph_with_other_logits_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kept = graph.Program.logits
    monkeypatch.setattr(graph.Program, "logits", lambda *args: 1.01 * kept(*args))
    with pytest.raises(UserError, match=r"gives other logits \(1.0e-02 of the largest\)"):
        export_graph(saved(tmp_path / "source"), tmp_path / "out", "exported-program")
    nothing_is_left(tmp_path, "source")
