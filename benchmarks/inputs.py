"""Statistics of every matrix's input that the baselines need, from one pass forward.

Shapes: N tokens of a batch, X inputs of a matrix.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tensorllm.calibration import Calibration
from tensorllm.calibration.watch import module_of
from tensorllm.models import RoleMatrices

Matrix = tuple[int, str]


def input_moments(
    model: Any, roles: RoleMatrices, matrices: Sequence[Matrix], text: Calibration
) -> dict[Matrix, torch.Tensor]:
    """SVD-LLM's X Xᵀ of every matrix's input: one pass forward."""
    sums: dict[Matrix, Any] = {}

    def add(matrix: Matrix, x_NX: torch.Tensor) -> None:
        x_NX = x_NX.double()
        sums[matrix] = sums.get(matrix, 0) + x_NX.mT @ x_NX

    _watch_inputs(model, roles, matrices, text, add)
    return sums


def mean_abs(
    model: Any, roles: RoleMatrices, matrices: Sequence[Matrix], text: Calibration
) -> dict[Matrix, torch.Tensor]:
    """ASVD's scale: mean |x| of every input feature."""
    sums: dict[Matrix, Any] = {}

    def add(matrix: Matrix, x_NX: torch.Tensor) -> None:
        sums[matrix] = sums.get(matrix, 0) + x_NX.abs().sum(0)

    _watch_inputs(model, roles, matrices, text, add)
    return {matrix: total / text.tokens for matrix, total in sums.items()}


def _watch_inputs(
    model: Any,
    roles: RoleMatrices,
    matrices: Sequence[Matrix],
    text: Calibration,
    add: Callable[[Matrix, torch.Tensor], None],
) -> None:
    now: dict[str, torch.Tensor] = {}
    handles = []
    for matrix in matrices:

        def see(module: nn.Module, args: Any, matrix: Matrix = matrix) -> None:
            mask_BT = now["mask"]
            add(matrix, args[0].reshape(*mask_BT.shape, -1)[mask_BT])

        module = module_of(model, roles, *matrix)
        handles.append(module.register_forward_pre_hook(see))
    with torch.no_grad():
        for batch in text.batches():
            now["mask"] = batch.mask_BT
            model.base_model(batch.ids_BT, attention_mask=batch.mask_BT.long())
    for handle in handles:
        handle.remove()
