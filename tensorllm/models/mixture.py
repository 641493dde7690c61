"""A layer's mixture of experts, found by structure on the meta device."""

from dataclasses import dataclass, replace

from torch import nn

from tensorllm.models.experts import KINDS, Experts, experts_in
from tensorllm.models.spec import Stored
from tensorllm.tensors.stacking import FFN, Geometry, expert_role

Shapes = tuple[tuple[str, tuple[int, int]], ...]
# Fused matrices of shared experts, which every token passes, by the name of their module.
FUSED_SHARED = {"input_linear": ("shared.gate", "shared.in"), "output_linear": ("shared.out",)}


@dataclass(frozen=True, slots=True)
class Mixture:
    """A layer's mixture of experts: routed and shared ones.

    Attributes:
        experts: the routed ones.
        stored: the parameters that hold its roles.
        shapes: of its role matrices.
    """

    experts: Experts
    stored: tuple[Stored, ...]
    shapes: Shapes

    @property
    def kind(self) -> tuple[object, ...]:
        """Identifies its structure, whatever the sizes."""
        own = replace(self.experts, count=0, width=0)
        return (own, *(one.path for one in self.stored if one.experts is None))


def mixture_of(block: nn.Module, width: int) -> Mixture | None:
    """The mixture in a layer's module; None if it has none."""
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
    """Linear layers of the modules called `shared` near the experts, and their roles' shapes."""
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


def with_mixture(geometry: Geometry, found: Mixture) -> Geometry:
    """The sizes of a layer whose FFN is a mixture."""
    own = tuple((role, geometry.shape(role)) for role in geometry.roles if role not in FFN)
    return replace(geometry, F=0, gated=False, shapes=own + found.shapes)
