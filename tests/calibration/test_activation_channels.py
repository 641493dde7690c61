"""FFNs that lose channels within a fit to text.

Shapes: N tokens, F channels, D model width.
"""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from calibration_text import logits, text
from tiny_models import tiny_model

from tensorllm.calibration import fit
from tensorllm.checkpoint.loading import load
from tensorllm.compression.engine import compress
from tensorllm.compression.save import save
from tensorllm.compressors import ActivationHybrid
from tensorllm.compressors.calibrated.channels import (
    curve,
    is_narrowed,
    min_stored,
    narrowed_site,
)
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.tensors.kept_rows import KeptRows
from tensorllm.tensors.stacking import Geometry
from tensorllm.tensors.weighted import floor_of

RATIOS = {"llama": 1.39, "phi3": 1.39, "gpt2": 1.6, "gptj": 1.6}  # what dead channels allow


def test_the_curve_is_the_error_of_least_squares_on_the_first_channels() -> None:
    draws = torch.Generator().manual_seed(0)
    h_NF = (
        torch.randn(400, 48, generator=draws).double()
        @ torch.randn(48, 48, generator=draws).double()
    )
    out_FD, g_ND = (torch.randn(n, 12, generator=draws).double() for n in (48, 90))
    gradient_DD = g_ND.mT @ g_ND / 90
    site = narrowed_site(3, ("q", "in", "gate", "out"))
    assert site is not None
    context = SimpleNamespace(
        weight=lambda role: out_FD,
        input_covariance=lambda role: h_NF.mT @ h_NF / 400,
        geometry=SimpleNamespace(D=12),
        tokens=400,
        holds_out=False,
    )
    found = curve(site, context, gradient_DD)  # type: ignore[arg-type]
    scores_F = h_NF.square().sum(0) * ((out_FD @ gradient_DD) * out_FD).sum(1)
    order_F = scores_F.argsort(descending=True)
    raised_FF = h_NF.mT @ h_NF / 400
    raised_FF += floor_of(48, 400) * raised_FF.diagonal().mean() * torch.eye(48)
    root_FF = torch.linalg.cholesky(raised_FF).mT  # what is read, floor included, in 48 samples
    for size, error, cost in zip(found.sizes_NC[:, 0], found.error_N, found.cost_N, strict=True):
        kept = order_F[:size]
        best = torch.linalg.lstsq(root_FF[:, kept], root_FF @ out_FD).solution
        miss_ND = root_FF[:, kept] @ best - root_FF @ out_FD
        want = ((miss_ND @ gradient_DD) * miss_ND).sum() / (1 - size / 400) ** 2
        torch.testing.assert_close(error, want, rtol=1e-3, atol=1e-6)
        assert cost == 3 * (12 * size + 48)
    assert len(found.cost_N) == 48 // 8 - 1


@pytest.mark.parametrize(("channels", "step"), [(48, 8), (256, 8), (1536, 32), (11008, 256)])
def test_widths_are_multiples_that_kernels_run_well(channels: int, step: int) -> None:
    site = narrowed_site(0, ("in", "gate", "out"))
    assert site is not None
    geometry = Geometry(D=64, H=4, G=4, K=16, F=channels, gated=True)
    assert min_stored(geometry, site) == 3 * (step * 64 + channels)


def test_channels_fitted_to_fewer_tokens_than_there_are_channels_are_not_taken_for_free() -> None:
    draws = torch.Generator().manual_seed(0)
    h_NF, out_FD = (torch.randn(s, generator=draws).double() for s in ((24, 48), (48, 12)))
    site = narrowed_site(0, ("in", "gate", "out"))
    assert site is not None
    context = SimpleNamespace(
        weight=lambda role: out_FD,
        input_covariance=lambda role: h_NF.mT @ h_NF / 24,
        geometry=SimpleNamespace(D=12),
        tokens=24,
        holds_out=False,
    )
    found = curve(site, context, torch.eye(12).double())  # type: ignore[arg-type]
    whole = float((h_NF @ out_FD).square().sum() / 24)
    enough = found.sizes_NC[:, 0] >= 24  # least squares on these misses nothing of the 24 tokens
    assert enough.sum() >= 2
    assert (found.error_N[enough] > 0.2 * whole).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gptj"])
def test_channels_that_nothing_reads_go_and_nothing_else_changes(name: str, tmp_path: Path) -> None:
    """Planted: most rows of `out` are zero, so that narrower is exact and low rank is not."""
    model = tiny_model(name)
    roles, weights = RoleMatrices(model.config, parameters_of(model)), parameters_of(model)
    for layer in range(roles.layers):
        out_FD = roles.read(weights, layer, "out").clone()
        out_FD[torch.arange(len(out_FD)) % 4 > 0] = 0
        roles.write(weights, layer, "out", out_FD)
    ratio = RATIOS[name]
    found = fit(ActivationHybrid(target_ratio=ratio, refit_epochs=0), model, text(count=48))
    narrowed = [site for site in found.sites if is_narrowed(site)]
    assert len(narrowed) == roles.layers
    assert all(isinstance(found.factors(site), KeptRows) for site in narrowed)
    whole = fit(ActivationHybrid(target_ratio=ratio, refit_epochs=0, narrowing=False),
                model, text(count=48))  # fmt: skip
    assert not any(is_narrowed(site) for site in whole.sites)
    wanted, errors = logits(model, text(1)), []
    for fitted in (found, whole):
        smaller = copy.deepcopy(model)
        compress(smaller, fitted)
        errors.append(float((logits(smaller, text(1)) - wanted).norm() / wanted.norm()))
    assert errors[0] < 0.6 * errors[1]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_narrowed_layers_run_in_their_factors_and_are_refitted(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    mode = ActivationHybrid(target_ratio=2.5, refit_epochs=2)
    plain = fit(ActivationHybrid(target_ratio=2.5, refit_epochs=0), model, text())
    refitted = fit(mode, model, text())
    assert any(is_narrowed(site) for site in refitted.sites)
    wanted, errors = logits(model, text()), []
    for fitted in (plain, refitted):
        smaller = copy.deepcopy(model)
        compress(smaller, fitted)
        errors.append(float((logits(smaller, text()) - wanted).norm()))
    assert errors[1] < errors[0]
    save(smaller, tmp_path / "out")
    factored = load(tmp_path / "out", policy="always")
    torch.testing.assert_close(
        logits(factored, text(2)), logits(smaller, text(2)), rtol=1e-3, atol=1e-3
    )
