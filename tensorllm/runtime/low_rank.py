"""Low-rank factors of matrices as modules: plain, and pivoted.

Shapes: I rows of all roles, D model width, R rank, X = I - R rows that are mixed.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorllm.compressors.layer import Site
from tensorllm.runtime.sites import Cost, Held, Order, SiteModule, linear, runs
from tensorllm.tensors.factors import Factors, LowRank, parameters
from tensorllm.tensors.pivoted import PivotedLowRank
from tensorllm.tensors.shared_input import ROWS_STACKINGS
from tensorllm.tensors.stacking import ATTENTION_ROLES, Geometry, is_output_projection


@runs(LowRank, "matrix")
class LowRankSite(SiteModule):
    """Two ordinary linears, so that LoRA and quantisation find what they know."""

    @classmethod
    def cost(cls, site: Site, factors: Factors, geometry: Geometry) -> Cost:
        stored = parameters(factors)
        return Cost(stored, 2, stored)

    @classmethod
    def roles(cls, site: Site, factors: Factors, geometry: Geometry) -> dict[tuple[int, str], Held]:
        ((layer, role),) = site.matrices
        u_IR, v_RD = factors.tensors()["u"], factors.tensors()["v"]
        if is_output_projection(role):
            pair, names = (u_IR.mT, v_RD.mT), ("0.weight", "1.weight")
        else:
            pair, names = (v_RD, u_IR), ("1.weight", "0.weight")
        order: Order = (1, 0) if is_output_projection(role) else None
        held = {stored: (name, order) for stored, name in zip("uv", names, strict=True)}
        return {(layer, role): Held(nn.Sequential(*map(linear, pair)), held)}


@runs(PivotedLowRank, "matrix", *ROWS_STACKINGS)
class PivotedSite(SiteModule):
    """R rows of the stacked matrix as they are, the others as combinations of them.

    The outputs of the chosen rows are the latent from which the others are mixed. All roles read
    the same input, so the outputs of all are made at once, for the first role that asks.
    """

    basis_RD: nn.Parameter
    mix_XR: nn.Parameter
    rows_R: Tensor
    order_I: Tensor
    names = {  # noqa: RUF012
        "basis": ("basis_RD", None),
        "mix": ("mix_XR", None),
        "rows": ("rows_R", None),
    }

    def __init__(self, factors: Factors, site: Site, geometry: Geometry) -> None:
        super().__init__(factors, site, geometry)
        self.from_inner = is_output_projection(site.roles[0])
        self.in_attention = site.roles[0] in ATTENTION_ROLES
        order_I = torch.empty(sum(self.sizes), dtype=torch.int32, device=self.rows_R.device)
        self.register_buffer("order_I", order_I, persistent=False)
        self._held: tuple[Tensor, Sequence[Tensor], int] | None = None

    @classmethod
    def cost(cls, site: Site, factors: Factors, geometry: Geometry) -> Cost:
        """Two products, and what puts the rows where they belong."""
        stored = parameters(factors)
        return Cost(stored, 3 if is_output_projection(site.roles[0]) else 4, stored)

    @torch.no_grad()
    def finish(self) -> None:
        """Find where each row belongs, once the numbers of the chosen ones are there."""
        if self.rows_R.is_meta:
            return
        mixed_I = torch.ones(sum(self.sizes), dtype=torch.uint8, device=self.rows_R.device)
        mixed_I[self.rows_R.long()] = 0
        made_I = torch.argsort(mixed_I, stable=True)  # the chosen rows, then the mixed ones
        self.order_I = (made_I if self.from_inner else torch.argsort(made_I)).int()

    def input_projection(self, x: Tensor, index: int) -> Tensor:
        if torch.compiler.is_compiling() or len(self.sizes) == 1:
            return self._outputs(x)[index]
        held = self._held
        if held is None or held[0] is not x:
            held = (x, self._outputs(x), len(self.sizes))
        self._held = None if held[2] == 1 else (held[0], held[1], held[2] - 1)
        return held[1][index]

    def _outputs(self, x: Tensor) -> Sequence[Tensor]:
        """(..., I) of each role.

        Made transposed, a row for each output: on a CPU rows are put in order up to a hundred
        times faster than columns. What goes into elementwise functions are views of it; attention
        kernels want each token's numbers side by side.
        """
        lead = x.shape[:-1]
        if x.numel() == x.shape[-1]:  # one token, decoded: all that is started counts
            z = F.linear(x, self.basis_RD)
            y_I = torch.cat([z, F.linear(z, self.mix_XR)], dim=-1).view(-1)
            return y_I.index_select(0, self.order_I).view(*lead, -1).split(self.sizes, dim=-1)
        z_RN = F.linear(x.flatten(0, -2), self.basis_RD).mT
        y_IN = torch.cat([z_RN, self.mix_XR @ z_RN]).index_select(0, self.order_I)
        if self.in_attention:
            return y_IN.mT.contiguous().view(*lead, -1).split(self.sizes, dim=-1)
        return [y.mT.view(*lead, -1) for y in y_IN.split(self.sizes)]

    def output_projection(self, x: Tensor, index: int) -> Tensor:
        rank = len(self.basis_RD)
        if x.numel() == x.shape[-1]:
            x_NI = x.reshape(-1).index_select(0, self.order_I)[None]
            z_NR = torch.addmm(x_NI[:, :rank], x_NI[:, rank:], self.mix_XR)
            return (z_NR @ self.basis_RD).view(*x.shape[:-1], -1)
        x_IN = x.flatten(0, -2).mT.contiguous().index_select(0, self.order_I)
        z_RN = torch.addmm(x_IN[:rank], self.mix_XR.mT, x_IN[rank:])
        return (z_RN.mT @ self.basis_RD).view(*x.shape[:-1], -1)
