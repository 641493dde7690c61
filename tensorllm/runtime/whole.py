"""Module for a matrix that is only rounded: a linear layer, dequantised for each use."""

from tensorllm.compressors.layer import Site
from tensorllm.runtime.sites import Cost, Held, Order, SiteModule, linear, runs
from tensorllm.tensors.factors import Factors
from tensorllm.tensors.stacking import Geometry, is_output_projection
from tensorllm.tensors.whole import Whole


@runs(Whole, "matrix")
class WholeSite(SiteModule):
    """One ordinary linear layer (out, in)."""

    @classmethod
    def cost(cls, site: Site, factors: Factors, geometry: Geometry) -> Cost:
        size = factors.tensors()["w"].numel()
        return Cost(size, 1, size)

    @classmethod
    def roles(cls, site: Site, factors: Factors, geometry: Geometry) -> dict[tuple[int, str], Held]:
        ((layer, role),) = site.matrices
        w_ID, writes = factors.tensors()["w"], is_output_projection(role)
        order: Order = (1, 0) if writes else None
        return {(layer, role): Held(linear(w_ID.mT if writes else w_ID), {"w": ("weight", order)})}
