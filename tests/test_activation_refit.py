"""Moving all factors of a layer together: gradients, and outputs that come nearer.

Shapes: B sequences, T positions, D model width, M outputs of a map, X its inputs.
"""

import copy

import pytest
import torch
from test_activation_fit import text
from tiny_models import TINY, tiny_model
from torch import Tensor

from tensorllm.calibration import fit
from tensorllm.compression.engine import compress
from tensorllm.compressors import ActivationHybrid
from tensorllm.compressors.calibrated.refit import Between
from tensorllm.errors import UserError
from tensorllm.tensors.weighted import Metric


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def first_layer(model) -> Tensor:
    """Its output on every token, read from the model as a whole."""
    out = []
    for batch in text().batches():
        found = model(
            batch.ids_BT, attention_mask=batch.mask_BT.long(), output_hidden_states=True
        ).hidden_states[1]
        out.append(found[batch.mask_BT])
    return torch.cat(out)


def relative(model, original) -> float:
    """What the refit makes small: squared distances over squared sizes, mean over tokens."""
    wanted, found = first_layer(original).double(), first_layer(model).double()
    return float(((found - wanted).square().sum(1) / wanted.square().sum(1)).mean())


@pytest.mark.parametrize("name", TINY)
def test_the_layers_output_comes_nearer_on_every_architecture(name):
    model, found = tiny_model(name), {}
    for steps in (0, 8):
        smaller = copy.deepcopy(model)
        wanted = ActivationHybrid(target_ratio=3, refit_steps=steps)
        report = compress(smaller, fit(wanted, model, text(), [0]), [0])
        assert report.ratios()["matrices_compressed"] >= 3  # at the same size
        found[steps] = relative(smaller, model)
    assert found[8] < 0.95 * found[0]


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_gradients_are_passed_on_by_the_chain_rule(shape):
    felt, seen = randn(shape[0], 40), randn(shape[1], 40, seed=1)
    between = Between(randn(*shape, seed=2), Metric(felt @ felt.mT), Metric(seen @ seen.mT), 4)
    target = randn(*shape, seed=3)
    left, right = between.left_MR, between.right_RX
    w_MX = between.inverse_MM @ (left / between.size_R) @ right @ between.inverse_XX
    (0.5 * (w_MX - target).square().sum()).backward()
    wanted = left.grad.clone(), right.grad.clone()
    between.pass_on(w_MX.detach() - target)
    assert torch.allclose(left.grad, wanted[0])
    assert torch.allclose(right.grad, wanted[1])


def test_a_map_of_its_rank_starts_as_it_was_with_its_size_in_both_factors():
    w_MX = randn(9, 3) @ randn(3, 6, seed=1)
    felt, seen = randn(9, 40, seed=2), randn(6, 40, seed=3)
    between = Between(w_MX, Metric(felt @ felt.mT), Metric(seen @ seen.mT), 3)
    left, right = between.factors()
    assert torch.allclose(left @ right, w_MX)
    for norms in (between.left_MR.norm(dim=0), between.right_RX.norm(dim=1)):
        assert torch.allclose(norms, between.size_R)


def test_a_map_of_zeros_is_no_trouble():
    between = Between(torch.zeros(5, 4).double(), Metric(torch.eye(5)), Metric(torch.eye(4)), 2)
    left, right = between.factors()
    assert not left.any()
    assert torch.isfinite(right).all()


def test_without_correction_nothing_is_refitted():
    model = tiny_model("llama")
    one, other = (
        fit(ActivationHybrid(target_ratio=3, correction=False, refit_steps=n), model, text())
        for n in (0, 8)
    )
    for a, b in zip(one.sites, other.sites, strict=True):
        assert torch.equal(one.factors(a).dense(), other.factors(b).dense())
    with pytest.raises(UserError, match="refit_steps must be 0 or more, got -1"):
        ActivationHybrid(target_ratio=3, refit_steps=-1)
