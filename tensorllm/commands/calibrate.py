"""Fitting a data-aware strategy to a model and a text, before it compresses."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from tensorllm.calibration.fit import fit, fit_folder, store_for
from tensorllm.calibration.groups import input_width, site_of
from tensorllm.calibration.sequences import Calibration, read_calibration
from tensorllm.calibration.sizes import budget_of
from tensorllm.checkpoint.writer import exclusive
from tensorllm.commands.models import Loader
from tensorllm.compression.plan import Plan, plan_folder
from tensorllm.compression.task import FolderTask
from tensorllm.compression.units import open_checkpoint
from tensorllm.compressors import Job
from tensorllm.compressors.activation import ActivationTucker
from tensorllm.compressors.base import Leaf, MatrixStatistics
from tensorllm.errors import UserError
from tensorllm.progress import Progress
from tensorllm.tensors.factors import Factors

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
    stream: bool,
    check: Check,
    progress: Progress,
) -> FolderTask:
    """The task with its strategy fitted to what the model sees on the text of `file`.

    Args:
        check: refuses a text, given the tokenizer, before anything is fitted to it.
        stream: the model's layers are read from disk one at a time.

    Where there is an output folder, an interrupted fit goes on from what it had finished.
    """
    loader = Loader(task.source, task.dtype, task.device)
    compressor, text = _read(task, file, loader, sequences, seed, stream, check)
    if not stream and task.target == Path():
        fitted = fit(compressor, loader(), text, task.layers, progress=progress)
        return replace(task, compressor=fitted)
    with exclusive(task.target):
        before = _work(task).exists()  # an interrupted fit's, or somebody else's folder
        try:
            return replace(task, compressor=_resumable(task, text, loader, stream, progress))
        except UserError:  # refused: the same command will not go on
            if not before:
                clear(task)
            raise


def planned(
    task: FolderTask, file: Path, *, sequences: int, seed: int, stream: bool, check: Check
) -> Plan:
    """What is known before the fit: the size in all, from the target; the fit shares it out."""
    loader = Loader(task.source, task.dtype)
    compressor, text = _read(task, file, loader, sequences, seed, stream, check)
    checkpoint, roles = open_checkpoint(task.source)
    geometry = roles.geometry
    layers = sorted(roles.check_layers(range(roles.layers) if task.layers is None else task.layers))
    clusters = compressor.clusters(geometry)
    keys = [(layer, cluster) for layer in layers for cluster in clusters]
    widest = max(input_width(geometry, cluster[0]) for cluster in clusters)
    config = checkpoint.config.get_text_config()
    text.check(config.vocab_size, widest, getattr(config, "max_position_embeddings", None))
    stored = None
    if compressor.max_loss_increase is None:
        stored = budget_of(compressor, keys, geometry, checkpoint.parameters)
    jobs = [Job(site_of(layer, cluster), _Unfitted()) for layer, cluster in keys]
    task = replace(task, compressor=compressor.with_fit(jobs, text.facts()))
    return replace(plan_folder(task, stored), seconds=None)


class _Unfitted(Leaf):
    """Stands for factors that a fit has not made yet."""

    source: ClassVar[str] = ""

    def decompose(self, w: Tensor, statistics: Sequence[MatrixStatistics] | None = None) -> Factors:
        raise AssertionError("a dry run decomposes nothing")


def _read(
    task: FolderTask,
    file: Path,
    loader: Loader,
    sequences: int,
    seed: int,
    stream: bool,
    check: Check,
) -> tuple[ActivationTucker, Calibration]:
    """The strategy and its text, if they are for one another."""
    if not isinstance(task.compressor, ActivationTucker):
        raise UserError(
            "--calibration is for the modes that use data: activation-tucker and -hybrid"
        )
    if stream and task.target == Path():
        raise UserError("--stream needs --out FOLDER: what is fitted is kept beside it meanwhile")
    tokenizer = loader.tokenizer()
    context = getattr(loader.config(), "max_position_embeddings", None) or LENGTH
    text = read_calibration(
        file, tokenizer, sequences=sequences, length=min(LENGTH, context), seed=seed
    )
    check(text, tokenizer)
    return task.compressor, text


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
