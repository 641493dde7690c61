"""Attention that runs in the latents of the shared tensor, for every architecture.

Shapes: B batch, T queries, N keys, D model width, H query heads, G key/value heads, g = H/G, K
head_dim, J rotated width, R = R2 latent width, E and V widths of cached keys and values, m some of
the 2g+2 matrices.

With W[m] = U1 A[m] U2^T, values need only R numbers per head, as U2^T U2 can be applied between
them and the output's factors. Keys are expanded in the dimensions that are rotated; the rest stays
latent, since its bias adds the same to all scores of a query. So the cache holds latents.
Alternatively both are expanded to K before they are cached, as in the dense model.
"""

from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorllm.runtime.adapters import AttentionAdapter, rotary_function
from tensorllm.runtime.tucker import HeadsSite
from tensorllm.tensors.stacking import Geometry


class Bias(nn.Module):
    """The remainder of a linear layer whose weight is in factors: its bias, under its old name."""

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias)


class LatentOutput(Bias):
    """W_O applied to latent heads (B, T, H R), in place of the dense output projection."""

    def __init__(self, bias: Tensor | None, site: HeadsSite, groups: int) -> None:
        super().__init__(bias)
        self.groups = groups
        self._site = (site,)  # in a tuple: the attention registers it

    def forward(self, y: Tensor) -> Tensor:
        site = self._site[0]
        y_BTGmR = y.view(*y.shape[:-1], self.groups, site.queries, -1)
        out_BTD = site.out_of(y_BTGmR.transpose(-3, -2), slice(site.queries + 2, None))
        return out_BTD if self.bias is None else out_BTD + self.bias


class FactoredAttention:
    """Mixed into a model's own attention class by `become_factored`; replaces its `forward`."""

    config: Any
    layer_idx: int
    is_causal: bool
    training: bool

    def prepare(
        self,
        config: Any,
        adapter: AttentionAdapter,
        geometry: Geometry,
        site: HeadsSite,
        latent: bool,
    ) -> None:
        """Set the attributes that `forward` uses, besides those of the dense module.

        Args:
            config: of the model.
            adapter: of the architecture.
            geometry: of the layer.
            site: its factors.
            latent: whether to cache latents instead of keys and values of width K.
        """
        self.factors = site
        self.adapter, self.geometry = adapter, geometry
        self.rotary_function = rotary_function(type(self).dense_class)  # type: ignore[attr-defined]
        self.num_key_value_groups = geometry.groups
        self.rotated = adapter.width(config, geometry.K)
        self.norm_modules = (
            adapter.norms if adapter.norms and hasattr(self, adapter.norms[0]) else None
        )
        softcap = getattr(self, adapter.softcap, None) if adapter.softcap else None
        self.softcap = softcap
        self.biases: list[tuple[str, Bias]] = []
        self.output: LatentOutput | None = None
        rest, rank = geometry.K - self.rotated, site.u_KR.shape[1]
        self.latent_values = latent
        self.latent_keys = latent and rank < rest and self.norm_modules is None and softcap is None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        position_embeddings: Any = None,
        position_ids: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The output and the probabilities, as the dense module returns them."""
        q_BHTE, k_BGTE, v_BGTV = self._project(hidden_states, position_embeddings, position_ids)
        past = past_key_values if past_key_values is not None else layer_past
        if past is not None:
            past = getattr(past, "self_attention_cache", past)
            k_BGTE, v_BGTV = past.update(k_BGTE, v_BGTV, self.layer_idx)
        y_BTHV, weights = self._attend(
            q_BHTE, k_BGTE, v_BGTV, attention_mask, output_attentions, kwargs
        )
        y = (y_BTHV if self.latent_values else y_BTHV @ self.factors.u_KR).flatten(-2)
        if self.output is not None:
            y = self.output(y)
        if self.adapter.output_dropout:
            y = getattr(self, self.adapter.output_dropout)(y)
        return y, weights

    def _project(
        self, x_BTD: Tensor, position_embeddings: Any, position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values per head, expanded only as far as necessary."""
        site, geo, u_KR = self.factors, self.geometry, self.factors.u_KR
        y_BTmGR = site.into(x_BTD, slice(0, geo.groups + 2))
        q_BHTR = y_BTmGR[:, :, : geo.groups].permute(0, 3, 2, 1, 4).flatten(1, 2)
        k_BGTR, v_BGTR = (y_BTmGR[:, :, geo.groups + i].transpose(1, 2) for i in (0, 1))
        bias = self._role_biases()
        if self.latent_values:
            v = v_BGTR @ (u_KR.mT @ u_KR)
            v = v + bias["v"] @ u_KR if bias else v
        else:
            v = v_BGTR @ u_KR.mT
            v = v + bias["v"] if bias else v

        full = self.rotated if self.latent_keys else geo.K
        q, k = ((y @ u_KR[:full].mT) for y in (q_BHTR, k_BGTR))
        if bias:
            q, k = q + bias["q"][..., :full], k + bias["k"][..., :full]
        q, k = self._position(q, k, position_embeddings, position_ids)
        if self.latent_keys:
            u_pass = u_KR[full:]
            q_latent = q_BHTR @ (u_pass.mT @ u_pass)
            if bias:
                q_latent = q_latent + bias["q"][..., full:] @ u_pass
            q, k = torch.cat([q, q_latent], dim=-1), torch.cat([k, k_BGTR], dim=-1)
        return q, k, v

    def _position(
        self, q: Tensor, k: Tensor, position_embeddings: Any, position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Normalise and rotate the expanded part of queries and keys."""
        if self.norm_modules:
            q, k = (
                getattr(self, name)(t) for name, t in zip(self.norm_modules, (q, k), strict=True)
            )
        if self.adapter.rotate is None:
            return q, k
        J = self.rotated
        q_BHTJ, k_BGTJ = self.adapter.rotate(
            self, q[..., :J], k[..., :J], position_embeddings, position_ids
        )
        if q.shape[-1] == J:
            return q_BHTJ, k_BGTJ
        return torch.cat([q_BHTJ, q[..., J:]], dim=-1), torch.cat([k_BGTJ, k[..., J:]], dim=-1)

    def _role_biases(self) -> dict[str, Tensor]:
        """Biases (heads, 1, K) of q, k and v; empty if the model has none."""
        out: dict[str, Tensor] = {}
        geo = self.geometry
        for layout, module in self.biases:
            if module.bias is None:
                continue
            if layout == "grouped":
                by_group = module.bias.view(geo.G, geo.groups + 2, geo.K)
                parts = by_group.split([geo.groups, 1, 1], dim=1)
                out |= {r: p.reshape(-1, 1, geo.K) for r, p in zip("qkv", parts, strict=True)}
            else:
                sizes = [geo.inner(role) for role in layout]
                parts = module.bias.split(sizes)
                out |= {r: p.view(-1, 1, geo.K) for r, p in zip(layout, parts, strict=True)}
        return out

    def _attend(
        self,
        q_BHTE: Tensor,
        k_BGNE: Tensor,
        v_BGNR: Tensor,
        mask: Tensor | None,
        want_weights: bool,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs (B, T, H, R) by the attention implementation that the model is set to."""
        name = self.config._attn_implementation
        drop = getattr(self, self.adapter.dropout) if self.training else 0.0
        dropout = drop.p if isinstance(drop, nn.Dropout) else drop
        scale = self.adapter.scale(self)
        wide, narrow = k_BGNE.shape[-1], v_BGNR.shape[-1]
        one_by_one = q_BHTE.shape[2] == 1 and wide != narrow
        plain = name == "sdpa" and (want_weights or one_by_one)  # masks of other kernels differ
        if name == "eager" or plain:
            if plain and mask is None and self.is_causal:
                mask = causal_mask(q_BHTE, k_BGNE)
            return attend(q_BHTE, k_BGNE, v_BGNR, mask, scale, self.softcap, dropout)
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        # Kernels are slow unless values are as wide as keys; the zeros are cut off again below.
        v_BGNE = F.pad(v_BGNR, (0, wide - narrow)) if narrow < wide else v_BGNR
        extra = {"softcap": self.softcap} if self.softcap is not None else {}
        window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        y_BTHE, weights = ALL_ATTENTION_FUNCTIONS[name](
            self,
            q_BHTE,
            k_BGNE,
            v_BGNE,
            mask,
            dropout=dropout,
            scaling=scale,
            sliding_window=window,
            **extra,
            **kwargs,
        )
        return y_BTHE[..., :narrow], weights


@cache  # one class per dense class, so that types compare equal
def _factored_class(dense: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a model's attention class with our `forward`.

    Being a subclass, it is still found by the model's `isinstance` checks.
    """
    return type(f"Factored{dense.__name__}", (FactoredAttention, dense), {"dense_class": dense})


def become_factored(
    module: Any,
    config: Any,
    adapter: AttentionAdapter,
    geometry: Geometry,
    site: HeadsSite,
    *,
    latent: bool,
) -> None:
    """Turn a dense attention module into a factored one, in place.

    Everything except the weights stays: norms, dropouts, tables, layer index, and its place in the
    model.
    """
    module.__class__ = _factored_class(cast(Any, type(module)))
    module.prepare(config, adapter, geometry, site, latent)


def attend(
    q_BHTE: Tensor,
    k_BGNE: Tensor,
    v_BGNR: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Plain attention: outputs (B, T, H, R) and probabilities (B, H, T, N).

    Keys and values are not repeated for the queries of a group: these become rows of one product.

    Args:
        q_BHTE, k_BGNE, v_BGNR: queries, keys and values.
        mask: added to the scores, or True where attended; broadcasts to (B, H, T, N).
        scale: multiplies the scores.
        softcap: of the scores.
        dropout: of the probabilities.
    """
    batch, heads, tokens, _ = q_BHTE.shape
    groups = k_BGNE.shape[1]
    q_BGgTE = (q_BHTE * scale).reshape(batch, groups, -1, q_BHTE.shape[-1])
    single = q_BGgTE.shape[2] == 1  # transposed, up to four times faster on a CPU
    scores = (k_BGNE @ q_BGgTE.mT).mT if single else q_BGgTE @ k_BGNE.mT
    scores = scores.reshape(batch, heads, tokens, -1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v_BGNR.dtype)
    dropped = F.dropout(weights, dropout) if dropout else weights
    y_BHTR = (dropped.view(batch, groups, -1, dropped.shape[-1]) @ v_BGNR).view(
        batch, heads, tokens, -1
    )
    return y_BHTR.transpose(1, 2), weights


def causal_mask(q_BHTE: Tensor, k_BGNE: Tensor) -> Tensor | None:
    """The causal mask (T, N), True where attended, as sdpa applies it if no mask is given.

    None for a single query.
    """
    queries, keys = q_BHTE.shape[2], k_BGNE.shape[2]
    if queries == 1:
        return None
    seen = torch.ones(queries, keys, dtype=torch.bool, device=q_BHTE.device)
    return seen.tril(keys - queries)
