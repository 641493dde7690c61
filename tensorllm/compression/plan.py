"""What a compression will do: which sites, and where the factors of each come from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
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
class Plan:
    """What a compression will do: sites, and where the factors of each come from.

    Attributes:
        strategy: as it decomposes, or as it was fitted.
        layers: those that were asked for and have something that is compressed.
        passed_over: layer -> the roles that it lacks.
    """

    strategy: Compressor | Fitted
    layers: tuple[int, ...]
    jobs: list[Job]
    passed_over: dict[int, tuple[str, ...]] = field(default_factory=dict)

    @property
    def sites(self) -> list[Site]:
        if isinstance(self.strategy, Fitted):
            return list(self.strategy.sites)
        return [job.site for job in self.jobs]

    @property
    def settings(self) -> tuple[str, dict[str, Any]]:
        """The mode's name and its settings, for reports and manifests."""
        if isinstance(self.strategy, Fitted):
            return self.strategy.settings
        return settings_of(self.strategy)

    def factors(self, site: Site, w: Tensor) -> Factors:
        """The factors of a site; `w` is its tensor."""
        if isinstance(self.strategy, Fitted):
            return self.strategy.factors(site)
        (leaf,) = (job.compressor for job in self.jobs if job.site == site)
        assert isinstance(leaf, Leaf), "what is not fitted was refused by `plan`"
        return leaf.decompose(w)

    def changed(self, roles: RoleMatrices) -> dict[str, tuple[int, str]]:
        """Norms and biases that were fitted too: name -> layer and name below it."""
        if not isinstance(self.strategy, Fitted):
            return {}
        return {
            f"{roles.layer_path(layer)}.{name}": (layer, name)
            for layer in self.strategy.layers
            for name in self.strategy.parameters(layer)
        }

    def parameter(self, layer: int, name: str) -> Tensor:
        """One of `changed`."""
        assert isinstance(self.strategy, Fitted)
        return self.strategy.parameters(layer)[name]


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
        layers: counted from 0; all by default, or those that a fit was made for.

    Raises:
        UserError: settings that do not fit the model, a strategy that needs a text, or a fit to
            other layers.
    """
    if isinstance(strategy, Fitted):
        wanted = strategy.layers if layers is None else tuple(layers)
        if sorted(roles.check_layers(wanted)) != sorted(strategy.layers):
            raise UserError(
                f"this strategy was fitted to layers {sorted(strategy.layers)}, "
                f"not {sorted(wanted)}"
            )
        return Plan(strategy, tuple(wanted), [], dict(strategy.passed_over))
    found = _checked(placed(strategy, roles, layers), roles)
    unfitted = [job.compressor for job in found.jobs if job.compressor.needs != "weights"]
    if unfitted:
        mode = COMPRESSORS.name_of(type(unfitted[0]))
        raise UserError(
            f"mode {mode!r} is fitted to text: give --calibration FILE (or calibration= in Python)"
        )
    return Plan(strategy, found.layers, found.jobs, found.passed_over)


def _refuse_overlap(sites: Sequence[Site]) -> None:
    matrices = sorted(m for site in sites for m in site.matrices)
    for one, other in pairwise(matrices):
        if one == other:
            raise UserError(f"matrix {one[1]!r} of layer {one[0]} would be compressed twice")
