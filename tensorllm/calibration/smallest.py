"""The smallest model whose loss on the calibration set increases by no more than allowed.

Shapes: B sequences, T positions, V vocabulary.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tensorllm.calibration.original import LayerModule
from tensorllm.calibration.sequences import Batch
from tensorllm.compressors.layer import Site
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.tensors.factors import Factors

STEPS = 9
MILDEST = 1.01  # the ratio of the largest size tried
Found = TypeVar("Found")


def smallest(
    minimum: int, before: int, limit: float, attempt: Callable[[int], tuple[Found, float]]
) -> tuple[Found, float]:
    """The result of `attempt` for the smallest budget found within the limit, and its increase.

    Budgets are bisected on a logarithmic scale, to about one per cent if the loss never decreases
    with a smaller budget.

    Args:
        minimum: the smallest budget; rank 1 everywhere.
        before: numbers in the original matrices.
        limit: allowed increase of the loss.
        attempt: budget -> result, and increase of the loss.

    Raises:
        UserError: none is within the limit.
    """
    high = int(before / MILDEST)
    found, lost = attempt(high)
    if lost > limit:
        raise UserError(
            f"max_loss_increase {limit:g} nats per token cannot be reached: matrices only "
            f"{MILDEST} times smaller already lose {lost:.4f}"
        )
    low = minimum
    for _ in range(STEPS):
        middle = round((low * high) ** 0.5)
        made, now = attempt(middle)
        if now <= limit:
            high, found, lost = middle, made, now
        else:
            low = middle
    return found, lost


@torch.no_grad()
def next_token_loss(model: Any, batches: Sequence[Batch]) -> float:
    """The mean loss in nats per predicted token."""
    total, tokens = 0.0, 0
    device = next(model.parameters()).device
    for batch in batches:
        ids_BT, mask_BT = batch.ids_BT.to(device), batch.mask_BT.to(device)
        logits_BTV: Tensor = model(input_ids=ids_BT, attention_mask=mask_BT.long()).logits
        wanted_BT = mask_BT[:, 1:]
        total += float(
            nn.functional.cross_entropy(
                logits_BTV[:, :-1][wanted_BT].float(), ids_BT[:, 1:][wanted_BT], reduction="sum"
            )
        )
        tokens += int(wanted_BT.sum())
    return total / max(tokens, 1)


def with_factors(
    model: nn.Module, roles: RoleMatrices, factors: Mapping[Site, Factors]
) -> nn.Module:
    """A copy of the model whose weights are replaced by the factors' dense matrices."""
    smaller = copy.deepcopy(model)
    for site, found in factors.items():
        (layer,) = site.layers
        block = smaller.get_submodule(roles.layer_path(layer))
        LayerModule(roles, layer, block).replace(site, found)
    return smaller
