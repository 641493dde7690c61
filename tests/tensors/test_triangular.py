"""Products that leave out what is zero or known, against the plain ones.

Shapes: N size of the triangular matrix, M the other.
"""

import pytest
import torch

from tensorllm.tensors.triangular import congruent, times_lower, transposed_lower_times

SIZES = [7, 1024, 1100]  # below the strips, whole strips, and a last strip that is narrower


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
def test_products_with_a_triangle_are_the_plain_ones(size: int) -> None:
    lower_NN, x_MN = randn(size, size).tril(), randn(5, size, seed=1)
    assert torch.allclose(times_lower(x_MN, lower_NN), x_MN @ lower_NN, atol=1e-11)
    found_NM = transposed_lower_times(lower_NN, x_MN.mT)
    assert torch.allclose(found_NM, lower_NN.mT @ x_MN.mT, atol=1e-11)


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_a_congruence_is_the_plain_one_and_symmetric(size: int, lower: bool) -> None:
    c_NN, half_NN = randn(size, size), randn(size, size, seed=1) / size**0.5
    c_NN, half_NN = c_NN + c_NN.mT, half_NN.tril() if lower else half_NN
    found_NN = congruent(c_NN, half_NN, lower=lower)
    assert torch.equal(found_NN, found_NN.mT)
    assert torch.allclose(found_NN, half_NN.mT @ c_NN @ half_NN, atol=1e-10)
