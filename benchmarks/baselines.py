"""Plain references of what others do to one matrix: W (Y, X) replaced by rank r, from their papers.

Each is the paper's formula and no more; ranks are the same share of every matrix, as in the papers.
Shapes: Y outputs, X inputs, R rank.
"""

import torch
from torch import Tensor

from tensorllm.tensors.ranks import tucker_parameters
from tensorllm.tensors.tucker import relative_error, tucker


def rank_at(shape: tuple[int, int], ratio: float) -> int:
    """The rank at which two factors store 1/ratio of the matrix's numbers."""
    return max(1, int(shape[0] * shape[1] / ratio / sum(shape)))


def svd(w_YX: Tensor, rank: int) -> Tensor:
    """Eckart-Young: the best in plain squared error."""
    u, s, v = torch.linalg.svd(w_YX.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def asvd(w_YX: Tensor, mean_abs_X: Tensor, rank: int, alpha: float = 0.5) -> Tensor:
    """Activation-scaled SVD: columns scaled by (mean |x|)^alpha. arXiv 2312.05821, section 3.2."""
    s_X = mean_abs_X.double().clamp(min=1e-6) ** alpha
    return svd(w_YX * s_X, rank) / s_X


def svd_llm(w_YX: Tensor, moment_XX: Tensor, rank: int) -> Tensor:
    """Truncation-aware whitening: SVD of W S, S the Cholesky factor of X Xᵀ. arXiv 2403.07378, 3.1.

    Where the moment is not positive definite, its diagonal is raised, as in the authors' code.
    """
    moment_XX = moment_XX.double()
    shift = 0.0
    while True:
        raised = moment_XX + shift * torch.eye(len(moment_XX), dtype=torch.float64)
        s_XX, failed = torch.linalg.cholesky_ex(raised)
        if not failed:
            break
        shift = max(2 * shift, 1e-8 * float(moment_XX.diagonal().mean()))
    truncated = svd(w_YX.double() @ s_XX, rank)
    return torch.linalg.solve_triangular(s_XX, truncated, upper=False, left=False)


def tucker_ranks(w_DKMG: Tensor, ratio: float) -> tuple[int, int, int]:
    """Of all ranks on a grid that meet the ratio, those with the least error on this layer."""
    sizes, found = tuple(w_DKMG.shape), []
    for r2 in sorted({sizes[1] * eighths // 8 for eighths in range(4, 9)}):
        for r3 in range(2, sizes[2] + 1):
            stored = [
                tucker_parameters(sizes, {0: r, 1: r2, 2: r3}) for r in range(1, sizes[0] + 1)
            ]
            r1 = sum(numbers <= w_DKMG.numel() / ratio for numbers in stored)
            if r1:
                error = relative_error(w_DKMG, tucker(w_DKMG, {0: r1, 1: r2, 2: r3}))
                found.append((error, (r1, r2, r3)))
    return min(found)[1]
