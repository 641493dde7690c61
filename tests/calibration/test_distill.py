"""Training of factors towards the original's predictions."""

import copy
from dataclasses import replace

import pytest
import torch
from calibration_text import distance, text
from tiny_models import tiny_model

import tensorllm as tl
from tensorllm.calibration import Calibration, fit
from tensorllm.calibration import distill as distillation
from tensorllm.calibration.distill import Distiller, distill
from tensorllm.calibration.fit import fit_sizes
from tensorllm.calibration.layers import InMemory
from tensorllm.compression.engine import compress, compression_of
from tensorllm.compressors import ActivationHybrid
from tensorllm.compressors.budget import Budget
from tensorllm.compressors.calibrated.svd_llm import SVDLLM
from tensorllm.errors import UserError
from tensorllm.tensors.factors import LowRank


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("llama", ActivationHybrid(target_ratio=2, refit_epochs=0)),
        ("gpt2", ActivationHybrid(target_ratio=2, refit_epochs=0)),
        ("falcon-grouped", SVDLLM(kept=0.5)),
        ("mixtral", ActivationHybrid(target_ratio=2, refit_epochs=0)),
        ("llama", tl.SharedTucker4D(ranks=(16, 4, 3))),
        ("gpt2", tl.SharedTucker4D(ranks=(16, 4, 3))),
        ("gpt2", tl.LaserSVD(rho=0.4)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_in_factors_is_one_through_the_matrices(name, wanted, dtype, monkeypatch):
    """Loss and gradients; what the factors do not stand for is shared with the original."""
    model, few = tiny_model(name), text(3, 6, 12)
    smaller = copy.deepcopy(model)
    compress(smaller, fit(wanted, model, text()) if wanted.needs != "weights" else wanted)
    factors = {done.site: done.factors for done in compression_of(smaller).sites}
    model.to(dtype)
    roles = InMemory(model).roles
    (batch, *_) = few.batches(128)

    def step() -> tuple[Distiller, torch.Tensor, list[torch.Tensor]]:
        trained = Distiller(model, roles, factors, 1)
        loss = trained.training_step(batch, 0)
        loss.backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained.numbers]
        return trained, loss, found

    trained, loss, gradients = step()
    assert trained.placed
    student = trained._held[1]
    assert student.get_input_embeddings().weight is model.get_input_embeddings().weight
    monkeypatch.setattr(distillation, "module_for", lambda *_: None)
    dense, wanted_loss, wanted_gradients = step()
    assert not dense.placed
    near = 1e-3 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(loss, wanted_loss, rtol=near, atol=near)
    for found_gradient, gradient in zip(gradients, wanted_gradients, strict=True):
        assert float((found_gradient - gradient).norm()) <= 3 * near * float(gradient.norm()) + 1e-9


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-grouped"])
def test_distillation_brings_predictions_nearer_and_trains_nothing_else(name):
    model = tiny_model(name)
    before = copy.deepcopy(model.state_dict())
    few = text(3, 60, 12)
    found = {}
    for steps in (0, 60):
        smaller = copy.deepcopy(model)
        fitted = fit(ActivationHybrid(target_ratio=3, distill_steps=steps), model, few)
        report = compress(smaller, fitted)
        found[steps] = distance(model, smaller, text(4, 40, 12)), report.totals.parameters_after
    assert found[60][0] < 0.95 * found[0][0]
    assert found[60][1] == found[0][1]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())


def test_what_is_distilled_on_may_be_another_text():
    """The fit is that of the calibration text alone, and training knows only the other one."""
    model = tiny_model("llama")
    few, other = text(3, 60, 12), text(5, 60, 12)
    wanted = ActivationHybrid(target_ratio=3, refit_epochs=0, distill_steps=30)
    found = fit(wanted, model, replace(few, to_distill=other))
    start = fit(replace(wanted, distill_steps=0), model, few)
    factors = {site: start.factors(site) for site in start.sites}
    trained = distill(model, InMemory(model).roles, factors, other, 30)
    assert found.sites == start.sites
    for site in start.sites:
        torch.testing.assert_close(found.factors(site).dense(), trained[site].dense())
    assert found.calibration["to_distill"] == other.facts()
    with pytest.raises(UserError, match="has token 10000"):
        fit(wanted, model, replace(few, to_distill=Calibration(((10000,),))))


def test_distillation_steps_are_shares_of_each_parameters_size():
    """Fixed ones ruin real models: a factor that is eight times smaller would move as far."""
    model = tiny_model("llama")
    fitted = fit(SVDLLM(kept=0.5), model, text())
    roles, few = InMemory(model).roles, text(3, 60, 12)
    even = {site: fitted.factors(site) for site in fitted.sites}
    uneven = {site: LowRank(8 * low.u_IR, low.v_RO / 8) for site, low in even.items()}
    found, other = (distill(model, roles, factors, few, 6) for factors in (even, uneven))
    for site, low in found.items():
        before, after = even[site].dense(), low.dense()
        moved = float((after - before).norm())
        assert moved > 1e-3 * float(before.norm())
        assert float((other[site].dense() - after).norm()) < 0.05 * moved


def test_steps_of_distillation_are_shorter_in_wider_models():
    """0.003 of a parameter's root mean square, over the root of the width."""
    for width in (32, 128):
        model = tiny_model("llama", hidden_size=width)
        fitted = fit(SVDLLM(kept=0.5), model, text(width // 8))
        factors = {site: fitted.factors(site) for site in fitted.sites}
        trained = Distiller(model, InMemory(model).roles, factors, 1)
        for group in trained.configure_optimizers()[0][0].param_groups:
            (x,) = group["params"]
            size = float(x.detach().square().mean()) ** 0.5
            assert group["lr"] == pytest.approx(0.003 * size / width**0.5)


def test_several_sizes_are_distilled_as_one_is():
    model = tiny_model("llama")
    wanted = ActivationHybrid(target_ratio=2.0, refit_epochs=0, distill_steps=5)
    (found,) = fit_sizes(wanted, model, text(), [Budget(target_ratio=2.0)])
    alone = fit(wanted, model, text())
    for site in alone.sites:
        w = alone.factors(site).dense()
        assert torch.allclose(found.factors(site).dense(), w, atol=1e-3 * float(w.abs().max()))
