"""What the factored attention needs to know of each architecture besides its weights.

Paths and names are those of the transformers 5 modelling files (`models/<model_type>`).

Shapes: B batch, H heads, T tokens, K head_dim, J rotated width.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from tensorllm.registry import Registry

Rotate = Callable[[Any, Tensor, Tensor, Any, Any], tuple[Tensor, Tensor]]


def rotate_halves(
    module: Any, q_BHTJ: Tensor, k_BGTJ: Tensor, position_embeddings: Any, position_ids: Any
) -> tuple[Tensor, Tensor]:
    """Rotary embedding by the model's own function, with cosines and sines from the model."""
    cos, sin = position_embeddings
    return module.rotary_function(q_BHTJ, k_BGTJ, cos, sin)


def rotate_pairs(
    module: Any, q_BHTJ: Tensor, k_BGTJ: Tensor, position_embeddings: Any, position_ids: Any
) -> tuple[Tensor, Tensor]:
    """Rotary embedding by the model's own function, with a table of sines and cosines per layer.

    Heads come after tokens in that function (GPT-J).
    """
    sin, cos = (
        module.embed_positions.to(position_ids.device)[position_ids]
        .to(k_BGTJ.dtype)
        .chunk(2, dim=-1)
    )
    q, k = (module.rotary_function(t.transpose(1, 2), sin, cos) for t in (q_BHTJ, k_BGTJ))
    return q.transpose(1, 2), k.transpose(1, 2)


def _rope_width(config: Any, head_dim: int) -> int:
    return int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionAdapter:
    """One architecture's attention, apart from its matrices.

    Attributes:
        rotate: how queries and keys are rotated; None if positions are not rotary.
        width: how many leading dimensions of a head are rotated, from the config and head_dim.
        norms: names of the modules that normalise queries and keys per head, if the model has them.
        scale: the factor that multiplies scores.
        softcap: attribute with the soft cap of scores.
        dropout: attribute with the dropout of probabilities.
        output_dropout: attribute with the dropout of the output.
        latent: whether a module with this config can run in latents.
    """

    rotate: Rotate | None = rotate_halves
    width: Callable[[Any, int], int] = _rope_width
    norms: tuple[str, str] | None = None
    scale: Callable[[Any], float] = lambda module: module.scaling
    softcap: str | None = None
    dropout: str = "attention_dropout"
    output_dropout: str | None = None
    latent: Callable[[Any], bool] = lambda config: True


ADAPTERS: Registry[AttentionAdapter] = Registry(
    "attention adapter", group="tensorllm.attention_adapters"
)

_ROTARY = AttentionAdapter()
for _name in ("llama", "mistral", "qwen2", "phi3", "gpt_neox"):
    ADAPTERS.register(_name)(_ROTARY)
for _name in ("qwen3", "gemma3_text"):
    ADAPTERS.register(_name)(replace(_ROTARY, norms=("q_norm", "k_norm")))
ADAPTERS.register("gemma2")(replace(_ROTARY, softcap="attn_logit_softcapping"))
ADAPTERS.register("phi")(replace(_ROTARY, norms=("q_layernorm", "k_layernorm")))
ADAPTERS.register("falcon")(
    replace(
        _ROTARY,
        scale=lambda module: module.inv_norm_factor,
        latent=lambda config: not config.alibi,
    )
)
ADAPTERS.register("gptj")(
    AttentionAdapter(
        rotate=rotate_pairs,
        width=lambda config, head_dim: config.rotary_dim or head_dim,
        scale=lambda module: 1 / module.scale_attn,
        dropout="attn_dropout",
        output_dropout="resid_dropout",
    )
)

_PLAIN = AttentionAdapter(rotate=None, width=lambda config, head_dim: 0, dropout="dropout")
for _name in ("opt", "bert", "roberta", "distilbert"):
    ADAPTERS.register(_name)(_PLAIN)
ADAPTERS.register("gpt2")(replace(_PLAIN, dropout="attn_dropout", output_dropout="resid_dropout"))


def rotary_function(dense: type[nn.Module]) -> Any:
    """The rotary embedding of the modelling file that defines an attention class."""
    return getattr(sys.modules[dense.__module__], "apply_rotary_pos_emb", None)
