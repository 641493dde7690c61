"""Every compressor on every architecture: one contract, and references written independently.

Shapes: D model width, K head width, M matrices per group, H heads, I inner width.
"""

import copy
from typing import Any

import numpy as np
import pytest
import tensorly.decomposition
import torch
from compressor_cases import CASES, Matrices, Slot
from naive_layer import TOKENS
from tiny_models import TINY, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

import tensorllm as tl
from tensorllm.compression.engine import compression_of
from tensorllm.models import RoleMatrices, parameters_of

# Alternating least squares is slow, and how Trawl stacks is held by its other rows.
PAIRS = [(c, n) for c in CASES for n in TINY if c != "trawl-cp" or n in ("gptj", "phi3", "bert")]


def test_every_registered_compressor_has_a_case() -> None:
    # what is fitted to text is tested in test_activation_fit.py and test_compressors_baselines.py,
    # what takes mixtures alone in test_experts_compress.py, rounding in test_target_bytes.py
    blind = {mode for mode in tl.COMPRESSORS if tl.COMPRESSORS[mode].needs == "weights"}
    assert {case.mode for case in CASES.values()} | {"expert-tucker", "rounded"} == blind
    assert all(tl.COMPRESSORS[mode].source.startswith("https://") for mode in tl.COMPRESSORS)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS)[0]


def roles_of(model: PreTrainedModel) -> tuple[RoleMatrices, dict[str, Tensor]]:
    weights = parameters_of(model)
    return RoleMatrices(model.config, weights), weights


def role_matrices(model: PreTrainedModel, slots: list[Slot]) -> Matrices:
    roles, weights = roles_of(model)
    return {slot: roles.read(weights, *slot).double().numpy().copy() for slot in slots}


def plant(model: PreTrainedModel, compressor: tl.Compressor, noise: float) -> list[Slot]:
    """Make the weights of all sites low-rank, in just the way of the compressor, plus noise."""
    roles, weights = roles_of(model)
    generator = torch.Generator().manual_seed(3)
    slots = []
    for job in compressor.jobs(roles.spec, (0, 1)):
        shape = job.site.shape(roles.spec.geometry(0))
        random = torch.randn(shape, generator=generator, dtype=torch.float64)
        w = job.compressor.decompose(random).dense()
        w = 0.3 * (w / w.std() + noise * torch.randn(shape, generator=generator, dtype=w.dtype))
        for slot, w_ID in zip(
            job.site.matrices, job.site.unstack(w, roles.spec.geometry(0)), strict=True
        ):
            roles.write(weights, *slot, w_ID)
            slots.append(slot)
    return slots


@pytest.mark.parametrize(("case", "name"), [pair for pair in PAIRS if CASES[pair[0]].full])
def test_full_rank_keeps_the_logits(case: str, name: str) -> None:
    model = tiny_model(name)
    before = copy.deepcopy(model)
    geometry = roles_of(model)[0].spec.geometry(0)
    full = CASES[case].full
    assert full is not None
    report = tl.compress(model, full(geometry), layers=[0, 1])
    assert max(site.relative_error for site in report.sites) < 2e-6
    want = logits(before)
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_weights_equal_the_reference_and_nothing_else_changes(case: str, name: str) -> None:
    model = tiny_model(name).double()
    geometry = roles_of(model)[0].spec.geometry(0)
    compressor = CASES[case].cut(geometry)
    slots = plant(model, compressor, noise=0.02)
    original = copy.deepcopy(model)
    found = role_matrices(model, slots)
    report = tl.compress(model, compressor)

    got, want = role_matrices(model, slots), CASES[case].reference(found, geometry)
    for slot in slots:
        error = np.linalg.norm(got[slot] - want[slot]) / np.linalg.norm(want[slot])
        assert error < 1e-5, (slot, error)
        assert np.linalg.norm(got[slot] - found[slot]) > 1e-3 * np.linalg.norm(found[slot])
    assert_only_changed(model, original, slots)
    assert_factors_are_the_weights(model, report)


def assert_only_changed(
    model: PreTrainedModel, original: PreTrainedModel, slots: list[Slot]
) -> None:
    """Whatever is not one of `slots` is bit for bit as it was: biases, norms, fused neighbours."""
    roles, weights = roles_of(model)
    _, before = roles_of(original)
    names = {roles.name(*slot) for slot in slots}
    for name, w in weights.items():
        assert torch.equal(w, before[name]) or name in names, name
    for layer in range(roles.layers):
        for role in roles.spec.geometry(0).roles:
            same = torch.equal(roles.read(weights, layer, role), roles.read(before, layer, role))
            assert same == ((layer, role) not in slots), (layer, role)


def assert_factors_are_the_weights(model: PreTrainedModel, report: Any) -> None:
    """What stays on the model stands for its weights, and is counted as it is stored."""
    roles, weights = roles_of(model)
    compression = compression_of(model)
    assert compression is not None
    for done, site in zip(compression.sites, report.sites, strict=True):
        stored = sum(t.numel() for t in done.factors.tensors().values())
        assert site.parameters_after == stored
        matrices = done.site.unstack(done.factors.dense(), roles.spec.geometry(0))
        assert site.parameters_before == sum(w.numel() for w in matrices)
        for slot, w_ID in zip(done.site.matrices, matrices, strict=True):
            assert torch.equal(
                roles.read(weights, *slot), w_ID.to(weights[roles.name(*slot)].dtype)
            )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_half_precision(case: str, name: str) -> None:
    """bfloat16 in, bfloat16 out; computed in float32, so as good as rounding allows."""
    compressor = CASES[case].cut(roles_of(tiny_model(name))[0].spec.geometry(0))
    wide = tiny_model(name)
    slots = plant(wide, compressor, noise=0.02)
    narrow = copy.deepcopy(wide).to(torch.bfloat16)
    report = tl.compress(narrow, compressor)
    assert report.dtype == "bfloat16"
    assert {w.dtype for w in parameters_of(narrow).values()} == {torch.bfloat16}
    found, got = role_matrices(wide, slots), role_matrices(narrow, slots)
    for slot in slots:
        error = np.linalg.norm(got[slot] - found[slot]) / np.linalg.norm(found[slot])
        assert error < 0.02 * 1.5 + 3 * 2**-8, (slot, error)
    assert_factors_are_the_weights(narrow, report)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_job_that_fails_leaves_the_model_as_it_was(case: str, value: float) -> None:
    """The last matrix of the last layer is bad: everything before it could be decomposed."""
    model = tiny_model("gptj")
    roles, weights = roles_of(model)
    compressor = CASES[case].cut(roles.spec.geometry(0))
    last = compressor.jobs(roles.spec, (0, 1))[-1].site.matrices[-1]
    weights[roles.name(*last)][3, 4] = value
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(tl.UserError, match=f"{roles.name(*last)} has NaN or infinite values"):
        tl.compress(model, compressor)
    for name, w in model.state_dict().items():
        torch.testing.assert_close(w, before[name], rtol=0, atol=0, equal_nan=True)
    assert compression_of(model) is None


@pytest.mark.parametrize("case", CASES)
def test_layers_that_are_not_chosen_stay(case: str) -> None:
    model = tiny_model("qwen3")
    compressor = CASES[case].cut(roles_of(model)[0].spec.geometry(0))
    if getattr(compressor, "across_layers", False):
        compressor = tl.Trawl(method="tucker", ranks=(9, 8, 2), across_layers=True)
    original = copy.deepcopy(model)
    report = tl.compress(model, compressor, layers=[1])
    slots = [(layer, role) for site in report.sites for layer in site.layers for role in site.roles]
    assert {layer for layer, _ in slots} == {1}
    assert_only_changed(model, original, slots)


def test_one_tensor_in_one_tensor_out() -> None:
    w_DKMH = torch.randn(24, 8, 4, 3, generator=torch.Generator().manual_seed(0))
    factors = tl.SharedTucker4D(ranks=(10, 5, 3)).decompose(w_DKMH)
    assert factors.dense().shape == w_DKMH.shape
    assert sum(t.numel() for t in factors.tensors().values()) == 10 * 5 * 3 * 3 + 240 + 40 + 12
    exact = tl.SharedTucker4D(ranks=(24, 8, 4)).decompose(w_DKMH).dense()
    torch.testing.assert_close(exact, w_DKMH, rtol=0, atol=1e-5)


def test_a_second_compression_is_refused() -> None:
    model = tiny_model("gpt2")
    tl.compress(model, tl.LaserSVD(rank=2), layers=[0])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(tl.UserError, match="compressed already"):
        tl.compress(model, tl.LaserSVD(rank=2), layers=[1])
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_weights_that_are_elsewhere_are_refused() -> None:
    """As `device_map` leaves them where memory is short: without values."""
    model = tiny_model("gpt2")
    model.transformer.h[1].to("meta")
    with pytest.raises(tl.UserError, match=r"h\.1\..* is not in memory"):
        tl.compress(model, tl.LaserSVD(rank=2))


def test_cp_of_any_size_of_numbers_is_the_same() -> None:
    """Powers of two are exact; beyond some the plain least squares leave float32's range."""
    w = torch.randn(12, 10, 2, generator=torch.Generator().manual_seed(0))
    want = tl.Trawl(rank=3).decompose(w).dense()
    for power in (-90, 90):
        got = tl.Trawl(rank=3).decompose(w * 2.0**power).dense()
        torch.testing.assert_close(got * 2.0**-power, want, rtol=1e-5, atol=1e-5)
    assert not tl.Trawl(rank=3).decompose(torch.zeros(12, 10, 2)).dense().any()


@pytest.mark.parametrize("fails", ["with an error", "with NaN"])
def test_cp_components_that_are_one_are_refused(
    fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a rank-one matrix stacked twice has at rank 20, where the processor's rounding lets it."""

    def parafac(w: Tensor, rank: int, **settings: Any) -> Any:
        if fails == "with an error":
            raise torch.linalg.LinAlgError("singular")
        return torch.ones(rank), [torch.full((size, rank), torch.nan) for size in w.shape]

    monkeypatch.setattr(tensorly.decomposition, "parafac", parafac)
    with pytest.raises(tl.UserError, match="cannot tell 20 components"):
        tl.Trawl(rank=20).decompose(torch.ones(12, 10, 2))


def test_a_matrix_in_two_sites_is_refused() -> None:
    model = tiny_model("gpt2")
    both = tl.Hybrid(ranks=(12, 5, 3), rho=0.5, matrices=("in", "q"))
    with pytest.raises(tl.UserError, match="matrix 'q' of layer 0 would be compressed twice"):
        tl.compress(model, both)


@pytest.mark.parametrize("wanted", [{"energy": 0.9}, {"error": 0.4}])
def test_ranks_are_the_least_that_keep_what_is_wanted(wanted: dict[str, float]) -> None:
    """Per mode by numpy's singular values of the unfoldings; an error is shared by the modes."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(32, 8, 4, 4, generator=generator, dtype=torch.float64)
    w *= torch.logspace(0, -2, 32)[:, None, None, None] * torch.logspace(0, -1, 8)[:, None, None]
    found = tl.SharedTucker4D(**wanted).decompose(w)
    lost = 1 - wanted["energy"] if "energy" in wanted else wanted["error"] ** 2 / 3
    for mode, rank in enumerate(found.ranks):
        unfolding = np.moveaxis(w.numpy(), mode, 0).reshape(w.shape[mode], -1)
        squares = np.linalg.svd(unfolding, compute_uv=False) ** 2
        tail = 1 - np.cumsum(squares) / squares.sum()
        assert tail[rank - 1] <= lost + 1e-12
        assert rank == 1 or tail[rank - 2] > lost
    if "error" in wanted:
        assert (found.dense() - w).norm() <= wanted["error"] * w.norm()
