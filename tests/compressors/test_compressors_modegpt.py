"""MoDeGPT against its formulas in numpy, planted redundancy, and what cannot be made narrower.

Shapes: N tokens, F FFN channels, D model width, K head width, G KV heads, g queries per group.
"""

import numpy as np
import pytest
import torch
from calibration_text import text
from role_inputs import inputs_of, made
from tiny_models import tiny_model

import tensorllm as tl
from tensorllm.calibration import fit
from tensorllm.compressors.budget import Budget
from tensorllm.compressors.calibrated.modegpt import (
    MoDeGPT,
    dimensions_together,
    leverage,
    nystrom,
)
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.tensors.kept_rows import KeptRows


def role_matrix(model, layer: int, role: str) -> np.ndarray:
    roles = RoleMatrices(model.config, parameters_of(model))
    return roles.read(parameters_of(model), layer, role).double().numpy()


def kept_rows(w: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.abs(w).sum(1))


def test_ffn_channels_are_those_of_the_highest_leverage_and_out_makes_the_best_of_them():
    model = tiny_model("llama")
    smaller = made(MoDeGPT(kept=0.4, matrices=("in", "gate", "out")), model, text())
    x_NF = inputs_of(model, 0, "out", text())
    c_FF = x_NF.T @ x_NF / len(x_NF)
    ridge = np.trace(c_FF) / len(c_FF)
    scores = np.diag(c_FF @ np.linalg.inv(c_FF + ridge * np.eye(len(c_FF))))
    chosen = np.sort(np.argsort(-scores)[: round(0.4 * len(c_FF))])
    for role in ("in", "gate", "out"):
        np.testing.assert_array_equal(kept_rows(role_matrix(smaller, 0, role)), chosen)
    for role in ("in", "gate"):
        want = role_matrix(model, 0, role)[chosen]
        np.testing.assert_array_equal(role_matrix(smaller, 0, role)[chosen], want)
    wanted_ND = x_NF @ role_matrix(model, 0, "out")
    best, *_ = np.linalg.lstsq(x_NF[:, chosen], wanted_ND, rcond=None)
    lost, least = (
        np.linalg.norm(wanted_ND - x_NF[:, chosen] @ w)
        for w in (role_matrix(smaller, 0, "out")[chosen], best)
    )
    assert least > 0
    assert lost == pytest.approx(least, rel=1e-4)


def test_channels_that_do_nothing_cost_nothing():
    model = tiny_model("llama")
    names = parameters_of(model)
    roles = RoleMatrices(model.config, names)
    w = roles.read(names, 0, "in").clone()
    w[1::2] = 0
    roles.write(names, 0, "in", w)
    smaller = made(MoDeGPT(kept=0.5, matrices=("in", "gate", "out")), model, text())
    np.testing.assert_array_equal(kept_rows(role_matrix(smaller, 0, "in")), np.arange(0, len(w), 2))
    out = role_matrix(model, 0, "out")
    np.testing.assert_allclose(role_matrix(smaller, 0, "out")[::2], out[::2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["mistral", "gptj"])
def test_the_product_of_values_and_outputs_is_the_best_of_its_rank(architecture: str):
    model = tiny_model(architecture)
    geo = RoleMatrices(model.config, parameters_of(model)).spec.geometry(0)
    smaller = made(MoDeGPT(kept=0.5, matrices=("v", "o")), model, text())
    x_ND = inputs_of(model, 0, "v", text())
    rank = round(0.5 * geo.K)

    def products(m) -> np.ndarray:
        v_GKD = role_matrix(m, 0, "v").reshape(geo.G, geo.K, -1)
        o_GgKD = role_matrix(m, 0, "o").reshape(geo.G, geo.groups, geo.K, -1)
        return np.stack(
            [
                np.concatenate([x_ND @ v.T @ o for o in heads], 1)
                for v, heads in zip(v_GKD, o_GgKD, strict=True)
            ]
        )

    for want, got in zip(products(model), products(smaller), strict=True):
        tail = np.linalg.svd(want, compute_uv=False)[rank:]
        assert np.linalg.norm(want - got) == pytest.approx(np.linalg.norm(tail), rel=1e-3)
        assert np.linalg.norm(tail) > 0


def test_channels_that_are_never_active_have_scores_and_rows():
    """As behind a ReLU that is always below zero: their covariance is all zero."""
    zero_FF, out_FD = torch.zeros(6, 6, dtype=torch.float64), torch.ones(6, 2, dtype=torch.float64)
    assert len(leverage(zero_FF).unique()) == 1  # each matters as little as the others
    assert torch.equal(nystrom(zero_FF, torch.tensor([1, 4]), out_FD), zero_FF[:2, :2])


def test_query_key_dimensions_go_in_pairs_that_rotate_together():
    model = tiny_model("llama")
    geo = RoleMatrices(model.config, parameters_of(model)).spec.geometry(0)
    smaller = made(MoDeGPT(kept=0.5, matrices=("q", "k")), model, text())
    x_ND = inputs_of(model, 0, "q", text())
    q, k = (np.square(x_ND @ role_matrix(model, 0, role).T).mean(0) for role in "qk")
    scores_GK = q.reshape(geo.G, geo.groups, geo.K).sum(1) * k.reshape(geo.G, geo.K)
    kept_k = kept_rows(role_matrix(smaller, 0, "k")).reshape(geo.G, -1) % geo.K
    kept_q = kept_rows(role_matrix(smaller, 0, "q")).reshape(geo.H, -1) % geo.K
    half = geo.K // 2
    for group, kept in enumerate(kept_k):
        pairs = scores_GK[group, :half] + scores_GK[group, half:]
        best = np.sort(np.argsort(-pairs)[: round(0.5 * half)])
        np.testing.assert_array_equal(kept, np.concatenate([best, best + half]))
        for head in range(geo.groups):
            np.testing.assert_array_equal(kept_q[group * geo.groups + head], kept)
    assert dimensions_together(6, "neighbours").tolist() == [[0, 1], [2, 3], [4, 5]]
    assert dimensions_together(3, "halves").tolist() == [[0], [1], [2]]


def test_values_with_a_bias_are_chosen_and_refitted():
    """A bias cannot follow another basis: rows of v stay those of the original."""
    model = tiny_model("qwen2")
    smaller = made(MoDeGPT(kept=0.5, matrices=("v", "o")), model, text())
    before, after = role_matrix(model, 0, "v"), role_matrix(smaller, 0, "v")
    rows = kept_rows(after)
    assert len(rows) == round(0.5 * len(before))
    np.testing.assert_array_equal(after[rows], before[rows])


def test_what_is_fitted_runs_in_its_rows(tmp_path):
    model = tiny_model("llama")
    tl.compress(model, MoDeGPT(kept=0.5), calibration=text())
    tl.save(model, tmp_path / "small", format="factored")
    ids = torch.randint(0, model.config.vocab_size, (2, 9))
    with torch.no_grad():
        want = model(ids).logits
        got = tl.load(tmp_path / "small", policy="always")(ids).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_kept_rows_are_their_dense_matrix():
    rows = KeptRows.of(torch.tensor([3, 0]), torch.tensor([[3.0, 4.0], [1.0, 2.0]]), 5)
    want = torch.tensor([[1.0, 2], [0, 0], [0, 0], [3, 4], [0, 0]])
    assert torch.equal(rows.dense(), want)
    assert torch.equal(KeptRows.from_tensors(rows.tensors()).dense(), want)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kept": 1.0}, r"kept must be in \(0, 1\), got 1.0"),
        ({"kept": 0.5, "matrices": ("q",)}, "q and k become narrower together, got q alone"),
        ({"kept": 0.5, "matrices": ("in", "gate")}, "in and out become narrower together"),
    ],
)
def test_bad_settings(settings, said):
    with pytest.raises(UserError, match=said):
        MoDeGPT(**settings)


def test_no_budget():
    with pytest.raises(UserError, match=r"keeps one share \(kept\) of the dimensions"):
        fit(MoDeGPT(kept=0.5), tiny_model("llama"), text(), budget=Budget(target_ratio=2.0))
