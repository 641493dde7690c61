"""What is searched: layers and the ranks of a mode, as a list of choices per dimension.

Shapes: D model width, K head width, M = 2g+2 matrices per group, G groups (= heads where g = 1).
"""

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tensorllm.architectures import RoleMatrices
from tensorllm.compression.jobs import plan_jobs
from tensorllm.compressors import COMPRESSORS, Compressor
from tensorllm.compressors.settings import make_compressor
from tensorllm.errors import UserError
from tensorllm.registry import did_you_mean
from tensorllm.tensors.ranks import check_rank
from tensorllm.tensors.stacking import FFN

Value = int | float | str
Values = Mapping[str, Value]  # one choice of every dimension

SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of the width and of the head width
RHOS = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
TUCKER = ("R1", "R2", "R3")


@dataclass(frozen=True, slots=True)
class Point:
    """A compression that can be tried.

    Attributes:
        mode: the compressor's name.
        layers: which are edited.
        settings: the compressor's fields.
    """

    mode: str
    layers: tuple[int, ...]
    settings: dict[str, Any]

    @property
    def compressor(self) -> Compressor:
        return make_compressor(self.mode, self.settings)

    @property
    def key(self) -> str:
        """The same text for the same compression."""
        return json.dumps([self.mode, list(self.layers), self.settings], sort_keys=True)

    def recipe(self) -> dict[str, Any]:
        """What `tensorllm compress --config` needs beside the model."""
        return {"mode": self.mode, "layers": list(self.layers), **self.settings}


@dataclass(frozen=True)
class Space:
    """The choices of each dimension, and how they make a point.

    Attributes:
        mode: the compressor's name.
        choices: dimension -> its values, ascending: `layer` (the first edited one), `R1`, `R2`,
            `R3`, `rho`, `matrices`.
        together: how many neighbouring layers are edited at once, with the same settings.
        tied: R1 is R2 times the heads, as in the authors' published ranks.
        fixed: other fields of the compressor.
        heads: G, the last mode of the tensor.
        width: D, what R1 may be at most.
    """

    mode: str
    choices: Mapping[str, tuple[Value, ...]]
    together: int = 1
    tied: bool = False
    fixed: Mapping[str, Any] = None  # type: ignore[assignment]  # set below
    heads: int = 1
    width: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "fixed", dict(self.fixed or {}))

    def point(self, values: Values) -> Point:
        """The compression that these values stand for."""
        first = int(values["layer"])
        settings = dict(self.fixed)
        if "R2" in values:
            settings["ranks"] = self._ranks(values)
        if "rho" in values:
            settings["rho"] = values["rho"]
        if "matrices" in values:
            settings["matrices"] = str(values["matrices"]).split("+")
        return Point(self.mode, tuple(range(first, first + self.together)), settings)

    def _ranks(self, values: Values) -> list[int]:
        r1 = self.heads * int(values["R2"]) if self.tied else int(values["R1"])
        return [r1, int(values["R2"]), *([int(values["R3"])] if "R3" in values else [])]

    def allows(self, values: Values) -> bool:
        """Whether the ranks can be reached: each is at most the product of the others.

        A mode's unfolding has no higher rank; (R1 > R2 R3 G) would be stored for nothing.
        """
        if "R2" not in values:
            return True
        ranks = self._ranks(values)
        cells = math.prod(ranks) * self.heads
        return ranks[0] <= self.width and all(rank * rank <= cells for rank in ranks)

    @cached_property
    def grid(self) -> list[dict[str, Value]]:
        """Every combination of the choices that can be reached."""
        names = list(self.choices)
        product = itertools.product(*self.choices.values())
        everything = (dict(zip(names, values, strict=True)) for values in product)
        return [values for values in everything if self.allows(values)]

    def describe(self) -> dict[str, Any]:
        """As plain JSON values: what must not change between two runs of one study."""
        return {
            "mode": self.mode,
            "choices": {name: list(values) for name, values in self.choices.items()},
            "together": self.together,
            "tied": self.tied,
            "fixed": dict(self.fixed),
        }


def make_space(
    roles: RoleMatrices,
    mode: str,
    *,
    layers: Sequence[int] | None = None,
    ranks: Mapping[str, Sequence[int]] | None = None,
    rhos: Sequence[float] | None = None,
    matrices: Sequence[str] | None = None,
    together: int = 1,
    tied: bool = False,
    fixed: Mapping[str, Any] | None = None,
) -> Space:
    """The space of a model and mode; what is not given is chosen from the model's sizes.

    Args:
        roles: of the model.
        mode: `shared-tucker`, `per-matrix-tucker`, `laser` or `hybrid`.
        layers: the candidates; all by default.
        ranks: of any of R1, R2, R3 the values to try.
        rhos: shares of the rank that LASER keeps.
        matrices: the sets of matrices to try, each as `in` or `in+out`.
        together: how many neighbouring layers are edited at once.
        tied: R1 = heads * R2.
        fixed: other fields of the compressor, such as `layout`.

    Raises:
        UserError: nothing is left to search, or a value is out of range.
    """
    name = COMPRESSORS.name_of(COMPRESSORS[mode])
    if name not in DIMENSIONS:
        raise UserError(f"the mode to search must be one of {', '.join(DIMENSIONS)}, got {mode!r}")
    wanted = DIMENSIONS[name]
    _refuse_foreign(name, wanted, ranks, rhos, matrices, tied)
    choices: dict[str, tuple[Value, ...]] = {"layer": _layers(roles, layers, together)}
    for dimension in wanted:
        if not (dimension == "R1" and tied):
            given = {"rho": rhos, "matrices": matrices}.get(dimension, (ranks or {}).get(dimension))
            choices[dimension] = _CHOICES[dimension](roles, name, given)
    geometry = roles.geometry
    space = Space(
        name, choices, together, tied, dict(fixed or {}), heads=geometry.G, width=geometry.D
    )
    if not space.grid:
        raise UserError(
            f"no combination of the ranks can be reached: {space.describe()['choices']}; a rank is "
            f"at most the product of the others and the {geometry.G} heads, R1 at most {geometry.D}"
        )
    for values in (space.grid[0], space.grid[-1]):
        plan_jobs(space.point(values).compressor, roles, space.point(values).layers)
    return space


DIMENSIONS = {
    "shared-tucker": TUCKER,
    "per-matrix-tucker": ("R1", "R2"),
    "laser": ("rho", "matrices"),
    "hybrid": (*TUCKER, "rho", "matrices"),
}


def _refuse_foreign(
    mode: str,
    wanted: Sequence[str],
    ranks: Mapping[str, Sequence[int]] | None,
    rhos: Sequence[float] | None,
    matrices: Sequence[str] | None,
    tied: bool,
) -> None:
    given = [name for name, values in (ranks or {}).items() if values]
    given += [name for name, v in (("rho", rhos), ("matrices", matrices)) if v]
    if tied:
        given.append("R1")
        if (ranks or {}).get("R1"):
            raise UserError("the tied family says what R1 is (heads * R2): give no R1")
    for name in given:
        if name not in wanted:
            raise UserError(f"mode {mode!r} has no {name}; it has {', '.join(wanted)}")


def _layers(roles: RoleMatrices, layers: Sequence[int] | None, together: int) -> tuple[Value, ...]:
    if not 1 <= together <= roles.layers:
        raise UserError(f"layers edited together must be 1 to {roles.layers}, got {together}")
    if layers is not None and not layers:
        raise UserError(f"no layer is left to search; the model has layers 0..{roles.layers - 1}")
    known = sorted(roles.check_layers(range(roles.layers) if layers is None else layers))
    first = [i for i in known if all(i + n in known for n in range(together))]
    if not first:
        raise UserError(f"no {together} neighbouring layers are among {known}")
    return tuple(first)


def _ranks_of(size: Callable[[RoleMatrices], int], every: bool) -> "Choices":
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


Choices = Callable[[RoleMatrices, str, Sequence[Any] | None], tuple[Value, ...]]
_CHOICES: dict[str, Choices] = {
    "R1": _ranks_of(lambda roles: roles.geometry.D, every=False),
    "R2": _ranks_of(lambda roles: roles.geometry.K, every=False),
    "R3": _ranks_of(lambda roles: 2 * roles.geometry.groups + 2, every=True),
    "rho": _rhos,
    "matrices": _matrices,
}
