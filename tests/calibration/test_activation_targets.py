"""Targets of data-aware fits on whole models: sizes that nothing beats, and losses that are kept.

Shapes: N tokens, V words.
"""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from calibration_text import logits, text
from tiny_models import tiny_model

from tensorllm.calibration import fit
from tensorllm.calibration.fit import Fitted, fit_sizes
from tensorllm.calibration.layers import InMemory
from tensorllm.calibration.smallest import next_token_loss, smallest, with_factors
from tensorllm.calibration.store import Store
from tensorllm.calibration.sweeps import Sweeps
from tensorllm.compression.engine import compress
from tensorllm.compressors import ActivationHybrid, ActivationTucker
from tensorllm.compressors.budget import Budget
from tensorllm.compressors.calibrated.maps import site_of
from tensorllm.errors import UserError
from tensorllm.tensors.pivoted import pivoted_parameters


def test_no_allocation_of_a_coarse_grid_is_better_by_one_per_cent_of_the_loss():
    """Every grid of ranks within the budget is fitted and run: nothing predicted, all measured."""
    model = tiny_model("llama")
    wanted = ActivationTucker(target_ratio=2.0)
    unseen = text(1)
    p_NV = logits(model, unseen).double().softmax(-1)
    work = Sweeps(wanted, InMemory(model), text(), None)

    def loss(sites) -> float:
        made = Fitted(wanted, (), tuple(sites), None, {}, work.store)
        factors = {site: made.factors(site) for site in sites}
        q_NV = (
            logits(with_factors(model, work.source.roles, factors), unseen).double().log_softmax(-1)
        )
        return float(-(p_NV * q_NV).sum(-1).mean())

    found = loss(work.run(wanted.budget))
    groups = list(work.planned.keys)  # q, k, v together, and o
    shapes = {("q", "k", "v"): (64, 32), ("o",): (32, 32)}
    budget = sum(a * b for _, c in groups for a, b in [shapes[c]]) / 2.0
    losses = []
    for ranks in itertools.product((2, 6, 12, 24), repeat=len(groups)):
        cost = sum(
            pivoted_parameters(shapes[c], r) for (_, c), r in zip(groups, ranks, strict=True)
        )
        if 0.8 * budget < cost <= budget:
            work.store = Store()
            sizes = {site_of(*key): (r,) for key, r in zip(groups, ranks, strict=True)}
            losses.append(loss(work.factors(sizes)))
    assert len(losses) > 15
    assert found <= 1.01 * min(losses)
    assert found < sum(losses) / len(losses)


def test_the_smallest_model_within_the_limit_is_found():
    model = tiny_model("llama")
    strict, loose = (
        fit(ActivationHybrid(max_loss_increase=limit), model, text()) for limit in (0.01, 0.1)
    )
    sizes = []
    for fitted, limit in ((strict, 0.01), (loose, 0.1)):
        smaller = copy.deepcopy(model)
        report = compress(smaller, fitted)
        batches = text().batches()
        rise = next_token_loss(smaller, batches) - next_token_loss(model, batches)
        assert rise <= limit
        assert rise == pytest.approx(fitted.calibration["loss_increase"], abs=1e-5)
        sizes.append(report.totals.parameters_after)
    assert sizes[1] < sizes[0] < sum(p.numel() for p in model.parameters())


def test_the_search_ends_at_the_edge_of_what_is_allowed():
    tried = []

    def attempt(budget: int) -> tuple[int, float]:
        tried.append(budget)
        return budget, 100 / budget

    found, lost = smallest(10, 10_000, 0.5, attempt)
    assert 200 <= found <= 205
    assert lost <= 0.5
    assert len(tried) == 10
    with pytest.raises(UserError, match=r"cannot be reached: .* 1.01 times smaller already lose"):
        smallest(10, 10_000, 1e-3, attempt)


def test_what_a_loss_limit_cannot_be_for_is_refused():
    with pytest.raises(UserError, match="max_loss_increase must be above 0, got 0"):
        ActivationTucker(max_loss_increase=0.0)
    with pytest.raises(UserError, match="max_loss_increase must be above 0, got nan"):
        ActivationTucker(max_loss_increase=float("nan"))
    with pytest.raises(UserError, match="predicts the next token"):
        fit(ActivationTucker(max_loss_increase=0.1), tiny_model("bert"), text())


def test_an_unreachable_target_says_the_best_before_anything_is_measured():
    told = []
    with pytest.raises(UserError, match=r"target_ratio 500 cannot be met: .* reachable is 19\.2"):
        fit(
            ActivationTucker(target_ratio=500),
            tiny_model("llama"),
            text(),
            progress=lambda *step: told.append(step),
        )
    assert told == []
    model = tiny_model("llama")
    with pytest.raises(UserError, match=r"target_params must be in (\d+)\.\.\d+, got 7") as refused:
        fit(ActivationTucker(target_params=7), model, text())
    least = int(str(refused.value).split()[4].split("..")[0])
    smaller = copy.deepcopy(model)
    report = compress(smaller, fit(ActivationTucker(target_params=least), model, text()))
    assert report.totals.parameters_after == least


def steps_of(compressor) -> list[tuple[int, int, str]]:
    told: list[tuple[int, int, str]] = []
    fit(
        compressor,
        tiny_model("llama"),
        text(),
        progress=lambda done, total, what: told.append((done, total, what)),
    )
    return told


def test_progress_is_told_within_layers_and_to_the_end():
    """A layer may take minutes: a bar that moves once a layer says no time left."""
    told = steps_of(ActivationHybrid(target_ratio=2.0, distill_steps=3))
    assert list(dict.fromkeys(what for *_, what in told)) == [
        "measuring layers",
        "fitting layers",
        "distilling",
    ]
    fitting = [(done, total) for done, total, what in told if what != "distilling"]
    distilling = [(done, total) for done, total, what in told if what == "distilling"]
    for stage in (fitting, distilling):  # measuring and fitting are on one scale
        assert len({total for _, total in stage}) == 1
        assert [done for done, _ in stage] == sorted(done for done, _ in stage)
        assert stage[0][0] == 0
        assert stage[-1][0] >= 0.7 * stage[-1][1]  # the last layer's states go nowhere
        assert len({done for done, _ in stage}) > 3


def test_sizes_that_are_tried_are_one_stage():
    told = [step for step in steps_of(ActivationTucker(max_loss_increase=0.1)) if "size" in step[2]]
    assert {what for *_, what in told} == {f"trying size {n} of 10" for n in range(1, 11)}
    assert [done for done, *_ in told] == sorted(done for done, *_ in told)
    assert len({total for _, total, _ in told}) == 1


def test_several_sizes_come_from_one_measurement(monkeypatch):
    """Each is what a fit of its own finds; layers are measured once."""
    model, measured = tiny_model("llama"), []
    measure = Sweeps._measurement
    monkeypatch.setattr(
        Sweeps, "_measurement", lambda self, *args: measured.append(args[1]) or measure(self, *args)
    )
    wanted = ActivationTucker(target_ratio=1.2, refit_epochs=1)
    targets = [Budget(target_ratio=1.5), Budget(target_ratio=3.0)]
    found = fit_sizes(wanted, model, text(), targets)
    assert measured == [0, 1]
    for target, many in zip(targets, found, strict=True):
        alone = fit(replace(wanted, target_ratio=target.target_ratio), model, text())
        assert many.settings == alone.settings
        assert many.sites == alone.sites
        for site in many.sites:
            w = alone.factors(site).dense()
            assert torch.allclose(many.factors(site).dense(), w, atol=1e-3 * float(w.abs().max()))
    with pytest.raises(UserError, match="target_ratio 900 cannot be met"):
        fit_sizes(wanted, model, text(), [*targets, Budget(target_ratio=900.0)])
    with pytest.raises(UserError, match="searches for one size"):
        fit_sizes(wanted, model, text(), [Budget(max_loss_increase=0.1)])
