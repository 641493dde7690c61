"""The jobs of a strategy for which a model has the matrices; some layers may lack some.

A layer that lacks what a job decomposes is skipped, or refused if it was named.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tensorllm.compressors.base import Compressor, Job
from tensorllm.errors import UserError
from tensorllm.models.access import RoleMatrices
from tensorllm.models.spec import ModelSpec
from tensorllm.tensors.stacking import MLA, Geometry, families


@dataclass(frozen=True)
class Placed:
    """The jobs of a strategy on one model.

    Attributes:
        jobs: those whose matrices exist.
        layers: the requested layers, without those that have no job left.
        missing_roles: layer -> the roles that a job needs and the layer lacks.
    """

    jobs: list[Job]
    layers: tuple[int, ...]
    missing_roles: dict[int, tuple[str, ...]]


def placed(compressor: Compressor, roles: RoleMatrices, layers: Sequence[int] | None) -> Placed:
    """The jobs of a strategy for layers of a model.

    Args:
        compressor: the strategy.
        roles: the model's role matrices.
        layers: counted from 0; None: all, skipping those that lack what a job needs.

    Raises:
        UserError: a named layer lacks what a job needs, or no layer has it.
    """
    spec = roles.spec
    wanted = roles.check_layers(range(roles.layers) if layers is None else layers)
    jobs = compressor.jobs(spec, wanted)
    lacking = _lacking(jobs, spec, roles)
    if layers is not None:
        lacking |= _empty(jobs, spec, wanted)
    left = [layer for layer in wanted if layer not in lacking]
    if lacking and left and any(len(job.site.layers) > 1 for job in jobs):
        jobs = compressor.jobs(spec, left)
    jobs = _whole(jobs, lacking)
    if lacking and (layers is not None or not jobs):
        layer, missing = next(iter(lacking.items()))
        missing = families(missing)
        there = spec.having(missing)
        where = f"of layers, {', '.join(map(str, there))} have" if there else "no layer has"
        raise UserError(
            f"layer {layer} has no matrix {', '.join(missing)}"
            f" (it has {', '.join(spec.geometry(layer).families) or 'none'}); {where} all of them"
            f"{_latent(spec.geometry(layer))}"
        )
    missing_roles = {layer: families(missing) for layer, missing in lacking.items()}
    gone = set(lacking) - {layer for job in jobs for layer in job.site.layers}
    for job in jobs:
        _check_alike(job, spec)
    return Placed(jobs, tuple(n for n in wanted if n not in gone), missing_roles)


def _latent(geometry: Geometry) -> str:
    """For error messages: why heads cannot be stacked in multi-head latent attention."""
    if not set(MLA) & set(geometry.roles):
        return ""
    return (
        ". Its attention is latent (MLA): keys and values of all heads are products of kv_a and "
        "kv_b, low-rank already, and there are no matrices k and v over the model width to stack "
        "with q and o; svd, laser and the modes fitted to text work on each of its matrices"
    )


def _lacking(
    jobs: Sequence[Job], spec: ModelSpec, roles: RoleMatrices
) -> dict[int, tuple[str, ...]]:
    out: dict[int, list[str]] = {}
    for job in jobs:
        roles.check_layers(job.site.layers)
        for layer, role in job.site.matrices:
            if role not in spec.geometry(layer).roles:
                out.setdefault(layer, []).append(role)
    return {layer: tuple(dict.fromkeys(missing)) for layer, missing in sorted(out.items())}


def _empty(
    jobs: Sequence[Job], spec: ModelSpec, layers: Sequence[int]
) -> dict[int, tuple[str, ...]]:
    """Layers that get no job because they have none of the strategy's matrices."""
    edited = {layer for job in jobs for layer in job.site.layers}
    roles = {f for job in jobs for f in job.site.families} or set(spec.roles)
    return {
        layer: tuple(sorted(roles))
        for layer in layers
        if layer not in edited and not roles & set(spec.geometry(layer).families)
    }


def _whole(jobs: Sequence[Job], lacking: dict[int, tuple[str, ...]]) -> list[Job]:
    """The jobs none of whose matrices is missing."""
    return [
        job
        for job in jobs
        if not any(role in lacking.get(layer, ()) for layer, role in job.site.matrices)
    ]


def _check_alike(job: Job, spec: ModelSpec) -> None:
    """Refuse a job over layers whose matrices differ in shape."""
    first, *others = job.site.layers
    for layer in others:
        for role in job.site.roles:
            one, other = (spec.geometry(n).shape(role) for n in (first, layer))
            if one != other:
                raise UserError(
                    f"layers {first} and {layer} cannot be decomposed as one tensor: {role!r} is "
                    f"{one} in the one and {other} in the other"
                )
