"""A model without dropout for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode in the block; afterwards each of its modules as it was.

    `model.train(model.training)` would set them all alike: a part that its owner holds in
    evaluation mode while the rest is trained would get its dropout back.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, before in training.items():
            module.training = before
