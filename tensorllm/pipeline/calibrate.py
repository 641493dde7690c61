"""Fitting a data-aware strategy to a model and a text, before it compresses."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tensorllm.calibration.fit import fit, fit_folder, store_for
from tensorllm.calibration.sequences import Calibration, read_calibration
from tensorllm.checkpoint.writer import exclusive
from tensorllm.compression.model import Progress
from tensorllm.compression.task import FolderTask
from tensorllm.compressors.activation import ActivationTucker
from tensorllm.errors import UserError
from tensorllm.pipeline.models import Loader

LENGTH = 512  # tokens of a calibration sequence, at most
Check = Callable[[Calibration, Any], None]


def accept(text: Calibration, tokenizer: Any) -> None:
    """The check that refuses nothing."""


def calibrated(
    task: FolderTask,
    file: Path,
    *,
    sequences: int,
    seed: int,
    progress: Progress,
    check: Check,
    stream: bool = False,
) -> FolderTask:
    """The task with its strategy fitted to what the model sees on the text of `file`.

    Args:
        check: refuses a text, given the tokenizer, before anything is fitted to it.
        stream: the model's layers are read from disk one at a time.

    Where there is an output folder, an interrupted fit goes on from what it had finished.
    """
    if not isinstance(task.compressor, ActivationTucker):
        raise UserError(
            "--calibration is for the modes that use data: activation-tucker and -hybrid"
        )
    if stream and task.target == Path():
        raise UserError("--stream needs --out FOLDER: what is fitted is kept beside it meanwhile")
    loader = Loader(task.source, task.dtype, task.device)
    tokenizer = loader.tokenizer()
    context = getattr(loader.config(), "max_position_embeddings", None) or LENGTH
    text = read_calibration(
        file, tokenizer, sequences=sequences, length=min(LENGTH, context), seed=seed
    )
    check(text, tokenizer)
    if not stream and task.target == Path():
        fitted = fit(task.compressor, loader(), text, task.layers, progress=progress)
        return replace(task, compressor=fitted)
    with exclusive(task.target):
        try:
            return replace(task, compressor=_resumable(task, text, loader, stream, progress))
        except UserError:  # refused: the same command will not go on
            clear(task)
            raise


def _resumable(
    task: FolderTask, text: Calibration, loader: Loader, stream: bool, progress: Progress
) -> ActivationTucker:
    """The fit with what it finishes kept beside the output until that is there."""
    assert isinstance(task.compressor, ActivationTucker)
    compressor, source, layers, work = task.compressor, task.source, task.layers, _work(task)
    if stream:
        return fit_folder(
            compressor,
            source,
            text,
            layers,
            work=work,
            dtype=task.dtype,
            device=task.device,
            progress=progress,
        )
    model = loader()
    dtype = next(model.parameters()).dtype
    store = store_for(work, compressor, source, text, layers, dtype)
    return fit(compressor, model, text, layers, store=store, progress=progress)


def refuse_evaluated(dataset: str, data_file: Path | None) -> Check:
    """A check that refuses text which holds the rows that `dataset` would be scored on."""
    from tensorllm.evaluation.evaluate import make_dataset

    def check(text: Calibration, tokenizer: Any) -> None:
        data = make_dataset(dataset, data_file=data_file, limit=None)
        data.connect(tokenizer)
        text.refuse_overlap(
            [
                example.tokens or tokenizer(f"{example.prompt} {example.answer}").input_ids
                for example in data.examples
            ]
        )

    return check


def clear(task: FolderTask) -> None:
    """Delete what a fit kept beside the output."""
    shutil.rmtree(_work(task), ignore_errors=True)


def _work(task: FolderTask) -> Path:
    return task.target.parent / f".{task.target.name}.fit"
