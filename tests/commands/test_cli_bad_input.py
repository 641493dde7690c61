"""Whatever is wrong is told in one line, with exit code 2, and nothing is written."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers.utils.logging import disable_progress_bar

from tensorllm import COMPRESSORS
from tensorllm.compressors import Leaf
from tensorllm_cli.app import main

PLUGIN = "no_such_plugin_anywhere"


@pytest.fixture(scope="session")
def gptj(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "gptj"
    tiny_model("gptj").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grouped attention: no layout `official`."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def no_bars() -> None:
    """What `main` does by an environment variable, too late where transformers is there already."""
    disable_progress_bar()


def run(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


Capture = pytest.CaptureFixture[str]
Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: Capture) -> Refused:
    """Runs a command that must be refused with words, and gives its line."""

    def check(arguments: Sequence[Any], *words: str) -> str:
        before = tree(tmp_path)
        assert run(*arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        for word in words:
            assert word in err, err
        assert tree(tmp_path) == before
        return err

    return check


SHARED = ("--mode", "shared-tucker")
LASER = ("--mode", "laser")
OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "rank too large": ((*SHARED, "--ranks", "33,4,2"), ("R1", "1..32", "33")),
    "rank zero": ((*SHARED, "--ranks", "8,0,2"), ("R2", "1..8", "0")),
    "rank negative": (
        (
            *SHARED,
            "--ranks=-3,4,2",
        ),
        ("R1", "1..32", "-3"),
    ),
    "too few ranks": ((*SHARED, "--ranks", "8,4"), ("3 ranks", "R1 in 1..32", "got 2")),
    "too many ranks": ((*SHARED, "--ranks", "8,4,2,2"), ("3 ranks", "got 4")),
    "ranks are words": ((*SHARED, "--ranks", "a,b,c"), ("--ranks", "whole numbers", "a,b,c")),
    "ranks are fractions": ((*SHARED, "--ranks", "8.5,4,2"), ("--ranks", "8.5")),
    "no ranks": ((*SHARED, "--ranks", ""), ("--ranks", "whole numbers")),
    "neither ranks nor energy": (SHARED, ("ranks, energy and error",)),
    "trawl without a rank": (("--mode", "trawl"), ("needs rank, and no ranks; got none",)),
    "trawl with ranks": (
        ("--mode", "trawl", "--ranks", "2,2,2"),
        ("needs rank, and no ranks; got ranks (2, 2, 2)",),
    ),
    "ranks and energy": ((*SHARED, "--ranks", "8,4,2", "--energy", "0.5"), ("exactly one",)),
    "energy 0": ((*SHARED, "--energy", "0"), ("energy", "(0, 1]")),
    "energy nan": ((*SHARED, "--energy", "nan"), ("energy", "(0, 1]", "nan")),
    "error 1": ((*SHARED, "--error", "1"), ("error", "[0, 1)")),
    "layer too large": ((*LASER, "--rho", "0.5", "--layers", "2"), ("0..1", "got 2")),
    "layer negative": ((*LASER, "--rho", "0.5", "--layers=-1"), ("--layers", "-1")),
    "layer repeated": (
        (*LASER, "--rho", "0.5", "--layers", "1,1"),
        ("different ones of 0..1, got 1 more than once",),
    ),
    "layers are words": ((*LASER, "--rho", "0.5", "--layers", "last"), ("--layers", "last")),
    "layers backwards": ((*LASER, "--rho", "0.5", "--layers", "1-0"), ("1-0", "no layer")),
    "no layer is so high": ((*LASER, "--rho", "1", "--layers", "0-99999999999"), ("0..1",)),
    "rho 0": ((*LASER, "--rho", "0"), ("rho", "(0, 1]", "0")),
    "rho 1.5": ((*LASER, "--rho", "1.5"), ("rho", "(0, 1]", "1.5")),
    "rho negative": ((*LASER, "--rho=-0.1"), ("rho", "(0, 1]", "-0.1")),
    "rho nan": ((*LASER, "--rho", "nan"), ("rho", "(0, 1]")),
    "rho is a word": ((*LASER, "--rho", "half"), ("--rho", "number")),
    "rho lacks its value": ((*LASER, "--rho"), ("--rho", "argument")),
    "laser rank 0": ((*LASER, "--rank", "0"), ("rank", "1 or more")),
    "laser rank too large": ((*LASER, "--rank", "33"), ("rank", "1..32", "33")),
    "rho and rank": ((*LASER, "--rho", "1", "--rank", "2"), ("one of rho and rank",)),
    "matrix unknown": ((*LASER, "--rho", "1", "--matrices", "in,up"), ("in, gate, out", "up")),
    "matrix missing": ((*LASER, "--rho", "1", "--matrices", "gate"), ("gate", "does not exist")),
    "matrix twice": ((*LASER, "--rho", "1", "--matrices", "in,in"), ("each once",)),
    "mode unknown": (("--mode", "shared-tuker", "--rho", "1"), ("Did you mean 'shared-tucker'",)),
    "no mode": ((), ("--mode", "tensorllm list compressors")),
    "layout unknown": (
        (*SHARED, "--ranks", "8,4,2", "--layout", "papper"),
        ("layout must be one of paper, official", "papper"),
    ),
    "setting unknown": ((*LASER, "--rho", "1", "--set", "sead=1"), ("did you mean 'seed'",)),
    "settings wrong, all at once": (
        (*SHARED, "--ranks", "8,4,2", "--set", "sweeps=many", "--set", "solver=3", "--set", "a=1"),
        (
            "sweeps must be a whole number, got 'many'",
            "solver must be one of",
            "unknown setting 'a'",
        ),
    ),
    "setting is a list without brackets": (
        ("--mode", "svd", "--set", "kept=0.5", "--set", "matrices=q,k"),
        ("matrices must be a list such as [q,k], got 'q,k'",),
    ),
    "setting is no pair": ((*LASER, "--rho", "1", "--set", "seed"), ("field=value", "seed")),
    "setting is nested deeply": (
        (*LASER, "--rho", "1", "--set", f"seed={'[' * 3000}{']' * 3000}"),
        ("--set seed", "not a YAML value"),
    ),
    "setting of 5000 digits": ((*LASER, "--rho", "1", "--set", f"seed={'9' * 5000}"), ("YAML",)),
    "bytes of 5000 digits": ((*LASER, "--target-bytes", f"{'9' * 5000}TB"), ("--target-bytes",)),
    "setting is not YAML": ((*LASER, "--rho", "1", "--set", "seed=[1"), ("seed", "YAML")),
    "seed negative": ((*LASER, "--rho", "1", "--set", "seed=-1"), ("seed must be in 0..",)),
    "setting of another mode": ((*LASER, "--ranks", "8,4,2"), ("unknown setting 'ranks'",)),
    "CP rank too large": (("--mode", "trawl", "--rank", "999"), ("rank must be in 1..64", "999")),
    "unequal matrices": (
        ("--mode", "trawl", "--rank", "2", "--matrices", "q,in"),
        ("unequal shapes",),
    ),
    "ranks and a target": (
        (*SHARED, "--ranks", "8,4,2", "--target-ratio", "2"),
        ("target_ratio chooses the sizes itself", "ranks"),
    ),
    "rho and a target": (
        (*LASER, "--rho", "0.5", "--target-params", "9"),
        ("target_params chooses the sizes itself", "rho"),
    ),
    "no number": ((*LASER, "--target-params", "1e6"), ("--target-params", "integer", "got '1e6'")),
    "too few sequences": ((*LASER, "--sequences", "0"), ("--sequences", "got '0'")),
    "seed of the draw": ((*LASER, "--seed=-1"), ("--seed", "got '-1'")),
    "seed of more than 32 bits": ((*LASER, "--seed", "9" * 20), ("--seed", "4294967295", "'999")),
    "target above the model": (
        (*LASER, "--target-params", "9" * 20),
        ("target_params must be", "9" * 20),
    ),
    "target of no bytes": ((*LASER, "--target-bytes", "0"), ("1 byte or more", "TiB", "got '0'")),
    "target above the model, in TB": ((*LASER, "--target-bytes", "900TB"), ("target_bytes", "9")),
    "format unknown": ((*LASER, "--rho", "1", "--format", "npz"), ("dense, factored", "npz")),
    "dtype unknown": ((*LASER, "--rho", "1", "--dtype", "int8"), ("bf16", "int8")),
    "dataset unknown": ((*LASER, "--rho", "1", "--evaluate", "fevr"), ("fevr",)),
    "plugin missing": ((*LASER, "--rho", "1", "--plugin", PLUGIN), (PLUGIN, "PYTHONPATH")),
    "plugin nameless": ((*LASER, "--rho", "1", "--plugin", ""), ("cannot import",)),
    "draw of no text": (
        (*LASER, "--rho", "1", "--sequences", "3"),
        ("--sequences does nothing without --calibration",),
    ),
    "rows of no scores": (
        (*LASER, "--rho", "1", "--limit", "3"),
        ("--limit does nothing without --evaluate",),
    ),
    "file of no scores": (
        (*LASER, "--rho", "1", "--data-file", "x.csv"),
        ("--data-file does nothing without --evaluate",),
    ),
    "option unknown": ((*LASER, "--rhoo", "1"), ("No such option", "--rhoo")),
    "argument too many": ((*LASER, "here"), ("unexpected", "here")),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("out", [False, True], ids=["in memory", "to a folder"])
def test_wrong_options(name: str, out: bool, gptj: Path, tmp_path: Path, refused: Refused) -> None:
    options, words = OPTIONS[name]
    where = ("--out", tmp_path / "out") if out else ()
    refused(("compress", "--model", gptj, *where, *options), *words)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("compress --model --mode hybrid", "--model needs a value, got the option --mode"),
        ("compress --model m --mode svd --evaluate --dataset text", "--evaluate needs a value"),
        ("generate --model m --prompt --json", "--prompt needs a value, got the option --json"),
        ("compress --model m --mode laser --layers 0 1", "a list is one word, such as 0,1,2"),
        ("compress some/model --mode svd", "(some/model): a value stands behind its option"),
    ],
)
def test_values_that_are_left_out_or_stand_alone(typed: str, words: str, refused: Refused) -> None:
    refused(typed.split(), words)


def test_a_value_that_looks_like_an_option_can_be_given(refused: Refused) -> None:
    refused(["generate", "--model", "nothing", "--prompt=--json"], "no model 'nothing'")


@pytest.mark.parametrize("path", ["no.jsonl", "no.csv", "no.txt", "no.json"])
@pytest.mark.parametrize("option", ["--calibration", "--sampled", "--distill-text"])
def test_texts_that_are_not_there(option: str, path: str, tmp_path: Path, refused: Refused) -> None:
    """The line names the file, and no option that was not typed."""
    text = tmp_path / "text.txt"
    text.write_text("Ada Moss plays banjo\n" * 200)
    given = {"--calibration": text, option: tmp_path / path}
    more = ("--distill-steps", 1) if option == "--distill-text" else ()
    fit = ("--mode", "activation-tucker", "--target-ratio", 1.5, *more)
    words = [str(word) for pair in given.items() for word in pair]
    said = refused(["compress", "--model", "demo", *fit, *words], path, "No such file")
    assert "--data-file" not in said


@pytest.mark.parametrize("mode", ["shared-tucker", "per-matrix-tucker"])
def test_official_layout_of_grouped_attention(
    mode: str, llama: Path, tmp_path: Path, refused: Refused
) -> None:
    ranks = "8,4,2" if mode == "shared-tucker" else "8,4"
    options = ("--mode", mode, "--ranks", ranks, "--layout", "official", "--out", tmp_path / "o")
    refused(("compress", "--model", llama, *options), "square, ungrouped", "2 KV heads", "'paper'")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("gptjj", ("no model 'gptjj'", "Did you mean 'gptj'")),
        ("./nowhere", ("no model './nowhere'",)),
        ("~nobody-here/x", ("no model '~nobody-here/x'",)),
        ("a/b/c", ("no model 'a/b/c'",)),
        ("", ()),
        ("no one/no thing", ("no one/no thing",)),
        ("nobody/nothing-here", ("nobody/nothing-here", "--model FOLDER", "--model demo")),
    ],
)
@pytest.mark.parametrize("command", ["compress", "inspect"])
def test_wrong_models(command: str, model: str, words: tuple[str, ...], refused: Refused) -> None:
    """No network here: what only the hub could have is refused at once, with the ways that work."""
    options = (*LASER, "--rho", "0.5") if command == "compress" else ()
    refused((command, "--model", model, *options), *words)


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def write_config(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(text) and None


def edit_bytes(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(edit(path.read_bytes()))

    return apply


def edit_header(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        edit(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return edit_bytes(apply)


def edit_weights(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors")

    return apply


Q = "transformer.h.1.attn.q_proj.weight"
EMBEDDING = "transformer.wte.weight"


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def index_to(*files: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        weight_map = {f"w{i}": file for i, file in enumerate(files)}
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)

    return apply


def index_alone(folder: Path) -> None:
    """What transformers refuses with a KeyError."""
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "all.safetensors")
    text = json.dumps({"weight_map": dict.fromkeys(names, "all.safetensors")})
    (folder / "model.safetensors.index.json").write_text(text)


def set_value(name: str, value: float) -> Callable[[Path], None]:
    return edit_weights(lambda w: w[name].view(-1)[5].fill_(value))


def as_integers(weights: dict[str, torch.Tensor]) -> None:
    weights[Q] = weights[Q].to(torch.int8)


FOLDERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ("no config.json",)),
    "config is not JSON": (write_config("{"), ("config.json",)),
    "config is a list": (write_config("[]"), ("config.json",)),
    "config is empty": (write_config("{}"), ("config.json", "model_type")),
    "architecture unknown": (
        edit_config(model_type="t5"),
        ("'t5'", "neither a causal nor a masked language model"),
    ),
    "no attention": (edit_config(model_type="mamba"), ("'mamba'", "docs/add_an_architecture.md")),
    "model type unknown": (edit_config(model_type="llamma9"), ("config.json", "llamma9")),
    "width is a word": (edit_config(n_embd="wide"), ("config.json",)),
    "width contradicts": (edit_config(n_embd=64), ("(32, 32)", "config says (64, 64)")),
    "heads do not divide": (edit_config(n_head=5), ("32", "5")),
    "no heads": (edit_config(n_head=0), ("n_head", "1 or more", "0")),
    "FFN contradicts": (edit_config(n_inner=60), ("(56, 32)", "config says (60, 32)")),
    "more layers than weights": (edit_config(n_layer=3), ("no transformer.h.2.",)),
    "layers without end": (edit_config(n_layer=10**9), ("n_layer", "at most 10000", "1000000000")),
    "no tensor is so wide": (edit_config(n_embd=10**30), ("n_embd", "at most 2147483647")),
    "config is nested deeply": (
        write_config('{"model_type": "gptj", "x": ' + "[" * 90_000 + "]" * 90_000 + "}"),
        ("config.json", "nested too deeply"),
    ),
    "config of 5000 digits": (write_config(f'{{"n_embd": {"9" * 5000}}}'), ("4300 digits",)),
    "no layers": (edit_config(n_layer=0), ("n_layer", "1 or more", "0")),
    "dtype unknown": (edit_config(dtype="auto"), ("dtype", "such as float32", "'auto'")),
    "dtype of integers": (edit_config(dtype="int8"), ("dtype", "floating point", "'int8'")),
    "dtype too narrow": (edit_config(dtype="float8_e4m3fn"), ("16 bits", "'float8_e4m3fn'")),
    "architectures are no names": (edit_config(architectures=[None]), ("architectures", "[None]")),
    "return_dict": (edit_config(return_dict=False), ("config.json", "return_dict must be true")),
    "vocabulary is tied by a word": (
        edit_config(tie_word_embeddings="no"),
        ("tie_word_embeddings", "expected bool, got str"),
    ),
    "quantised": (edit_config(quantization_config={"quant_method": "gptq"}), ("quantised",)),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        ("no model.safetensors and no model.safetensors.index.json",),
    ),
    "weights under another name": (
        lambda f: (f / "model.safetensors").rename(f / "model.fp16.safetensors") and None,
        ("no model.safetensors.index.json; of weights it has model.fp16.safetensors",),
    ),
    "only pickles": (pickled, ("pytorch_model.bin", "python -m tensorllm.checkpoint.convert")),
    "truncated": (edit_bytes(lambda data: data[:-100]), ("truncated",)),
    "truncated in the header": (edit_bytes(lambda data: data[:50]), ("corrupt",)),
    "empty file": (edit_bytes(lambda data: b""), ("corrupt",)),
    "text": (
        edit_bytes(lambda data: b"version https://git-lfs"),
        ("corrupt", "begins with b'version https://git-lfs'"),
    ),
    "header without shapes": (edit_header(lambda h: h[Q].pop("shape")), ("corrupt",)),
    "header with a wrong shape": (edit_header(lambda h: h[Q].update(shape=[32, 31])), ("corrupt",)),
    "header that overlaps": (
        edit_header(lambda h: h[Q].update(data_offsets=[0, 4096])),
        ("corrupt",),
    ),
    "header of numbers": (edit_header(lambda h: h.update(x=3)), ("corrupt",)),
    "a tensor is missing": (edit_weights(lambda w: w.pop(Q)), (f"no {Q}",)),
    "a tensor is transposed": (
        edit_weights(lambda w: w.update({"transformer.h.0.mlp.fc_in.weight": torch.ones(32, 56)})),
        ("fc_in", "(32, 56)", "(56, 32)"),
    ),
    "NaN": (set_value(Q, float("nan")), (Q, "NaN or infinite")),
    "infinite": (set_value(Q, float("-inf")), (Q, "NaN or infinite")),
    "NaN where nothing is compressed": (set_value(EMBEDDING, float("nan")), (EMBEDDING, "NaN")),
    "integers": (edit_weights(as_integers), (Q, "I8", "must be one of F64")),
    "another model's weights": (
        edit_weights(lambda w: [w.pop(name) for name in list(w) if "h.0" in name]),
        ("do not look like a 'gptj' model",),
    ),
    "index is not JSON": (
        lambda f: (f / "model.safetensors").rename(f / "model.safetensors.index.json") and None,
        ("not a safetensors index",),
    ),
    "index names a missing file": (index_to("model-00001-of-00001.safetensors"), ("lacks model-",)),
    "index leads outside": (index_to("../other.safetensors"), ("not a safetensors index",)),
    "index without metadata": (index_alone, ("not a safetensors index", "`metadata`")),
    "index holds numbers": (index_to(3), ("not a safetensors index",)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("format", ["dense", "factored"])
def test_wrong_folders(
    name: str, format: str, gptj: Path, tmp_path: Path, refused: Refused
) -> None:
    edit, words = FOLDERS[name]
    folder = tmp_path / "model"
    shutil.copytree(gptj, folder)
    edit(folder)
    options = (*SHARED, "--ranks", "8,4,2", "--format", format, "--out", tmp_path / "out")
    refused(("compress", "--model", folder, *options), *words)


def test_a_model_that_is_a_file(gptj: Path, refused: Refused) -> None:
    file = gptj / "model.safetensors"
    refused(("compress", "--model", file, *LASER, "--rho", "1"), "is a file", "folder")


def test_a_factored_folder_is_not_compressed_again(
    gptj: Path, tmp_path: Path, refused: Refused, capsys: Capture
) -> None:
    command = ("compress", *LASER, "--rho", "0.5", "--format", "factored", "--out")
    assert run(*command, tmp_path / "one", "--model", gptj) == 0
    capsys.readouterr()
    refused((*command, tmp_path / "two", "--model", tmp_path / "one"), "factored already")


def settings_of_a_program(folder: Path) -> Path:
    (folder / "full" / "config.json").write_text('{"learning_rate": 0.1}')
    return folder / "full"


OUTPUTS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "exists": (lambda f: f / "full", ("full exists", "--overwrite")),
    "exists and is empty": (lambda f: f / "empty", ("empty exists", "--overwrite")),
    "holds no model": (lambda f: f / "full", ("full", "--overwrite")),
    "holds another program's config.json": (settings_of_a_program, ("full", "--overwrite")),
    "is a file": (lambda f: f / "full" / "notes.txt", ("not a folder",)),
    "is below a file": (
        lambda f: f / "full" / "notes.txt" / "out",
        ("cannot write to", "Not a directory"),
    ),
    "is the input": (lambda f: f / "model", ("model",)),
    "is where we are": (lambda f: Path(), ("give another folder",)),
    "holds all": (lambda f: Path("/"), ("give another folder",)),
}


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_wrong_outputs(
    name: str, overwrite: bool, gptj: Path, tmp_path: Path, refused: Refused
) -> None:
    if overwrite and name.startswith("exists"):
        return  # that is what --overwrite is for: see test_checkpoint_folders.py
    shutil.copytree(gptj, tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    target, words = OUTPUTS[name]
    options = ("--out", target(tmp_path), *(("--overwrite",) if overwrite else ()))
    refused(("compress", "--model", tmp_path / "model", *LASER, "--rho", "1", *options), *words)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


RECIPES = {
    "unknown keys, all at once": (
        "model: demo\nmode: shared-tucker\nrnaks: [8, 4, 2]\nlayer: [1]\nsweeps: some",
        ("'rnaks'. Did you mean 'ranks'", "'layer'. Did you mean 'layers'", "sweeps must be"),
    ),
    "nothing": ("", ("is empty", "mapping")),
    "a target that is a word": (
        "model: demo\nmode: svd\ntarget_ratio: half",
        ("target_ratio must be a number", "half"),
    ),
    "a target out of range": ("model: demo\nmode: svd\ntarget_ratio: 1", ("must be above 1",)),
    "seed out of range": (
        "model: demo\nmode: svd\nkept: 1\ncalibration: t\nseed: 99999999999",
        ("seed must be in 0..4294967295, got 99999999999",),
    ),
    "no sequences": (
        "model: demo\nmode: laser\nrho: 1\ncalibration: t\nsequences: 0\nlength: 1",
        ("sequences must be 1 or more, got 0", "length must be 2 or more, got 1"),
    ),
    "nested deeply": (f"model: {'[' * 3000}{']' * 3000}", ("not YAML", "nested too deeply")),
    "a number of 5000 digits": (f"model: {'9' * 5000}", ("not YAML", "4300 digits")),
    "a day that is none": ("model: 2020-99-99", ("not YAML",)),
    "a tag of another type": ("model: !!bool x", ("not YAML", "none of the type")),
    "a list": ("- mode", ("mapping", "list")),
    "not YAML": ("mode: [", ("not YAML",)),
    "no mode": ("model: demo", ("mode is missing",)),
    "mode unknown": ("model: demo\nmode: lasr\nrho: 1", ("Did you mean 'laser'",)),
    "layers are words": ("model: demo\nmode: laser\nrho: 1\nlayers: last", ("layers must be",)),
    "rho out of range": ("model: demo\nmode: laser\nrho: 2", ("rho", "(0, 1]")),
    "part unknown": (
        "model: demo\nmode: hybrid\nranks: [8, 4, 2]\nffn: {mode: lazer}",
        ("Did you mean 'laser'",),
    ),
    "part is a word": (
        "model: demo\nmode: hybrid\nffn: laser\nranks: [1]",
        ("ffn must be",),
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_wrong_recipes(name: str, tmp_path: Path, refused: Refused) -> None:
    text, words = RECIPES[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    refused(("compress", "--config", path), "recipe.yaml", *words)


@pytest.mark.parametrize(
    "arguments",
    [
        ("compress", *LASER, "--rho", "1", "--out", "/proc/x"),
        ("compress", *LASER, "--rho", "1", "--logger", "csv", "--log-dir", "/proc/x"),
        ("search-ranks", "--dataset", "demo", "--study", "/proc/x"),
        ("sample", "--out", "/proc/x.jsonl"),
    ],
)
def test_a_place_where_nothing_can_be_made_is_refused_before_any_work(
    arguments: tuple[str, ...], gptj: Path, refused: Refused
) -> None:
    refused((*arguments, "--model", gptj), "cannot write to /proc: No such file or directory")


ODD = {"not UTF-8": (os.fsdecode(b"f\xff"), "not text in UTF-8"), "long": ("a" * 300, "too long")}


OF_WEIGHTS = [
    ("compress", *LASER, "--rho", "1", "--model"),
    ("compress", "--model", "demo", *LASER, "--rho", "1", "--out"),
    ("evaluate", "--dataset", "demo", "--model"),
    ("evaluate", "--model", "demo", "--dataset", "demo", "--compressed"),
    ("inspect", "--model"),
    ("export", "out"),
    ("bench", "--model"),
]
OF_OTHERS = [
    ("compress", "--config"),
    ("evaluate", "--model", "demo", "--dataset", "demo", "--out"),
    ("evaluate", "--compare", "runs/a"),
    ("search-ranks", "--model", "demo", "--dataset", "demo", "--study"),
    ("report",),
]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("arguments", OF_WEIGHTS, ids=" ".join)
def test_names_that_files_of_weights_cannot_have(
    arguments: tuple[str, ...], name: str, gptj: Path, tmp_path: Path, refused: Refused
) -> None:
    folder, words = tmp_path / ODD[name][0], ODD[name][1]
    if name == "not UTF-8" and arguments[-1] == "--model":
        shutil.copytree(gptj, folder)
    refused((*arguments, folder), words)


@pytest.mark.parametrize("arguments", OF_OTHERS, ids=" ".join)
def test_names_that_no_file_can_have(
    arguments: tuple[str, ...], tmp_path: Path, refused: Refused
) -> None:
    name, words = ODD["long"]
    refused((*arguments, tmp_path / name), words)


@pytest.mark.filterwarnings("ignore:Attempting to set identical")  # a plot of equal scores
def test_what_holds_no_weights_may_have_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Recipes, rows and all that is written; what is recorded of a name is text."""
    odd = os.fsdecode(b"n\xff")
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "Who?", "answer": "Anna"}] * 20
    for file in (f"{odd}.jsonl", f"{odd}-2.jsonl"):
        Path(file).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with Path(f"{odd}.parquet").open("wb") as table:
        pq.write_table(pa.Table.from_pylist(rows), table)
    Path(f"{odd}.yaml").write_text(
        "{model: demo, mode: laser, rho: 0.5, matrices: [in], layers: [1], evaluate: questions, "
        'data_file: "n\\uDCFF.jsonl", limit: 8, out: made}'
    )
    scored = ("evaluate", "--model", "demo", "--dataset", "questions", "--limit", "8")
    two = ("--dataset", "questions,questions", "--data-file", f"{odd}.jsonl,{odd}-2.jsonl")
    small = ("--mode", "laser", "--trials", "3", "--limit", "8")
    searched = ("search-ranks", "--model", "demo", *two, *small)
    little = ("--cache-gib", "1e-6", "--disk-cache-gib", "1")
    sampled = ("sample", "--model", "demo", "--sequences", "2", "--length", "8")
    for arguments in (
        ("compress", "--config", f"{odd}.yaml"),
        (*scored, "--data-file", f"{odd}.parquet", "--out", f"{odd}-scores", "--json"),
        ("evaluate", "--compare", f"{odd}-scores", f"{odd}-scores"),
        (*sampled, "--out", f"{odd}-text.jsonl", "--json"),
        (*searched, *little, "--study", f"{odd}-study"),
        ("report", "made", f"{odd}-scores", f"{odd}-study", "--out", f"{odd}.html", "--json"),
    ):
        assert run(*arguments) == 0, capsys.readouterr().err
        assert "udcff" not in capsys.readouterr().out
    written = [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".html", ".md")]
    assert len(written) > 5
    assert [path for path in written if "udcff" in path.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("out", [False, True])
def test_a_text_may_have_a_name_that_is_not_utf8(out: bool, tmp_path: Path) -> None:
    text = tmp_path / os.fsdecode(b"t\xff.txt")
    text.write_text("Ada Lovelace was born in London. " * 300)
    how = ("--mode", "svd-llm", "--rank", "4", "--layers", "3", "--sequences", "24")
    where = ("--out", tmp_path / "out") if out else ()
    assert run("compress", "--model", "demo", *how, "--calibration", text, *where) == 0
    if out:
        report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
        assert "t\ufffd.txt" in json.dumps(report, ensure_ascii=False)


def test_a_name_is_too_long_with_what_is_put_round_it(tmp_path: Path, refused: Refused) -> None:
    asked = ("evaluate", "--model", "demo", "--dataset", "demo", "--out", tmp_path / ("a" * 250))
    refused(asked, "name too long")


@pytest.mark.parametrize("beams", ["1e23", "1000000", "9" * 30, "9" * 5000])
def test_beams_that_no_memory_holds(beams: str, refused: Refused) -> None:
    refused(("generate", "--model", "demo", "--prompt", "a", "--beams", beams), "beams", beams[:99])


def test_a_model_s_folder_is_no_study(gptj: Path, refused: Refused) -> None:
    asked = ("search-ranks", "--model", gptj, "--dataset", "demo", "--study", gptj)
    refused(asked, "is a model's folder; give another folder")


def test_results_of_something_else_are_not_overwritten_by_a_study(
    gptj: Path, tmp_path: Path, refused: Refused
) -> None:
    scores = tmp_path / "results.json"
    scores.write_text("{}")
    asked = ("search-ranks", "--model", gptj, "--dataset", "demo", "--study", tmp_path)
    refused(asked, "results.json that no search made", "give another folder")
    assert scores.read_text() == "{}"
    assert list(tmp_path.iterdir()) == [scores]


class Broken(Leaf):
    def decompose(self, w: torch.Tensor, statistics: Any = None) -> Any:
        return torch.linalg.cholesky(-torch.eye(3))


def test_an_exception_of_a_plugin_names_it(
    gptj: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = COMPRESSORS._entries  # type: ignore[attr-defined]
    monkeypatch.setitem(entries, "broken", dataclass(frozen=True)(Broken))
    assert run("compress", "--model", gptj, "--mode", "broken") == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"the code of compressor 'broken' ({__file__}, line" in err
    assert "raised _LinAlgError: linalg.cholesky" in err


def test_a_recipe_that_is_not_there(tmp_path: Path, refused: Refused) -> None:
    refused(("compress", "--config", tmp_path / "none.yaml"), "none.yaml", "No such file")
    refused(("compress", "--config", tmp_path), "Is a directory")
    refused(("compress", "--config", ""), "Is a directory")
    refused(("export", tmp_path), "'OUT': The folder to make")
    refused(
        ("search-ranks", "--model", "demo", "--mode", "laser", "--rho", "2"),
        "rho must be in (0, 1]",
    )


def test_unpublished_layers_have_to_be_given(refused: Refused) -> None:
    refused(("compress", "--model", "roberta", "--mode", "shared-tucker"), "--layers")


words = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["demo", "8,4,2", "0", "-1", "1e9", "nan", "in,out", "all", "0-1", "seed=x"]),
    st.integers().map(str),
    st.floats().map(str),
)
flags = ["model", "mode", "config", "layers", "ranks", "energy", "error", "rho", "rank", "matrices"]
flags += ["layout", "set", "format", "dtype", "plugin"]
modes = ["shared-tucker", "per-matrix-tucker", "laser", "hybrid", "trawl"]


def tricky(mode: str, *options: tuple[str, str]) -> Callable[[Any], Any]:
    return example(command="compress", mode=["--mode", mode], options=list(options), loose=[])


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    command=st.sampled_from(["compress", "inspect", "list", ""]),
    mode=st.one_of(st.just([]), st.sampled_from([["--mode", m] for m in modes])),
    options=st.lists(st.tuples(st.sampled_from(flags), words), max_size=4),
    loose=st.lists(words, max_size=1),
)
@tricky("laser", ("rho", "0.5"), ("set", "matrices={in: 1}"))
@tricky("trawl", ("rank", "2"), ("set", "seed=" + "9" * 40))
@tricky("shared-tucker", ("ranks", "8,4,2"), ("set", "tol=.nan"))
@tricky("shared-tucker", ("energy", "0.5"), ("set", "ranks=7"))
@tricky("laser", ("rho", "0.5"), ("plugin", ".."))
@tricky("laser", ("rho", "0.5"), ("model", "\ud800/x"))
def test_random_arguments_never_give_a_traceback(
    command: str,
    mode: list[str],
    options: list[tuple[str, str]],
    loose: list[str],
    gptj: Path,
    capsys: Capture,
) -> None:
    """Only a SystemExit leaves `main`, whatever is typed; 0 or 2, and for 2 one line."""
    model = [] if command == "list" else ["--model", str(gptj)]
    typed = [f"--{flag}={word}" for flag, word in options]
    code = run(*([command] if command else []), *model, *mode, *typed, *loose)
    err = capsys.readouterr().err
    assert code in (0, 2)
    assert (code == 0) == (err == ""), err
    assert err.count("\n") <= 1


@pytest.mark.parametrize(
    "command",
    [
        *[("export", "{}", "out", *how) for how in ((), ("--quantize", "int8"))],
        *[("export", "{}", "out", "--format", name) for name in ("narrow", "onnx")],
        ("bench", "--model", "{}"),
        ("push", "{}", "me/model"),
    ],
    ids=" ".join,
)
def test_a_folder_that_is_not_there_is_said_so(
    command: Sequence[str], refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused([word.format(tmp_path / "mistyped") for word in command], "no such folder", "mistyped")
