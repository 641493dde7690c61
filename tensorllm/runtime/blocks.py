"""Modules for matrices in blocks of rows.

Shapes: D model width, B blocks of J rows, R rank.
"""

from torch import Tensor, nn

from tensorllm.compressors.layer import Site
from tensorllm.runtime.sites import Cost, SiteModule, runs
from tensorllm.tensors.blocks import BlockLowRank
from tensorllm.tensors.factors import Factors, parameters
from tensorllm.tensors.stacking import Geometry


@runs(BlockLowRank, "matrix")
class BlockLowRankSite(SiteModule):
    """One product for the latents of all blocks, and one batched over the blocks."""

    u: nn.Parameter  # (B, J, R)
    v: nn.Parameter  # (B, R, D)

    @classmethod
    def cost(cls, site: Site, factors: Factors, geometry: Geometry) -> Cost:
        stored = parameters(factors)
        return Cost(stored, 4, stored)

    def input_projection(self, x: Tensor, index: int) -> Tensor:
        del index
        x_ND = x.flatten(0, -2)
        z_NBR = (x_ND @ self.v.flatten(0, 1).mT).unflatten(1, self.v.shape[:2])
        y_BNJ = z_NBR.transpose(0, 1) @ self.u.mT
        return y_BNJ.transpose(0, 1).reshape(*x.shape[:-1], -1)

    def output_projection(self, x: Tensor, index: int) -> Tensor:
        del index
        x_BNJ = x.reshape(-1, *self.u.shape[:2]).transpose(0, 1)
        z_NBR = (x_BNJ @ self.u).transpose(0, 1)
        return (z_NBR.flatten(1) @ self.v.flatten(0, 1)).view(*x.shape[:-1], -1)
