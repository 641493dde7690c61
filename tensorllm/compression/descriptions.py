"""Describe in plain words what a compression did, from the sites of its report.

Works without the plugin whose kinds of factors a report names.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from tensorllm.errors import UserError
from tensorllm.tensors.factors import Factors, Picture
from tensorllm.tensors.quantised import kind_named
from tensorllm.tensors.stacking import ATTENTION, ATTENTION_ROLES, STACKINGS, families

Sites = Sequence[Mapping[str, Any]]
Group = tuple[tuple[tuple[str, ...], str], Sites]  # roles and kind of factors, and their sites
MOST = 3  # groups of matrices that are listed separately


def done_in_words(sites: Sites) -> str:
    """Such as `attention of layer 1 as a shared Tucker tensor of ranks (64, 16, 4), ...`."""
    parts = []
    groups = _grouped(sites)
    if len(groups) > MOST:  # a phrase for each would be a list, not a sentence
        groups = _by_kind(sites)
    for (roles, kind), together in groups:
        layers = numbers(layer for site in together for layer in site["layers"])
        parts.append(f"{_matrices(roles)} of {layers} as {_factors(kind, together)}")
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1] if parts else ""


def numbers(layers: Iterable[int]) -> str:
    """`layer 3`, `layers 0-3, 7`."""
    found = sorted(set(layers))
    runs = [
        [n for _, n in run]
        for _, run in groupby(enumerate(found), key=lambda pair: pair[1] - pair[0])
    ]
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"layer{'s' if len(found) > 1 else ''} {text}"


def _grouped(sites: Sites) -> list[Group]:
    groups: dict[tuple[tuple[str, ...], str], list[Mapping[str, Any]]] = {}
    for site in sites:
        groups.setdefault((families(site["roles"]), site["kind"]), []).append(site)
    return list(groups.items())


def _by_kind(sites: Sites) -> list[Group]:
    """Sites grouped by kind of factors only, whatever their roles."""
    out: list[Group] = []
    for kind in dict.fromkeys(site["kind"] for site in sites):
        together = [site for site in sites if site["kind"] == kind]
        roles = families(role for site in together for role in site["roles"])
        out.append(((roles, kind), together))
    return out


def _matrices(roles: tuple[str, ...]) -> str:
    if set(roles) == set(ATTENTION):
        return "attention"
    if set(roles) > set(ATTENTION):
        ffn = ", ".join(f"“{role}”" for role in roles if role not in ATTENTION_ROLES)
        return f"attention and FFN matrices {ffn}"
    part = "attention" if set(roles) <= set(ATTENTION_ROLES) else "FFN"
    many = "matrices" if len(roles) > 1 else "matrix"
    names = ", ".join(f"“{role}”" for role in roles)
    return f"{part} {many} {names}"


def _factors(kind: str, sites: Sites) -> str:
    ranks = sorted({tuple(site["ranks"]) for site in sites})
    several = len({tuple(site["layers"]) for site in sites}) > 1
    known = _known(kind)
    of = Factors.describe if known is None else known.describe
    return of(kind, ranks, several)


def modes_of(stacking: str) -> tuple[str, ...]:
    """What each mode runs over; empty for a stacking that is not known here."""
    return STACKINGS[stacking].modes if stacking in STACKINGS else ()


def picture_of(kind: str) -> Picture | None:
    """How factors of this kind are drawn; None: they are not."""
    known = _known(kind)
    return None if known is None else known.picture


def _known(kind: str) -> type[Factors] | None:
    try:
        return kind_named(kind)
    except UserError:
        return None
