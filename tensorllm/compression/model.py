"""Compressing a model that is in memory, in place."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from tensorllm.compression.jobs import Compressed, plan_jobs, run_job, write_dense
from tensorllm.compression.report import CompressionReport, Totals, saved_parameters
from tensorllm.compressors import Compressor
from tensorllm.compressors.settings import settings_of
from tensorllm.environment import environment
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.progress import Progress, quiet

ATTRIBUTE = "tensorllm_compression"


@dataclass(frozen=True, slots=True)
class Compression:
    """What was done to a model: kept on it so that it can be saved factored."""

    compressor: Compressor
    layers: tuple[int, ...]
    sites: list[Compressed]


def compress(
    model: nn.Module,
    compressor: Compressor,
    layers: Sequence[int] | None = None,
    *,
    progress: Progress = quiet,
) -> CompressionReport:
    """Replace the weights of `layers` by their low-rank approximation, in place.

    Args:
        model: any transformers model of a known architecture.
        compressor: the strategy; see `tensorllm list compressors`.
        layers: counted from 0; all layers by default.
        progress: called with (jobs done, jobs in all, the site's name).

    Returns:
        What was done. The factors stay on the model, so that `save` can store them.

    Raises:
        UserError: settings that do not fit the model; it is then unchanged.
    """
    _refuse_compressed(model)
    started = time.perf_counter()
    weights = parameters_of(model)
    config: Any = model.config
    roles = RoleMatrices(config, weights)
    layers = tuple(range(roles.layers)) if layers is None else tuple(layers)
    jobs = plan_jobs(compressor, roles, layers)
    done = []
    for index, job in enumerate(jobs):
        progress(index, len(jobs), job.site.name)
        done.append(run_job(job, roles, weights))
    for compressed in done:  # only now: a failure half-way leaves the model as it was
        write_dense(compressed, roles, weights)
    progress(len(jobs), len(jobs), "done")

    parameters = sum(p.numel() for p in model.parameters())
    sites = [compressed.report for compressed in done]
    mode, settings = settings_of(compressor)
    report = CompressionReport(
        model=getattr(config, "_name_or_path", "") or config.model_type,
        revision=getattr(config, "_commit_hash", None),
        mode=mode,
        settings=settings,
        layers=layers,
        dtype=str(next(iter(weights.values())).dtype).removeprefix("torch."),
        format="dense",
        sites=sites,
        geometry=roles.geometry,
        model_layers=roles.layers,
        totals=Totals(parameters, parameters - saved_parameters(sites)),
        seconds=time.perf_counter() - started,
        environment=environment(),
    )
    setattr(model, ATTRIBUTE, Compression(compressor, layers, done))
    return report


def compression_of(model: nn.Module) -> Compression | None:
    """What `compress` did to this model, or None."""
    return getattr(model, ATTRIBUTE, None)


@contextmanager
def compressed(
    model: nn.Module, compressor: Compressor, layers: Sequence[int] | None = None
) -> Iterator[CompressionReport]:
    """The model compressed within the block; afterwards its weights are back bit for bit."""
    _refuse_compressed(model)
    weights = parameters_of(model)
    roles = RoleMatrices(model.config, weights)
    wanted = tuple(range(roles.layers)) if layers is None else tuple(layers)
    sites = [job.site for job in plan_jobs(compressor, roles, wanted)]
    touched = {roles.name(*matrix) for site in sites for matrix in site.matrices}
    kept = {name: weights[name].clone() for name in touched}
    try:
        yield compress(model, compressor, wanted)
    finally:
        for name, w in kept.items():
            weights[name].copy_(w)
        if compression_of(model) is not None:
            delattr(model, ATTRIBUTE)


def _refuse_compressed(model: nn.Module) -> None:
    if compression_of(model) is not None:
        raise UserError("this model is compressed already; load the original again")
