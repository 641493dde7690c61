"""Evaluation in Lightning: one module for all architectures, callbacks, the Trainer, loggers."""

from tensorllm.lightning.callbacks import PerBatch, PredictionJournal, ProgressReport
from tensorllm.lightning.module import ReasoningModule

__all__ = ["PerBatch", "PredictionJournal", "ProgressReport", "ReasoningModule"]
