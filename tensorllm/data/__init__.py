"""Datasets of questions: one short file each over `ReasoningDataModule`, and the demo world.

`DATASETS`, `ReasoningDataModule` and `Example` are loaded on first use: the demo world itself needs
no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensorllm.data.base import DATASETS, ReasoningDataModule
    from tensorllm.data.example import Example

__all__ = ["DATASETS", "Example", "ReasoningDataModule"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tensorllm.data' has no attribute {name!r}")
    from tensorllm.data import catalog

    return getattr(catalog, name)
