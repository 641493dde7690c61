"""Do one job: read the matrices of a site, decompose, measure the error."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tensorllm.calibration.fit import Fitted
from tensorllm.compression.details import details_of, error_of_site, norms_of_heads
from tensorllm.compression.plan import Plan, plan
from tensorllm.compression.report import SiteReport
from tensorllm.compressors import Compressor, Site
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.runtime.cost import choose
from tensorllm.tensors.factors import Factors, cast, parameters
from tensorllm.tensors.stacking import is_output_projection
from tensorllm.tensors.unfold import all_finite


@dataclass(frozen=True, slots=True)
class CompressedSite:
    """A site and the factors of its matrices, in the dtype in which they are stored."""

    site: Site
    factors: Factors
    report: SiteReport
    details: dict[str, Any] = field(default_factory=dict)


def run_job(
    site: Site,
    planned: Plan,
    roles: RoleMatrices,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> CompressedSite:
    """Decompose one site of `weights`; nothing is written.

    Args:
        site: the site.
        planned: where its factors come from.
        roles: of the model.
        weights: the parameters that the site touches, by name.
        dtype: of the stored factors; by default that of the weights.
    """
    geometry = roles.spec.geometry(site.layers[0])
    w_ID = [_finite(roles, weights, *m) for m in site.matrices]
    w = site.stack(w_ID, geometry)
    started = time.perf_counter()
    factors = planned.factors(site, w).as_run(output=is_output_projection(site.roles[0]))
    factors = cast(factors, dtype or w.dtype)
    if w.is_cuda:
        torch.cuda.synchronize(w.device)
    seconds = time.perf_counter() - started
    norms = norms_of_heads(site, w, w_ID, factors, geometry)
    plain = factors.plain()
    choice = choose(site, plain, geometry, "auto")
    report = SiteReport(
        name=site.name,
        layers=site.layers,
        roles=site.roles,
        stacking=site.stacking,
        shape=tuple(w.shape),
        kind=factors.kind,
        ranks=plain.ranks,
        parameters_before=w.numel(),
        parameters_after=parameters(plain),
        relative_error=error_of_site(w, factors, norms),
        seconds=seconds,
        auto=f"{'factored' if choice.factored else 'dense'}: {choice.why}",
    )
    return CompressedSite(site, factors, report, details_of(site, w, factors, norms))


def decomposed(
    strategy: Compressor | Fitted,
    roles: RoleMatrices,
    weights: Mapping[str, Tensor],
    layers: Sequence[int] | None = None,
) -> list[CompressedSite]:
    """Decompose all sites of a strategy as `compress` would; nothing is written."""
    planned = plan(strategy, roles, layers)
    return [run_job(site, planned, roles, weights) for site in planned.sites]


def _finite(roles: RoleMatrices, weights: Mapping[str, Tensor], layer: int, role: str) -> Tensor:
    w_ID = roles.read(weights, layer, role)
    if w_ID.is_meta:
        raise UserError(
            f"{roles.name(layer, role)} is not in memory (offloaded?); load the whole model, or "
            "compress its folder layer by layer (tensorllm compress --out)"
        )
    if not w_ID.is_floating_point():
        raise UserError(f"{roles.name(layer, role)} is {w_ID.dtype}, not a floating point type")
    if not all_finite(w_ID):
        raise UserError(f"{roles.name(layer, role)} has NaN or infinite values")
    return w_ID
