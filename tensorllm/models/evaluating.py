"""Put a model in evaluation mode temporarily."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode within the block; each module's mode is restored afterwards.

    `model.train(model.training)` would set all modules alike: a part that its owner keeps in
    evaluation mode while the rest is trained would get its dropout back.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, before in training.items():
            module.training = before
