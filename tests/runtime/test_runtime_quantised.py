"""Factors in few bits: rounded as they should be, stored, opened, run and saved again."""

import json
import logging
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors import safe_open
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import tensorllm as tl
from tensorllm.checkpoint.loading import choices_of, load
from tensorllm.checkpoint.writer import ShardWriter
from tensorllm.compression.export import quantise_folder
from tensorllm.errors import UserError
from tensorllm.runtime.attention import FactoredAttention
from tensorllm.runtime.measure import weight_bytes
from tensorllm.tensors import quantised
from tensorllm.tensors.factors import CP, LowRank, Tucker
from tensorllm.tensors.pivoted import PivotedLowRank
from tensorllm.tensors.quantised import Quantised, dequantise, quantise, quantise_tensor
from tensorllm_cli import export as export_command

IDS = torch.randint(3, 100, (2, 11), generator=torch.Generator().manual_seed(1))
BIG = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}


def random(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes)))


@pytest.mark.parametrize("shape", [(64, 20), (63, 20), (1, 9), (200, 7), (129, 3, 5), (130, 2, 4)])
@pytest.mark.parametrize("bits", [8, 4])
def test_every_number_is_the_nearest_of_its_group(shape: tuple[int, ...], bits: int):
    t = random(*shape)
    parts = quantise_tensor(t, bits)
    assert len(parts) == (3 if bits == 4 and len(t) % 2 else 2)
    got = dequantise(*parts)
    assert got.shape == t.shape
    steps = 2 ** (bits - 1) - 0.5
    for start in range(0, len(t), 64):
        group, back = t[start : start + 64], got[start : start + 64]
        step = group.abs().amax(0) / steps
        assert ((group - back).abs() <= 0.75 * step + 1e-6).all()  # half, and one end is cut
    rows = sum(p.numel() * p.element_size() for p in parts[:1] + parts[2:])
    assert rows == (len(t) // 2 + len(t) % 2 if bits == 4 else len(t)) * t[0].numel()


def test_what_is_too_small_to_gain_stays_as_it_is():
    at_least = LowRank(random(32, 32), random(32, 31))
    assert set(quantise(at_least, "int8").tensors()) == {"u_values", "u_scales", "v"}
    long = CP(random(1100), (random(2, 1100), random(3, 1100)))  # a row of numbers has no groups
    stored = quantise(long, "int8").tensors()
    assert stored["weights"] is long.weights_R
    assert "factor_0_values" in stored
    rows = PivotedLowRank(random(1100, 2), random(4, 1100), torch.arange(1100).int())
    assert quantise(rows, "int4").tensors()["rows"] is rows.rows_R


def test_plain_factors_are_plain_already():
    factors = LowRank(random(40, 30), random(30, 40))
    assert factors.plain() is factors
    assert type(quantise(factors, "int8").plain()) is LowRank


def test_torchao_is_asked_for_and_kept_quiet(monkeypatch: pytest.MonkeyPatch):
    logger, levels = logging.getLogger("torchao"), []
    monkeypatch.setattr(logger, "level", logging.INFO)

    def imported(name: str) -> object:
        levels.append(logger.level)
        return import_module(name)

    monkeypatch.setattr(quantised, "import_module", imported)
    quantise_tensor(random(4, 4), 8)
    assert levels == [logging.ERROR]
    assert logger.level == logging.INFO  # whoever uses torchao beside us hears it again
    monkeypatch.setitem(sys.modules, "torchao.quantization.quant_primitives", None)
    with pytest.raises(UserError) as caught:
        quantise_tensor(random(4, 4), 8)
    assert str(caught.value) == "quantising needs torchao; pip install 'tensorllm[quant]'"


def test_zeros_stay_zeros():
    assert torch.equal(dequantise(*quantise_tensor(torch.zeros(70, 20), 4)), torch.zeros(70, 20))


@pytest.mark.parametrize(("how", "error"), [("int8", 0.02), ("int4", 0.3)])
def test_factors_keep_what_they_stand_for(how: str, error: float):
    for factors in (
        LowRank(random(300, 40), random(40, 200)),
        Tucker(random(60, 12, 4, 4), {0: random(128, 60), 1: random(96, 12), 2: random(4, 4)}),
    ):
        small: Any = quantise(factors, how)
        want = factors.dense()
        assert (small.dense() - want).norm() <= error * want.norm()
        assert small.ranks == factors.ranks
        sizes = [sum(t.nbytes for t in f.tensors().values()) for f in (factors, small)]
        assert sizes[0] / sizes[1] > (3.5 if how == "int8" else 6)
        with pytest.raises(UserError, match="cannot be quantised"):
            quantise(small, how)
    with pytest.raises(UserError, match="got 'int3'"):
        quantise(factors, "int3")


@pytest.fixture(scope="module", params=["gptj", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A factored folder with both kinds of factors."""
    out = tmp_path_factory.mktemp("quantised") / "out"
    sizes = {"hidden_size": 64, "n_inner": 256} if request.param == "gptj" else BIG
    model = tiny_model(request.param, **sizes)
    tl.compress(model, tl.Hybrid(ranks=(40, 12, 4), rho=0.4, matrices=("in", "out")))
    tl.save(model, out)
    return out


@pytest.mark.parametrize("how", ["int8", "int4"])
@torch.no_grad()
def test_a_quantised_folder_opens_runs_and_saves_itself(how: str, folder: Path, tmp_path: Path):
    sites = quantise_folder(folder, tmp_path / "small", how)
    assert all(s.bytes_after < s.bytes_before / 2 for s in sites)
    assert all(0 < s.relative_error < (0.03 if how == "int8" else 0.4) for s in sites)
    sizes = [(f / "factored.safetensors").stat().st_size for f in (folder, tmp_path / "small")]
    assert sizes[1] < sizes[0]

    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info.values()), info
    assert any(isinstance(m, FactoredAttention) for m in model.modules())
    before = AutoModelForCausalLM.from_pretrained(folder)
    saved = sum(s.bytes_before - s.bytes_after for s in sites)
    assert weight_bytes(before) - weight_bytes(model) == saved  # in memory too

    dense = load(tmp_path / "small")  # what the numbers stand for, by another way
    want = dense(IDS).logits
    got = model(IDS).logits
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **settings), dense.generate(IDS, **settings))

    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(IDS).logits, got)
    some = load(tmp_path / "small", policy="auto")  # these are too small to gain
    assert not all(choice.factored for choice in choices_of(some))
    assert (some(IDS).logits - want).abs().max() <= 1e-5 * want.abs().max()


def test_bfloat16_leaves_the_narrow_numbers_alone(folder: Path, tmp_path: Path):
    quantise_folder(folder, tmp_path / "small", "int8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.bfloat16)
    kinds = {p.dtype for p in model.parameters()}
    assert kinds == {torch.bfloat16, torch.int8}
    assert model(IDS).logits.isfinite().all()


def test_the_command_and_what_it_refuses(folder: Path, tmp_path: Path):
    app = typer.Typer()
    app.command()(export_command.export)
    arguments = [str(folder), str(tmp_path / "small"), "--quantize", "int8", "--json"]
    run = CliRunner().invoke(app, arguments, catch_exceptions=False)
    values = json.loads(run.stdout)
    assert {site["site"] for site in values["sites"]} >= {"layers.0.qkvo", "layers.1.out"}
    card = (tmp_path / "small" / "README.md").read_text()
    report, before = (
        json.loads((made / "report.json").read_text()) for made in (tmp_path / "small", folder)
    )
    size = sum(path.stat().st_size for path in (tmp_path / "small").glob("*.safetensors"))
    assert report["totals"]["bytes_after"] == size < before["totals"]["bytes_after"]
    for site, old in zip(report["sites"], before["sites"], strict=True):
        assert site["kind"] == f"int8-{old['kind']}"
        assert old["relative_error"] <= site["relative_error"] < old["relative_error"] + 0.01
        assert site["kind"] in card
    with pytest.raises(UserError, match="already"):
        quantise_folder(tmp_path / "small", tmp_path / "twice", "int4")
    with pytest.raises(UserError, match="int3"):
        quantise_folder(folder, tmp_path / "x", "int3")
    with pytest.raises(UserError, match="not factored"):
        quantise_folder(tmp_path, tmp_path / "x", "int8")
    for also in (["--dtype", "float16"], ["--format", "dense"]):
        with pytest.raises(UserError, match="without --format and --dtype"):
            CliRunner().invoke(app, arguments + also, catch_exceptions=False)


def test_kinds_are_known_in_a_fresh_process(folder: Path, tmp_path: Path):
    quantise_folder(folder, tmp_path / "small", "int4")
    manifest = json.loads((tmp_path / "small" / "tensorllm.json").read_text())
    assert {site["kind"] for site in manifest["sites"]} == {"int4-tucker", "int4-low-rank"}
    assert issubclass(type(quantise(LowRank(random(99, 40), random(40, 99)), "int4")), Quantised)


def test_a_killed_quantisation_goes_on_and_leaves_nothing_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    quantise_folder(folder, tmp_path / "want", "int8")
    small = partial(ShardWriter, shard_bytes=2**12)
    monkeypatch.setattr("tensorllm.compression.export.ShardWriter", small)

    def dies(writer: ShardWriter) -> None:
        writer.flush()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "name_files", dies)
        with pytest.raises(KeyboardInterrupt):
            quantise_folder(folder, tmp_path / "small", "int8")
    quantise_folder(folder, tmp_path / "small", "int8")
    names = [
        name
        for file in (tmp_path / "small").glob("*.safetensors")
        for name in safe_open(file, framework="pt").keys()  # noqa: SIM118  no mapping
    ]
    assert len(names) == len(set(names))
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / n)(IDS).logits for n in ("want", "small")
    )
    assert torch.equal(one, other)


def test_what_is_refused_leaves_nothing(folder: Path, tmp_path: Path):
    quantise_folder(folder, tmp_path / "small", "int8")
    with pytest.raises(UserError, match="already"):
        quantise_folder(tmp_path / "small", tmp_path / "twice", "int4")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
