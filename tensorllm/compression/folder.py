"""Compressing a checkpoint on disk unit by unit, so that the model is never whole in memory."""

import time
from collections.abc import Sequence
from typing import Any

from tensorllm.checkpoint.factored import STEM
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.checkpoint.writer import ShardWriter, check_target, exclusive
from tensorllm.compression.jobs import plan_jobs
from tensorllm.compression.publish import publish
from tensorllm.compression.report import CompressionReport
from tensorllm.compression.task import FolderTask
from tensorllm.compression.units import Unit, open_checkpoint, run_unit, units
from tensorllm.compressors.settings import settings_of
from tensorllm.environment import versions
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.progress import Progress, quiet

__all__ = ["FolderTask", "compress_folder"]


def compress_folder(task: FolderTask, progress: Progress = quiet) -> CompressionReport:
    """Compress a local checkpoint into a new folder; killed and run again, it resumes.

    Raises:
        UserError: what was asked does not fit the checkpoint; nothing is written.
        Incomplete: the disk is full; the finished part is kept for the next run.
    """
    started = time.perf_counter()
    check_target(task.target, overwrite=task.overwrite, source=task.source)
    checkpoint, roles = open_checkpoint(task.source)
    layers = tuple(range(roles.layers)) if task.layers is None else tuple(task.layers)
    work = units(checkpoint, roles, plan_jobs(task.compressor, roles, layers))
    with exclusive(task.target):
        writer = ShardWriter(
            task.target,
            stem=STEM if task.format == "factored" else "model",
            fingerprint=_fingerprint(task, checkpoint, layers),
            shard_bytes=task.shard_bytes,
            overwrite=task.overwrite,
        )
        try:
            _run_units(work, task, checkpoint, roles, writer, progress)
            return publish(task, checkpoint, roles, layers, writer, started)
        except UserError:  # wrong weights, met on the way: nothing to go on with
            writer.discard()
            raise
        finally:
            writer.rest()  # before another run may write here


def _run_units(
    work: Sequence[Unit],
    task: FolderTask,
    checkpoint: Checkpoint,
    roles: RoleMatrices,
    writer: ShardWriter,
    progress: Progress,
) -> None:
    """Every unit that an earlier, interrupted run has not finished."""
    total = sum(_bytes(checkpoint, unit) for unit in work)
    done, finished = 0, writer.finished
    for unit in work:
        progress(done, total, unit.name)
        if unit.name not in finished:
            writer.add(unit.name, *run_unit(unit, task, checkpoint, roles))
        done += _bytes(checkpoint, unit)
    progress(total, total, "finishing")


def _bytes(checkpoint: Checkpoint, unit: Unit) -> int:
    return sum(checkpoint.entries[name].bytes for name in unit.names)


def _fingerprint(
    task: FolderTask, checkpoint: Checkpoint, layers: tuple[int, ...]
) -> dict[str, Any]:
    """What must be the same for an interrupted run to be continued."""
    return {
        **checkpoint.fingerprint(),
        "compressor": list(settings_of(task.compressor)),
        "layers": list(layers),
        "format": task.format,
        "dtype": str(task.dtype),
        "shard_bytes": task.shard_bytes,
        "versions": versions(),
    }
