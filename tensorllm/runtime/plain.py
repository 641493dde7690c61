"""Plain attention, for what no kernel takes: narrow values, probabilities that are asked for.

Shapes: B batch, T queries, N keys, H query heads, G key/value heads, g = H/G, E and R key and value
widths.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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

    Keys and values are not repeated for the heads of a group: those are rows of one product.

    Args:
        mask: added to the scores, or true where attended; broadcasts to (B, H, T, N).
    """
    batch, heads, tokens, _ = q_BHTE.shape
    groups = k_BGNE.shape[1]
    q_BGgTE = (q_BHTE * scale).reshape(batch, groups, -1, q_BHTE.shape[-1])
    single = q_BGgTE.shape[2] == 1  # a CPU is up to four times faster at it the other way round
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
    """True (T, N) where attended: what sdpa itself makes of a mask that the model left out."""
    queries, keys = q_BHTE.shape[2], k_BGNE.shape[2]
    if queries == 1:
        return None
    seen = torch.ones(queries, keys, dtype=torch.bool, device=q_BHTE.device)
    return seen.tril(keys - queries)
