"""What may be chosen in each dimension of a search: layers, ranks, rho, matrices."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.registry import did_you_mean
from tensorllm.tensors.ranks import check_rank
from tensorllm.tensors.stacking import FFN

Value = int | float | str
Choices = Callable[[RoleMatrices, str, Sequence[Any] | None], tuple[Value, ...]]

SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of the width and of the head width
RHOS = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
TUCKER = ("R1", "R2", "R3")
DIMENSIONS = {
    "shared-tucker": TUCKER,
    "per-matrix-tucker": ("R1", "R2"),
    "laser": ("rho", "matrices"),
    "hybrid": (*TUCKER, "rho", "matrices"),
}


def choices_of(
    roles: RoleMatrices,
    mode: str,
    given: Mapping[str, Sequence[Any] | None],
    *,
    layers: Sequence[int] | None,
    together: int,
    tied: bool,
) -> dict[str, tuple[Value, ...]]:
    """Dimension -> its values, ascending: those given, or a few by the model's sizes.

    Raises:
        UserError: a dimension that the mode does not have, or a value out of range.
    """
    if mode not in DIMENSIONS:
        raise UserError(f"the mode to search must be one of {', '.join(DIMENSIONS)}, got {mode!r}")
    wanted = DIMENSIONS[mode]
    there = [name for name, values in given.items() if values]
    if tied and "R1" in there:
        raise UserError("the tied family says what R1 is (heads * R2): give no R1")
    for name in [*there, *(["R1"] if tied else [])]:
        if name not in wanted:
            raise UserError(f"mode {mode!r} has no {name}; it has {', '.join(wanted)}")
    out = {"layer": _layers(roles, layers, together)}
    for name in wanted:
        if not (name == "R1" and tied):
            out[name] = _CHOICES[name](roles, mode, given.get(name) or None)
    return out


def _layers(roles: RoleMatrices, layers: Sequence[int] | None, together: int) -> tuple[Value, ...]:
    """The first layers of all runs of `together` neighbours among the candidates."""
    if not 1 <= together <= roles.layers:
        raise UserError(f"layers edited together must be 1 to {roles.layers}, got {together}")
    if layers is not None and not layers:
        raise UserError(f"no layer is left to search; the model has layers 0..{roles.layers - 1}")
    known = sorted(roles.check_layers(range(roles.layers) if layers is None else layers))
    first = [i for i in known if all(i + n in known for n in range(together))]
    if not first:
        raise UserError(f"no {together} neighbouring layers are among {known}")
    return tuple(first)


def _ranks_of(size: Callable[[RoleMatrices], int], every: bool) -> Choices:
    def choices(roles: RoleMatrices, mode: str, given: Sequence[Any] | None) -> tuple[Value, ...]:
        n = size(roles)
        if given is not None:
            return tuple(sorted({check_rank("to search", rank, n) for rank in given}))
        whole = range(1, n + 1) if every else {max(1, round(share * n)) for share in SHARES}
        return tuple(sorted(whole))

    return choices


def _rhos(roles: RoleMatrices, mode: str, given: Sequence[Any] | None) -> tuple[Value, ...]:
    for rho in given or ():
        if not 0 < rho <= 1:
            raise UserError(f"rho must be in (0, 1], got {rho}")
    return tuple(sorted(set(given))) if given else RHOS


def _matrices(roles: RoleMatrices, mode: str, given: Sequence[Any] | None) -> tuple[Value, ...]:
    known = roles.geometry.roles if mode == "laser" else FFN
    there = [role for role in roles.geometry.roles if role in known]
    for of in given or ():
        for role in str(of).split("+"):
            if role not in there:
                hint = did_you_mean(role, there)
                raise UserError(f"matrices must be some of {', '.join(there)}, got {role!r}.{hint}")
    return tuple(given or [role for role in there if role in FFN])


_CHOICES: dict[str, Choices] = {
    "R1": _ranks_of(lambda roles: roles.geometry.D, every=False),
    "R2": _ranks_of(lambda roles: roles.geometry.K, every=False),
    "R3": _ranks_of(lambda roles: 2 * roles.geometry.groups + 2, every=True),
    "rho": _rhos,
    "matrices": _matrices,
}
