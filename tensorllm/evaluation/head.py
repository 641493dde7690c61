"""Compute the output embedding only for the columns, and as exactly, as is needed.

With a vocabulary of 50,000 tokens it costs as much as eight layers of a small model. So it reads
only the columns whose logits are used (`Head`). Where only the most probable token is needed, no
logits are stored (`Strips`), or a product in bfloat16 rules out most tokens first (`Screen`).

Shapes: B rows, N columns, M wanted columns of all rows, D model width, V vocabulary. In `Screen`: N
blocks of b tokens, Q pairs of a wanted column and a block, P of a wanted column and a token.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from tensorllm.runtime.products import seconds_of_product

LARGE = 2**22  # numbers in the embedding; smaller ones are multiplied directly
FASTER = 1.5  # bfloat16 must be this many times faster than float32
BLOCK = 64  # tokens that are screened together
STRIP = 1024  # tokens whose logits are computed together: they stay in the processor's cache
MOST = 64  # candidates per column, on average; beyond this all logits are computed
ROUNDOFF = 2.0**-8  # of bfloat16


class Head:
    """Restricts the output embedding to the wanted columns; does nothing outside `picking`.

    Its weights must not change for as long as this object lives.
    """

    def __init__(self, model: Any) -> None:
        self._module: nn.Module | None = model.get_output_embeddings()
        self._now = threading.local()  # per thread: batches may run in parallel
        self._finder: Screen | Strips | None = None
        self._kind = _finder_of(self._module)  # None once the model is seen to change its logits
        if self._module is not None:
            handle = self._module.register_forward_pre_hook(_picked(self._now))
            weakref.finalize(self, handle.remove)

    @contextmanager
    def picking(self, wanted_BN: Tensor | None, *, best: bool = False) -> Iterator[None]:
        """Within the block, and in this thread, only these of the last N columns are read.

        Args:
            wanted_BN: None: all columns.
            best: only the most probable token of each is needed.
        """
        now = self._now
        now.wanted, now.hidden, now.finder = wanted_BN, None, self._finder if best else None
        now.best = None
        try:
            yield
        finally:
            now.wanted = now.hidden = now.finder = now.best = None

    def logits(self, logits: Tensor, wanted_BN: Tensor) -> Tensor:
        """Logits of the wanted columns (M, V), from what the model returned within `picking`."""
        if self._now.hidden is not None:
            return logits[0]
        return logits[:, -wanted_BN.shape[1] :][wanted_BN]  # its module was not called

    def best(self, logits: Tensor, wanted_BN: Tensor) -> Tensor:
        """The most probable tokens (M) of the wanted columns, from what the model returned."""
        if self._now.best is not None:
            found: Tensor = self._now.best
            return found
        logits_MV = self.logits(logits, wanted_BN)
        if self._kind is not None and self._finder is None:
            hidden_MD = self._now.hidden
            module: Any = self._module
            if hidden_MD is not None and torch.allclose(
                linear(hidden_MD[:2], module.weight, module.bias), logits_MV[:2], 1e-4, 1e-4
            ):
                self._finder = self._kind(module.weight, module.bias)
            else:
                self._kind = None
        return logits_MV.argmax(-1)


def _picked(now: threading.local) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        wanted_BN = getattr(now, "wanted", None)
        if wanted_BN is None:
            return None
        now.hidden = args[0][:, -wanted_BN.shape[1] :][wanted_BN]
        if now.finder is None:
            return (now.hidden[None], *args[1:])
        now.best = now.finder(now.hidden)
        return (now.hidden[None, :0], *args[1:])

    return hook


def _finder_of(module: nn.Module | None) -> "type[Screen | Strips] | None":
    """The quickest way on this machine to find the most probable token; None: all logits."""
    if not isinstance(module, nn.Linear) or module.weight.numel() < LARGE:
        return None
    if module.weight.dtype != torch.float32 or module.weight.device.type != "cpu":
        return None
    narrow, wide = map(seconds_of_product, (torch.bfloat16, torch.float32))
    return Screen if FASTER * narrow <= wide else Strips


class Strips:
    """Finds the most probable token strip by strip of the vocabulary.

    Its logits are never stored as a whole: with 256 columns, on a CPU, that is a fifth quicker.

    Args:
        weight_VD: of the output embedding.
        bias_V: of it, if it has one.
    """

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None) -> None:
        self.weights = weight_VD.detach().split(STRIP)
        self.biases = [None] * len(self.weights) if bias_V is None else bias_V.detach().split(STRIP)

    def __call__(self, x_MD: Tensor) -> Tensor:
        """The most probable token (M) of each column."""
        each = zip(self.weights, self.biases, strict=True)
        best = [linear(x_MD, weight, bias).max(-1) for weight, bias in each]
        highest_NM = torch.stack([strip.values for strip in best])
        token_NM = torch.stack([at * STRIP + strip.indices for at, strip in enumerate(best)])
        return token_NM.gather(0, highest_NM.argmax(0)[None])[0]


class Screen:
    """Finds the most probable token without computing most of the float32 logits.

    The product of inputs rounded to bfloat16, x' w', is off by at most
    |x| |w - w'| + |x - x'| |w'| (Cauchy-Schwarz; its sums are float32), and its own rounding by u
    times its size. Only tokens that may be the best within these bounds are computed in float32.

    Args:
        weight_VD: of the output embedding.
        bias_V: of it, if it has one.
    """

    def __init__(self, weight_VD: Tensor, bias_V: Tensor | None) -> None:
        self.weight_VD = weight_VD.detach()
        self.bias_V = torch.zeros(len(weight_VD)) if bias_V is None else bias_V.detach()
        filled = -len(weight_VD) % BLOCK
        self.narrow_VD = pad(self.weight_VD.bfloat16(), (0, 0, 0, filled))
        self.narrow_V = None if bias_V is None else pad(self.bias_V.bfloat16(), (0, filled))
        sums = weight_VD.shape[1] * 2.0**-23  # roundoff of float32 sums, relative to |x| |w|
        norm_V = pad(self.weight_VD.norm(dim=1), (0, filled))
        off_V = pad((self.weight_VD - self.narrow_VD[: len(weight_VD)]).norm(dim=1), (0, filled))
        bias_off_V = pad(self.bias_V.abs() * ROUNDOFF, (0, filled))
        # The largest of each block of tokens.
        self.norm_N = norm_V.view(-1, BLOCK).amax(1) * (1 + ROUNDOFF)
        self.off_N = off_V.view(-1, BLOCK).amax(1) + sums * self.norm_N
        self.bias_off_N = bias_off_V.view(-1, BLOCK).amax(1)

    def __call__(self, x_MD: Tensor) -> Tensor:
        """The most probable token of each column, (M)."""
        narrow_MD = x_MD.bfloat16()
        rough_MV = linear(narrow_MD, self.narrow_VD, self.narrow_V)
        rough_MV[:, len(self.weight_VD) :] = -torch.inf  # padding of the last block
        rough_MNb = rough_MV.view(len(x_MD), -1, BLOCK)
        highest_MN = rough_MNb.amax(-1).float()
        lowest_MN = self.lowest(x_MD, narrow_MD, highest_MN)
        row_Q, block_Q = torch.nonzero(highest_MN >= lowest_MN, as_tuple=True)
        possible_Qb = rough_MNb[row_Q, block_Q] >= lowest_MN[row_Q, block_Q, None]
        at_P, within_P = torch.nonzero(possible_Qb, as_tuple=True)
        row_P, token_P = row_Q[at_P], block_Q[at_P] * BLOCK + within_P
        if len(row_P) > MOST * len(x_MD) or not bool(lowest_MN.isfinite().all()):
            return linear(x_MD, self.weight_VD, self.bias_V).argmax(-1)
        exact_P = (x_MD[row_P] * self.weight_VD[token_P]).sum(-1) + self.bias_V[token_P]
        top_M = exact_P.new_full((len(x_MD),), -torch.inf)
        top_M = top_M.scatter_reduce(0, row_P, exact_P, "amax")
        none = len(self.weight_VD)
        equal_P = token_P.where(exact_P == top_M[row_P], none)
        return token_P.new_full((len(x_MD),), none).scatter_reduce(0, row_P, equal_P, "amin")

    def lowest(self, x_MD: Tensor, narrow_MD: Tensor, highest_MN: Tensor) -> Tensor:
        """The least rough logit, in each block of tokens, with which a token may be the best.

        Args:
            highest_MN: the highest rough logit of each block.
        """
        x_M, off_M = x_MD.norm(dim=1), (x_MD - narrow_MD).norm(dim=1)
        off_MN = x_M[:, None] * self.off_N + off_M[:, None] * self.norm_N + self.bias_off_N
        u = ROUNDOFF * (1 + 2 * ROUNDOFF)
        off_MN = off_MN * (1 + u)  # u is relative to the rounded sum, not the exact one
        least_M = (highest_MN - off_MN - u * highest_MN.abs()).amax(1)  # bounds the best logit
        need_MN = least_M[:, None] - off_MN
        return need_MN / torch.where(need_MN < 0, 1 - u, 1 + u)
