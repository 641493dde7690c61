"""What experts' strategies make of statistics, apart from any model."""

import pytest
import torch
from torch import Tensor

from tensorllm.compressors.experts import summed_inputs
from tensorllm.compressors.layer import MatrixStatistics

E, F, D = 3, 4, 5


def statistics(tokens: list[int], device: str) -> list[MatrixStatistics]:
    draws = torch.Generator().manual_seed(0)
    out = []
    for count in tokens:
        x_ND = torch.randn(10, D, generator=draws).double().to(device)
        out.append(MatrixStatistics(x_ND.mT @ x_ND, x_ND.abs().mean(0), None, False, count))
    return out


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_covariances_are_summed_by_tokens_where_the_weights_are(device: str) -> None:
    """On the meta device, which refuses tensors of another one as a GPU does."""
    w: Tensor = torch.zeros(E, F, D, 1, device=device)
    given = statistics([2, 0, 7], device)
    total_DD = summed_inputs(w, given)
    assert (total_DD.device.type, total_DD.dtype) == (device, torch.float64)
    if device == "cpu":
        want_DD = 2 * given[0].input_covariance_XX + 7 * given[2].input_covariance_XX
        assert torch.allclose(total_DD, want_DD)
