"""The engine: plan, measure and fit where a text is given, decompose, write, report.

`compress` works on a model in memory, `compress_folder` from folder to folder, unit by unit, so
that the whole model is never in memory. Both make the same plan (`compression.plan`).
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from tensorllm.calibration.fit import Fitted, fit
from tensorllm.calibration.sequences import Calibration
from tensorllm.checkpoint.factored import STEM
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.checkpoint.writer import ShardWriter, check_target, exclusive
from tensorllm.compression.budget import meet_budget
from tensorllm.compression.jobs import CompressedSite, run_job
from tensorllm.compression.narrow import Narrowing, chosen, foreseen
from tensorllm.compression.plan import Plan, plan
from tensorllm.compression.prepare import fit_folder_of, prepared
from tensorllm.compression.publish import publish
from tensorllm.compression.report import CompressionReport, Totals, saved_parameters
from tensorllm.compression.room import StoredTensor, with_room
from tensorllm.compression.task import FolderTask
from tensorllm.compression.units import Unit, open_checkpoint, run_unit, units
from tensorllm.compressors import Compressor
from tensorllm.compressors.budget import Budget
from tensorllm.environment import environment, versions
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.models.task import name_of
from tensorllm.progress import Progress, quiet
from tensorllm.weights import restored, write_dense

ATTRIBUTE = "tensorllm_compression"


@dataclass(frozen=True, slots=True)
class Compression:
    """What was done to a model; kept on it so that it can be saved as factors."""

    plan: Plan
    sites: list[CompressedSite]


def compress(
    model: nn.Module,
    strategy: Compressor | Fitted,
    layers: Sequence[int] | None = None,
    *,
    budget: Budget | None = None,
    calibration: Calibration | None = None,
    progress: Progress = quiet,
) -> CompressionReport:
    """Replace the weights of `layers` by their low-rank approximation, in place.

    Args:
        model: any transformers model of a known architecture.
        strategy: see `tensorllm list compressors`; or a fitted one, from `fit`.
        layers: counted from 0; all layers by default.
        budget: a target size, for a strategy without one of its own.
        calibration: the text, for a strategy that is fitted to one.
        progress: called with (steps done, steps in all, what is done).

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
    target = budget or (None if isinstance(strategy, Fitted) else strategy.budget)
    if target is not None and target.target_bytes is not None:
        assert isinstance(strategy, Compressor), "a fit has met its target"
        held = {n: StoredTensor(tuple(w.shape), w.element_size()) for n, w in weights.items()}
        strategy, budget = with_room(strategy, target, roles, held, layers)
    if calibration is not None:
        if isinstance(strategy, Fitted):
            raise UserError("this strategy is fitted already; give no calibration text")
        strategy = fit(strategy, model, calibration, layers, budget=budget, progress=progress)
    parameters = sum(p.numel() for p in model.parameters())
    if budget is not None and not isinstance(strategy, Fitted):
        strategy = meet_budget(
            strategy, roles, lambda _: weights, parameters, budget, layers, progress=progress
        )
    planned = plan(strategy, roles, layers)
    done = []
    for index, site in enumerate(planned.sites):
        progress(index, len(planned.sites), site.name)
        done.append(run_job(site, planned, roles, weights))
    for compressed in done:  # only now, so that an earlier failure leaves the model as it was
        write_dense(compressed.site, compressed.factors, roles, weights)
    for name, w in planned.changed(roles).items():
        weights[name].copy_(w)
    progress(len(planned.sites), len(planned.sites), "done")

    report = _report(model, planned, done, roles, parameters, time.perf_counter() - started)
    setattr(model, ATTRIBUTE, Compression(planned, done))
    return report


def _report(
    model: nn.Module,
    planned: Plan,
    done: Sequence[CompressedSite],
    roles: RoleMatrices,
    parameters: int,
    seconds: float,
) -> CompressionReport:
    config: Any = model.config
    sites = [compressed.report for compressed in done]
    mode, settings = planned.settings
    return CompressionReport(
        model=name_of(config),
        revision=getattr(config, "_commit_hash", None),
        mode=mode,
        settings=settings,
        layers=planned.layers,
        dtype=str(next(iter(parameters_of(model).values())).dtype).removeprefix("torch."),
        format="dense",
        sites=sites,
        spec=roles.spec,
        totals=Totals(parameters, parameters - saved_parameters(sites)),
        seconds=seconds,
        environment=environment(),
        structure=roles.layout.describe(),
        missing_roles=dict(planned.missing_roles),
    )


def compression_of(model: nn.Module) -> Compression | None:
    """What `compress` did to this model; None if nothing."""
    return getattr(model, ATTRIBUTE, None)


@contextmanager
def compressed(
    model: nn.Module, strategy: Compressor | Fitted, layers: Sequence[int] | None = None
) -> Iterator[CompressionReport]:
    """Compress the model within the block; afterwards its weights are restored bit for bit."""
    _refuse_compressed(model)
    weights = parameters_of(model)
    roles = RoleMatrices(model.config, weights)
    planned = plan(strategy, roles, layers)
    before = {name: weights[name].clone() for name in planned.changed(roles)}
    with restored(planned.sites, roles, weights):
        try:
            yield compress(model, strategy, layers)
        finally:
            for name, w in before.items():
                weights[name].copy_(w)
            if compression_of(model) is not None:
                delattr(model, ATTRIBUTE)


def compress_folder(task: FolderTask, progress: Progress = quiet) -> CompressionReport:
    """Compress a local checkpoint into a new folder; an interrupted run is resumed.

    Raises:
        UserError: the request does not fit the checkpoint; nothing is written.
        Incomplete: the disk is full; the finished part is kept for the next run.
    """
    started = time.perf_counter()
    check_target(task.folder, overwrite=task.overwrite, source=task.source)
    checkpoint, roles = open_checkpoint(task.source)
    if task.format == "narrow":
        foreseen(task, roles)  # refuse now, not after the fit
    with exclusive(task.folder), fit_folder_of(task) as work:
        planned = plan(prepared(task, work, progress), roles, task.layers)
        cut = chosen(task, planned, checkpoint, roles) if task.format == "narrow" else None
        todo = units(checkpoint, roles, planned.sites)
        with ShardWriter(
            task.folder,
            stem=STEM if task.format == "factored" else "model",
            fingerprint=_fingerprint(task, planned, checkpoint),
            shard_bytes=task.shard_bytes,
            overwrite=task.overwrite,
        ) as writer:
            _run_units(todo, planned, task, checkpoint, roles, writer, progress, cut)
            return publish(task, planned, checkpoint, roles, writer, started, cut)


def _run_units(
    todo: Sequence[Unit],
    planned: Plan,
    task: FolderTask,
    checkpoint: Checkpoint,
    roles: RoleMatrices,
    writer: ShardWriter,
    progress: Progress,
    cut: Narrowing | None,
) -> None:
    """Run every unit that an earlier, interrupted run has not finished."""
    total = sum(_bytes(checkpoint, unit) for unit in todo)
    done, finished = 0, writer.finished
    for unit in todo:
        progress(done, total, unit.name)
        if unit.name not in finished:
            tensors, note = run_unit(unit, planned, task, checkpoint, roles)
            if cut is not None:
                tensors = {name: cut(name, tensor) for name, tensor in tensors.items()}
            writer.add(unit.name, tensors, note)
        done += _bytes(checkpoint, unit)
    progress(total, total, "finishing")


def _bytes(checkpoint: Checkpoint, unit: Unit) -> int:
    return sum(checkpoint.entries[name].bytes for name in unit.names)


def _fingerprint(task: FolderTask, planned: Plan, checkpoint: Checkpoint) -> dict[str, Any]:
    """What must be the same for an interrupted run to be continued."""
    return {
        **checkpoint.fingerprint(),
        "compressor": list(planned.settings),
        "layers": list(planned.layers),
        "format": task.format,
        "dtype": str(task.dtype),
        "shard_bytes": task.shard_bytes,
        "versions": versions(),
    }


def _refuse_compressed(model: nn.Module) -> None:
    if compression_of(model) is not None:
        raise UserError("this model is compressed already; load the original again")
