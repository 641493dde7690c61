"""The benchmark's references do what their papers say.

Shapes: Y outputs, X inputs.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).parents[1] / "benchmarks" / "baselines.py"
SPEC = importlib.util.spec_from_file_location("activation_baselines", FILE)
assert SPEC is not None
assert SPEC.loader is not None
baselines = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(baselines)


@pytest.fixture
def inputs() -> torch.Tensor:
    draws = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -3, 12, dtype=torch.float64)
    mix = torch.randn(12, 12, generator=draws, dtype=torch.float64)
    return torch.randn(400, 12, generator=draws, dtype=torch.float64) * scales @ mix


def test_svd_llm_is_the_best_on_the_outputs(inputs):
    """Its loss is the tail of the outputs' own singular values: the bound of all rank-r maps."""
    w = torch.randn(9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs = inputs @ w.mT
    for rank in (2, 5, 8):
        found = baselines.svd_llm(w, inputs.mT @ inputs, rank)
        assert torch.linalg.matrix_rank(found) == rank
        tail = torch.linalg.svdvals(outputs)[rank:].square().sum()
        assert float((outputs - inputs @ found.mT).square().sum()) == pytest.approx(float(tail))
        for other in (baselines.svd(w, rank), baselines.asvd(w, inputs.abs().mean(0), rank)):
            assert float((outputs - inputs @ other.mT).square().sum()) > float(tail)


def test_svd_llm_bears_a_singular_moment(inputs):
    w = torch.randn(9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    few = inputs[:4]
    found = baselines.svd_llm(w, few.mT @ few, 4)
    assert torch.allclose(few @ found.mT, few @ w.mT, atol=1e-3)


def test_asvd_without_scales_is_the_svd():
    w = torch.randn(9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(baselines.asvd(w, torch.full((12,), 3.0), 4), baselines.svd(w, 4))
    assert torch.allclose(baselines.svd(w, 9), w)


def test_the_rank_is_the_largest_that_meets_the_ratio():
    for ratio in (1.2, 2.0, 3.0):
        rank = baselines.rank_at((384, 128), ratio)
        assert rank * 512 <= 384 * 128 / ratio < (rank + 1) * 512
