"""Before anything is decomposed: share out the target, fit the strategy to its text.

An interrupted fit is kept in a folder beside the target, from which the same command resumes.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tensorllm.calibration.fit import Fitted, fit, fit_folder, store_for
from tensorllm.calibration.ranks import all_ranks
from tensorllm.calibration.sequences import Calibration
from tensorllm.checkpoint.loader import Loader
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.checkpoint.whole import load_whole
from tensorllm.compression.budget import meet_budget
from tensorllm.compression.room import stored_in, with_room
from tensorllm.compression.task import FolderTask
from tensorllm.compression.units import open_checkpoint
from tensorllm.compressors import Compressor, Job, LayerFit
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.models.task import context_length
from tensorllm.progress import Progress, quiet


def prepared(
    task: FolderTask, work: Path | None = None, progress: Progress = quiet
) -> Compressor | Fitted:
    """The task's strategy with its sizes and, if it needs a text, its factors.

    Args:
        task: what is to be made.
        work: the folder in which an interrupted fit is kept; None: in memory.
        progress: called with (steps done, steps in all, what is done).
    """
    if isinstance(task.compressor, Fitted):
        return task.compressor
    checkpoint, roles = open_checkpoint(task.source)
    task = aimed(task, checkpoint, roles)
    if task.calibration is not None:
        return _fitted(task, task.strategy, task.calibration, work, progress)
    if task.budget is None:
        return task.compressor
    device = torch.device(task.device)

    def read(names: Any) -> Any:
        return {name: w.to(device, task.dtype) for name, w in checkpoint.read(names).items()}

    return meet_budget(
        task.strategy,
        roles,
        read,
        checkpoint.parameters,
        task.budget,
        task.layers,
        progress=progress,
    )


def aimed(task: FolderTask, checkpoint: Checkpoint, roles: RoleMatrices) -> FolderTask:
    """Prepare a target in bytes: sizes become ranks and bits, and fixed costs are subtracted.

    Raises:
        UserError: the format stores neither factors nor few bits, or the target is too small.
    """
    target = task.aim
    if target is None or target.target_bytes is None:
        return task
    if task.target is not None and task.format != "factored":
        raise UserError(
            "target_bytes is met by factors and rounded matrices, which --format factored stores; "
            f"got --format {task.format}"
        )
    tensors = stored_in(checkpoint, task.dtype)
    written = (task.dtype or checkpoint.config.dtype) if task.calibration is not None else None
    strategy, budget = with_room(
        task.strategy, target, roles, tensors, task.layers, task.shard_bytes, written
    )
    return replace(task, compressor=strategy, budget=budget)


def _fitted(
    task: FolderTask,
    strategy: Compressor,
    text: Calibration,
    work: Path | None,
    progress: Progress,
) -> Fitted:
    if work is not None and task.format == "narrow":
        work /= task.format  # there the same strategy chooses from fewer candidates
    if task.stream:
        assert work is not None, "a streamed fit keeps its states on disk"
        return fit_folder(
            strategy,
            task.source,
            text,
            task.layers,
            work=work,
            budget=task.budget,
            dtype=computing_dtype_of(task),
            device=task.device,
            progress=progress,
        )
    config, dtype = Checkpoint(task.source).config, computing_dtype_of(task)
    model = load_whole(task.source, config, dtype, language=False).to(task.device)
    store = None
    if work is not None:
        dtype = next(model.parameters()).dtype
        store = store_for(work, strategy, task.source, text, task.layers, dtype, task.budget)
    return fit(
        strategy,
        model,
        text,
        task.layers,
        budget=task.budget,
        store=store,
        progress=progress,
    )


def computing_dtype_of(task: FolderTask) -> torch.dtype | None:
    """The dtype in which the model runs while it is fitted, the same in every process.

    The result is written in the requested dtype, or in the stored one.
    """
    found = Loader(task.source, task.dtype, task.device).quickest(overflows=False).dtype
    wide_1 = torch.tensor([float(found == torch.float32)], device=task.device)
    all_ranks().sum(wide_1)  # float32 if it is faster for at least one process
    return torch.float32 if wide_1.item() else found


def help_to_fit(task: FolderTask) -> None:
    """Take part in a fit by several processes, of which another one writes the result.

    Raises:
        UserError, Incomplete: as `compress_folder`.
    """
    task = aimed(task, *open_checkpoint(task.source))
    assert task.calibration is not None, "only a fit is shared out"
    _fitted(task, task.strategy, task.calibration, _work(task), quiet)


def _work(task: FolderTask) -> Path:
    return task.folder.parent / f".{task.folder.name}.fit"


@contextmanager
def _work_folder(task: FolderTask) -> Iterator[Path]:
    """The folder for an interrupted fit, beside the target; removed once the target exists."""
    work = _work(task)
    before = work.exists()  # left by an interrupted fit, or someone else's folder
    try:
        yield work
    except UserError:  # refused: repeating the command cannot resume it
        if not before:
            shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)


def fit_folder_of(task: FolderTask) -> AbstractContextManager[Path | None]:
    """The folder in which a fit is kept while it runs; None if nothing is fitted."""
    return _work_folder(task) if task.calibration is not None else nullcontext()


def check_fit(
    task: FolderTask, jobs: Sequence[Job], checkpoint: Checkpoint, roles: RoleMatrices
) -> int | None:
    """Refuse a text or a target that does not fit the model, before anything is measured.

    Returns:
        The numbers that all factors together may store; None if no target says so.
    """
    assert task.calibration is not None, "asked for a fit"
    geometry = roles.spec.geometry
    matrices = [matrix for job in jobs for matrix in job.site.matrices]
    config = checkpoint.config.get_text_config()
    widest = max(geometry(layer).inputs(role) for layer, role in matrices)
    task.calibration.check(config.vocab_size, widest, context_length(config))
    strategy, target = task.strategy, task.aim
    if target is None or target.max_loss_increase is not None:
        return None
    if target.target_bytes is not None:
        aimed(task, checkpoint, roles)  # refuses a target that is too small
        return None
    before = sum(geometry(n).numel(role) for n, role in matrices)
    layers = sorted({layer for layer, _ in matrices})
    least = None
    if isinstance(strategy, LayerFit):
        least = strategy.min_parameters(roles.spec, layers)
    return target.numbers(before, checkpoint.parameters, least)
