"""The shared tensor of one layer's attention as a module: into its latents, and out of them.

Shapes: B batch, T tokens, D model width, P = R1, K head width, R = R2, M = 2g+2 matrices of a
group, S = R3, G key/value heads, m the matrices asked for.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from tensorllm.tensors.factors import Tucker, wide

CORE_ORDER = (2, 3, 1, 0)  # stored (P, R, S, G), held (S, G, R, P): rows that lie together are used


class HeadsSite(nn.Module):
    """Factors of the (D, K, M, G) tensor; query rows come first, then key, value and outputs.

    Where S = M nothing is saved by the stack factor, so it is multiplied into the core (`absorb`):
    each projection then reads its own part of the core only.
    """

    def __init__(self, tucker: Tucker) -> None:
        super().__init__()
        self.core_SGRP = nn.Parameter(tucker.core.permute(CORE_ORDER).contiguous())
        self.u_DP = nn.Parameter(tucker.factors[0])
        self.u_KR = nn.Parameter(tucker.factors[1])
        self.u_MS = nn.Parameter(tucker.factors[2])
        self.absorbed = False

    @property
    def queries(self) -> int:
        """Query heads per key/value head."""
        return (self.u_MS.shape[0] - 2) // 2

    @torch.no_grad()
    def absorb(self) -> None:
        """Multiply the stack factor into the core where both have the same size."""
        matrices, rank = self.u_MS.shape
        if self.absorbed or matrices != rank or self.u_MS.is_meta or is_parametrized(self):
            return  # quantised factors are not written to
        core_MGRP = torch.einsum("sgrp,ms->mgrp", wide(self.core_SGRP), wide(self.u_MS))
        # New tensors: the old ones may be the factors that the compression's record holds.
        self.core_SGRP.data = core_MGRP.to(self.core_SGRP.dtype)
        self.u_MS.data = torch.eye(matrices).to(self.u_MS)
        self.u_MS.requires_grad_(False)
        self.absorbed = True

    def tucker(self) -> Tucker:
        """The factors as they are stored."""
        core = self.core_SGRP.detach().permute(3, 2, 0, 1)
        return Tucker(core, {0: self.u_DP.detach(), 1: self.u_KR.detach(), 2: self.u_MS.detach()})

    def into(self, x_BTD: Tensor, rows: slice) -> Tensor:
        """Latents (B, T, m, G, R) of the matrices `rows`."""
        return self.rows(x_BTD @ self.u_DP, rows)

    def rows(self, z_BTP: Tensor, rows: slice) -> Tensor:
        """Latents (B, T, m, G, R) of the matrices `rows` from the shared latent of the layer."""
        core_SGRP = self.core_SGRP[rows] if self.absorbed else self.core_SGRP
        y = F.linear(z_BTP, core_SGRP.flatten(0, 2))
        y_BTSGR = y.view(*z_BTP.shape[:-1], *core_SGRP.shape[:3])
        if self.absorbed:
            return y_BTSGR
        return torch.einsum("...sgr,ms->...mgr", y_BTSGR, self.u_MS[rows])

    def out_of(self, y_BTmGR: Tensor, rows: slice) -> Tensor:
        """The model width again: the transpose of `into`."""
        core_SGRP: Tensor = self.core_SGRP
        if self.absorbed:
            core_SGRP = core_SGRP[rows]  # a view
        else:
            y_BTmGR = torch.einsum("...mgr,ms->...sgr", y_BTmGR, self.u_MS[rows])
        z_BTP = y_BTmGR.flatten(-3) @ core_SGRP.flatten(0, 2)
        return F.linear(z_BTP, self.u_DP)
