"""One decomposition per site serves every trial: smaller ranks are slices of the largest ones."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from tensorllm.calibration.fit import Fitted
from tensorllm.compression.jobs import CompressedSite
from tensorllm.compression.plan import plan
from tensorllm.compressors import Job, Leaf, Site
from tensorllm.models import RoleMatrices
from tensorllm.tensors.factors import Factors, cast, parameters
from tensorllm.tensors.tucker import relative_error
from tensorllm.weights import dense_matrices, edited, stacked


class SiteEdit(NamedTuple):
    """The new role matrices of one site.

    Attributes:
        relative_error: relative Frobenius distance from the old matrices.
        before, after: numbers in the matrices, and numbers stored for them.
    """

    site: Site
    matrices: list[Tensor]
    relative_error: float
    before: int
    after: int


class ModelEdit(NamedTuple):
    """What a point changes: matrices, and the norms and biases that a fit has adjusted."""

    sites: list[SiteEdit]
    parameters: Mapping[str, Tensor]


@contextmanager
def applied(edit: ModelEdit, roles: RoleMatrices, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Apply an edit to the model within the block; afterwards it is restored bit for bit."""
    before = {name: weights[name].clone() for name in edit.parameters}
    with edited([(site.site, site.matrices) for site in edit.sites], roles, weights):
        try:
            with torch.no_grad():
                for name, w in edit.parameters.items():
                    weights[name].copy_(w)
            yield
        finally:
            for name, w in before.items():
                weights[name].copy_(w)


def edit_of_fit(fitted: Fitted, roles: RoleMatrices, weights: Mapping[str, Tensor]) -> ModelEdit:
    """The edit of a strategy that was fitted to a text."""
    planned = plan(fitted, roles, None)
    sites = [
        _edit(site, stacked(site, roles, weights), fitted.factors(site), roles)
        for site in fitted.sites
    ]
    return ModelEdit(sites, planned.changed(roles))


def edit_of_sites(sites: Sequence[CompressedSite], roles: RoleMatrices) -> ModelEdit:
    """The edit that `compress` would write into the model."""
    edits = [
        SiteEdit(
            done.site,
            dense_matrices(done.site, done.factors, roles),
            done.report.relative_error,
            done.report.parameters_before,
            done.report.parameters_after,
        )
        for done in sites
    ]
    return ModelEdit(edits, {})


def _edit(site: Site, w: Tensor, factors: Factors, roles: RoleMatrices) -> SiteEdit:
    factors = cast(factors, w.dtype)
    matrices = dense_matrices(site, factors, roles)
    return SiteEdit(site, matrices, relative_error(w, factors), w.numel(), parameters(factors))


class Decompositions:
    """The decompositions of a model's sites; nested ones are made once, at their largest ranks.

    Args:
        roles: of the model.
        weights: its parameters by name, unedited whenever `edit` is called for a new site.
        jobs: all that may be asked for; they determine how large the decompositions must be.
    """

    def __init__(
        self, roles: RoleMatrices, weights: Mapping[str, Tensor], jobs: Iterable[Job]
    ) -> None:
        self.roles = roles
        self.weights = weights
        self.made = 0  # decompositions computed so far
        by_site: dict[Site, dict[str, Leaf]] = {}
        for job in jobs:
            if isinstance(job.compressor, Leaf):
                by_site.setdefault(job.site, {})[repr(job.compressor)] = job.compressor
        self._covering = {
            site: leaf.covering(others, self._shape(site))
            for site, (leaf, *others) in ((s, leaves.values()) for s, leaves in by_site.items())
        }
        self._factors: dict[Site, Factors] = {}

    def edit(self, jobs: Sequence[Job]) -> ModelEdit:
        """The matrices that these jobs would write, rounded as stored factors are."""
        sites = []
        for job in jobs:
            w = stacked(job.site, self.roles, self.weights)
            sites.append(_edit(job.site, w, self._decomposed(job, w), self.roles))
        return ModelEdit(sites, {})

    def _decomposed(self, job: Job, w: Tensor) -> Factors:
        leaf, site = job.compressor, job.site
        assert isinstance(leaf, Leaf), "what is fitted to a text goes through `fit`"
        covering = self._covering.get(site)
        if covering is None:
            self.made += 1
            return leaf.decompose(w)
        if site not in self._factors:
            self._factors[site] = covering.decompose(w)
            self.made += 1
        return leaf.sliced(self._factors[site], tuple(w.shape))

    def _shape(self, site: Site) -> tuple[int, ...]:
        return site.shape(self.roles.spec.geometry(site.layers[0]))
