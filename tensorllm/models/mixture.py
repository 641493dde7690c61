"""Which layers of a model are mixtures of experts, found by structure on the meta device."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from tensorllm.models.experts import KINDS, Experts, experts_in
from tensorllm.models.spec import Stored
from tensorllm.tensors.stacking import Geometry, expert_role

Shapes = tuple[tuple[str, tuple[int, int]], ...]
# What modules that every token passes beside the experts hold their matrices in, fused.
FUSED_SHARED = {"input_linear": ("shared.gate", "shared.in"), "output_linear": ("shared.out",)}


@dataclass(frozen=True, slots=True)
class Mixture:
    """The feed-forward part of a layer of experts.

    Attributes:
        stored: the parameters that hold its roles: experts and shared ones.
        shapes: of its role matrices.
    """

    experts: Experts
    stored: tuple[Stored, ...]
    shapes: Shapes


def mixtures(config: Any, block: str, layers: int, names: Collection[str]) -> dict[int, Mixture]:
    """The layers that are mixtures of experts.

    Args:
        block: path of layer `{i}` below the base model.
        names: of stored parameters; where none speaks of experts, nothing is looked for.
    """
    if not any("expert" in name or "sparse_moe" in name for name in names):
        return {}
    return dict(_found(json.dumps(config.to_dict(), sort_keys=True, default=str), config, block))


class _Hashed:
    """A config by what it says."""

    def __init__(self, text: str, config: Any) -> None:
        self.text, self.config = text, config

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and other.text == self.text


def _found(text: str, config: Any, block: str) -> Mapping[int, Mixture]:
    return _of_config(_Hashed(text, config), block)


@lru_cache(maxsize=8)
def _of_config(hashed: _Hashed, block: str) -> Mapping[int, Mixture]:
    from transformers import AutoModel

    config = hashed.config
    with torch.device("meta"):
        model: Any = AutoModel.from_config(config)
    out = {}
    for layer in range(config.num_hidden_layers):
        found = mixture_of(model.get_submodule(block.format(i=layer)), config.hidden_size)
        if found is not None:
            out[layer] = found
    return out


def mixture_of(block: nn.Module, width: int) -> Mixture | None:
    """The mixture in a layer's module; None where it has none."""
    experts = experts_in(block, width)
    if experts is None:
        return None
    routed = tuple(
        Stored(f"{experts.path}.{name}", experts.roles_of(name), experts=experts)
        for name in (experts.inputs, experts.outputs)
    )
    shapes: Shapes = tuple(
        (expert_role(kind, n), (experts.width, width))
        for kind in experts.kinds
        for n in range(experts.count)
    )
    shared, shared_shapes = _shared(block, experts.path.rpartition(".")[0], width)
    return Mixture(experts, routed + shared, shared_shapes + shapes)


def _shared(block: nn.Module, parent: str, width: int) -> tuple[tuple[Stored, ...], Shapes]:
    """Linears of a module beside the experts, or beside what holds them, that says `shared`."""
    stored: list[Stored] = []
    shapes: list[tuple[str, tuple[int, int]]] = []
    for path, module in block.named_modules():
        owner, _, name = path.rpartition(".")
        if not isinstance(module, nn.Linear) or "shared" not in owner.rpartition(".")[2]:
            continue
        roles = (f"shared.{KINDS[name]}",) if name in KINDS else FUSED_SHARED.get(name, ())
        if roles:
            stored.append(Stored(path, roles))
            inner = module.weight.numel() // width // len(roles)
            shapes += [(role, (inner, width)) for role in roles]
    return tuple(stored), tuple(shapes)


def with_mixture(geometry: Geometry, found: Mixture) -> Shapes:
    """The shapes of a layer whose FFN is a mixture."""
    own = tuple((role, geometry.shape(role)) for role in geometry.roles if role in "qkvo")
    return own + found.shapes
