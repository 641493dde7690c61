"""Lower precision of products, allowed in the process by a trainer, changes no decomposition."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tensorllm.tensors.factors import CP, LowRank
from tensorllm.tensors.pivoted import pivot
from tensorllm.tensors.svd import truncated_svd
from tensorllm.tensors.tucker import tucker
from tensorllm.tensors.unfold import gram


def test_reduced_precision_may_be_set_backend_by_backend() -> None:
    """As torch recommends now; its older setting of all backends at once cannot be read then."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        gram(torch.randn(8, 8), 0, torch.float32)
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before


@pytest.mark.parametrize(
    "work",
    [
        lambda w: truncated_svd(w, 200).dense(),
        lambda w: tucker(w.view(256, 16, 16), {0: 200, 1: 12}).factors[0],
        lambda w: LowRank(w, w).dense(),
        lambda w: CP(torch.ones(256), (w, w)).dense(),
        lambda w: pivot(w[:, :200], w[:200]).dense(),
    ],
)
def test_reduced_precision_changes_no_result(work: Callable[[Tensor], Tensor]) -> None:
    """On processors that multiply bfloat16 (and on GPUs) it would be a relative error of 1e-3."""
    w = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    want = work(w)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(work(w), want)
    finally:
        torch.set_float32_matmul_precision("highest")
