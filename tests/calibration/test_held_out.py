"""What truncation costs on text that no covariance has seen, and what it does to the curves."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibration_text import long_text
from tiny_models import tiny_model
from torch import Tensor

from tensorllm.calibration import Calibration, fit
from tensorllm.calibration.ranks import Ranks
from tensorllm.calibration.statistics import MEASURED_TOKENS, sampled
from tensorllm.calibration.sweeps import BATCH
from tensorllm.compression.engine import compress
from tensorllm.compressors import ActivationHybrid, ActivationTucker
from tensorllm.compressors.calibrated.error_model import ErrorModel
from tensorllm.compressors.calibrated.held_out import LARGEST, Trial, error_ratio, mean_ratio
from tensorllm.compressors.calibrated.maps import pivoted
from tensorllm.compressors.rounded import HOW, RoundedFit
from tensorllm.tensors.quantised import quantise

PATHS = {
    **{role: f"self_attn.{role}_proj" for role in ("q", "k", "v", "o")},
    "in": "mlp.up_proj",
    "gate": "mlp.gate_proj",
    "out": "mlp.down_proj",
}
WRITE = ("o", "out")


def asked(
    monkeypatch: pytest.MonkeyPatch, model: Any, text: Calibration, ask: Any, **settings: Any
) -> list[Any]:
    """What `ask(context, curves)` gave in each layer while sizes were measured."""
    found, before = [], ActivationTucker.curves

    def curves(self: Any, sites: Any, context: Any) -> Any:
        out = before(self, sites, context)
        found.append(ask(context, out))
        return out

    monkeypatch.setattr(ActivationTucker, "curves", curves)
    fit(ActivationHybrid(target_ratio=1.5, refit_epochs=0, **settings), model, text)
    return found


@torch.no_grad()
def moved(model: Any, layer: int, role: str, w_ID: Tensor, ids_BT: Tensor) -> float:
    """The mean squared move of the layer's output relative to its size, by the whole model's own
    run."""
    linear = model.model.layers[layer].get_submodule(PATHS[role])
    held, kept = linear.weight.clone(), []
    handle = model.model.layers[layer].register_forward_hook(
        lambda module, args, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    model(ids_BT)
    linear.weight.copy_(w_ID.mT if role in WRITE else w_ID)
    model(ids_BT)
    linear.weight.copy_(held)
    handle.remove()
    before, after = kept
    return float(((after - before).square().sum(-1) / before.square().sum(-1)).mean())


def test_the_error_is_that_of_a_run_on_the_first_batch_that_is_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, text = tiny_model("llama"), long_text()
    batches = text.batches(BATCH)
    measured_B = sampled(batches, model.config.hidden_size, MEASURED_TOKENS)
    unseen = batches[measured_B.tolist().index(False)]

    def ask(context: Any, curves: Any) -> dict[str, tuple[Tensor, float]]:
        halves = {role: context.weight(role) / 2 for role in PATHS}
        assert context.holds_out
        seen = (b for b, yes in zip(batches, measured_B.tolist(), strict=True) if yes)
        assert context.tokens == sum(batch.count for batch in seen)
        return {role: (w, context.held_out_error({role: w})) for role, w in halves.items()}

    for layer, errors in enumerate(asked(monkeypatch, model, text, ask)):
        for role, (w_ID, error) in errors.items():
            wanted = moved(model, layer, role, w_ID, unseen.ids_BT)
            assert error == pytest.approx(wanted, rel=1e-4), (layer, role)


def test_a_text_that_is_measured_whole_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for holds_out in asked(
        monkeypatch, tiny_model("llama"), long_text(4), lambda context, curves: context.holds_out
    ):
        assert not holds_out


def test_the_first_sequences_of_a_batch_are_the_same_in_several_processes() -> None:
    whole = long_text().batches(1200)[0]
    first = whole.first(600)
    assert first.ids_BT.equal(whole.ids_BT[:10])
    assert (first.rows, first.count) == (10, 600)
    parts = [
        long_text().batches(1200, Ranks(rank, 3))[0].first(600, Ranks(rank, 3)) for rank in range(3)
    ]
    assert sorted(row for part in parts for row in part.ids_BT.tolist()) == sorted(
        first.ids_BT.tolist()
    )
    assert {(part.rows, part.count) for part in parts} == {(10, 600)}
    assert whole.first(1).rows == 1
    assert whole.first(10**6).ids_BT.equal(whole.ids_BT)
    assert long_text().batches(1200, Ranks(2, 3))[0].first(1, Ranks(2, 3)).ids_BT.shape == (1, 60)


def test_a_trial_of_a_sketch_tells_what_one_of_the_best_map_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As at large widths: another map of the same rank, with what is predicted for it."""

    def ask(context: Any, curves: Any) -> dict[str, Trial]:
        keys = [("q", "k", "v"), ("o",), ("in", "gate"), ("out",)]
        return {
            role: ErrorModel.of(context, key, None).trial(context, role)
            for key in keys
            for role in key
        }

    model, text = tiny_model("llama"), long_text()
    with monkeypatch.context() as patched:
        exact = asked(patched, model, text, ask)
    with monkeypatch.context() as patched:
        patched.setattr("tensorllm.tensors.eigen.LARGE", 8)
        near = asked(patched, model, text, ask)
    for best, sketched in zip(exact, near, strict=True):
        for role, trial in best.items():
            assert trial.predicted < sketched[role].predicted < 4 * trial.predicted
            assert sketched[role].ratio == pytest.approx(trial.ratio, rel=0.3)


@pytest.mark.parametrize("role", ["q", "o"])
def test_a_curve_goes_through_what_its_trial_has_cost(
    role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a trial costs thrice what was expected, so does every rank."""
    model, text = tiny_model("llama"), long_text()

    def curve_of(ratio: float) -> list[Tensor]:
        def measured(context: Any, weights: Any, predicted: float) -> float:
            return ratio if role in weights else 1.0

        with monkeypatch.context() as patched:
            name = "tensorllm.compressors.calibrated.error_model.error_ratio"
            patched.setattr(name, measured)
            found: list[Tensor] = asked(
                patched, model, text, lambda context, curves: by_role(curves, role), sharing=False
            )
            return found

    for plain, dear in zip(curve_of(1.0), curve_of(3.0), strict=True):
        assert torch.allclose(dear, 3 * plain, rtol=1e-9)


def by_role(curves: Any, role: str) -> Tensor:
    (curve,) = (curve for site, curve in curves.items() if site.roles == (role,))
    errors: Tensor = curve.error_N
    return errors


def test_factors_are_bounded_and_averaged_by_cost() -> None:
    context: Any = SimpleNamespace(held_out_error=lambda weights: 6.0)
    assert error_ratio(context, {}, 2.0) == 3.0
    assert error_ratio(context, {}, 1e-9) == LARGEST
    assert error_ratio(context, {}, 1e9) == 1 / LARGEST
    assert error_ratio(context, {}, 0.0) == 1.0
    assert mean_ratio([Trial(1.0, 2.0), Trial(3.0, 4.0)]) == 3.5
    assert mean_ratio([Trial(0.0, 2.0)]) == 1.0


def test_what_rounding_factors_costs_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size of q, k and v in one factor costs in four bits at least what a trial has cost."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=128)
    with torch.no_grad():  # of very different sizes
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(1e-3)
            layer.self_attn.o_proj.weight.mul_(1e3)
    together, found, before = ("q", "k", "v"), [], RoundedFit.curves

    def curves(self: Any, sites: Any, context: Any) -> Any:
        out = before(self, sites, context)
        site = next(site for site in sites if site.roles == together)
        rank = 32
        fitted = ErrorModel.of(context, together, self.inner.plain).fit(context, together, rank)
        factors = pivoted(*fitted.map, together)
        costs = [
            context.held_out_error(context.matrices(site, each))
            for each in (factors, *(quantise(factors, how) for how in HOW.values()))
        ]
        found.append((out[site], costs))
        return out

    monkeypatch.setattr(RoundedFit, "curves", curves)
    mode = ActivationHybrid(target_bytes=200_000, refit_epochs=0, narrowing=False)
    compress(model, mode, calibration=long_text())
    for curve, (plainly, eight, four) in found:
        assert four - plainly > 5 * abs(eight - plainly)
        sizes = curve.sizes_NC
        in_four = curve.error_N[(sizes[:, -1] == 4) & (sizes[:, 0] > 0)]
        assert (in_four >= 0.99 * (four - plainly)).all()
