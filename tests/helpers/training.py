"""A few steps of training, for tests of adapters."""

from typing import Any

import torch
from torch import Tensor


def learn(model: Any, ids_BT: Tensor, steps: int) -> None:
    """AdamW on whatever requires gradients, towards the next tokens of `ids_BT`."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=0.03)
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
