"""What a row says about one architecture: where its attention and FFN matrices are stored.

Shapes: D model width, H query heads, G key/value heads, K head width, F FFN width, I inner width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
            and not role by role.
        conv1d: stored (in, out), as GPT-2's Conv1D, and not (out, in), as `nn.Linear`.
        experts: of a parameter that holds matrices of all experts: how. Its path is its own name.
    """

    path: str
    roles: tuple[str, ...]
    grouped: bool = False
    conv1d: bool = False
    experts: Experts | None = None

    @property
    def transposed(self) -> bool:
        """Whether the role matrix (I, D) is the transpose of what is stored."""
        return self.conv1d != (is_output_projection(self.roles[0]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """One Hugging Face architecture.

    Attributes:
        block: path of layer `{i}` below the base model.
        attention: where q, k, v and o are stored.
        ffn: where in, gate (if there is one) and out are stored.
        task: whether the model predicts the next token or a masked one.
        ffn_width: the config's name for F; where it is None or not there, F is 4 D.
        kv_heads: G from the config; by default `num_key_value_heads`, or H where there is none.
    """

    block: str
    attention: tuple[Stored, ...]
    ffn: tuple[Stored, ...]
    task: Task = "causal"
    ffn_width: str = "intermediate_size"
    kv_heads: Callable[[Any], int] = lambda config: (
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    )

    def __iter__(self) -> Iterator[Stored]:
        return iter(self.attention + self.ffn)

    def stored(self, role: str) -> Stored:
        """The stored parameter that holds `role`."""
        for stored in self:
            if role in stored.roles:
                return stored
        known = ", ".join(role for stored in self for role in stored.roles)
        raise UserError(f"this architecture has no matrix {role!r}; it has {known}")

    def geometry(self, config: Any) -> Geometry:
        """The sizes of one layer, from the model's config; sizes that do not divide are refused."""
        width, heads, groups = config.hidden_size, config.num_attention_heads, self.kv_heads(config)
        head_dim = getattr(config, "head_dim", None)
        if min(width, heads, groups) < 1:
            raise UserError(
                f"width, heads and KV heads must be 1 or more, got {width}, {heads} and {groups}"
            )
        if heads % groups:
            raise UserError(f"heads must be a multiple of KV heads, got {heads} and {groups}")
        if not head_dim and width % heads:
            raise UserError(f"the model width must be a multiple of heads, got {width} and {heads}")
        return Geometry(
            D=width,
            H=heads,
            G=groups,
            K=head_dim or width // heads,
            F=getattr(config, self.ffn_width, None) or 4 * width,
            gated=any("gate" in stored.roles for stored in self.ffn),
        )


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
        """Roles that some layer has, each once; the same matrix of all experts is one name."""
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
            UserError: no layer has.
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


def architecture_of(config: Any) -> Architecture:
    """The row for a transformers config; an unknown `model_type` says how to add one."""
    try:
        return ARCHITECTURES[config.model_type]
    except UserError as error:
        raise UserError(
            f"{error}. To add it, register one row: docs/add_an_architecture.md"
        ) from None
