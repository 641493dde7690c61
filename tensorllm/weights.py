"""From factors to weights: write what a site's factors represent in place of its matrices.

The only code that turns factors back into dense weights; `runtime.install` turns them into modules.

Shapes: I inner width, D model width of a role matrix.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from tensorllm.compressors.layer import Site
from tensorllm.models.access import RoleMatrices
from tensorllm.tensors.factors import Factors

T = TypeVar("T")


def stacked(site: Site, roles: RoleMatrices, weights: Mapping[str, Tensor]) -> Tensor:
    """The site's stacked tensor, from the model's parameters by name."""
    geometry = roles.spec.geometry(site.layers[0])
    return site.stack([roles.read(weights, *m) for m in site.matrices], geometry)


def dense_matrices(site: Site, factors: Factors, roles: RoleMatrices) -> list[Tensor]:
    """The role matrices (I, D) that the factors represent, in the order of `site.matrices`.

    They are in float32 or wider; `cast` the factors first if they are stored in a narrow dtype.
    """
    return site.unstack(factors.dense(), roles.spec.geometry(site.layers[0]))


def write_matrices(
    site: Site, matrices_ID: Sequence[Tensor], roles: RoleMatrices, weights: Mapping[str, Tensor]
) -> None:
    """Overwrite the site's role matrices in place, each rounded to its stored dtype."""
    for (layer, role), w_ID in zip(site.matrices, matrices_ID, strict=True):
        roles.write(weights, layer, role, w_ID)


def write_dense(
    site: Site, factors: Factors, roles: RoleMatrices, weights: Mapping[str, Tensor]
) -> None:
    """Overwrite the site's matrices in place by what the factors represent.

    Args:
        site: the site.
        factors: in the dtype in which they are stored.
        roles: of the model.
        weights: parameters by name; those of the site's matrices must be there.
    """
    write_matrices(site, dense_matrices(site, factors, roles), roles, weights)


@contextmanager
def restored(
    sites: Iterable[Site], roles: RoleMatrices, weights: Mapping[str, Tensor]
) -> Iterator[None]:
    """Restore the matrices of `sites` after the block, whatever it writes to them.

    The parameters are restored bit for bit, in place, however the block ends.
    """
    names = {roles.name(*matrix) for site in sites for matrix in site.matrices}
    before = {name: weights[name].detach().clone() for name in names}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, w in before.items():
                weights[name].copy_(w)


@contextmanager
def edited(
    edits: Iterable[tuple[Site, Sequence[Tensor]]],
    roles: RoleMatrices,
    weights: Mapping[str, Tensor],
) -> Iterator[None]:
    """Replace role matrices within the block; afterwards they are restored bit for bit.

    Args:
        edits: sites and their new matrices (I, D), such as those of `dense_matrices`.
        roles: of the model.
        weights: parameters by name.
    """
    edits = list(edits)
    with restored([site for site, _ in edits], roles, weights):
        with torch.no_grad():
            for site, matrices_ID in edits:
                write_matrices(site, matrices_ID, roles, weights)
        yield


def touched(site: Site, roles: RoleMatrices) -> set[str]:
    """Names of the parameters that a site's factors replace, and of those fused with them."""
    return {name for matrix in site.matrices for name in roles.together(*matrix)}


def sharing(
    items: Iterable[T], names_of: Callable[[T], set[str]]
) -> list[tuple[set[str], list[T]]]:
    """Group items that touch the same parameter, such as a fused one.

    Args:
        names_of: the parameters that an item touches.

    Returns:
        Groups of items, each with all its names, such that no name belongs to two groups.
    """
    groups: list[tuple[set[str], list[T]]] = []
    for item in items:
        names, together = names_of(item), [item]
        for group in [g for g in groups if g[0] & names]:
            groups.remove(group)
            names, together = names | group[0], group[1] + together
        groups.append((names, together))
    return groups
