"""The description of an architecture (a row): where its attention and FFN matrices are stored.

Shapes: D model width, H query heads, G key/value heads, K head_dim, F FFN width, I inner width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tensorllm.errors import UserError
from tensorllm.models.experts import Experts
from tensorllm.registry import Registry
from tensorllm.tensors.stacking import Geometry, is_output_projection

Task = Literal["causal", "masked"]


@dataclass(frozen=True, slots=True)
class Stored:
    """One stored parameter and the roles it holds.

    Attributes:
        path: module path below the block; the parameter is its `weight`.
        roles: one role, or the fused ones in their stored order.
        grouped: the fused heads are stored group by group, (G, g queries + key + value, K, D),
            instead of role by role.
        conv1d: stored (in, out), as GPT-2's Conv1D, instead of (out, in), as `nn.Linear`.
        experts: how a parameter holds the matrices of all experts; `path` is then its own name.
        blocks: the fused roles are stored in so many blocks, each with a part of every role.
        per_head: the fused roles are stored head by head, each with its part of every role.
    """

    path: str
    roles: tuple[str, ...]
    grouped: bool = False
    conv1d: bool = False
    experts: Experts | None = None
    blocks: int = 1
    per_head: bool = False

    @property
    def parameter(self) -> str:
        """The parameter's own name."""
        return "weight" if self.experts is None else self.path.rpartition(".")[2]

    def count(self, geometry: Geometry) -> int:
        """In how many blocks the fused roles are stored, each with a part of every role."""
        return geometry.G if self.grouped else geometry.H if self.per_head else self.blocks

    @property
    def transposed(self) -> bool:
        """Whether the role matrix (I, D) is the transpose of what is stored."""
        return self.conv1d != (is_output_projection(self.roles[0]))


def part_of(stored: Stored, weight: Tensor, role: str, geometry: Geometry) -> Tensor:
    """The role's view of a stored parameter: (I, C), or (blocks, I / blocks, C)."""
    w_IC = weight.mT if stored.transposed else weight
    count = stored.count(geometry)
    rows = len(w_IC) // count
    sizes = {r: geometry.inner(r) // count for r in stored.roles if r in geometry.roles}
    kept = rows - sum(sizes.values())  # rows stored with the roles, such as an output gate's
    start = sum(sizes.get(r, kept) for r in stored.roles[: stored.roles.index(role)])
    if count == 1:
        return w_IC.narrow(0, start, sizes.get(role, kept))
    return w_IC.unflatten(0, (count, rows))[:, start : start + sizes.get(role, kept)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """One Hugging Face architecture; sizes are taken from the model's own modules.

    Attributes:
        block: path of layer `{i}` below the base model.
        attention: where q, k, v and o are stored; a layer without them has no attention roles.
        ffn: where in, gate (if there is one) and out are stored; likewise.
        task: whether the model predicts the next token or a masked one.
        tested: compared with the real modules by the project's tests; other rows are verified on a
            tiny model whenever they are used.
    """

    block: str
    attention: tuple[Stored, ...]
    ffn: tuple[Stored, ...]
    task: Task = "causal"
    tested: bool = False

    def __iter__(self) -> Iterator[Stored]:
        return iter(self.attention + self.ffn)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The sizes of a model, layer by layer."""

    geometries: tuple[Geometry, ...]

    @property
    def layers(self) -> int:
        return len(self.geometries)

    def geometry(self, layer: int) -> Geometry:
        return self.geometries[layer]

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles found in any layer; the same matrix of all experts counts as one."""
        return tuple(dict.fromkeys(role for geo in self.geometries for role in geo.families))

    def having(self, roles: Sequence[str]) -> tuple[int, ...]:
        """The layers that have all these roles."""
        return tuple(
            layer
            for layer, geo in enumerate(self.geometries)
            if set(roles) <= {*geo.roles, *geo.families}
        )

    def sample(self, roles: Sequence[str]) -> Geometry:
        """The sizes of the first layer that has all these roles.

        Raises:
            UserError: no layer has them.
        """
        found = self.having(roles)
        if not found:
            raise UserError(
                f"no layer of this model has the matrices {', '.join(roles)}; "
                f"it has {', '.join(self.roles) or 'none'}"
            )
        return self.geometries[found[0]]


ARCHITECTURES: Registry[Architecture] = Registry(
    "architecture (model_type)", group="tensorllm.architectures"
)
