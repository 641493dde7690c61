"""SVD-LLM: truncation-aware whitening, and its update on the compressed model's inputs.

Shapes: Y outputs, X inputs, R rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tensorllm.compressors.base import COMPRESSORS, Needs
from tensorllm.compressors.layer import LayerContext, LayerResult, MatrixStatistics, Site
from tensorllm.compressors.matrix import (
    MatrixFit,
    MatrixSVD,
    Root,
    low_rank,
    map_of,
    truncated,
    whitening,
)
from tensorllm.tensors.factors import Factors
from tensorllm.tensors.stacking import is_output_projection


@COMPRESSORS.register("svd-llm")
@dataclass(frozen=True, kw_only=True)
class SVDLLM(MatrixSVD):
    """Each matrix truncated where its inputs are white: the best of its rank on its own outputs.

    Source: SVD-LLM, arXiv 2403.07378, section 3.1 (Theorem 3.2).
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2403.07378"
    needs: ClassVar[Needs] = "activations"

    def root(self, w_YX: Tensor, statistics: MatrixStatistics | None) -> Root:
        assert statistics is not None, "measured, as `needs` says"
        return whitening(statistics.input_covariance_XX.to(w_YX))


@COMPRESSORS.register("svd-llm-sequential")
@dataclass(frozen=True, kw_only=True)
class SVDLLMSequential(MatrixFit):
    """`svd-llm`, then the left factor refitted to the inputs that the compressed model gives.

    Source: SVD-LLM, arXiv 2403.07378, section 3.2 (sequential low-rank parameter update).
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2403.07378"

    def passes(self, sites: Sequence[Site]) -> int:
        return len(sites)

    def fit_layer(self, context: LayerContext) -> LayerResult:
        out: dict[Site, Factors] = {}
        for site in in_order(context.sites):
            (role,) = site.roles
            w_ID = context.weight(role)
            w_YX = map_of(w_ID, role)
            root = whitening(context.input_covariance(role).to(w_YX))
            _, v_RX = truncated(w_YX, root, self.rank_at(context, site))
            _, own_XX = context.shifted_covariances(role)
            right_XR = own_XX.to(w_YX) @ v_RX.mT
            u_YR = torch.linalg.lstsq(v_RX @ right_XR, (w_YX @ right_XR).mT).solution.mT
            out[site] = low_rank(u_YR, v_RX, transposed=is_output_projection(role), like=w_ID)
            context.replace(site, out[site])
        return LayerResult(out)


def in_order(sites: Mapping[Site, Any]) -> list[Site]:
    """Sites of single roles in the order in which a layer runs."""
    order = ("q", "k", "v", "o", "gate", "in", "out")
    return sorted(sites, key=lambda site: order.index(site.roles[0]))
