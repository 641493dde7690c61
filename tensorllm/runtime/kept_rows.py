"""Modules for matrices of which only some rows are kept.

Shapes: D model width, I rows, R kept rows.
"""

from collections.abc import Collection, Iterable
from os.path import commonpath

import torch
from torch import Tensor, nn

from tensorllm.compressors.layer import Site
from tensorllm.models import RoleMatrices
from tensorllm.runtime.one_token import linear_of
from tensorllm.runtime.products import decodes, vector_times
from tensorllm.runtime.sites import Cost, RoleLinear, SiteModule, runs
from tensorllm.tensors.factors import Factors, parameters
from tensorllm.tensors.kept_rows import KeptRows
from tensorllm.tensors.shared_input import CHANNEL_STACKINGS, NARROWED
from tensorllm.tensors.stacking import Geometry


@runs(KeptRows, "matrix", *CHANNEL_STACKINGS)
class KeptRowsSite(SiteModule):
    """A product with the kept rows of a matrix: other outputs are zero, other inputs unread.

    If several matrices are stacked, the same rows of each are kept. An FFN that keeps the same
    channels of all its matrices (`NARROWED`) runs at their width, unless something between the
    matrices needs all channels (`widen`).
    """

    half_precision_reads = (1.0, 0.65)
    kept: Tensor
    rows_R: Tensor
    rows: nn.Parameter

    def __init__(self, factors: Factors, site: Site, geometry: Geometry) -> None:
        super().__init__(factors, site, geometry)
        self.narrow = site.roles in NARROWED
        self.count = len(self.rows) // len(site.roles)
        self.register_buffer("rows_R", None, persistent=False)  # until the mask is loaded

    @classmethod
    def cost(cls, site: Site, factors: Factors, geometry: Geometry) -> Cost:
        """As if no FFN had to be widened; those with biases take some copies more."""
        stored = parameters(factors)
        return Cost(stored, len(site.matrices) if site.roles in NARROWED else 3, stored)

    def widen(self) -> None:
        self.narrow = False

    @torch.no_grad()
    def finish(self) -> None:
        """Find the row indices, once the mask is loaded."""
        if not self.kept.is_meta:
            # Those of the first matrix; sorting the mask of all, as `KeptRows.rows`, takes longer.
            self.rows_R = self.kept[: self.sizes[0]].nonzero()[: self.count, 0]

    def input_projection(self, x: Tensor, index: int) -> Tensor:
        y_R = linear_of(x, self._own(index))
        if self.narrow:
            return y_R
        return y_R.new_zeros(*x.shape[:-1], self.sizes[index]).index_copy(-1, self.rows_R, y_R)

    def output_projection(self, x: Tensor, index: int) -> Tensor:
        x_R = x if self.narrow else x.index_select(-1, self.rows_R)
        if decodes(x):
            return vector_times(x_R.flatten(), self._own(index)).view(*x.shape[:-1], -1)
        return x_R @ self._own(index)

    def _own(self, index: int) -> Tensor:
        """The kept rows (R, D) of one matrix."""
        return self.rows[index * self.count : (index + 1) * self.count]


def widen_where_needed(
    site: Site, modules: Iterable[nn.Module], roles: RoleMatrices, names: Collection[str]
) -> None:
    """Let a site's modules give outputs of full width if what reads them may need all channels.

    That is if the module around the FFN's matrices has other parameters: a bias is as wide as all
    channels, and a norm between the matrices depends on all of them.

    Args:
        site: any.
        modules: that run its matrices.
        roles: of the model.
        names: of all its parameters.
    """
    if site.roles not in NARROWED:
        return
    matrices = {roles.name(layer, role) for layer, role in site.matrices}
    around = commonpath(["/".join(name.split(".")[:-2]) for name in matrices])
    start = f"{around}/".lstrip("/").replace("/", ".")
    if all(name in matrices for name in names if name.startswith(start)):
        return
    for module in modules:
        if isinstance(module, RoleLinear):
            module.widen()
