"""Fitting a data-aware strategy to a model and a text, before it compresses."""

from dataclasses import replace
from pathlib import Path

from tensorllm.calibration.fit import fit
from tensorllm.calibration.sequences import read_calibration
from tensorllm.compression.model import Progress
from tensorllm.compression.task import FolderTask
from tensorllm.compressors.activation import ActivationTucker
from tensorllm.errors import UserError
from tensorllm.pipeline.models import Loader

LENGTH = 512  # tokens of a calibration sequence, at most


def calibrated(
    task: FolderTask, file: Path, *, sequences: int, seed: int, progress: Progress
) -> FolderTask:
    """The task with its strategy fitted to what the model sees on the text of `file`."""
    if not isinstance(task.compressor, ActivationTucker):
        raise UserError(
            "--calibration is for the modes that use data: activation-tucker and -hybrid"
        )
    loader = Loader(task.source, task.dtype, task.device)
    model, tokenizer = loader(), loader.tokenizer()
    context = getattr(model.config, "max_position_embeddings", None) or LENGTH
    text = read_calibration(
        file, tokenizer, sequences=sequences, length=min(LENGTH, context), seed=seed
    )
    fitted = fit(task.compressor, model, text, task.layers, progress=progress)
    return replace(task, compressor=fitted)
