"""What a compression will do: which sites, and where the factors of each come from."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from tensorllm.calibration.fit import Fitted
from tensorllm.compressors import COMPRESSORS, Compressor, Job, Leaf, Site
from tensorllm.compressors.placing import Placed, placed
from tensorllm.compressors.settings import settings_of
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.tensors.factors import Factors


@dataclass(frozen=True)
class Plan(ABC):
    """What a compression will do.

    Attributes:
        strategy: the compressor, or the fitted strategy.
        layers: requested layers that have something to compress.
        sites: those that get factors.
        settings: the mode's name and its settings, for reports and manifests.
        missing_roles: layer -> the roles that it lacks.
    """

    strategy: Compressor | Fitted
    layers: tuple[int, ...]
    sites: tuple[Site, ...]
    settings: tuple[str, dict[str, Any]]
    missing_roles: Mapping[int, tuple[str, ...]]

    @abstractmethod
    def factors(self, site: Site, w: Tensor) -> Factors:
        """The factors of a site; `w` is its stacked tensor."""

    def parameters(self, layer: int) -> dict[str, Tensor]:
        """Norms and biases of a layer that the strategy changes, by names within the layer."""
        del layer
        return {}

    def changed(self, roles: RoleMatrices) -> dict[str, Tensor]:
        """All `parameters`, by their names in the model."""
        return {
            f"{roles.layer_path(layer)}.{name}": w
            for layer in self.layers
            for name, w in self.parameters(layer).items()
        }


@dataclass(frozen=True)
class DecompositionPlan(Plan):
    """Decomposes each site's weights when they are needed.

    Attributes:
        jobs: each site with its compressor.
    """

    jobs: list[Job]

    def factors(self, site: Site, w: Tensor) -> Factors:
        (leaf,) = (job.compressor for job in self.jobs if job.site == site)
        assert isinstance(leaf, Leaf), "what is not fitted was refused by `plan`"
        return leaf.decompose(w)


@dataclass(frozen=True)
class FittedPlan(Plan):
    """Holds all factors already: the strategy was fitted to a text."""

    strategy: Fitted

    def factors(self, site: Site, w: Tensor) -> Factors:
        del w
        return self.strategy.factors(site)

    def parameters(self, layer: int) -> dict[str, Tensor]:
        return self.strategy.parameters(layer)


def plan_jobs(
    compressor: Compressor, roles: RoleMatrices, layers: Sequence[int] | None
) -> list[Job]:
    """The jobs of a compression; whatever does not fit the model is refused before any work."""
    return _checked(placed(compressor, roles, layers), roles).jobs


def _checked(found: Placed, roles: RoleMatrices) -> Placed:
    for job in found.jobs:
        job.compressor.check(job.site.shape(roles.spec.geometry(job.site.layers[0])))
    _refuse_overlap([job.site for job in found.jobs])
    return found


def plan(strategy: Compressor | Fitted, roles: RoleMatrices, layers: Sequence[int] | None) -> Plan:
    """The plan of a strategy for a model.

    Args:
        strategy: the compressor, or the fitted strategy.
        roles: of the model.
        layers: counted from 0; by default all, or those of a fitted strategy.

    Raises:
        UserError: settings that do not fit the model, a strategy that needs a text, or one that
            was fitted to other layers.
    """
    if isinstance(strategy, Fitted):
        return _of_fit(strategy, roles, layers)
    return decompositions(strategy, roles, layers)


def decompositions(
    compressor: Compressor, roles: RoleMatrices, layers: Sequence[int] | None
) -> DecompositionPlan:
    """The plan of a strategy that needs no text.

    Raises:
        UserError: settings that do not fit the model, or a strategy that needs a text.
    """
    found = _checked(placed(compressor, roles, layers), roles)
    unfitted = [job.compressor for job in found.jobs if job.compressor.needs != "weights"]
    if unfitted:
        mode = COMPRESSORS.name_of(type(unfitted[0].named))
        raise UserError(
            f"mode {mode!r} is fitted to text: give --calibration FILE (or calibration= in Python)"
        )
    return DecompositionPlan(
        compressor,
        found.layers,
        tuple(job.site for job in found.jobs),
        settings_of(compressor),
        found.missing_roles,
        found.jobs,
    )


def _of_fit(fitted: Fitted, roles: RoleMatrices, layers: Sequence[int] | None) -> Plan:
    wanted = fitted.layers if layers is None else tuple(layers)
    if sorted(roles.check_layers(wanted)) != sorted(fitted.layers):
        raise UserError(
            f"this strategy was fitted to layers {sorted(fitted.layers)}, not {sorted(wanted)}"
        )
    return FittedPlan(fitted, wanted, fitted.sites, fitted.settings, fitted.missing_roles)


def _refuse_overlap(sites: Sequence[Site]) -> None:
    matrices = sorted(m for site in sites for m in site.matrices)
    for one, other in pairwise(matrices):
        if one == other:
            raise UserError(f"matrix {one[1]!r} of layer {one[0]} would be compressed twice")
