"""AA-SVD: a fit anchored to the original's outputs, then a refinement of each block.

Shapes: Y outputs, X inputs, R rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tensorllm.compressors.base import COMPRESSORS
from tensorllm.compressors.calibrated.svd_llm import in_order
from tensorllm.compressors.layer import LayerContext, LayerResult, Site
from tensorllm.compressors.matrix import (
    MatrixFit,
    Root,
    low_rank,
    map_of,
    truncated,
    whitening,
)
from tensorllm.errors import UserError
from tensorllm.tensors.factors import LowRank
from tensorllm.tensors.stacking import is_output_projection

# Relative to the mean variance. Inputs that come from compressed matrices lie in a subspace;
# outside it there is only rounding noise, which the fit would otherwise amplify.
RIDGE = 1e-6


@COMPRESSORS.register("aa-svd")
@dataclass(frozen=True, kw_only=True)
class AASVD(MatrixFit):
    """Each matrix fitted so that its outputs on the compressed model's inputs are the original's.

    Source: AA-SVD, arXiv 2604.02119: the anchored fit min |W X - W' X'|, then all factors, biases
    and norms of a block trained towards the original block's output (AdamW). The distance here is
    relative to each token's output; the authors' is the plain mean square.

    Attributes:
        refine_epochs: passes over the text in which a block is trained (the paper: 25); 0: none.
        learning_rate: of AdamW.
    """

    refine_epochs: int = 0
    learning_rate: float = 1e-4

    source: ClassVar[str] = "https://arxiv.org/abs/2604.02119"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refine_epochs < 0:
            raise UserError(f"refine_epochs must be 0 or more, got {self.refine_epochs}")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate must be above 0, got {self.learning_rate}")

    def passes(self, sites: Sequence[Site]) -> int:
        return len(sites) + self.refine_epochs

    def fit_layer(self, context: LayerContext) -> LayerResult:
        out: dict[Site, LowRank] = {}
        for site in in_order(context.sites):
            (role,) = site.roles
            w_ID = context.weight(role)
            factors = anchored(
                map_of(w_ID, role),
                *context.shifted_covariances(role),
                self.rank_at(context, site),
            )
            out[site] = low_rank(*factors, transposed=is_output_projection(role), like=w_ID)
            context.replace(site, out[site])
        return self._refined(context, out) if self.refine_epochs else LayerResult(out)

    def _refined(self, context: LayerContext, fitted: Mapping[Site, LowRank]) -> LayerResult:
        """Train all factors, biases and norms of the layer together."""
        pairs = {site: (leaf(f.u_IR), leaf(f.v_RO)) for site, f in fitted.items()}
        norms = context.other_parameters()
        kept = {name: w.dtype for name, w in norms.items()}
        others = {name: leaf(w.float()) for name, w in norms.items()}
        trained = [t for pair in pairs.values() for t in pair] + list(others.values())
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate)
        for _ in range(self.refine_epochs):
            for batch in range(context.batches):
                optimizer.zero_grad()
                with torch.enable_grad():
                    weights = {site.roles[0]: u @ v for site, (u, v) in pairs.items()}
                    rest = {name: w.to(kept[name]) for name, w in others.items()}
                    context.output_loss(batch, weights, rest).backward()
                optimizer.step()
        out = {site: LowRank(u.detach(), v.detach()) for site, (u, v) in pairs.items()}
        for site, factors in out.items():
            context.replace(site, factors)
        changed = {name: w.detach().to(kept[name]) for name, w in others.items()}
        context.replace_parameters(changed)
        return LayerResult(out, changed)


def leaf(t: Tensor) -> Tensor:
    """A copy that requires gradients."""
    return t.detach().clone().requires_grad_()


def anchored(w_YX: Tensor, cross_XX: Tensor, own_XX: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (Y, R) and (R, X) of the map whose outputs on y are nearest to W x in mean square.

    Args:
        w_YX: W.
        cross_XX: E[x yᵀ].
        own_XX: E[y yᵀ] = L Lᵀ; the map is SVD_R(W E[x yᵀ] L⁻ᵀ) L⁻¹.
        rank: R.
    """
    root = whitening(own_XX.to(w_YX), RIDGE)
    target = w_YX @ cross_XX.to(w_YX) @ root.inverse_XX.mT  # W E[x yᵀ] L⁻ᵀ
    ones = w_YX.new_ones(w_YX.shape[1])
    u_YR, v_RX = truncated(target, Root(ones, ones), rank)
    return u_YR, root.unscale(v_RX)
