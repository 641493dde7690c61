"""Linears of pivoted factors, one for all the roles that read the same input.

R rows of the stacked matrix are stored as they are, the others as combinations of them: so the
outputs of the chosen rows are the latent, made once, and each role mixes its other rows from it.
Shapes: I rows of all roles, D model width, R rank, X = I - R rows that are mixed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorllm.tensors.pivoted import PivotedLowRank


class PivotedSite(nn.Module):
    """The factors of one site.

    Args:
        sizes: how many rows each role has, in the stored order.
    """

    rows_R: Tensor
    order_I: Tensor

    def __init__(self, factors: PivotedLowRank, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.basis_RD = nn.Parameter(factors.basis_RO)
        self.mix_XR = nn.Parameter(factors.mix_XR)
        self.register_buffer("rows_R", factors.rows_R)
        device = factors.rows_R.device
        order_I = torch.empty(sum(sizes), dtype=torch.long, device=device)
        self.register_buffer("order_I", order_I, persistent=False)
        self.sizes = sizes
        self.spans: list[tuple[slice, slice]] = []
        self._held: tuple[Tensor, Tensor, int] | None = None
        self.settle()

    def settle(self) -> None:
        """Find which rows of each role are chosen, once the row numbers are there."""
        if self.rows_R.is_meta:
            return
        chosen_I = torch.zeros(sum(self.sizes), dtype=torch.bool, device=self.rows_R.device)
        chosen_I[self.rows_R.long()] = True
        self.spans, before = [], 0
        for size, chosen in zip(self.sizes, chosen_I.split(self.sizes), strict=True):
            earlier = sum(span.stop - span.start for span, _ in self.spans)
            count, mixed = int(chosen.sum()), before - earlier
            # Within a role the chosen rows come first; this puts them where they belong.
            behind = torch.argsort((~chosen).byte(), stable=True)
            self.order_I[before : before + size] = torch.argsort(behind)
            self.spans.append((slice(earlier, earlier + count), slice(mixed, mixed + size - count)))
            before += size

    def latent(self, x: Tensor) -> Tensor:
        """(..., R): made for the first role, kept until the last one has read it."""
        if torch.compiler.is_compiling() or len(self.sizes) == 1:
            return F.linear(x, self.basis_RD)
        held = self._held
        if held is None or held[0] is not x:
            held = (x, F.linear(x, self.basis_RD), len(self.sizes))
        self._held = None if held[2] == 1 else (held[0], held[1], held[2] - 1)
        return held[1]

    def rise(self, x: Tensor, index: int) -> Tensor:
        """One role's outputs."""
        chosen, mixed = self.spans[index]
        z = self.latent(x)
        y = torch.cat([z[..., chosen], F.linear(z, self.mix_XR[mixed])], dim=-1)
        start = sum(self.sizes[:index])
        return y.index_select(-1, self.order_I[start : start + self.sizes[index]])

    def fall(self, x: Tensor) -> Tensor:
        """Back to the model width, where the site is one role."""
        rank = len(self.basis_RD)
        x = x.index_select(-1, torch.argsort(self.order_I))
        return (x[..., :rank] + x[..., rank:] @ self.mix_XR) @ self.basis_RD


class PivotedPart(nn.Module):
    """One role of a `PivotedSite`, which belongs to the first of them."""

    def __init__(self, site: PivotedSite, index: int, *, rises: bool) -> None:
        super().__init__()
        self.index, self.rises = index, rises
        if index == 0:
            self.factors = site
        self._site = (site,)  # in a tuple, so that only the owner registers it

    def forward(self, x: Tensor) -> Tensor:
        site = self._site[0]
        return site.rise(x, self.index) if self.rises else site.fall(x)
