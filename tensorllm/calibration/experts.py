"""The inputs of the experts of a mixture on a calibration set: only tokens routed to them.

Shapes: B sequences, T positions, M tokens of one expert, X input width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensorllm.calibration.covariances import Key
from tensorllm.models import RoleMatrices
from tensorllm.models.experts import tokens_at_experts
from tensorllm.tensors.stacking import is_output_projection

OnInputs = Callable[[Key, Tensor], None]  # called with the inputs (M, X) of a key


def is_of_experts(roles: RoleMatrices, key: Key) -> bool:
    """Whether the key's roles belong to a routed expert."""
    return roles.stored(key[0], key[1][0]).experts is not None


def expert_hooks(
    model: nn.Module,
    roles: RoleMatrices,
    keys: Sequence[Key],
    kept: Callable[[], Tensor],
    on_inputs: OnInputs,
) -> Iterator[Any]:
    """Hooks on the mixtures of these keys, one per layer.

    Args:
        model: the model.
        roles: of the model.
        keys: of routed experts.
        kept: gives the mask (B, T) of the current batch, True for tokens.
        on_inputs: called for every expert that gets a token in the batch.
    """
    for layer in dict.fromkeys(key[0] for key in keys):
        experts = roles.mixtures[layer].experts
        module = model.get_submodule(f"{roles.layer_path(layer)}.{experts.path}")
        by_role = {role: key for key in keys if key[0] == layer for role in key[1]}
        hook = _hook(roles, layer, by_role, kept, on_inputs)
        yield module.register_forward_pre_hook(hook, with_kwargs=True)


def _hook(
    roles: RoleMatrices,
    layer: int,
    by_role: Mapping[str, Key],
    kept: Callable[[], Tensor],
    on_inputs: OnInputs,
) -> Callable[..., None]:
    experts = roles.mixtures[layer].experts
    of_expert: dict[int, dict[bool, Key]] = {}
    for role, key in by_role.items():
        of_expert.setdefault(int(role.split(".")[1]), {})[is_output_projection(role)] = key

    def see(module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        given = (*args, *kwargs.values())
        kept_N = kept().flatten().to(given[0].device)
        with torch.no_grad():
            found = tokens_at_experts(module, experts, given[0].detach(), given[1:], kept_N)
            for expert, x_MD, h_MF in found:
                for outputs, key in of_expert.get(expert, {}).items():
                    on_inputs(key, h_MF if outputs else x_MD)

    return see
