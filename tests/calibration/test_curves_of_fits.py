"""Sizes that a budget chooses from, of every strategy that is fitted to a text."""

import copy

import pytest
from calibration_text import text
from tiny_models import tiny_model

from tensorllm.calibration import fit
from tensorllm.calibration.layers import InMemory
from tensorllm.calibration.statistics import frozen
from tensorllm.calibration.sweeps import Sweeps
from tensorllm.compression.engine import compress
from tensorllm.compressors import (
    AASVD,
    ASVD,
    SVDLLM,
    ActivationExpertTucker,
    ActivationHybrid,
    ActivationTucker,
    SVDLLMSequential,
)

STRATEGIES = [
    ActivationTucker(target_ratio=1.1),
    ActivationHybrid(target_ratio=1.1),
    ActivationHybrid(target_ratio=1.1, rank_multiple=1),
    SVDLLM(rank=1),
    ASVD(rank=1),
    SVDLLMSequential(rank=1),
    AASVD(rank=1),
    ActivationExpertTucker(ranks=(1, 1, 1, 1)),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda one: type(one).__name__)
def test_no_size_stores_more_than_the_matrices(strategy):
    """And one leaves them as they are, which costs as much and loses nothing."""
    model = tiny_model("mixtral" if isinstance(strategy, ActivationExpertTucker) else "llama")
    with frozen(model):
        work = Sweeps(strategy, InMemory(model), text(), None)
        curves = work.curves()
    for site, curve in curves.items():
        numbers = site.numel(work.planned.spec.geometry(site.layers[0]))
        assert int(curve.cost_N.max()) == numbers
        whole = curve.sizes_NC.tolist().index([0] * curve.sizes_NC.shape[1])
        assert int(curve.cost_N[whole]) == numbers
        assert float(curve.error_N[whole]) == 0
        assert (curve.cost_N[:whole] < numbers).all()


def test_matrices_that_a_mild_target_leaves_whole_are_left_alone():
    """They stored a row number for each row beside all their own numbers."""
    model = tiny_model("llama")
    smaller = copy.deepcopy(model)
    made = fit(ActivationTucker(target_ratio=1.05, refit_epochs=0), model, text())
    report = compress(smaller, made)
    assert report.sites
    assert all(site.ratio > 1 for site in report.sites)
    for name, value in model.state_dict().items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        touched = {
            f"{role}_proj"
            for site in report.sites
            if site.layers == (layer,)
            for role in site.roles
        }
        if not any(part in name for part in touched):
            assert value.equal(smaller.state_dict()[name])
