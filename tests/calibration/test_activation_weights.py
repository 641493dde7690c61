"""What errors cost: covariances of sampled gradients, drawn towards plain mean squares.

Shapes: N samples, D model width, M outputs.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibration_text import text
from tiny_models import tiny_model
from torch import Tensor

from tensorllm.calibration import fit
from tensorllm.calibration.covariances import Covariances, Wanted
from tensorllm.calibration.layers import InMemory, Layers
from tensorllm.calibration.statistics import GRADIENT_TOKENS, Measurement, frozen, sampled
from tensorllm.compressors import ActivationHybrid
from tensorllm.compressors.calibrated.error_model import (
    ErrorModel,
    shrinkage,
    shrunk_gradient_covariance,
)
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.tensors.weighted import at_equal_cost

D, M, RANK = 24, 40, 8


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(size: int, samples: int, seed: int) -> Tensor:
    x_NX = randn(samples, size, seed=seed) * torch.linspace(0.2, 3, size)
    return x_NX.mT @ x_NX / samples


def layer(w_MD: Tensor, inputs_DD: Tensor, gradients_MM: Tensor, samples: int = 0) -> Any:
    """A layer in which `in` and `gate` read the same, and are the same matrix."""
    return SimpleNamespace(
        weight=lambda role: w_MD,
        width_covariance=lambda roles: inputs_DD,
        propagated_covariance=lambda roles: len(roles) * w_MD.mT @ gradients_MM @ w_MD,
        tokens=10**6,
        gradient_tokens=lambda roles: samples,
        geometry=SimpleNamespace(D=D),
    )


def cost(w_MD: Tensor, fitted_MD: Tensor, inputs_DD: Tensor, gradients_MM: Tensor) -> float:
    error_MD = w_MD - fitted_MD
    return float((gradients_MM @ error_MD @ inputs_DD * error_MD).sum())


def fitted(context: Any, plain: float | None, roles: tuple[str, ...] = ("in",)) -> Tensor:
    map_ = ErrorModel.of(context, roles, plain).fit(context, roles, RANK).map
    return map_.left_MR @ map_.right_RX


@pytest.mark.parametrize("roles", [("in",), ("in", "gate")])
def test_all_plain_is_the_svd_of_the_white_inputs(roles: tuple[str, ...]) -> None:
    """SVD-LLM's: the best of its rank in the mean square of the outputs."""
    w_MD, inputs_DD = randn(M, D, seed=1), covariance(D, 200, 2)
    context = layer(w_MD, inputs_DD, covariance(M, 200, 3))
    root_DD = torch.linalg.cholesky(inputs_DD)
    u, s, v = torch.linalg.svd(w_MD @ root_DD)
    best_MD = u[:, :RANK] * s[:RANK] @ v[:RANK] @ torch.linalg.inv(root_DD)
    for found_MD in fitted(context, 1.0, roles).chunk(len(roles)):
        assert torch.allclose(found_MD, best_MD, atol=1e-3)


@pytest.mark.timeout(60)
def test_gradients_that_overflow_are_refused() -> None:
    """As in half precision; a covariance with NaN has no Cholesky factor, whatever is added."""
    model = tiny_model("llama")
    handle = model.model.layers[0].register_full_backward_pre_hook(
        lambda module, gradients: (gradients[0] * float("inf"),)
    )
    with pytest.raises(UserError, match=r"gradient of .*layers\.0\..* NaN or Inf .* batch 0"):
        fit(ActivationHybrid(target_ratio=2), model, text())
    handle.remove()


def test_nothing_plain_is_the_gradients_alone() -> None:
    context = layer(randn(M, D, seed=1), covariance(D, 200, 2), covariance(M, 200, 3))
    found_DD = ErrorModel.of(context, ("in",), 0.0).propagated(context, ("in",))
    assert torch.equal(found_DD, context.propagated_covariance(("in",)))
    assert torch.equal(
        shrunk_gradient_covariance(context, ("out",), 0.0), context.width_covariance(("out",))
    )


@pytest.mark.parametrize("plain", [0.0, 0.3, 1.0])
def test_all_of_a_matrix_costs_the_same_whatever_the_share(plain: float) -> None:
    """So that matrices keep their weights against each other in one budget."""
    w_MD, inputs_DD, gradients_MM = randn(M, D, seed=1), covariance(D, 200, 2), covariance(M, 90, 3)
    context = layer(w_MD, inputs_DD, gradients_MM)
    found_DD = ErrorModel.of(context, ("in",), plain).propagated(context, ("in",))
    whole = cost(w_MD, torch.zeros_like(w_MD), inputs_DD, gradients_MM)
    assert float((found_DD * inputs_DD).sum()) == pytest.approx(whole, rel=1e-9)
    trace = shrunk_gradient_covariance(context, ("out",), plain).trace()
    assert float(trace) == pytest.approx(float(inputs_DD.trace()), rel=1e-9)


def test_of_few_gradients_a_share_that_is_plain_costs_less_and_of_many_more() -> None:
    """By the covariance that the gradients were drawn from."""
    w_MD, inputs_DD = randn(M, D, seed=1), covariance(D, 4000, 2)
    true_MM = torch.diag(torch.linspace(0.5, 1.5, M, dtype=torch.float64).square())
    lost: dict[tuple[int, float | None], float] = {}
    for samples in (8, 40000):
        for plain in (0.0, 0.5, None):
            for seed in range(5):
                g_NM = randn(samples, M, seed=10 + seed) @ true_MM.sqrt()
                context = layer(w_MD, inputs_DD, g_NM.mT @ g_NM / samples, samples)
                found_MD = fitted(context, plain)
                before = lost.get((samples, plain), 0.0)
                lost[samples, plain] = before + cost(w_MD, found_MD, inputs_DD, true_MM)
    assert lost[8, 0.5] < 0.97 * lost[8, 0.0]
    assert lost[40000, 0.0] < lost[40000, 0.5]
    assert lost[8, None] < 0.97 * lost[8, 0.0]
    assert lost[40000, None] == pytest.approx(lost[40000, 0.0], rel=1e-3)


@pytest.mark.parametrize(("samples", "share"), [(1, 1.0), (4 * D, 0.5), (20 * D, 0.1)])
def test_the_share_falls_with_the_tokens_that_gradients_were_taken_of(
    samples: int, share: float
) -> None:
    context = layer(randn(M, D, seed=1), covariance(D, 200, 2), covariance(M, 90, 3), samples)
    assert shrinkage(context, ("in",), None) == pytest.approx(share)
    assert shrinkage(context, ("in",), 0.3) == 0.3


def test_gradients_are_counted_and_the_count_is_kept() -> None:
    """Of every other batch, as they are sampled, through what is kept between the two sweeps."""
    model, calibration = tiny_model("llama"), text(count=400)
    roles = RoleMatrices(model.config, parameters_of(model))
    key = (0, ("q", "k", "v"))
    layers = Layers(InMemory(model), calibration.batches(512), 1)
    wanted = Wanted(matrices=False, width=True, gradients=True)
    with frozen(model):
        run = Measurement(layers, 0, model.model.layers[0], [key], layers.start, wanted)
        found = run.covariances
    sample_B = sampled(layers.batches, roles.spec.geometry(0).D, GRADIENT_TOKENS)
    assert 0 < int(sample_B.sum()) < len(layers.batches)
    want = sum(b.count for b, yes in zip(layers.batches, sample_B, strict=True) if yes)
    assert int(found.gradient_tokens[key]) == want
    kept = Covariances.from_tensors(found.tensors(inputs=False), torch.device("cpu"))
    assert int(kept.gradient_tokens[key]) == want


def test_what_costs_nothing_gives_nothing() -> None:
    zero_DD = torch.zeros(3, 3)
    assert not at_equal_cost(zero_DD, torch.eye(3), torch.eye(3)).any()
    assert not at_equal_cost(torch.eye(3), zero_DD, torch.eye(3)).any()


@pytest.mark.parametrize("plain", [-0.1, 1.01, float("nan")])
def test_a_share_is_between_none_and_all(plain: float) -> None:
    with pytest.raises(UserError, match=r"plain must be in 0\.\.1"):
        ActivationHybrid(target_ratio=2, plain=plain)
