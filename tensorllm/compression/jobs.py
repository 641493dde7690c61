"""Doing one job: read the matrices of a site, decompose, say how well, write them back."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tensorllm.compression.details import details_of, error_of_site, norms_of_heads
from tensorllm.compression.report import SiteReport
from tensorllm.compressors import Compressor, Job, Site
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.runtime.cost import choose
from tensorllm.tensors.factors import FACTORS, Factors, cast, parameters
from tensorllm.tensors.unfold import all_finite


@dataclass(frozen=True, slots=True)
class Compressed:
    """A site and the factors that stand for its matrices, in the dtype in which they are stored."""

    site: Site
    factors: Factors
    report: SiteReport
    details: dict[str, Any] = field(default_factory=dict)


def plan_jobs(compressor: Compressor, roles: RoleMatrices, layers: Sequence[int]) -> list[Job]:
    """The jobs of a compression; whatever does not fit the model is refused before any work."""
    jobs = compressor.jobs(roles.spec, roles.check_layers(layers))
    for job in jobs:
        roles.check_layers(job.site.layers)
        job.compressor.check(job.site.shape(roles.geometry))
    matrices = sorted(m for job in jobs for m in job.site.matrices)
    for one, other in pairwise(matrices):
        if one == other:
            raise UserError(f"matrix {one[1]!r} of layer {one[0]} would be compressed twice")
    return jobs


def run_job(
    job: Job, roles: RoleMatrices, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> Compressed:
    """Decompose one site of `weights`; nothing is written.

    Args:
        dtype: in which the factors are stored; that of the weights by default.
    """
    site = job.site
    w_ID = [_finite(roles, weights, *m) for m in site.matrices]
    w = site.stack(w_ID, roles.geometry)
    started = time.perf_counter()
    factors = cast(job.compressor.decompose(w), dtype or w.dtype)
    if w.is_cuda:
        torch.cuda.synchronize(w.device)
    seconds = time.perf_counter() - started
    norms = norms_of_heads(site, w, w_ID, factors, roles.geometry)
    choice = choose(site, factors, roles.geometry, "auto")
    report = SiteReport(
        name=site.name,
        layers=site.layers,
        roles=site.roles,
        stacking=site.stacking,
        shape=tuple(w.shape),
        kind=FACTORS.name_of(type(factors)),
        ranks=factors.ranks,
        parameters_before=w.numel(),
        parameters_after=parameters(factors),
        relative_error=error_of_site(w, factors, norms),
        seconds=seconds,
        auto=f"{'factored' if choice.factored else 'dense'}: {choice.why}",
    )
    return Compressed(site, factors, report, details_of(site, w, factors, norms))


def write_dense(done: Compressed, roles: RoleMatrices, weights: Mapping[str, Tensor]) -> None:
    """Put the matrices that the factors stand for into `weights`, in place."""
    matrices = done.site.unstack(done.factors.dense(), roles.geometry)
    for (layer, role), w_ID in zip(done.site.matrices, matrices, strict=True):
        roles.write(weights, layer, role, w_ID)


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
