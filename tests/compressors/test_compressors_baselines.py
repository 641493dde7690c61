"""The field's baselines as modes, against their papers' formulas in numpy on a tiny model.

Shapes: N tokens, Y outputs, X inputs, I and D of a role matrix.
"""

import copy

import numpy as np
import pytest
import torch
from calibration_text import distance, text
from role_inputs import inputs_of, made
from tiny_models import tiny_model

import tensorllm as tl
from tensorllm.calibration import fit
from tensorllm.compression.engine import compress
from tensorllm.compressors import AASVD, ASVD, SVDLLM, PlainSVD, SVDLLMSequential
from tensorllm.compressors.budget import Budget
from tensorllm.compressors.matrix import Root, weighted_curve
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.tensors.stacking import is_output_projection

ROLES = ("q", "k", "v", "o", "in", "gate", "out")


def map_of(model, layer: int, role: str) -> np.ndarray:
    roles = RoleMatrices(model.config, parameters_of(model))
    w_ID = roles.read(parameters_of(model), layer, role).double().numpy()
    return w_ID.T if is_output_projection(role) else w_ID


def cut(w: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(w, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize("role", ROLES)
def test_svd_is_eckart_young(role):
    model = tiny_model("llama")
    got = map_of(made(PlainSVD(rank=5), model), 1, role)
    np.testing.assert_allclose(got, cut(map_of(model, 1, role), 5), atol=1e-5)


def test_a_matrix_of_zeros_has_no_error_at_any_rank():
    """As experts that were pruned away; NaN in one curve would spoil a budget over all sites."""
    white = Root(torch.ones(6).double(), torch.ones(6).double())
    curve = weighted_curve(torch.zeros(8, 6).double(), white)
    assert torch.equal(curve.error_N, torch.zeros(len(curve.cost_N)).double())


@pytest.mark.parametrize("role", ROLES)
def test_asvd_scales_inputs_by_their_mean_size(role):
    model = tiny_model("llama")
    got = map_of(made(ASVD(rank=5, alpha=0.7), model, text()), 1, role)
    size_X = np.abs(inputs_of(model, 1, role, text())).mean(0) ** 0.7
    want = cut(map_of(model, 1, role) * size_X, 5) / size_X
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("role", ROLES)
def test_svd_llm_is_the_best_of_its_rank_on_its_own_outputs(role):
    """The error on the outputs is the tail of their singular values: no map does better."""
    model = tiny_model("llama")
    x_NX, w_YX = inputs_of(model, 1, role, text()), map_of(model, 1, role)
    got = map_of(made(SVDLLM(rank=5), model, text()), 1, role)
    lost = np.linalg.norm(x_NX @ (w_YX - got).T)
    tail = np.linalg.svd(x_NX @ w_YX.T, compute_uv=False)[5:]
    assert lost == pytest.approx(np.sqrt((tail**2).sum()), rel=1e-3)


def test_the_sequential_update_is_least_squares_on_the_compressed_models_inputs():
    """The first layer's q reads what it always read; o reads what compressed q, k and v give."""
    model = tiny_model("llama")
    smaller = made(SVDLLMSequential(rank=5, matrices=("q", "k", "v", "o")), model, text())
    y_NX, w_YX = inputs_of(smaller, 0, "o", text()), map_of(model, 0, "o")
    got = map_of(smaller, 0, "o")
    v_RX = np.linalg.svd(got)[2][:5]  # its row space stays, the left factor is refitted
    left_YR = np.linalg.lstsq(y_NX @ v_RX.T, y_NX @ w_YX.T, rcond=None)[0].T
    np.testing.assert_allclose(got, left_YR @ v_RX, atol=1e-3)


def test_the_anchored_fit_is_the_best_map_of_its_rank_from_the_compressed_inputs():
    """Reduced-rank regression of W x on y: its error is that of the least squares, and the tail."""
    model = tiny_model("llama")
    smaller = made(AASVD(rank=5), model, text())
    x_NX, y_NX = (inputs_of(m, 1, "q", text()) for m in (model, smaller))
    want_NY = x_NX @ map_of(model, 1, "q").T
    best = np.linalg.lstsq(y_NX, want_NY, rcond=None)[0]
    rest = np.linalg.norm(want_NY - y_NX @ best) ** 2
    tail = np.linalg.svd(y_NX @ best, compute_uv=False)[5:]
    lost = np.linalg.norm(want_NY - y_NX @ map_of(smaller, 1, "q").T) ** 2
    assert lost == pytest.approx(rest + (tail**2).sum(), rel=1e-3)


def test_refinement_comes_nearer_to_the_original_and_trains_the_norms():
    model = tiny_model("llama")
    plain, refined = (
        made(AASVD(kept=0.5, refine_epochs=n, learning_rate=3e-3), model, text()) for n in (0, 12)
    )
    assert distance(model, refined, text()) < 0.9 * distance(model, plain, text())
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(parameters_of(refined)[norm], parameters_of(model)[norm])
    assert torch.equal(parameters_of(plain)[norm], parameters_of(model)[norm])


@pytest.mark.parametrize("strategy", [PlainSVD, SVDLLM, ASVD, SVDLLMSequential, AASVD])
def test_every_matrix_keeps_the_same_share(strategy):
    model = tiny_model("llama")
    given = None if strategy is PlainSVD else text()
    report = compress(copy.deepcopy(model), strategy(kept=0.5), calibration=given)
    assert len(report.sites) == 14
    for site in report.sites:
        assert site.parameters_after <= 0.5 * site.parameters_before
        assert site.parameters_after + sum(site.shape) > 0.5 * site.parameters_before


@pytest.mark.parametrize("strategy", [PlainSVD, SVDLLM, ASVD])
def test_a_budget_is_shared_out_by_the_error_curves(strategy):
    model = tiny_model("llama")
    given = None if strategy is PlainSVD else text()
    report = compress(model, strategy(rank=1), budget=Budget(target_ratio=1.5), calibration=given)
    compressed = sum(site.parameters_before - site.parameters_after for site in report.sites)
    whole = sum(
        RoleMatrices(model.config, parameters_of(model)).spec.geometry(0).inner(r) for r in ROLES
    )
    numbers = 2 * whole * model.config.hidden_size
    assert numbers / (numbers - compressed) == pytest.approx(1.5, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one of kept and rank"),
        ({"kept": 1.0}, r"kept must be in \(0, 1\), got 1.0"),
        ({"rank": 0}, "rank must be 1 or more"),
        ({"kept": 0.5, "matrices": ("qq",)}, "matrices must be some of"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        PlainSVD(**settings)


def test_what_does_not_fit_is_refused():
    model = tiny_model("llama")
    with pytest.raises(UserError, match=r"rank must be in 1\.\.16, got 20"):
        compress(model, PlainSVD(rank=20))
    with pytest.raises(UserError, match="'svd-llm' is fitted to text: give --calibration"):
        compress(model, SVDLLM(kept=0.5))
    with pytest.raises(UserError, match="takes no calibration text"):
        fit(PlainSVD(kept=0.5), model, text())
    assert isinstance(tl.COMPRESSORS["aa-svd"](kept=0.5), AASVD)


@pytest.mark.parametrize("strategy", [SVDLLMSequential(rank=1), AASVD(rank=1)])
def test_a_budget_is_shared_out_over_the_matrices(strategy):
    """Ranks differ where errors do, the budget holds, and more of it leaves less error."""
    model, errors = tiny_model("llama"), []
    for ratio in (3.0, 1.5):
        smaller = copy.deepcopy(model)
        found = fit(strategy, model, text(), budget=Budget(target_ratio=ratio))
        report = compress(smaller, found)
        assert 0.8 * ratio < ratio <= report.ratios()["matrices_compressed"] < 1.4 * ratio
        assert len({found.factors(site).ranks for site in found.sites}) > 2
        ids = torch.arange(3, 14)[None]
        with torch.no_grad():
            errors.append(float((smaller(ids).logits - model(ids).logits).norm()))
    assert errors[1] < errors[0]
