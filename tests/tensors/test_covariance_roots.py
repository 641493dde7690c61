"""Cholesky factors of covariances that are singular, indefinite by rounding, or not finite."""

import pytest
import torch
from torch import Tensor

from tensorllm.compressors.matrix import whitening
from tensorllm.errors import UserError
from tensorllm.tensors.weighted import Metric


def indefinite() -> Tensor:
    """Of rank 2, one eigenvalue below zero by as much as rounding leaves there."""
    basis_NN = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    values_N = torch.tensor([3.0, 1.0, 0.0, 0.0, -1e-12], dtype=torch.float64)
    covariance_NN = (basis_NN * values_N) @ basis_NN.mT
    return (covariance_NN + covariance_NN.mT) / 2


@pytest.mark.timeout(20)
@pytest.mark.parametrize("floor", [0.0, 1e-15, 1e-6])
def test_an_indefinite_covariance_is_raised_until_it_has_a_root(floor: float) -> None:
    covariance_NN = indefinite()
    root_NN = Metric(covariance_NN, floor).root
    assert torch.allclose(root_NN @ root_NN.mT, covariance_NN, atol=1e-5)
    assert torch.equal(root_NN, root_NN.tril())


@pytest.mark.timeout(20)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_covariance_that_is_not_finite_is_refused(bad: float) -> None:
    covariance_NN = torch.eye(4, dtype=torch.float64)
    covariance_NN[1, 2] = covariance_NN[2, 1] = bad
    with pytest.raises(UserError, match=r"NaN or Inf: .* float32"):
        _ = Metric(covariance_NN).root
    with pytest.raises(UserError, match=r"NaN or Inf: .* float32"):
        whitening(covariance_NN)
