"""MoDeGPT: pairs of matrices made narrower together, so that no matrix product is added.

Shapes: D model width, K head_dim, G key/value heads, g queries per group, F FFN width, I rows of a
role matrix, R kept rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tensorllm.compressors.base import (
    COMPRESSORS,
    Dimension,
    ErrorCurve,
    Job,
    LayerFit,
)
from tensorllm.compressors.checks import check_roles
from tensorllm.compressors.layer import LayerContext, LayerResult, Site
from tensorllm.compressors.matrix import KEPT, kept_settings
from tensorllm.errors import UserError
from tensorllm.models.spec import ModelSpec
from tensorllm.options import Value
from tensorllm.tensors.kept_rows import KeptRows
from tensorllm.tensors.stacking import ATTENTION, FFN, Geometry
from tensorllm.tensors.triangular import raised_cholesky

TOGETHER = (("q", "k"), ("v", "o"), FFN)
RIDGE = 1e-6  # added to a covariance before it is inverted, relative to the mean variance
Rotary = Literal["halves", "neighbours", "none"]
Rows = dict[str, tuple[Tensor, Tensor]]  # role -> row indices and their values


@COMPRESSORS.register("modegpt")
@dataclass(frozen=True, kw_only=True)
class MoDeGPT(LayerFit):
    """FFN channels, query-key dimensions and value-output dimensions dropped, the rest refitted.

    Source: MoDeGPT, arXiv 2408.09632, section 3: FFN channels by ridge leverage with a Nyström
    refit of `out` (Algorithm 1), query-key dimensions by their norms (Algorithm 2; dimensions that
    rotate together are kept together), value-output dimensions by an SVD of each KV head's product
    (Algorithm 3). Here all layers keep the same share. If `v` has a bias, which cannot change
    basis, its dimensions are chosen as FFN channels are.

    Attributes:
        kept: share of the dimensions to keep, in (0, 1).
        matrices: q and k, v and o, or in (gate) and out, or several of these; by default all.
        rotary: how rotary embeddings pair the dimensions of a head: `halves` (LLaMA and most),
            `neighbours` (GPT-J), `none`.
    """

    kept: float
    matrices: tuple[str, ...] | None = None
    rotary: Rotary = "halves"

    source: ClassVar[str] = "https://arxiv.org/abs/2408.09632"
    size_settings: ClassVar[tuple[tuple[str, ...], ...]] = (("kept",),)

    def __post_init__(self) -> None:
        if not 0 < self.kept < 1:
            raise UserError(f"kept must be in (0, 1), got {self.kept}")
        if self.matrices is None:
            return
        object.__setattr__(self, "matrices", check_roles(self.matrices, FFN + ATTENTION))
        for together in TOGETHER:
            asked = set(together) & set(self.matrices)
            if asked and set(together) - asked - {"gate"}:
                raise UserError(
                    f"{' and '.join(r for r in together if r != 'gate')} become narrower together, "
                    f"got {', '.join(sorted(asked))} alone"
                )

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> list[Job]:
        return [
            Job(Site((layer,), (role,), "matrix"), self)
            for layer in sorted(layers)
            for together in TOGETHER
            for role in together
            if role in spec.geometry(layer).roles
            and (self.matrices is None or role in self.matrices)
        ]

    def curves(self, sites: Sequence[Site], context: LayerContext) -> Mapping[Site, ErrorCurve]:
        raise _one_share()

    @classmethod
    def budget_settings(cls, spec: ModelSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
        raise _one_share()

    def passes(self, sites: Sequence[Site]) -> int:
        del sites
        return 0

    @classmethod
    def search_space(cls, spec: ModelSpec, settings: Mapping[str, Any]) -> dict[str, Dimension]:
        del spec, settings
        return {"kept": Dimension(KEPT, (0.0, 1.0), log=False)}

    @classmethod
    def settings_at(cls, spec: ModelSpec, point: Mapping[str, Value]) -> dict[str, Any]:
        return kept_settings(point)

    def fit_layer(self, context: LayerContext) -> LayerResult:
        sites = {site.roles[0]: site for site in context.sites}
        geo = context.geometry
        rows: Rows = {}
        if "q" in sites:
            rows |= self._query_key(context, geo)
        if "v" in sites:
            rows |= self._value_output(context, geo)
        if "in" in sites:
            rows |= self._ffn(context, geo)
        factors = {}
        for role, (rows_R, values_RD) in rows.items():
            w_ID = context.weight(role)
            dtype = torch.promote_types(w_ID.dtype, torch.float32)
            factors[sites[role]] = KeptRows.of(rows_R, values_RD.to(dtype), len(w_ID))
            context.replace(sites[role], factors[sites[role]])
        return LayerResult(factors)

    def ffn_channels(self, geometry: Geometry) -> int:
        dropped = self.matrices is None or "out" in self.matrices
        return self._count(geometry.F) if dropped else geometry.F

    def _count(self, size: int) -> int:
        return min(size, max(1, round(self.kept * size)))

    def _ffn(self, context: LayerContext, geo: Geometry) -> Rows:
        """The channels of highest ridge leverage, and `out` refitted to them."""
        covariance_FF = context.input_covariance("out").to(context.device)
        chosen_R = leading(leverage(covariance_FF), self._count(len(covariance_FF)))
        out_RD = nystrom(covariance_FF, chosen_R, context.weight("out").double())
        same = [role for role in ("in", "gate") if role in geo.roles]
        rows = {role: (chosen_R, context.weight(role).double()[chosen_R]) for role in same}
        return rows | {"out": (chosen_R, out_RD)}

    def _query_key(self, context: LayerContext, geo: Geometry) -> Rows:
        """The dimensions of each KV head with the largest queries and keys."""
        covariance_DD = context.input_covariance("q").to(context.device)
        q_ID, k_ID = (context.weight(role).double() for role in "qk")
        sizes_q, sizes_k = (((w @ covariance_DD) * w).sum(1) for w in (q_ID, k_ID))
        scores_GK = sizes_q.view(geo.G, geo.groups, geo.K).sum(1) * sizes_k.view(geo.G, geo.K)
        pairs_PK = dimensions_together(geo.K, self.rotary).to(scores_GK.device)
        scores_GP = scores_GK[:, pairs_PK].sum(-1)
        count = self._count(len(pairs_PK))
        kept_GR = pairs_PK[scores_GP.topk(count).indices].flatten(1)
        rows_q, rows_k = of_heads(kept_GR, geo)
        return {"q": (rows_q, q_ID[rows_q]), "k": (rows_k, k_ID[rows_k])}

    def _value_output(self, context: LayerContext, geo: Geometry) -> Rows:
        """Values and outputs of each KV head from the truncated SVD of their product.

        If `v` has a bias, a subset of the dimensions instead.
        """
        v_GKD = context.weight("v").double().view(geo.G, geo.K, -1)
        o_GgKD = context.weight("o").double().view(geo.G, geo.groups, geo.K, -1)
        count = self._count(geo.K)
        kept_GR = torch.arange(count, device=context.device).expand(geo.G, count)
        if context.has_bias("v"):
            kept_GR, v_GRD, o_GgRD = self._chosen_values(context, geo, v_GKD, o_GgKD, count)
        else:
            covariance_DD = context.input_covariance("v").to(context.device)
            v_GRD, o_GgRD = product_svd(covariance_DD, v_GKD, o_GgKD, count)
        rows_o, rows_v = of_heads(kept_GR, geo)
        return {"v": (rows_v, v_GRD.flatten(0, 1)), "o": (rows_o, o_GgRD.flatten(0, 2))}

    def _chosen_values(
        self, context: LayerContext, geo: Geometry, v_GKD: Tensor, o_GgKD: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        size = geo.groups * geo.K
        covariance_II = context.input_covariance("o").to(context.device)
        kept, values, outputs = [], [], []
        for group in range(geo.G):
            here = slice(group * size, (group + 1) * size)
            own = covariance_II[here, here].view(geo.groups, geo.K, geo.groups, geo.K)
            heads = [own[head, :, head] for head in range(geo.groups)]
            chosen_R = leading(sum(map(leverage, heads), torch.zeros(())), count)
            kept.append(chosen_R)
            values.append(v_GKD[group, chosen_R])
            refit = [nystrom(c, chosen_R, o) for c, o in zip(heads, o_GgKD[group], strict=True)]
            outputs.append(torch.stack(refit))
        return torch.stack(kept), torch.stack(values), torch.stack(outputs)


def _one_share() -> UserError:
    return UserError(
        "modegpt keeps one share (kept) of the dimensions in all layers and meets no other target: "
        "give kept; activation-hybrid drops FFN channels to a ratio or to bytes"
    )


def leverage(covariance_FF: Tensor) -> Tensor:
    """Ridge leverage scores (F): the diagonal of C (C + λ 1)⁻¹, λ the mean eigenvalue."""
    mean = covariance_FF.diagonal().mean()
    ridge_FF = covariance_FF + mean * torch.eye(len(covariance_FF)).to(covariance_FF)
    inverse_FF = torch.cholesky_inverse(_root(ridge_FF))
    return 1 - mean * inverse_FF.diagonal()


def leading(scores: Tensor, count: int) -> Tensor:
    """The indices of the highest scores, ascending."""
    return scores.topk(count).indices.sort().values


def nystrom(covariance_FF: Tensor, chosen_R: Tensor, out_FD: Tensor) -> Tensor:
    """The rows (R, D) refitted to the chosen inputs: C_RR⁻¹ C_RF out."""
    own_RR = covariance_FF[chosen_R[:, None], chosen_R]
    own_RR = own_RR + RIDGE * own_RR.diagonal().mean() * torch.eye(len(own_RR)).to(own_RR)
    return torch.cholesky_solve(covariance_FF[chosen_R] @ out_FD, _root(own_RR))


def _root(covariance_NN: Tensor) -> Tensor:
    """The Cholesky factor; the diagonal is raised if some channels are always zero."""
    least = RIDGE * (float(covariance_NN.diagonal().mean()) or 1.0)
    return raised_cholesky(covariance_NN, least, 10)


def product_svd(
    covariance_DD: Tensor, v_GKD: Tensor, o_GgKD: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Values (G, R, D) and outputs (G, g, R, D) of the best product of rank R, inputs weighted.

    With C^½ Vᵀ = U S Tᵀ and S Tᵀ O = U' S' T'ᵀ it is (U'ᵀ S⁻¹ Tᵀ V)ᵀ (U'ᵀ S Tᵀ O); only matrices of
    size head_dim are decomposed.
    """
    squares_GK, t_GKK = torch.linalg.eigh(v_GKD @ covariance_DD @ v_GKD.mT)
    s_GK = squares_GK.clamp(min=RIDGE * squares_GK.amax(1, keepdim=True)).sqrt()
    o_GKX = o_GgKD.transpose(1, 2).flatten(2)
    weighted_GKX = s_GK[..., None] * (t_GKK.mT @ o_GKX)
    _, u_GKK = torch.linalg.eigh(weighted_GKX @ weighted_GKX.mT)
    u_GRK = u_GKK.flip(-1)[..., :rank].mT
    v_GRD = u_GRK @ ((t_GKK.mT @ v_GKD) / s_GK[..., None])
    o_GRX = u_GRK @ weighted_GKX
    groups = o_GgKD.shape[1]
    return v_GRD, o_GRX.unflatten(2, (groups, -1)).transpose(1, 2)


def dimensions_together(head_dim: int, rotary: Rotary) -> Tensor:
    """Dimensions of a head that a rotary embedding rotates together, (P, 1 or 2)."""
    every = torch.arange(head_dim)
    if rotary == "none" or head_dim % 2:
        return every[:, None]
    return every.view(2, -1).mT if rotary == "halves" else every.view(-1, 2)


def of_heads(kept_GR: Tensor, geo: Geometry) -> tuple[Tensor, Tensor]:
    """Rows of all query heads and of all KV heads, for the dimensions that each KV head keeps."""
    heads_GR = kept_GR + geo.K * torch.arange(geo.G, device=kept_GR.device)[:, None]
    queries_HR = kept_GR.repeat_interleave(geo.groups, 0)
    first_H = geo.K * torch.arange(geo.H, device=kept_GR.device)
    return (queries_HR + first_H[:, None]).flatten(), heads_GR.flatten()
