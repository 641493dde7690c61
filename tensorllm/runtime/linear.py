"""Factored linears: a stored parameter of one or several roles, each role dense or factored.

Shapes: D model width, I inner width, R, P, S ranks, K head width, h heads, M stacked matrices.
A part `rises` from the model width to the inner width (q, k, v, in, gate) or falls back (o, out).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tensorllm.runtime.heads import HeadsSite
from tensorllm.tensors.factors import CP, LowRank, Tucker
from tensorllm.tensors.stacking import Geometry


class FactoredLinear(nn.Module):
    """Stands for one `nn.Linear` (or `Conv1D`): the parts side by side, and the bias.

    Args:
        parts: role -> module from the layer's input to that role's output, in the stored order.
        bias: of all the roles, in the stored order.
        grouped: how many KV heads the outputs are interleaved by; 0 where they follow role by role.
        head_dim: the width of one head, where grouped.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        bias: Tensor | None,
        *,
        grouped: int = 0,
        head_dim: int = 0,
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({f"role_{role}": part for role, part in parts.items()})
        self.bias = None if bias is None else nn.Parameter(bias)
        self.grouped, self.head_dim = grouped, head_dim

    def forward(self, x: Tensor) -> Tensor:
        outs = [part(x) for part in self.parts.values()]
        if self.grouped:  # each group's queries, its key, its value
            split = [out.view(*x.shape[:-1], self.grouped, -1, self.head_dim) for out in outs]
            y = torch.cat(split, dim=-2).flatten(-3)
        else:
            y = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
        return y if self.bias is None else y + self.bias


def low_rank_linears(factors: LowRank, *, rises: bool) -> nn.Sequential:
    """Two ordinary linears, so that LoRA and quantisation find what they know."""
    u_IR, v_RD = factors.u_IR, factors.v_RO
    return nn.Sequential(*(_linear(w) for w in ((v_RD, u_IR) if rises else (u_IR.mT, v_RD.mT))))


def dense_linear(w_ID: Tensor, *, rises: bool) -> nn.Linear:
    """A role that is left as it is."""
    return _linear(w_ID if rises else w_ID.mT)


class HeadPart(nn.Module):
    """One attention matrix as a Tucker tensor (D, K, h) with factors for D and K."""

    def __init__(self, factors: Tucker, *, rises: bool) -> None:
        super().__init__()
        self.rises = rises
        self.core_hRP = nn.Parameter(factors.core.permute(2, 1, 0).contiguous())
        self.u_DP = nn.Parameter(factors.factors[0])
        self.u_KR = nn.Parameter(factors.factors[1])

    def forward(self, x: Tensor) -> Tensor:
        heads, rank, _ = self.core_hRP.shape
        core = self.core_hRP.flatten(0, 1)
        if self.rises:
            y_hR = (x @ self.u_DP @ core.mT).view(*x.shape[:-1], heads, rank)
            return (y_hR @ self.u_KR.mT).flatten(-2)
        y_hK = x.view(*x.shape[:-1], heads, -1)
        return (y_hK @ self.u_KR).flatten(-2) @ core @ self.u_DP.mT


class StackSite(nn.Module):
    """Whole matrices (I, D, M) as CP or Tucker: a left and a right factor, and a middle of each."""

    def __init__(self, factors: CP | Tucker) -> None:
        super().__init__()
        by_mode = factors.factors
        self.u_IP, self.u_DR, self.u_MS = (nn.Parameter(by_mode[mode]) for mode in range(3))
        middle = factors.weights_R if isinstance(factors, CP) else factors.core
        self.middle = nn.Parameter(middle)

    def through(self, y: Tensor, index: int, *, rises: bool) -> Tensor:
        if self.middle.ndim == 1:
            return y * (self.middle * self.u_MS[index])
        core_PR = self.middle @ self.u_MS[index]
        return y @ (core_PR.mT if rises else core_PR)


class StackPart(nn.Module):
    """One matrix of a `StackSite`, which belongs to the first of its parts."""

    def __init__(self, site: StackSite, index: int, *, rises: bool, owner: bool) -> None:
        super().__init__()
        self.index, self.rises = index, rises
        if owner:
            self.factors = site
        self._site = (site,)  # in a tuple, so that only the owner registers it

    def forward(self, x: Tensor) -> Tensor:
        site = self._site[0]
        first, last = (site.u_DR, site.u_IP) if self.rises else (site.u_IP, site.u_DR)
        return site.through(x @ first, self.index, rises=self.rises) @ last.mT


class HeadsPart(nn.Module):
    """One role of the shared attention tensor as a linear, where the latents cannot be used."""

    def __init__(
        self, site: HeadsSite, rows: slice, geometry: Geometry, *, rises: bool, owner: bool
    ) -> None:
        super().__init__()
        self.rows_, self.rises = rows, rises
        self.groups, self.head_dim = geometry.G, geometry.K
        if owner:
            self.factors = site
        self._site = (site,)

    def forward(self, x: Tensor) -> Tensor:
        site = self._site[0]
        if self.rises:
            y_mGK = site.into(x, self.rows_) @ site.u_KR.mT
            return y_mGK.transpose(-3, -2).flatten(-3)
        y_GmK = x.view(*x.shape[:-1], self.groups, -1, self.head_dim)
        return site.out_of((y_GmK @ site.u_KR).transpose(-3, -2), self.rows_)


def role_rows(geometry: Geometry) -> dict[str, slice]:
    """Which of the M stacked matrices of a group belong to a role."""
    g = geometry.groups
    return {
        "q": slice(0, g),
        "k": slice(g, g + 1),
        "v": slice(g + 1, g + 2),
        "o": slice(g + 2, None),
    }


def _linear(weight: Tensor) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.contiguous())
    return linear
