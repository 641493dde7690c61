"""The search space: layers, and the dimensions that a strategy defines."""

import itertools
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from tensorllm.compression.plan import plan_jobs
from tensorllm.compressors import COMPRESSORS, Compressor
from tensorllm.compressors.base import Dimension
from tensorllm.compressors.settings import make_compressor
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.models.spec import ModelSpec
from tensorllm.options import Value
from tensorllm.registry import did_you_mean

Values = Mapping[str, Value]  # one value per dimension
Matrices = frozenset[tuple[int, str]]  # (layer, role)

LAYER = "layer"  # the dimension that every strategy has


@dataclass(frozen=True, slots=True)
class Point:
    """A compression that can be tried.

    Attributes:
        mode: the compressor's name.
        layers: the layers that are edited.
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
        """A text that identifies the compression."""
        return json.dumps([self.mode, list(self.layers), self.settings], sort_keys=True)

    def recipe(self) -> dict[str, Any]:
        """The settings that `tensorllm compress --config` needs besides the model."""
        return {"mode": self.mode, "layers": list(self.layers), **self.settings}


@dataclass(frozen=True)
class Space:
    """The values of each dimension, and how they make a point.

    Attributes:
        mode: the compressor's name.
        spec: the model's sizes.
        choices: each dimension's values, ascending: `layer` (the first edited one) and the
            strategy's dimensions.
        log: dimensions that a sampler draws on a logarithmic scale.
        given: dimensions whose values the user listed: no others are tried.
        together: how many neighbouring layers are edited at once, with the same settings.
        left_out: dimensions that the strategy derives from others (R1 of the tied family).
        fixed: other fields of the compressor.
    """

    mode: str
    spec: ModelSpec
    choices: Mapping[str, tuple[Value, ...]]
    log: frozenset[str] = frozenset()
    given: frozenset[str] = frozenset()
    together: int = 1
    left_out: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, values: Values) -> dict[str, Any] | None:
        """The compressor's fields; None: no matrix can have these values."""
        own = {name: value for name, value in values.items() if name != LAYER}
        found = COMPRESSORS[self.mode].settings_at(self.spec, own)
        return None if found is None else {**self.fixed, **found}

    def point(self, values: Values) -> Point:
        """The compression that these values stand for."""
        settings, first = self.settings(values), int(values[LAYER])
        assert settings is not None, f"{values} cannot be reached"
        return Point(self.mode, tuple(range(first, first + self.together)), settings)

    @cached_property
    def grid(self) -> list[dict[str, Value]]:
        """Every valid combination of values."""
        names = list(self.choices)
        product = itertools.product(*self.choices.values())
        everything = (dict(zip(names, values, strict=True)) for values in product)
        return [values for values in everything if self.settings(values) is not None]

    def describe(self) -> dict[str, Any]:
        """The space as plain JSON values; must be the same in every run of a study."""
        return {
            "mode": self.mode,
            "choices": {name: list(values) for name, values in self.choices.items()},
            "given": sorted(self.given),
            "together": self.together,
            "left_out": list(self.left_out),
            "fixed": dict(self.fixed),
        }


def make_space(
    roles: RoleMatrices,
    mode: str,
    *,
    layers: Sequence[int] | None = None,
    values: Mapping[str, Sequence[Value] | None] | None = None,
    together: int = 1,
    left_out: Sequence[str] = (),
    fixed: Mapping[str, Any] | None = None,
) -> Space:
    """The search space of a model and mode; what is not given is chosen by the strategy.

    Args:
        layers: the candidate layers; None: all.
        values: the values to try, for any of the strategy's dimensions.
        together: how many neighbouring layers are edited at once.
        left_out: dimensions that the strategy derives from the others: R1 = heads * R2.
        fixed: other fields of the compressor, such as `layout`.

    Raises:
        UserError: nothing is left to search, no such dimension, or a value out of range.
    """
    kind, fixed = COMPRESSORS[mode], dict(fixed or {})
    name = COMPRESSORS.name_of(kind)
    there = kind.search_space(roles.spec, fixed)
    if not there:
        raise UserError(
            f"mode {name!r} has nothing to search; {searchable(roles.spec)} have (a strategy says "
            "what may be varied in search_space)"
        )
    given = {dimension: list(v) for dimension, v in (values or {}).items() if v}
    for dimension in (*given, *left_out):
        if dimension not in there:
            hint = did_you_mean(dimension, list(there))
            raise UserError(f"mode {name!r} has no {dimension}; it has {', '.join(there)}.{hint}")
        if dimension in given and dimension in left_out:
            raise UserError(f"{dimension} follows from the others (--tied): give no {dimension}")
    choices: dict[str, tuple[Value, ...]] = {LAYER: _layers(roles, layers, together)}
    for dimension, what in there.items():
        wanted = given.get(dimension)
        if wanted is not None:
            choices[dimension] = _checked(dimension, what, wanted)
        elif not what.optional and dimension not in left_out:
            choices[dimension] = what.values
    space = Space(
        name, roles.spec, choices,
        log=frozenset(dimension for dimension, what in there.items() if what.log),
        given=frozenset(given), together=together, left_out=tuple(left_out), fixed=fixed,
    )  # fmt: skip
    if not space.grid:
        shown = {key: list(v) for key, v in choices.items() if key != LAYER}
        raise UserError(f"no combination of these values can be reached by {name}: {shown}")
    if layers is None and len(set(roles.spec.geometries)) > 1:
        space = _where_it_can_be(space, roles)
    for at in (space.grid[0], space.grid[-1]):
        plan_jobs(space.point(at).compressor, roles, space.point(at).layers)
    return space


def _where_it_can_be(space: Space, roles: RoleMatrices) -> Space:
    """The space without the layers that lack a role which some of its settings decompose."""
    every = space.choices[LAYER]
    lacking = set()
    for values in space.grid:
        point = space.point(values)
        for job in point.compressor.jobs(roles.spec, point.layers):
            if any(role not in roles.spec.geometry(n).roles for n, role in job.site.matrices):
                lacking.add(values[LAYER])
    if len(lacking) == len(every):
        raise UserError(f"no layer of this model has what {space.mode} decomposes")
    left = tuple(layer for layer in every if layer not in lacking)
    return replace(space, choices={**space.choices, LAYER: left})


def corners(space: Space) -> list[dict[str, Value]]:
    """Combinations that together cover every layer and every name, at the largest numbers."""
    top = {name: values[-1] for name, values in space.choices.items()}
    varied = {n: v for n, v in space.choices.items() if n == LAYER or isinstance(v[0], str)}
    found = [
        {**top, **dict(zip(varied, values, strict=True))}
        for values in itertools.product(*varied.values())
    ]
    return [values for values in found if space.settings(values) is not None]


def spread(space: Space, trials: int, seed: int) -> list[dict[str, Value]]:
    """Initial values for a sampler's first trials: layers evenly spread, names in turn.

    Without them a sampler may settle on one layer before it has seen the others.
    """
    layers = space.choices[LAYER]
    count = min(len(layers), max(1, trials // 2))
    chosen = [layers[(2 * n + 1) * len(layers) // (2 * count)] for n in range(count)]
    random.Random(seed).shuffle(chosen)
    named = {n: v for n, v in space.choices.items() if isinstance(v[0], str)}
    return [
        {LAYER: layer, **{name: values[n % len(values)] for name, values in named.items()}}
        for n, layer in enumerate(chosen)
    ]


def searchable(spec: ModelSpec) -> str:
    """The names of the modes that define a search space for this model."""
    names = []
    for name in COMPRESSORS:
        try:
            found = COMPRESSORS[name].search_space(spec, {})
        except UserError:  # the mode does not fit this architecture
            continue
        if found:
            names.append(name)
    return ", ".join(names)


def _layers(roles: RoleMatrices, layers: Sequence[int] | None, together: int) -> tuple[Value, ...]:
    """The first layer of every run of `together` neighbouring candidates."""
    if not 1 <= together <= roles.layers:
        raise UserError(f"--together must be in 1..{roles.layers}, got {together}")
    if layers is not None and not layers:
        raise UserError(f"no layer is left to search; the model has layers 0..{roles.layers - 1}")
    known = sorted(roles.check_layers(range(roles.layers) if layers is None else layers))
    first = [i for i in known if all(i + n in known for n in range(together))]
    if not first:
        raise UserError(f"no {together} neighbouring layers are among {known}")
    return tuple(first)


def _checked(name: str, what: Dimension, given: Sequence[Value]) -> tuple[Value, ...]:
    """The user's values of a dimension without duplicates: numbers ascending, names as given."""
    if isinstance(what.values[0], str):
        _check_names(name, what, map(str, given))
        return tuple(dict.fromkeys(map(str, given)))
    whole = isinstance(what.values[0], int)
    for value in given:
        _check_number(name, what, value, whole)
    return tuple(sorted({int(value) if whole else float(value) for value in given}))


def _check_names(name: str, what: Dimension, given: Iterable[str]) -> None:
    known, how = list(what.names or map(str, what.values)), "some" if what.names else "one"
    for part in (part for v in given for part in (v.split("+") if what.names else [v])):
        if part not in known:
            hint = did_you_mean(part, known)
            raise UserError(f"{name} must be {how} of {', '.join(known)}, got {part!r}.{hint}")


def _check_number(name: str, what: Dimension, value: Value, whole: bool) -> None:
    if isinstance(value, str) or (whole and value != int(value)):
        raise UserError(f"{name} takes {'whole ' if whole else ''}numbers, got {value!r}")
    if what.allowed is None:
        if value not in what.values:
            shown = ", ".join(f"{v:g}" for v in what.values)
            raise UserError(f"{name} must be one of {shown}, got {value:g}")
        return
    low, high = what.allowed
    if not low <= value <= high or (what.log and value <= 0):
        opens = "(" if what.log and low == 0 else "["
        shown = f"{low}..{high}" if whole else f"{opens}{low:g}, {high:g}]"
        raise UserError(f"{name} must be in {shown}, got {value:g}")
