"""How role matrices are stacked into the tensor that is decomposed, and unstacked again.

Shapes: D model width, K head_dim, H query heads, G key/value heads, g = H/G queries per group, M
matrices, I inner width of a role matrix (heads x K, or the FFN width).

A role matrix is always (I, D); those of output projections are transposed `nn.Linear` weights.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorllm.errors import UserError
from tensorllm.registry import Registry

ATTENTION = ("q", "k", "v", "o")
MLA = ("q_a", "q_b", "kv_a", "kv_b")  # multi-head latent attention, with or without q, and with o
ATTENTION_ROLES = ATTENTION + MLA
FFN = ("in", "gate", "out")
SHARED = tuple(f"shared.{kind}" for kind in FFN)  # of the expert that every token passes through
ROUTED = tuple(f"experts.{kind}" for kind in FFN)  # of all routed experts
FEED_FORWARD = FFN + SHARED + ROUTED
MATRICES = FEED_FORWARD + ATTENTION_ROLES  # roles that a user may name
OUTPUT_PROJECTIONS = ("o", "out")  # write to the model width; the others are input projections


def expert_role(kind: str, expert: int) -> str:
    """The role of one expert's matrix, such as `experts.3.in`."""
    return f"experts.{expert}.{kind}"


def family(role: str) -> str:
    """`experts.in` for `experts.3.in`, the same matrix of all experts; other roles unchanged."""
    owner, _, kind = role.rpartition(".")
    return f"experts.{kind}" if owner.startswith("experts.") else role


def families(roles: Iterable[str]) -> tuple[str, ...]:
    """The roles without repetition, with one name for the same matrix of all experts."""
    return tuple(dict.fromkeys(map(family, roles)))


def is_output_projection(role: str) -> bool:
    """Whether the role writes to the model width."""
    return role.rpartition(".")[2] in OUTPUT_PROJECTIONS


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes and roles of one layer.

    Attributes:
        D: model width.
        H: query heads; 0 in a layer without attention, as G and K.
        G: key/value heads.
        K: head_dim.
        F: FFN width; 0 in a layer without an FFN.
        gated: whether the FFN has a gate.
        shapes: (role, (rows, columns)) of every role matrix of the layer, which has no other roles;
            None: standard attention and FFN, whose shapes follow from the sizes.
    """

    D: int
    H: int
    G: int
    K: int
    F: int
    gated: bool
    shapes: tuple[tuple[str, tuple[int, int]], ...] | None = None

    @property
    def groups(self) -> int:
        """Query heads per key/value head."""
        return self.H // self.G

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the layer."""
        if self.shapes is not None:
            return tuple(role for role, _ in self.shapes)
        return ATTENTION + (FFN if self.gated else ("in", "out"))

    @property
    def families(self) -> tuple[str, ...]:
        """The families of the roles."""
        return families(self.roles)

    def members(self, name: str) -> tuple[str, ...]:
        """The roles of a family, expert by expert, or the role itself; empty if it is not here."""
        return tuple(role for role in self.roles if name in (role, family(role)))

    @property
    def experts(self) -> int:
        """How many experts tokens are routed to."""
        return len(self.members("experts.out"))

    def shape(self, role: str) -> tuple[int, int]:
        """Rows and columns of the role matrix."""
        if self.shapes is not None:
            return dict(self.shapes)[role]
        if role in ("q", "o"):
            return self.H * self.K, self.D
        return (self.G * self.K if role in ("k", "v") else self.F), self.D

    def inner(self, role: str) -> int:
        """Rows of the role matrix."""
        return self.shape(role)[0]

    def heads(self, role: str) -> int:
        """How many heads are stacked in the rows of the role matrix; 1 if it has none."""
        return {"q": self.H, "k": self.G, "v": self.G, "o": self.H}.get(role) or 1

    def numel(self, role: str) -> int:
        """Numbers in the role matrix."""
        rows, columns = self.shape(role)
        return rows * columns

    def inputs(self, role: str) -> int:
        """Input width of the role's map."""
        return self.shape(role)[not is_output_projection(role)]

    def outputs(self, role: str) -> int:
        """Output width of the role's map."""
        return self.shape(role)[is_output_projection(role)]


@dataclass(frozen=True, slots=True)
class Stacking:
    """A bijection between role matrices (I, D) and one tensor.

    Attributes:
        stack: gives the tensor.
        unstack: gives the matrices of a tensor; the last argument is how many there are.
        check: refuses (UserError) roles that cannot be stacked.
        modes: names of the tensor's modes, for reports; none: their numbers.
        slices_are_heads: whether slices over the first two modes are the matrices' heads, so that
            `unstack` with D = K = 1 sorts one number per head.
    """

    stack: Callable[[Sequence[Tensor], Geometry], Tensor]
    unstack: Callable[[Tensor, Geometry, int], list[Tensor]]
    check: Callable[[Sequence[str], Geometry], None]
    modes: tuple[str, ...] = ()
    slices_are_heads: bool = False


STACKINGS: Registry[Stacking] = Registry("stacking")


def _stack_heads(w_ID: Sequence[Tensor], geo: Geometry) -> Tensor:
    """The paper's tensor (D, K, 2g+2, G): per KV head its g queries, key, value and g outputs."""
    parts_MGKD = [w.view(geo.G, -1, geo.K, geo.D).transpose(0, 1) for w in w_ID]
    return torch.cat(parts_MGKD).permute(3, 2, 0, 1)


def _unstack_heads(w_DKMG: Tensor, geo: Geometry, count: int) -> list[Tensor]:
    g = geo.groups
    parts = w_DKMG.permute(3, 2, 1, 0).split([g, 1, 1, g], dim=1)  # each (G, m, K, D)
    return [part.reshape(-1, geo.D) for part in parts]


def _stack_official_heads(w_ID: Sequence[Tensor], geo: Geometry) -> Tensor:
    """As in the authors' code: (I, D) viewed as (I, H, D/H), so heads are chunks of the width."""
    return torch.stack([w.view(geo.D, geo.H, -1).transpose(1, 2) for w in w_ID], dim=2)


def _unstack_official_heads(w_DKMH: Tensor, geo: Geometry, count: int) -> list[Tensor]:
    return [w.transpose(1, 2).reshape(geo.D, geo.D) for w in w_DKMH.unbind(2)]


def _stack_head(w_ID: Sequence[Tensor], geo: Geometry) -> Tensor:
    return w_ID[0].view(-1, geo.K, geo.D).permute(2, 1, 0)  # (D, K, heads)


def _unstack_head(w_DKH: Tensor, geo: Geometry, count: int) -> list[Tensor]:
    return [w_DKH.permute(2, 1, 0).reshape(-1, geo.D)]


def _stack_official_head(w_ID: Sequence[Tensor], geo: Geometry) -> Tensor:
    return w_ID[0].view(geo.D, geo.H, -1).transpose(1, 2)


def _unstack_official_head(w_DKH: Tensor, geo: Geometry, count: int) -> list[Tensor]:
    return [w_DKH.transpose(1, 2).reshape(geo.D, geo.D)]


def _no_check(roles: Sequence[str], geo: Geometry) -> None:
    """Accept any role and geometry."""


def _check_heads(roles: Sequence[str], geo: Geometry) -> None:
    """Refuse roles that are not whole heads of equal width over the model width."""
    for role in roles:
        heads = geo.heads(role)
        if geo.shape(role) != (heads * geo.K, geo.D):
            raise UserError(
                f"heads of equal width over the model width can be stacked: {role!r} is "
                f"{geo.shape(role)}, not {heads} heads of {geo.K} over {geo.D}"
            )


def _check_all_four(roles: Sequence[str], geo: Geometry) -> None:
    if tuple(roles) != ATTENTION:
        raise UserError(f"stacking all heads needs the roles {ATTENTION}, got {tuple(roles)}")
    _check_heads(roles, geo)


def _check_official(roles: Sequence[str], geo: Geometry) -> None:
    _check_heads(roles, geo)
    if geo.groups != 1 or geo.H * geo.K != geo.D:
        raise UserError(
            "layout 'official' is defined for square, ungrouped attention only (heads x head_dim = "
            f"model width, as many KV heads as heads); this model has width {geo.D}, {geo.H} heads "
            f"of {geo.K}, {geo.G} KV heads. Use layout 'paper'."
        )


def _check_equal_shapes(roles: Sequence[str], geo: Geometry) -> None:
    sizes = {role: geo.shape(role) for role in roles}
    if len(set(sizes.values())) > 1:
        raise UserError(f"matrices of unequal shapes cannot be stacked whole: {sizes}")


def _stack_experts(w_ID: Sequence[Tensor], geo: Geometry) -> Tensor:
    """(E, F, D, S): the S matrices of every expert; S = 1 for a single kind of matrix."""
    w_SEFD = torch.stack(list(w_ID)).unflatten(0, (-1, geo.experts))
    return w_SEFD.permute(1, 2, 3, 0)


def _unstack_experts(w_EFDS: Tensor, geo: Geometry, count: int) -> list[Tensor]:
    return list(w_EFDS.permute(3, 0, 1, 2).flatten(0, 1).unbind())


def _check_experts(roles: Sequence[str], geo: Geometry) -> None:
    """Require each kind of matrix of all experts, kind after kind, all of one shape."""
    want = [role for kind in families(roles) for role in geo.members(kind)]
    if not geo.experts or list(roles) != want:
        raise UserError(
            "stacking experts needs the same matrices of all experts of a layer, kind after kind, "
            f"got {', '.join(roles)}"
        )
    _check_equal_shapes(roles, geo)


def _stack_matrices(w_ID: Sequence[Tensor], geo: Geometry) -> Tensor:
    return torch.stack(list(w_ID), dim=2)  # (I, D, M)


HEADS = "heads"
MATRIX = ("inner width", "model width")
_OF_ALL_FOUR = ("model width", "head width", "stacked matrices", HEADS)
_OF_ONE = ("model width", "head width", HEADS)

STACKINGS.register("heads")(
    Stacking(_stack_heads, _unstack_heads, _check_all_four, _OF_ALL_FOUR, slices_are_heads=True)
)
STACKINGS.register("official-heads")(
    Stacking(_stack_official_heads, _unstack_official_heads, _check_official, _OF_ALL_FOUR)
)
STACKINGS.register("head")(
    Stacking(_stack_head, _unstack_head, _check_heads, _OF_ONE, slices_are_heads=True)
)
STACKINGS.register("official-head")(
    Stacking(_stack_official_head, _unstack_official_head, _check_official, _OF_ONE)
)
STACKINGS.register("matrix")(
    Stacking(lambda w, geo: w[0], lambda w, geo, count: [w], _no_check, MATRIX)
)
STACKINGS.register("matrices")(
    Stacking(
        _stack_matrices,
        lambda w, geo, count: list(w.unbind(2)),
        _check_equal_shapes,
        (*MATRIX, "stacked matrices"),
    )
)
STACKINGS.register("experts")(
    Stacking(
        _stack_experts, _unstack_experts, _check_experts, ("experts", *MATRIX, "stacked matrices")
    )
)
