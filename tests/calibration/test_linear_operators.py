"""Linear operators of factors: the same as their matrices, forward and backward.

Shapes: N tokens, X inputs, Y outputs, R rank, I and D of a role matrix.
"""

import pytest
import torch
from torch import Tensor, nn

from tensorllm.compressors.operators import (
    LinearOperator,
    ProductOperator,
    RowsOperator,
    SharedInput,
    replaced_by,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(writes: bool, rank: int = 3) -> ProductOperator:
    return ProductOperator(SharedInput(randn(7, rank)), randn(rank, 5, seed=1), writes)


def kept(writes: bool) -> RowsOperator:
    return RowsOperator(torch.tensor([1, 4, 5]), randn(3, 4, seed=2), 7, writes)


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("make", [product, kept])
def test_an_operator_is_the_role_matrix_and_its_gradients(make, writes):
    operator: LinearOperator = make(writes)
    w_ID = operator.matrix()
    w_XY = w_ID if writes else w_ID.mT
    x = randn(2, 6, len(w_XY), seed=3).requires_grad_()
    y = operator(x)
    assert torch.allclose(y, x @ w_XY)
    weights = randn(*y.shape, seed=4)
    (own,) = torch.autograd.grad((y * weights).sum(), x)
    assert torch.allclose(own, weights @ w_XY.mT)


def test_a_shared_factor_is_applied_once_to_each_input():
    shared = SharedInput(randn(7, 3))
    x, other = randn(2, 7), randn(2, 7, seed=5)
    assert shared(x) is shared(x)
    assert torch.allclose(shared(other), other @ shared.into_XR)
    assert torch.allclose(shared(x), x @ shared.into_XR)


def test_a_product_pays_where_its_factors_are_small_or_the_tokens_few():
    assert product(False, rank=1).is_cheaper(10_000)
    assert not product(False, rank=5).is_cheaper(10_000)
    assert product(False, rank=5).is_cheaper(1)


def test_a_module_has_its_bias_and_then_its_own_matrix_again():
    linear, operator = nn.Linear(7, 5).double(), product(False)
    x = randn(2, 7)
    before = linear(x)
    with replaced_by(linear, operator):
        assert torch.allclose(linear(x), x @ operator.matrix().mT + linear.bias)
    assert torch.equal(linear(x), before)
