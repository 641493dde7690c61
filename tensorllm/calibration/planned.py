"""What a strategy needs to do with a model's layers, before any of them runs."""

from collections.abc import Iterator, Mapping, Sequence

from tensorllm.calibration.covariances import Key, Wanted
from tensorllm.compressors.allocation import share_out
from tensorllm.compressors.base import (
    Compressor,
    ErrorCurve,
    GradientOf,
    Groupings,
    Job,
    LayerFit,
    Leaf,
)
from tensorllm.compressors.layer import Site, Size
from tensorllm.compressors.placing import placed
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.tensors.shared_input import reading_together


class Planned:
    """The jobs of a strategy, and what follows from them.

    Args:
        compressor: the strategy.
        roles: of the model.
        layers: those to compress; all by default.

    Attributes:
        layers: those that have jobs.
        keys: sets of roles of each layer that read the same input.
        numbers: in the matrices to compress.
        missing_roles: layer -> the roles that a job needs and the layer lacks.
    """

    def __init__(
        self, compressor: Compressor, roles: RoleMatrices, layers: Sequence[int] | None
    ) -> None:
        self.spec = roles.spec
        found = placed(compressor, roles, layers)
        self.jobs, self.missing_roles = found.jobs, found.missing_roles
        _check_jobs(self.jobs)
        self.layers = sorted({job.site.layers[0] for job in self.jobs})
        self.keys: list[Key] = [
            (layer, together)
            for layer in self.layers
            for together in reading_together(
                [role for job in self.of(layer) for role in job.site.roles]
            )
        ]
        geometry = roles.spec.geometry
        self.numbers = sum(geometry(n).numel(r) for n, together in self.keys for r in together)

    @property
    def width(self) -> int:
        """The width of the widest measured covariance."""
        geometry = self.spec.geometry
        return max(
            geometry(n).inputs(r) if self.wanted.matrices else geometry(n).D
            for n, together in self.keys
            for r in together
        )

    @property
    def passes(self) -> float:
        """The cost of fitting a layer, in forward passes of it."""
        first = self.of(self.layers[0])
        return 1 + sum(
            one.passes(mine)
            for one, mine in self.strategies(self.layers[0], [job.site for job in first])
        )

    @property
    def gradient_of(self) -> GradientOf | None:
        """Whose gradients the strategies need; None: only inputs."""
        wanted = {
            job.compressor.gradient_of for job in self.jobs if job.compressor.needs == "gradients"
        }
        if len(wanted) > 1:
            raise UserError("one fit takes gradients of the outputs or of the loss, not of both")
        return next(iter(wanted), None)

    @property
    def wanted(self) -> Wanted:
        """Which covariances the strategies need."""
        strategies = [job.compressor for job in self.jobs if job.compressor.needs != "weights"]
        width = [one.width_only for one in strategies]
        gradients = any(one.needs == "gradients" for one in strategies)
        whole = {role for one in strategies for role in one.full_covariances}
        return Wanted(
            matrices=not all(width), width=any(width), gradients=gradients, whole=frozenset(whole)
        )

    @property
    def holds_out(self) -> bool:
        """Whether a strategy needs text that is left out of the covariances."""
        return any(job.compressor.holds_out for job in self.jobs)

    @property
    def known_min_parameters(self) -> int | None:
        """Numbers stored at the smallest sizes, if known without curves."""
        first, *others = {id(job.compressor): job.compressor for job in self.jobs}.values()
        return None if others else first.min_parameters(self.spec, self.layers)

    def min_parameters(self, curves: Mapping[Site, ErrorCurve]) -> int:
        """Numbers stored at the smallest sizes."""
        least = 0
        for groupings in self.groupings():
            least += min(sum(int(curves[job.site].cost_N[0]) for job in one) for one in groupings)
        return least

    def allocate(self, curves: Mapping[Site, ErrorCurve], numbers: int) -> dict[Site, Size | None]:
        """The sites that a budget chooses, with their sizes."""
        clusters = self.groupings()
        tied = [
            job.site for groupings in clusters for job in groupings[0] if job.compressor.one_size
        ]
        found = share_out(clusters, curves, numbers, tied).sizes
        return {site: size for site, size in found.items() if any(size)}

    def groupings(self) -> list[Groupings]:
        """Alternative groupings into sites, for each set of matrices."""
        out: list[Groupings] = []
        for layer in self.layers:
            for strategy, sites in self.strategies(layer, [j.site for j in self.of(layer)]):
                if isinstance(strategy, LayerFit):
                    out += strategy.groupings(self.spec.geometry(layer), layer, sites)
                else:
                    out += [[[Job(site, strategy)]] for site in sites]
        return out

    @property
    def candidates(self) -> set[Site]:
        """The sites of all groupings."""
        groupings = [grouping for cluster in self.groupings() for grouping in cluster]
        return {job.site for grouping in groupings for job in grouping}

    def of(self, layer: int) -> list[Job]:
        """The jobs of a layer."""
        return [job for job in self.jobs if job.site.layers == (layer,)]

    def strategies(
        self, layer: int, sites: Sequence[Site]
    ) -> Iterator[tuple[Leaf | LayerFit, list[Site]]]:
        """Each strategy of a layer with those of `sites` whose matrices it planned, if any."""
        planned: dict[int, tuple[Leaf | LayerFit, set[tuple[int, str]]]] = {}
        for job in self.of(layer):
            _, matrices = planned.setdefault(id(job.compressor), (job.compressor, set()))
            matrices |= set(job.site.matrices)
        for strategy, matrices in planned.values():
            if mine := [site for site in sites if set(site.matrices) <= matrices]:
                yield strategy, mine


def _check_jobs(jobs: Sequence[Job]) -> None:
    if not any(job.compressor.needs != "weights" for job in jobs):
        raise UserError("this mode decomposes weights alone and takes no calibration text")
    for job in jobs:
        if len(job.site.layers) > 1:
            raise UserError(
                f"{job.site.name} spans several layers, and a fit to text goes layer by layer"
            )
