"""A budget in bytes: what is predicted is what is stored, and what is stored fits.

Shapes: I and D of a role matrix.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration_text import text
from rich.console import Console
from tiny_models import tiny_model

import tensorllm as tl
from tensorllm import options
from tensorllm.checkpoint import loader
from tensorllm.commands.compress import run
from tensorllm.compression.dry_run import dry_run
from tensorllm.compression.engine import compress_folder
from tensorllm.compression.task import FolderTask
from tensorllm.compressors import (
    AASVD,
    SVDLLM,
    ActivationHybrid,
    Hybrid,
    MoDeGPT,
    PlainSVD,
    Rounded,
    Site,
    SVDLLMSequential,
)
from tensorllm.compressors.base import ErrorCurve
from tensorllm.compressors.budget import Budget
from tensorllm.compressors.rounded import HOW, RoundedLeaf, RoundedSizes
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.reporting.tables import compression_tables
from tensorllm.requests.compress import CompressRequest
from tensorllm.tensors.factors import cast
from tensorllm.tensors.quantised import (
    BITS,
    compensation,
    quantise,
    quantised_whole,
    rounded_column,
    shapes_held,
)
from tensorllm.tensors.whole import Whole

IDS = torch.arange(3, 14)[None]
BIG = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}


def random(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nearest(w: np.ndarray, bits: int) -> np.ndarray:
    """Each 64 numbers of a column to the nearest of their grid: torchao's, symmetric."""
    out, most = w.copy(), 2 ** (bits - 1)
    for start in range(0, len(w), 64):
        group = w[start : start + 64]
        scale = np.maximum(np.maximum(-group.min(0), group.max(0)) / (most - 0.5), 1e-12)
        out[start : start + 64] = np.clip(np.round(group / scale), -most, most - 1) * scale
    return out


def gptq(w: np.ndarray, metric: np.ndarray, bits: int) -> np.ndarray:
    """Column after column, what is lost put into all that are left by least squares (OBS)."""
    w, out = w.copy(), np.zeros_like(w)
    metric = metric + 0.01 * metric.diagonal().mean() * np.eye(len(metric))
    left = list(np.argsort(-metric.diagonal(), kind="stable"))
    while left:
        inverse = np.linalg.inv(metric[np.ix_(left, left)])
        column = left.pop(0)
        out[:, column] = nearest(w[:, [column]], bits)[:, 0]
        lost = (w[:, column] - out[:, column]) / inverse[0, 0]
        w[:, left] -= np.outer(lost, inverse[0, 1:])
    return out


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("columns", [40, 150])  # 150: more than are changed at once
def test_whole_matrices_are_rounded_as_gptq_does(columns: int, bits: int) -> None:
    w = random(96, columns)
    root = random(columns, columns, seed=1) * torch.linspace(0.1, 3, columns)
    metric = root.mT @ root / columns
    found = quantised_whole(w.float(), HOW[bits], compensation(metric))
    want = gptq(w.numpy(), metric.numpy(), bits)
    first = int(metric.diagonal().argmax())  # what follows depends on how ties were rounded
    same = np.isclose(found.dense()[:, first].numpy(), want[:, first], atol=1e-5)
    assert same.mean() > 0.95

    def error(near: Any) -> float:
        lost = torch.as_tensor(near).double() - w
        return float(((lost @ metric) * lost).sum())

    assert error(found.dense()) == pytest.approx(error(want), rel=0.05)
    assert error(found.dense()) < 0.7 * error(nearest(w.numpy(), bits))


@pytest.mark.parametrize("rows", [64, 130, 200])
def test_a_column_is_rounded_to_what_is_stored(rows: int) -> None:
    """Else what is made up for is not what was lost; each group's largest number is a tie."""
    w = random(rows, 50).float()
    w[:, 7] = 0
    for how, bits in BITS.items():
        stored = quantise(Whole(w), how).dense()
        for column in range(50):
            assert torch.equal(rounded_column(w[:, column], bits), stored[:, column])


def test_without_a_metric_to_speak_of_it_is_plain_rounding() -> None:
    w = random(130, 33).float()
    for how in HOW.values():
        plain, found = quantise(Whole(w), how), quantised_whole(w, how, compensation(torch.eye(33)))
        assert type(found) is type(plain)
        for name, t in plain.tensors().items():
            assert torch.equal(found.tensors()[name], t)


SITE = Site((0,), ("q",), "matrix")


@pytest.mark.parametrize(
    ("strategy", "size"),
    [
        (PlainSVD(rank=1), (17,)),
        (tl.LaserSVD(rank=1), (5,)),
        (tl.SharedTucker4D(ranks=(1, 1, 1)), (40, 9, 3)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outlines_are_the_factors_and_their_bytes(
    strategy: Any, size: tuple[int, ...], dtype: torch.dtype
) -> None:
    shape = (67, 130) if len(size) == 1 else (67, 16, 4, 4)
    outline = cast(strategy.outline(shape, size), dtype)
    leaf = strategy.at_size(SITE, size)
    factors = cast(leaf.decompose(random(*shape).float()), dtype)
    assert type(outline) is type(factors)
    for bits in (None, 8, 4):
        stored = factors if bits is None else cast(quantise(factors, HOW[bits]), dtype)
        held = {n: (tuple(t.shape), t.element_size()) for n, t in stored.tensors().items()}
        assert shapes_held(outline, bits) == held
        numbers = sum(t.nbytes for t in stored.tensors().values())
        sizes = RoundedSizes(SITE, shape, dtype, 10**6, lambda size: strategy.outline(shape, size))
        names = sizes.bytes(outline, bits) - numbers
        assert 60 * len(held) < names < 140 * len(held)


def test_an_activation_outline_is_what_the_fit_makes() -> None:
    model = tiny_model("llama", **BIG)
    strategy = ActivationHybrid(target_ratio=2.5, refit_epochs=0)
    report = tl.compress(model, strategy, calibration=text())
    spec = RoleMatrices(model.config, parameters_of(model)).spec
    kinds = set()
    for done in model.tensorllm_compression.sites:  # type: ignore[union-attr]
        rank = done.factors.ranks[0] // (len(done.site.roles) if "kept" in done.factors.kind else 1)
        outline = strategy.outline(done.site, spec.geometry(0), (rank,))
        assert shapes_held(outline, None) == shapes_held(done.factors, None)
        kinds.add(done.factors.kind)
    assert kinds == {site.kind for site in report.sites} == {"pivoted-low-rank", "kept-rows"}


def test_a_curve_in_bytes_has_measured_errors() -> None:
    w = (random(96, 20) @ random(20, 128, seed=1) + 0.5 * random(96, 128, seed=2)).float()
    curve: ErrorCurve = RoundedLeaf(PlainSVD(rank=1), 10**6).curve(SITE, w)
    assert (curve.cost_N.diff() > 0).all()
    assert (curve.error_N.diff() < 0).all()
    scale = w.numel() / float(w.square().sum())
    sizes = curve.sizes_NC.tolist()
    assert sizes[-1] == [0, 0]
    assert [0, 8] in sizes
    for bits in [bits for bits in HOW if [0, bits] in sizes]:
        want = ((nearest(w.double().numpy(), bits) - w.numpy()) ** 2).sum() * scale
        assert float(curve.error_N[sizes.index([0, bits])]) == pytest.approx(want, rel=1e-3)
    singular = np.linalg.svd(w.double().numpy())[1]
    both = [size for size in sizes if all(size)]
    assert len(both) > 5
    for rank, bits in both[:: len(both) // 4]:  # what is predicted of factors is about what is true
        near = quantise(PlainSVD(rank=rank).decompose(w), HOW[bits]).dense().double()
        got = float((near - w).square().sum()) * scale
        lost = (singular[rank:] ** 2).sum() * scale
        predicted = float(curve.error_N[sizes.index([rank, bits])])
        assert predicted - lost == pytest.approx(got - lost, rel=0.35)


def folder_of(tmp_path: Path, architecture: str = "llama", dtype: Any = None, **more: Any) -> Path:
    folder = tmp_path / "whole"
    tiny_model(architecture, **more).to(dtype or torch.float32).save_pretrained(folder)
    return folder


def weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def compressed(source: Path, target: Path, strategy: Any, size: int | None, **more: Any) -> Any:
    budget = None if size is None else Budget(target_bytes=size)
    return compress_folder(FolderTask(source=source, target=target, compressor=strategy,
                                      budget=budget, format="factored", **more))  # fmt: skip


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2"])  # phi3, gpt2: fused parameters
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_are_never_larger_than_asked_for(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    big = {"n_embd": 64, "n_inner": 160} if architecture == "gpt2" else BIG
    source = folder_of(tmp_path, architecture, dtype, **big)
    for share in (0.9, 0.6):
        size, out = int(share * weights(source)), tmp_path / f"{share}"
        report = compressed(source, out, PlainSVD(rank=1), size)
        assert 0.9 * size < weights(out) == report.totals.bytes_after <= size
        with torch.no_grad():
            dense, small = (tl.load(out, policy=p)(IDS).logits for p in ("dense", "always"))
        atol = 1e-4 if dtype == torch.float32 else 0.2
        torch.testing.assert_close(small, dense, atol=atol, rtol=atol)


FFN = PlainSVD(rank=1, matrices=("in", "gate", "out"))


@pytest.mark.parametrize(
    "strategy",
    [
        Hybrid(ranks=(1, 1, 1), ffn=FFN),
        SVDLLM(rank=1),
        SVDLLMSequential(rank=1),
        AASVD(rank=1, refine_epochs=1),
        ActivationHybrid(target_bytes=130_000, refit_epochs=1),
    ],
)
def test_other_modes_fit_too(strategy: Any, tmp_path: Path) -> None:
    source = folder_of(tmp_path, **BIG)
    more = {"calibration": text()} if strategy.needs != "weights" else {}
    own = strategy.budget is not None
    size = 130_000
    assert size < 0.4 * weights(source)
    report = compressed(source, tmp_path / "out", strategy, None if own else size, **more)
    assert 0.9 * size < weights(tmp_path / "out") <= size
    assert report.settings.get("target_bytes", size) == size
    kinds = {site.kind.partition("-")[0] for site in report.sites}
    assert kinds & {"int4", "int8"}
    for site in report.sites:  # numbers are counted, not bytes
        assert site.kind.endswith("whole") == (site.parameters_after == site.parameters_before)
    tl.load(tmp_path / "out", verify=True)


@pytest.mark.parametrize("own", [False, True])
def test_bytes_are_those_of_the_file_whatever_the_model_runs_in(
    own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bfloat16 model is fitted in float32 where that is faster, and written in bfloat16."""
    monkeypatch.setattr(loader, "seconds_of_product", lambda dtype: 4.0 / dtype.itemsize)
    source = folder_of(tmp_path, dtype=torch.bfloat16, **BIG)
    size = int(0.7 * weights(source))
    strategy = ActivationHybrid(target_bytes=size, refit_epochs=0) if own else SVDLLM(rank=1)
    report = compressed(
        source, tmp_path / "out", strategy, None if own else size, calibration=text()
    )
    assert report.settings["calibration"]["dtype"] == "float32"
    assert 0.95 * size < weights(tmp_path / "out") == report.totals.bytes_after <= size


def test_more_bytes_leave_less_error(tmp_path: Path) -> None:
    source = folder_of(tmp_path, **BIG)
    want = tiny_model("llama", **BIG)(IDS).logits
    errors = []
    for size in (120_000, 160_000, 220_000, 300_000):
        compressed(source, tmp_path / str(size), PlainSVD(rank=1), size)
        with torch.no_grad():
            errors.append(float((tl.load(tmp_path / str(size))(IDS).logits - want).norm()))
    assert errors == sorted(errors, reverse=True)


def test_a_model_in_memory_fits_as_well(tmp_path: Path) -> None:
    model = tiny_model("llama", **BIG)
    strategy = ActivationHybrid(target_bytes=150_000, refit_epochs=0)
    tl.compress(model, strategy, calibration=text())
    report = tl.save(model, tmp_path / "out")
    assert weights(tmp_path / "out") <= 150_000
    assert report.settings["target_bytes"] == 150_000
    with torch.no_grad():
        torch.testing.assert_close(tl.load(tmp_path / "out")(IDS).logits, model(IDS).logits)


def test_an_interrupted_fit_knows_its_rounded_factors(tmp_path: Path) -> None:
    source, strategy = folder_of(tmp_path, **BIG), ActivationHybrid(target_bytes=140_000)
    for name in ("one", "streamed"):
        compressed(source, tmp_path / name, strategy, None, calibration=text(),
                   stream=name == "streamed")  # fmt: skip
    one, other = (tl.load(tmp_path / name).state_dict() for name in ("one", "streamed"))
    for name, w in one.items():
        torch.testing.assert_close(w, other[name], atol=1e-4, rtol=1e-3)


def test_rounding_is_a_mode_of_its_own(tmp_path: Path) -> None:
    source = folder_of(tmp_path, **BIG)
    asked = FolderTask(source=source, target=tmp_path / "out", compressor=Rounded(bits=4),
                       format="factored")  # fmt: skip
    planned, report = dry_run(asked), compress_folder(asked)
    before, after = (tl.load(tmp_path / "out"), tiny_model("llama", **BIG))
    roles = RoleMatrices(after.config, parameters_of(after))
    for role in ("q", "gate", "out"):
        w_ID = roles.read(parameters_of(after), 1, role).double().numpy()
        got = roles.read(parameters_of(before), 1, role).double().numpy()
        same = np.isclose(got, nearest(w_ID, 4), atol=1e-6)
        assert same.mean() > 0.98  # the largest of each group is a tie of the two ends
    assert {site.kind for site in report.sites} == {"int4-whole"}
    assert planned.bytes_after == pytest.approx(weights(tmp_path / "out"), rel=0.1)


def test_a_dry_run_says_the_bytes(tmp_path: Path) -> None:
    source = folder_of(tmp_path, **BIG)
    more: dict[str, Any] = {"source": source, "format": "factored"}
    budget = Budget(target_bytes=150_000)
    planned = dry_run(FolderTask(compressor=PlainSVD(rank=1), budget=budget, **more))
    compressed(source, tmp_path / "out", PlainSVD(rank=1), 150_000)
    assert weights(tmp_path / "out") <= planned.bytes_after <= 150_000
    fit = FolderTask(compressor=ActivationHybrid(target_bytes=150_000), calibration=text(), **more)
    assert dry_run(fit).bytes_after == 150_000


@pytest.mark.parametrize(
    ("strategy", "size", "format", "message"),
    [
        (PlainSVD(rank=1), 20_000, "factored", r"20000 cannot be met: \d+ are not compressed"),
        (PlainSVD(rank=1), 10**9, "factored", "must be less than the weight files hold now, some"),
        (PlainSVD(rank=1), 150_000, "dense", "which --format factored stores; got --format dense"),
        (MoDeGPT(kept=0.4), 150_000, "factored", "keeps one share .kept. of the dimensions"),
    ],
)
def test_what_cannot_be_met_is_refused_in_a_line(
    strategy: Any, size: int, format: str, message: str, tmp_path: Path
) -> None:
    source = folder_of(tmp_path, **BIG)
    asked = FolderTask(
        source=source,
        target=tmp_path / "out",
        compressor=strategy,
        budget=Budget(target_bytes=size),
        calibration=text() if strategy.needs != "weights" else None,
        format=format,  # type: ignore[arg-type]
    )
    with pytest.raises(UserError, match=message):
        compress_folder(asked)
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_only_compress_knows_what_else_the_files_hold() -> None:
    with pytest.raises(UserError, match="a target in bytes is for compress"):
        tl.fit(ActivationHybrid(target_bytes=10**6), tiny_model("llama"), text())


@pytest.mark.parametrize(
    ("typed", "size"),
    [("60MiB", 60 * 2**20), ("60MB", 60_000_000), ("1.5gib", 3 * 2**29), ("12345", 12_345),
     ("2 KB", 2_000), ("3KiB", 3_072), ("7B", 7)],
)  # fmt: skip
def test_sizes_as_they_are_typed(typed: str, size: int) -> None:
    assert options.size("--target-bytes", typed) == size


@pytest.mark.parametrize("typed", ["60 pounds", "-1", "0", "", "1e6", "MiB", "1,5GB", "inf"])
def test_what_is_no_size_is_refused(typed: str) -> None:
    with pytest.raises(UserError, match=r"^--target-bytes takes 1 byte or more, in .*got"):
        options.size("--target-bytes", typed)


def test_the_command_stores_factors_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    source, out = folder_of(tmp_path, **BIG), tmp_path / "out"
    asked: dict[str, Any] = {"model": str(source), "mode": "svd", "target_bytes": 150_000}
    report = run(CompressRequest(**asked, out=out))
    assert isinstance(report, tl.compression.report.CompressionReport)
    assert report.format == "factored"
    saved = json.loads((out / "report.json").read_text())
    assert saved["settings"]["chosen_by"]["target_bytes"] == 150_000
    assert weights(out) <= saved["settings"]["chosen_by"]["bytes"] <= 150_000
    with pytest.raises(UserError, match="got --format dense"):
        run(CompressRequest(**asked, out=tmp_path / "other", format="dense"))
    with pytest.raises(UserError, match="give one of"):
        run(CompressRequest(**asked, target_ratio=2.0, out=tmp_path / "other"))


def test_the_table_says_which_sites_are_in_few_bits() -> None:
    report = tl.compress(tiny_model("llama"), Rounded(bits=4, matrices=("q", "in")), layers=[0])
    out = io.StringIO()
    Console(width=80, file=out).print(compression_tables(report))
    assert "of 2 sites 2 in int4" in out.getvalue()
    plain = tl.compress(tiny_model("llama"), PlainSVD(kept=0.5), layers=[0])
    assert not any(site.few_bits for site in plain.sites)
