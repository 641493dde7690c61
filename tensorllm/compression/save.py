"""Save a model that was compressed in memory."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from tensorllm.checkpoint.writer import check_target
from tensorllm.compression.engine import Compression, compress_folder, compression_of
from tensorllm.compression.formats import Format
from tensorllm.compression.origin import copy_origin
from tensorllm.compression.report import CompressionReport
from tensorllm.compression.task import FolderTask
from tensorllm.compression.units import open_checkpoint
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.models.access import StoredOtherwise
from tensorllm.models.task import name_of
from tensorllm.weights import dense_matrices


def save(
    model: Any,
    target: str | Path,
    *,
    format: Format = "factored",
    tokenizer: Any = None,
    overwrite: bool = False,
) -> CompressionReport:
    """Save a compressed model as a checkpoint folder.

    Args:
        model: a transformers model, after `compress`.
        target: the folder to make.
        format: factors, or ordinary weights: dense, or without dropped FFN channels.
        tokenizer: saved beside the weights; None: none is saved.
        overwrite: replace an existing folder.

    Raises:
        UserError: the model was not compressed, its compressed matrices were changed since, or the
            folder cannot be made; nothing is written.
    """
    target = Path(target)
    check_target(target, overwrite=overwrite)
    compression = compression_of(model)
    if compression is None:
        raise UserError("this model was not compressed; compress it first")
    if getattr(model, "tensorllm_manifest", None) is not None:
        raise UserError(
            "this model runs in its factors, which save themselves: model.save_pretrained(folder)"
        )
    _refuse_changed(model, compression)
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    # transformers knows how its modules are named and tied on disk, so it writes them first
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=".saving-") as folder:
        model.save_pretrained(folder)
        try:
            open_checkpoint(Path(folder))
        except StoredOtherwise:  # fused in files and not in the model, for instance
            shutil.rmtree(folder)
            model.save_pretrained(folder, save_original_format=False)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        copy_origin(Path(getattr(model.config, "_name_or_path", "") or folder), Path(folder))
        task = FolderTask(
            source=Path(folder),
            target=target,
            compressor=compression.plan.strategy,
            layers=compression.plan.layers,
            format=format,
            overwrite=overwrite,
            model=name_of(model.config),
            revision=getattr(model.config, "_commit_hash", None),
            original=False,
            done={site.site.name: site for site in compression.sites},
        )
        return compress_folder(task)


def _refuse_changed(model: Any, compression: Compression) -> None:
    """Refuse a model whose compressed weights differ from their factors, as after training."""
    weights = parameters_of(model)
    roles = RoleMatrices(model.config, weights)
    for done in compression.sites:
        matrices = dense_matrices(done.site, done.factors, roles)
        for slot, w_ID in zip(done.site.matrices, matrices, strict=True):
            now = roles.read(weights, *slot)
            if not torch.equal(now, w_ID.to(now)):
                raise UserError(
                    f"{roles.name(*slot)} has changed since it was compressed, so its factors no "
                    "longer stand for it; save with save_pretrained and compress that folder"
                )
