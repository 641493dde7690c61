"""What is searched: layers and the ranks of a mode, as a list of choices per dimension.

Shapes: D model width, K head width, M = 2g+2 matrices per group, G groups (= heads where g = 1).
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tensorllm.compression.plan import plan_jobs
from tensorllm.compressors import COMPRESSORS, Compressor
from tensorllm.compressors.settings import make_compressor
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.search.choices import Value, choices_of

Values = Mapping[str, Value]  # one choice of every dimension


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
    fixed: Mapping[str, Any] = field(default_factory=dict)
    heads: int = 1
    width: int = 1

    def point(self, values: Values) -> Point:
        """The compression that these values stand for."""
        first = int(values["layer"])
        settings = dict(self.fixed)
        if "R2" in values:
            settings["ranks"] = self._ranks(values)
        if "rho" in values:
            settings["rho"] = float(f"{values['rho']:.6g}")  # samplers give all sixteen digits
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
    given = {**(ranks or {}), "rho": rhos, "matrices": matrices}
    choices = choices_of(roles, name, given, layers=layers, together=together, tied=tied)
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
