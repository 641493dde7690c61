"""Shrink a config to tiny sizes, of the same class and structure, for a model to test on.

Sizes are recognised by the names that configs give them; what a config needs beyond that is in
`shrink.json`, by model type.
"""

import copy
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

PARTS = ("decoder", "encoder")  # nested configs, besides those called `..._config`
WIDTH, HEADS, HEAD, VOCABULARY = 64, 4, 16, 128

_SIZES: dict[str, tuple[str, ...]] = {
    "width": ("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "embedding_size",
              "word_embed_proj_dim", "emb_dim", "dim_model", "decoder_hidden_size",
              "out_hidden_size"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
              "decoder_attention_heads", "attention_heads", "linear_num_heads",
              "linear_num_value_heads", "index_n_heads"),
    "groups": ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "n_kv_heads",
               "num_global_key_value_heads", "linear_num_key_heads"),
    "head": ("head_dim", "kv_channels", "attention_head_size", "d_kv", "global_head_dim",
             "dim_head", "linear_head_dim", "kv_lora_rank", "linear_key_head_dim",
             "linear_value_head_dim", "mamba_d_head", "mamba_head_dim", "v_head_dim",
             "qk_nope_head_dim", "swa_head_dim", "swa_v_head_dim"),
    "rope": ("qk_rope_head_dim",),
    "latent": ("q_lora_rank",),
    "inner": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "encoder_ffn_dim",
              "decoder_ffn_dim", "dim_ff", "dff", "hidden_dim", "d_inner", "d_ff"),
    "expert": ("moe_intermediate_size", "expert_ffn_hidden_size", "expert_intermediate_size"),
    "shared": ("shared_expert_intermediate_size", "shared_intermediate_size",
               "moe_shared_expert_intermediate_size"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "chosen": ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk",
               "moe_num_active_experts", "top_k_experts", "experts_per_token"),
    "one": ("n_group", "topk_group", "n_shared_experts", "num_expert_group"),
    "vocabulary": ("vocab_size", "vocab_size_per_layer_input", "n_vocab", "entity_vocab_size"),
    "positions": ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len",
                  "max_target_positions", "max_source_positions"),
    "chunk": ("mamba_chunk_size", "chunk_size"),
    "rotary": ("rotary_dim",),
    "window": ("sliding_window", "attention_window_size", "local_attention",
               "attention_chunk_size"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers",
               "decoder_layers"),
}  # fmt: skip
_TINY = {
    "width": WIDTH, "heads": HEADS, "groups": 2, "head": HEAD, "rope": HEAD, "latent": 24,
    "inner": 96, "expert": 48, "shared": 40, "experts": 4, "chosen": 2, "one": 1,
    "rotary": 8, "chunk": 8, "vocabulary": VOCABULARY, "positions": 64, "window": 16,
}  # fmt: skip
_KIND = {name: kind for kind, names in _SIZES.items() for name in names}


def shrunk(config: Any, layers: int) -> Any:
    """A tiny config of the same class.

    Args:
        layers: how many layers the text model keeps.
    """
    values = _shrunk(copy.deepcopy(config).to_dict(), layers)
    for name in ("quantization_config", "dtype", "torch_dtype"):
        values.pop(name, None)
    return type(config).from_dict(values)


@cache
def _overrides() -> dict[str, dict[str, Any]]:
    path = Path(__file__).with_name("shrink.json")
    found: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _shrunk(values: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The values with tiny sizes, including nested configs."""
    depth = next((values[n] for n in _SIZES["layers"] if isinstance(values.get(n), int)), None)
    keep = layers if depth is None else min(layers, depth)
    heads = next((values[n] for n in _SIZES["heads"] if isinstance(values.get(n), int)), None)
    out: dict[str, Any] = {}
    for name, value in values.items():
        if name == "per_layer_config" and isinstance(value, dict):
            out[name] = _per_layer(value, keep, heads)
        elif isinstance(value, dict) and (name.endswith("_config") or name in PARTS):
            out[name] = _shrunk(value, layers if _is_text(name) else 1)
        elif name in _SIZES["layers"] and isinstance(value, int):
            out[name] = min(keep, value)
        elif isinstance(value, list) and depth and len(value) == depth:
            out[name] = _tiny(name, value[:keep], heads)
        else:
            out[name] = _tiny(name, value, heads)
    _fit_rotary(out)
    for name, value in _overrides().get(str(values.get("model_type")), {}).items():
        merged = isinstance(value, dict) and isinstance(out.get(name), dict)
        out[name] = {**out[name], **value} if merged else value
    return out


def _per_layer(value: Mapping[Any, Any], layers: int, heads: int | None) -> dict[int, Any]:
    """The fields that differ between layers, shrunk."""
    return {
        int(number): {name: _tiny(name, one, heads) for name, one in each.items()}
        for number, each in value.items()
        if int(number) < layers
    }


def _is_text(name: str) -> bool:
    return any(word in name for word in ("text", "decoder", "thinker", "llm", "language"))


def _tiny(name: str, value: Any, heads: int | None) -> Any:
    kind = _KIND.get(name)
    if name.endswith(("token_id", "token_index")) or name == "image_token":
        return _token(name, value)
    if isinstance(value, list) and kind is not None:
        return [_tiny(name, one, heads) for one in value]
    if kind is None or isinstance(value, bool) or not isinstance(value, int):
        return value
    if kind == "groups":
        return 1 if value == 1 else HEADS if value == heads else 2
    return min(value, _TINY[kind])


def _token(name: str, value: Any) -> Any:
    """A token id within the small vocabulary, which no text here contains."""
    if isinstance(value, list):
        return [_token(name, one) for one in value]
    if not isinstance(value, int) or value < 3:
        return value
    return VOCABULARY - 1 - sum(map(ord, name)) % 40


def _fit_rotary(out: dict[str, Any]) -> None:
    """Make the sections of a rotary embedding add up to half a head again."""
    for name in ("rope_scaling", "rope_parameters"):
        parameters = out.get(name)
        if isinstance(parameters, dict) and isinstance(parameters.get("mrope_section"), list):
            sections = parameters["mrope_section"]
            share = parameters.get("partial_rotary_factor") or 1
            room = int(HEAD * share) // 2
            small = [max(1, n * room // sum(sections)) for n in sections]
            parameters["mrope_section"] = [*small[:-1], room - sum(small[:-1])]
