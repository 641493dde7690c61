"""Evaluation in Lightning: one module for all architectures, callbacks, the Trainer, loggers.

What is named here is loaded on first use: Lightning takes seconds to import, which a command that
only writes to a logger need not wait for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorllm.lightning.callbacks import PerBatch, PredictionJournal, ProgressReport
    from tensorllm.lightning.module import ReasoningModule

_HOME = {
    "PerBatch": "tensorllm.lightning.callbacks",
    "PredictionJournal": "tensorllm.lightning.callbacks",
    "ProgressReport": "tensorllm.lightning.callbacks",
    "ReasoningModule": "tensorllm.lightning.module",
}

__all__ = ["PerBatch", "PredictionJournal", "ProgressReport", "ReasoningModule"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tensorllm.lightning' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
