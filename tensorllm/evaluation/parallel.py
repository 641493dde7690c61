"""Several batches at once on the cores of one CPU.

The matrices of small models are too small to share between cores: torch's own threads then wait for
each other longer than they work. So each core takes a batch of its own.
"""

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from tensorllm.evaluation.row import Row
from tensorllm.evaluation.scorer import Scorer

SMALL = 2**26  # parameters; with larger models one batch keeps all cores busy

T = TypeVar("T")


def workers_for(model: PreTrainedModel) -> int:
    """How many batches are scored at once."""
    # Autocast holds for the thread that switched it on, and for no other.
    if model.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return 1
    return torch.get_num_threads() if model.num_parameters() <= SMALL else 1


def score_all(
    scorer: Scorer, batches: Sequence[Any], workers: int
) -> Generator[list[Row], None, None]:
    """The rows of each batch, in order; closed early, it drops the batches not yet begun."""
    if workers == 1 or len(batches) < 2:
        yield from map(scorer.score, batches)
        return
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(scorer.score, batches)
    finally:
        torch.set_num_threads(threads)


def grouped(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive items, so many at a time."""
    return [items[at : at + size] for at in range(0, len(items), size)]
