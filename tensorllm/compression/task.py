"""What is to be made of a checkpoint on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tensorllm.calibration.fit import Fitted
from tensorllm.calibration.sequences import Calibration
from tensorllm.checkpoint.writer import SHARD_BYTES
from tensorllm.compression.formats import Format
from tensorllm.compression.jobs import CompressedSite
from tensorllm.compressors import Compressor
from tensorllm.compressors.budget import Budget
from tensorllm.compressors.wrapped import channels_only


@dataclass(frozen=True, kw_only=True)
class FolderTask:
    """What is to be made of a checkpoint.

    Attributes:
        source: the checkpoint's folder.
        target: the folder to make; a dry run needs none.
        compressor: the strategy, or a fitted one.
        layers: counted from 0; None: all.
        budget: a target size, if the strategy has none of its own.
        calibration: the text that the strategy is fitted to.
        stream: fit with one layer in memory at a time, read from disk.
        format: of the new folder.
        device: where decompositions run.
        dtype: of the written weights; by default that of each stored tensor.
        overwrite: replace an existing folder.
        model: the model's name in reports; by default the folder.
        revision: of the model, for reports.
        done: factors that exist already, by the site's name.
        original: whether `source` holds the model as it was before any compression.
        shard_bytes: size at which a weight file is ended.
    """

    source: Path
    target: Path | None = None
    compressor: Compressor | Fitted
    layers: Sequence[int] | None = None
    budget: Budget | None = None
    calibration: Calibration | None = None
    stream: bool = False
    format: Format = "dense"
    device: str = "cpu"
    dtype: torch.dtype | None = None
    overwrite: bool = False
    model: str | None = None
    revision: str | None = None
    done: Mapping[str, CompressedSite] = field(default_factory=dict)
    original: bool = True
    shard_bytes: int = SHARD_BYTES

    @property
    def name(self) -> str:
        """The model's name in reports."""
        return self.model or str(self.source)

    @property
    def strategy(self) -> Compressor:
        """The strategy to fit."""
        assert isinstance(self.compressor, Compressor), "asked for a fit"
        return channels_only(self.compressor) if self.format == "narrow" else self.compressor

    @property
    def aim(self) -> Budget | None:
        """The target size, the task's or the strategy's own; None: sizes are given or fitted."""
        own = self.compressor.budget if isinstance(self.compressor, Compressor) else None
        return self.budget or own

    @property
    def folder(self) -> Path:
        """The folder to make."""
        assert self.target is not None, "only a plan needs no folder"
        return self.target
