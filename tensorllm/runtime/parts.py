"""Which modules run a site's factors, and where its tensors are in them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from tensorllm.compressors.base import Site
from tensorllm.models.spec import FALLING
from tensorllm.runtime.heads import CORE_ORDER, HeadsSite
from tensorllm.runtime.linear import (
    HeadPart,
    HeadsPart,
    StackPart,
    StackSite,
    low_rank_linears,
    role_rows,
)
from tensorllm.runtime.pivoted import PivotedPart, PivotedSite
from tensorllm.tensors.factors import CP, Factors, LowRank, Tucker
from tensorllm.tensors.pivoted import PivotedLowRank
from tensorllm.tensors.stacking import Geometry

Order = tuple[int, ...] | None


class Held(NamedTuple):
    """A part of a factored linear and where its tensors are: short name -> (below it, order)."""

    module: nn.Module
    tensors: Mapping[str, tuple[str, Order]]


def can_run_factored(site: Site, factors: Factors) -> bool:
    """Whether there is a module for a site's factors."""
    return _family(site, factors) in _MAKERS or is_shared_heads(site, factors)


def parts_of(site: Site, factors: Factors, geometry: Geometry) -> dict[tuple[int, str], Held]:
    """(layer, role) -> the module that stands for that matrix."""
    if is_shared_heads(site, factors):
        return _heads_parts(site, factors, geometry)
    return _MAKERS[_family(site, factors)](site, factors, geometry)


def is_shared_heads(site: Site, factors: Factors) -> bool:
    return (
        site.stacking == "heads"
        and isinstance(factors, Tucker)
        and set(factors.factors) == {0, 1, 2}
    )


def heads_names() -> dict[str, tuple[str, Order]]:
    return {f"factor_{n}": (name, None) for n, name in enumerate(("u_DP", "u_KR", "u_MS"))}


def _low_rank(site: Site, factors: Any, geometry: Geometry) -> dict[tuple[int, str], Held]:
    ((layer, role),) = site.matrices
    rises = role not in FALLING
    order = None if rises else (1, 0)
    names = ("1.weight", "0.weight") if rises else ("0.weight", "1.weight")
    module = low_rank_linears(factors, rises=rises)
    return {(layer, role): Held(module, {s: (n, order) for s, n in zip("uv", names, strict=True)})}


def _head(site: Site, factors: Any, geometry: Geometry) -> dict[tuple[int, str], Held]:
    ((layer, role),) = site.matrices
    names = {
        "core": ("core_hRP", (2, 1, 0)),
        "factor_0": ("u_DP", None),
        "factor_1": ("u_KR", None),
    }
    return {(layer, role): Held(HeadPart(factors, rises=role not in FALLING), names)}


def _stack(site: Site, factors: Any, geometry: Geometry) -> dict[tuple[int, str], Held]:
    shared = StackSite(factors)
    middle = "weights" if isinstance(factors, CP) else "core"
    short = {middle: "middle", "factor_0": "u_IP", "factor_1": "u_DR", "factor_2": "u_MS"}
    names = {stored: (f"factors.{name}", None) for stored, name in short.items()}
    return {
        matrix: Held(
            StackPart(shared, index, rises=matrix[1] not in FALLING, owner=index == 0),
            names if index == 0 else {},
        )
        for index, matrix in enumerate(site.matrices)
    }


def _heads_parts(site: Site, factors: Any, geometry: Geometry) -> dict[tuple[int, str], Held]:
    shared = HeadsSite(factors)
    shared.absorb()
    names = {"core": ("core_SGRP", CORE_ORDER)} | heads_names()
    below = {short: (f"factors.{name}", order) for short, (name, order) in names.items()}
    rows = role_rows(geometry)
    out = {}
    for layer, role in site.matrices:
        first = role == site.roles[0]
        part = HeadsPart(shared, rows[role], geometry, rises=role not in FALLING, owner=first)
        out[layer, role] = Held(part, below if first else {})
    return out


def _pivoted(site: Site, factors: Any, geometry: Geometry) -> dict[tuple[int, str], Held]:
    shared = PivotedSite(factors, tuple(geometry.inner(role) for role in site.roles))
    below = {"basis": "basis_RD", "mix": "mix_XR", "rows": "rows_R"}
    names: dict[str, tuple[str, Order]] = {s: (f"factors.{n}", None) for s, n in below.items()}
    return {
        matrix: Held(
            PivotedPart(shared, index, rises=matrix[1] not in FALLING), {} if index else names
        )
        for index, matrix in enumerate(site.matrices)
    }


def _family(site: Site, factors: Factors) -> tuple[type, str]:
    """What decides which module runs a site; matrices below each other are one kind of stacking."""
    return type(factors), "matrix" if site.stacking.startswith("rows-") else site.stacking


_MAKERS: dict[tuple[type, str], Callable[[Site, Any, Geometry], dict[tuple[int, str], Held]]] = {
    (LowRank, "matrix"): _low_rank,
    (PivotedLowRank, "matrix"): _pivoted,
    (Tucker, "head"): _head,
    (CP, "matrices"): _stack,
    (Tucker, "matrices"): _stack,
}
