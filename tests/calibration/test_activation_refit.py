"""TrainableSite all factors of a layer together: gradients, and outputs that come nearer.

Shapes: B sequences, T positions, D model width, M outputs of a map, X its inputs.
"""

import copy
from dataclasses import replace

import pytest
import torch
from calibration_text import text
from tiny_models import TINY, tiny_model
from torch import Tensor

from tensorllm.calibration import fit, sweeps
from tensorllm.calibration.context import Context
from tensorllm.compression.engine import compress
from tensorllm.compressors import ActivationHybrid
from tensorllm.compressors.calibrated import refit
from tensorllm.compressors.calibrated.maps import Map
from tensorllm.compressors.calibrated.refit import PreconditionedMap
from tensorllm.compressors.operators import ProductOperator, RowsOperator
from tensorllm.compressors.steps import damp_rounding
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
        wanted = ActivationHybrid(target_ratio=3, refit_epochs=steps)
        report = compress(smaller, fit(wanted, model, text(), [0]), [0])
        assert report.ratios()["matrices_compressed"] >= 3  # at the same size
        found[steps] = relative(smaller, model)
    assert found[8] < 0.95 * found[0]


def test_a_well_fitted_layer_comes_nearer_too():
    """A learning rate that does not fall with the error would make it worse."""
    model, found = tiny_model("llama"), {}
    for epochs in (0, 4):
        smaller = copy.deepcopy(model)
        wanted = ActivationHybrid(target_ratio=1.02, rank_multiple=1, refit_epochs=epochs)
        compress(smaller, fit(wanted, model, text(), [0]), [0])
        found[epochs] = relative(smaller, model)
    assert found[4] < 0.8 * found[0]


@pytest.mark.parametrize("writes", [False, True])
def test_a_map_starts_as_it_was_with_its_size_in_both_factors(writes):
    left_MR, right_RX = randn(9, 3), randn(3, 6, seed=1)
    samples = randn(9 if writes else 6, 40, seed=2)
    balanced = PreconditionedMap(
        Map(left_MR, right_RX), Metric(samples @ samples.mT), ("o",) if writes else ("q",)
    )
    found = balanced.map()
    assert torch.allclose(found.left_MR @ found.right_RX, left_MR @ right_RX)
    for norms in (balanced.wide_WR.norm(dim=0), balanced.narrow_RD.norm(dim=1)):
        assert torch.allclose(norms, balanced.size_R)


def test_a_map_of_zeros_is_no_trouble():
    map_ = Map(torch.zeros(5, 2).double(), torch.zeros(2, 4).double())
    left, right = PreconditionedMap(map_, Metric(torch.eye(4).double()), ("q",)).map()
    assert not left.any()
    assert torch.isfinite(right).all()


def test_a_refit_that_comes_no_nearer_is_thrown_away(monkeypatch):
    model = tiny_model("llama")
    wanted = ActivationHybrid(target_ratio=3, refit_epochs=0)
    plain = fit(wanted, model, text(), [0])
    monkeypatch.setattr(refit, "LEARNING_RATE", 1e3)
    same = fit(replace(wanted, refit_epochs=1), model, text(), [0])
    for a, b in zip(plain.sites, same.sites, strict=True):
        assert torch.equal(plain.factors(a).dense(), same.factors(b).dense())


def test_an_eighth_of_the_batches_is_compared_and_not_trained_on(monkeypatch):
    """Of more than that many; the best epoch by them is nearer there than the start."""
    monkeypatch.setattr(sweeps, "BATCH", 20)
    trained, compared, output_loss = set(), {}, Context.output_loss

    def noted(self, batch, weights, parameters):
        loss = output_loss(self, batch, weights, parameters)
        if loss.requires_grad:
            trained.add(batch)
        else:
            compared.setdefault(batch, []).append(float(loss))
        return loss

    monkeypatch.setattr(Context, "output_loss", noted)
    epochs, model = 3, tiny_model("llama")
    found = fit(ActivationHybrid(target_ratio=3, refit_epochs=epochs), model, text(), [0])
    assert len(compared) > 1
    assert set(compared) == set(range(0, len(trained) + len(compared), refit.HELD_OUT))
    assert not trained & set(compared)
    assert {len(losses) for losses in compared.values()} == {1 + epochs}
    start, *later = (sum(losses) for losses in zip(*compared.values(), strict=True))
    kept = any(
        not torch.equal(found.factors(site).dense(), without.factors(site).dense())
        for without in [fit(ActivationHybrid(target_ratio=3, refit_epochs=0), model, text(), [0])]
        for site in found.sites
    )
    assert kept == (min(later) < start)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_run_as_factors_or_as_matrices_it_is_the_same_refit(name, monkeypatch):
    model, found = tiny_model(name), {}
    wanted = ActivationHybrid(target_ratio=3, refit_epochs=1)
    for cheaper in (True, False):
        for kind in (ProductOperator, RowsOperator):
            monkeypatch.setattr(kind, "is_cheaper", lambda self, tokens, cheaper=cheaper: cheaper)
        found[cheaper] = fit(wanted, model, text(), [0])
    for site in found[True].sites:
        one, other = (found[cheaper].factors(site).dense() for cheaper in (True, False))
        assert torch.allclose(one, other, atol=2e-2 * float(other.abs().max())), site


def test_attention_is_not_run_again_while_the_ffn_moves_alone(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaAttention

    runs, forward, model = [], LlamaAttention.forward, tiny_model("llama")
    monkeypatch.setattr(
        LlamaAttention, "forward", lambda self, *a, **k: runs.append(1) or forward(self, *a, **k)
    )
    counted = {}
    for share in (1.0, 0.5):
        monkeypatch.setattr(refit, "TOGETHER", share)
        runs.clear()
        fit(ActivationHybrid(target_ratio=3, refit_epochs=4), model, text(), [0])
        counted[share] = len(runs)
    # each epoch trains and compares; of two left out, the first runs what the rest remembers
    assert counted[1.0] - counted[0.5] == 3 * len(text().batches(1024))


def test_without_correction_nothing_is_refitted():
    model = tiny_model("llama")
    one, other = (
        fit(ActivationHybrid(target_ratio=3, correction=False, refit_epochs=n), model, text())
        for n in (0, 8)
    )
    for a, b in zip(one.sites, other.sites, strict=True):
        assert torch.equal(one.factors(a).dense(), other.factors(b).dense())
    with pytest.raises(UserError, match="refit_epochs must be 0 or more, got -1"):
        ActivationHybrid(target_ratio=3, refit_epochs=-1)


def test_where_a_gradient_is_rounding_a_step_is_short() -> None:
    """Adam divides it by its own size; the other entries take the step that they take without."""
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.Adam([{"params": [p], "lr": 1.0}])
    p.grad = torch.tensor([1.0, 1e-6], dtype=torch.float64)
    damp_rounding(optimizer)
    optimizer.step()
    assert float(p.detach()[0]) == pytest.approx(-1, abs=2e-3)
    assert -2e-3 < float(p.detach()[1]) < 0
    p.grad.zero_()
    damp_rounding(optimizer)
    optimizer.step()
    assert torch.isfinite(p).all()
