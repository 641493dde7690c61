"""Factors in the place of weights: exactly the site's matrices, for good or for a while."""

from collections.abc import Callable

import pytest
import torch
from tiny_models import tiny_model

from tensorllm.compressors.layer import Site
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.tensors.factors import LowRank
from tensorllm.weights import dense_matrices, edited, restored, stacked, write_dense

# Fused, grouped, transposed (Conv1D) and plain parameters.
MODELS = ["llama", "gpt2", "phi3", "falcon-grouped", "gpt_neox"]
SITE = Site((1,), ("v",), "matrix")


def low_rank(rows: int, columns: int, seed: int = 0) -> LowRank:
    made = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rows, 3, generator=made), torch.randn(3, columns, generator=made))


def changes(model: torch.nn.Module, edit: Callable[[], None]) -> dict[str, torch.Tensor]:
    """By name, where a parameter's bits differ after `edit`."""
    before = {name: w.clone() for name, w in parameters_of(model).items()}
    edit()
    return {
        name: w != before[name]
        for name, w in parameters_of(model).items()
        if not torch.equal(w, before[name])
    }


@pytest.mark.parametrize("name", MODELS)
def test_only_the_sites_matrix_is_written(name: str) -> None:
    model = tiny_model(name)
    weights = parameters_of(model)
    roles = RoleMatrices(model.config, weights)
    geo = roles.spec.geometry(0)
    factors = low_rank(geo.inner("v"), geo.D)
    changed = changes(model, lambda: write_dense(SITE, factors, roles, weights))
    want = factors.u_IR.double() @ factors.v_RO.double()
    torch.testing.assert_close(roles.read(weights, 1, "v").double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stacked(SITE, roles, weights), factors.dense(), rtol=0, atol=0)
    assert changed.keys() == {roles.name(1, "v")}
    assert sum(int(where.sum()) for where in changed.values()) <= want.numel()


@pytest.mark.parametrize("name", MODELS)
def test_an_edit_is_undone_bit_for_bit(name: str) -> None:
    """Also where two sites share a fused parameter, and where the block raises."""
    model = tiny_model(name)
    weights = parameters_of(model)
    roles = RoleMatrices(model.config, weights)
    geo, ids = roles.spec.geometry(0), torch.arange(7)[None]
    sites = [Site((1,), (role,), "matrix") for role in ("q", "v", "in")]
    edits = [
        (site, dense_matrices(site, low_rank(geo.inner(site.roles[0]), geo.D, seed), roles))
        for seed, site in enumerate(sites)
    ]
    before = model(ids).logits

    def edit() -> None:
        with edited(iter(edits), roles, weights):
            for site, (w_ID,) in edits:
                assert torch.equal(roles.read(weights, 1, site.roles[0]), w_ID)
            assert not torch.allclose(model(ids).logits, before)
            raise KeyboardInterrupt

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            edit()

    assert changes(model, interrupted) == {}


def test_whatever_a_block_writes_is_undone() -> None:
    model = tiny_model("phi3")
    weights = parameters_of(model)
    roles = RoleMatrices(model.config, weights)

    def edit() -> None:
        with restored([SITE], roles, weights):
            weights[roles.name(1, "v")].zero_()

    assert changes(model, edit) == {}


def test_weights_that_want_gradients_are_written_without() -> None:
    model = tiny_model("llama")
    weights = dict(model.named_parameters())
    roles = RoleMatrices(model.config, weights)
    geo = roles.spec.geometry(0)
    new = dense_matrices(SITE, low_rank(geo.inner("v"), geo.D), roles)
    with edited([(SITE, new)], roles, weights):
        model(torch.arange(5)[None]).logits.sum().backward()
    assert weights[roles.name(1, "v")].grad is not None
