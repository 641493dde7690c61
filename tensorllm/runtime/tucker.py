"""Modules for Tucker and CP factors.

Shapes: B batch, T tokens, D model width, P = R1, K head_dim, R = R2, M = 2g+2 matrices of a group,
S = R3, G key/value heads, m the selected matrices, h heads, I inner width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from tensorllm.compressors.layer import Site
from tensorllm.runtime.sites import OPERATION, PROMPT, Cost, SiteModule, runs
from tensorllm.tensors.factors import CP, Factors, Tucker, parameters, wide
from tensorllm.tensors.stacking import Geometry

CORE_ORDER = (2, 3, 1, 0)  # stored (P, R, S, G), held (S, G, R, P): contiguous rows are used
ATTENTION_OPERATIONS = 40  # of an attention block per decoded token, dense or factored
SCORE = 100  # products that take as long as mask and softmax of one score


def attention_cost(geometry: Geometry, weights: int, values: int, expand: int = 0) -> Cost:
    """The cost of a whole attention block, including scores and values.

    Args:
        geometry: of the layer.
        weights: numbers read, each multiplied once.
        values: width of a cached value.
        expand: further products of a token.
    """
    attend = geometry.H * PROMPT * (geometry.K + values + SCORE)
    return Cost(weights, ATTENTION_OPERATIONS, weights + expand + attend)


@runs(Tucker, "heads")
class HeadsSite(SiteModule):
    """Factors of the (D, K, M, G) tensor; query rows come first, then key, value and outputs.

    If S = M, the stack factor saves nothing and is multiplied into the core, so that each
    projection reads only its own part of the core.
    """

    core_SGRP: nn.Parameter
    u_DP: nn.Parameter
    u_KR: nn.Parameter
    u_MS: nn.Parameter
    latent_attention = True
    names = {  # noqa: RUF012  a constant of the class
        "core": ("core_SGRP", CORE_ORDER),
        "factor_0": ("u_DP", None),
        "factor_1": ("u_KR", None),
        "factor_2": ("u_MS", None),
    }

    def __init__(self, factors: Factors, site: Site, geometry: Geometry) -> None:
        super().__init__(factors, site, geometry)
        self.groups, self.head_dim, self.queries = geometry.G, geometry.K, geometry.groups
        self.absorbed = False

    @classmethod
    def latents_pay(cls, factors: Factors, geometry: Geometry) -> bool:
        """Whether narrower cached values save more time than attention in parts costs.

        That is, whether the numbers saved in 512 cached tokens take as long to read as about one
        operation, by which attention in parts is slower than one kernel.
        """
        return geometry.G * (geometry.K - factors.ranks[1]) * PROMPT >= OPERATION

    @classmethod
    def accepts(cls, factors: Factors) -> bool:
        return set(factors.tensors()) == cls.names.keys()

    @classmethod
    def cost(cls, site: Site, factors: Factors, geometry: Geometry) -> Cost:
        p, r, s = factors.ranks
        width, stack = geometry.D * p, p * r * geometry.G
        whole = s == 2 * geometry.groups + 2  # each matrix then has its own part of the core
        inner, outer = (geometry.groups + 2, geometry.groups) if whole else (s, s)
        expand = (geometry.H + geometry.G) * r * geometry.K
        return attention_cost(geometry, 2 * width + (inner + outer) * stack, r, expand)

    @classmethod
    def dense_cost(cls, site: Site, geometry: Geometry) -> Cost:
        return attention_cost(geometry, site.numel(geometry), geometry.K)

    @torch.no_grad()
    def finish(self) -> None:
        """Multiply the stack factor into the core if it is square."""
        matrices, rank = self.u_MS.shape
        if self.absorbed or matrices != rank or self.u_MS.is_meta or is_parametrized(self):
            return  # quantised factors cannot be changed
        core_MGRP = torch.einsum("sgrp,ms->mgrp", wide(self.core_SGRP), wide(self.u_MS))
        # New tensors, as the compression's record may hold the old ones.
        self.core_SGRP.data = core_MGRP.to(self.core_SGRP.dtype)
        self.u_MS.data = torch.eye(matrices).to(self.u_MS)
        self.u_MS.requires_grad_(False)
        self.absorbed = True

    def into(self, x_BTD: Tensor, rows: slice) -> Tensor:
        """Latents (B, T, m, G, R) of the matrices `rows`."""
        z_BTP = x_BTD @ self.u_DP
        core_SGRP = self.core_SGRP[rows] if self.absorbed else self.core_SGRP
        y = F.linear(z_BTP, core_SGRP.flatten(0, 2))
        y_BTSGR = y.view(*z_BTP.shape[:-1], *core_SGRP.shape[:3])
        if self.absorbed:
            return y_BTSGR
        return torch.einsum("...sgr,ms->...mgr", y_BTSGR, self.u_MS[rows])

    def out_of(self, y_BTmGR: Tensor, rows: slice) -> Tensor:
        """From latents back to the model width: the transpose of `into`."""
        core_SGRP: Tensor = self.core_SGRP
        if self.absorbed:
            core_SGRP = core_SGRP[rows]  # a view
        else:
            y_BTmGR = torch.einsum("...mgr,ms->...sgr", y_BTmGR, self.u_MS[rows])
        z_BTP = y_BTmGR.flatten(-3) @ core_SGRP.flatten(0, 2)
        return F.linear(z_BTP, self.u_DP)

    # Single roles as linear layers, if attention cannot run in the latents.

    def input_projection(self, x: Tensor, index: int) -> Tensor:
        y_mGK = self.into(x, self._rows(index)) @ self.u_KR.mT
        return y_mGK.transpose(-3, -2).flatten(-3)

    def output_projection(self, x: Tensor, index: int) -> Tensor:
        y_GmK = x.view(*x.shape[:-1], self.groups, -1, self.head_dim)
        return self.out_of((y_GmK @ self.u_KR).transpose(-3, -2), self._rows(index))

    def _rows(self, index: int) -> slice:
        """The rows of q, k, v or o among the M stacked matrices of a group."""
        g = self.queries
        return (slice(0, g), slice(g, g + 1), slice(g + 1, g + 2), slice(g + 2, None))[index]


@runs(Tucker, "head")
class HeadSite(SiteModule):
    """One attention matrix as a Tucker tensor (D, K, h) with factors for D and K."""

    core_hRP: nn.Parameter
    u_DP: nn.Parameter
    u_KR: nn.Parameter
    names = {  # noqa: RUF012
        "core": ("core_hRP", (2, 1, 0)),
        "factor_0": ("u_DP", None),
        "factor_1": ("u_KR", None),
    }

    @classmethod
    def accepts(cls, factors: Factors) -> bool:
        return set(factors.tensors()) == cls.names.keys()

    def input_projection(self, x: Tensor, index: int) -> Tensor:
        heads, rank, _ = self.core_hRP.shape
        core = self.core_hRP.flatten(0, 1)
        y_hR = (x @ self.u_DP @ core.mT).view(*x.shape[:-1], heads, rank)
        return (y_hR @ self.u_KR.mT).flatten(-2)

    def output_projection(self, x: Tensor, index: int) -> Tensor:
        y_hK = x.view(*x.shape[:-1], len(self.core_hRP), -1)
        return (y_hK @ self.u_KR).flatten(-2) @ self.core_hRP.flatten(0, 1) @ self.u_DP.mT


class StackSite(SiteModule):
    """Stacked whole matrices (I, D, M): a left and a right factor, and a middle part for each."""

    u_IP: nn.Parameter
    u_DR: nn.Parameter
    u_MS: nn.Parameter
    middle: nn.Parameter
    names = {  # noqa: RUF012
        "core": ("middle", None),
        "weights": ("middle", None),
        "factor_0": ("u_IP", None),
        "factor_1": ("u_DR", None),
        "factor_2": ("u_MS", None),
    }

    @classmethod
    def accepts(cls, factors: Factors) -> bool:
        return {"factor_0", "factor_1", "factor_2"} <= set(factors.tensors())

    @classmethod
    def cost(cls, site: Site, factors: Factors, geometry: Geometry) -> Cost:
        stored, count = parameters(factors), len(site.matrices)
        return Cost(stored, 3 * count, stored * count)

    def input_projection(self, x: Tensor, index: int) -> Tensor:
        return self._between(x @ self.u_DR, index, transposed=True) @ self.u_IP.mT

    def output_projection(self, x: Tensor, index: int) -> Tensor:
        return self._between(x @ self.u_IP, index, transposed=False) @ self.u_DR.mT

    def _between(self, y: Tensor, index: int, *, transposed: bool) -> Tensor:
        raise NotImplementedError


@runs(Tucker, "matrices")
class TuckerStackSite(StackSite):
    """The middle part of each matrix is a combination of core slices, (P, R)."""

    def _between(self, y: Tensor, index: int, *, transposed: bool) -> Tensor:
        core_PR = self.middle @ self.u_MS[index]
        return y @ (core_PR.mT if transposed else core_PR)


@runs(CP, "matrices")
class CPStackSite(StackSite):
    """The middle part of each matrix is a weight for each of the R terms."""

    def _between(self, y: Tensor, index: int, *, transposed: bool) -> Tensor:
        return y * (self.middle * self.u_MS[index])
