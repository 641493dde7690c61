"""Dense linear layers for one token in bfloat16 on a CPU.

oneDNN's product reads such a matrix at half of memory's speed or less where 16 bits have
instructions of their own, and compiles a program for each shape. torch's product of a matrix and a
vector needs none, and reads up to twice as fast; elsewhere both are the same. Not in float16, where
it is slower.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tensorllm.runtime.products import decodes

PLAIN = (Tensor, nn.Parameter)  # types of weights that no library has replaced


class OneTokenLinear(nn.Linear):
    """`nn.Linear`, by `linear_of`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear_of(x, self.weight, self.bias)


def become_one_token(module: nn.Module) -> None:
    """Let a linear layer of the model run so; subclasses of `nn.Linear` stay as they are."""
    if type(module) is nn.Linear:
        module.__class__ = OneTokenLinear


def linear_of(x: Tensor, w_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`x @ w_OI.mT + bias_O` (..., O) for x (..., I), by the fastest kernel if x is one token."""
    if (
        x.dtype is torch.bfloat16
        and decodes(x)
        and x.is_cpu
        and type(w_OI) in PLAIN
        and w_OI.dtype is torch.bfloat16
    ):
        y_O = torch.mv(w_OI, x.reshape(-1))
        return (y_O if bias_O is None else y_O + bias_O).view(*x.shape[:-1], -1)
    return linear(x, w_OI, bias_O)
