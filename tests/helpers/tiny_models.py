"""One tiny random model per registered architecture, and per variant of its stored layout.

`tiny_model("falcon-grouped")` builds it; a row is a name and what its own config class takes. Two
layers, width 32 and 4 heads everywhere. Sizes that may differ do (head_dim != D / H where there is
one, KV heads != heads, F != 4 D where it can be said), so that a mixed-up axis cannot fit.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
)

SIZES = {  # by the names most configs use, or translate
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    # a special token outside the vocabulary warns on every use
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = {"intermediate_size": 56, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 12}  # heads x head_dim = 48, not the width 32


@dataclass(frozen=True, slots=True)
class Tiny:
    """A row: the `model_type`, the config's own fields, and what the model predicts."""

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    task: str = "causal"


TINY: dict[str, Tiny] = {
    "gptj": Tiny("gptj", {"rotary_dim": 4, "n_inner": 56}),
    "llama": Tiny("llama", {**GROUPED, "attention_bias": True}),
    "mistral": Tiny("mistral", GROUPED),
    "qwen2": Tiny("qwen2", GROUPED),
    "qwen3": Tiny("qwen3", WIDE),
    "gemma2": Tiny("gemma2", {**WIDE, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0}),
    "gemma3_text": Tiny("gemma3_text", {**WIDE, "query_pre_attn_scalar": 20}),
    "phi": Tiny("phi", GROUPED),
    "phi3": Tiny("phi3", GROUPED),
    "gpt2": Tiny("gpt2", {"n_inner": 56}),
    "gpt_neox": Tiny("gpt_neox", {"intermediate_size": 56}),
    "falcon": Tiny("falcon", {"multi_query": True, "bias": True}),
    "falcon-grouped": Tiny(
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True, "ffn_hidden_size": 56},
    ),
    "falcon-heads": Tiny("falcon", {"multi_query": False, "parallel_attn": False, "bias": True}),
    "opt": Tiny("opt", {"ffn_dim": 56, "word_embed_proj_dim": 32}),
    "bert": Tiny("bert", {"intermediate_size": 56}, task="masked"),
    "roberta": Tiny("roberta", {"intermediate_size": 56}, task="masked"),
    "distilbert": Tiny("distilbert", {"hidden_dim": 56}, task="masked"),
}

FEW = {"num_experts_per_tok": 2, "num_key_value_heads": 2}
DENSE_FIRST = {**FEW, "intermediate_size": 56, "moe_intermediate_size": 24, "head_dim": 12}
# Mixtures of 5 experts of width 24: fused in either orientation, interleaved, with biases, beside
# a shared expert, above a dense layer. In files most of them have a name for each expert.
EXPERTS: dict[str, Tiny] = {
    "mixtral": Tiny("mixtral", {**FEW, "intermediate_size": 24, "num_local_experts": 5}),
    "qwen2_moe": Tiny(
        "qwen2_moe",
        {**FEW, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20}
        | {"num_experts": 5, "decoder_sparse_step": 1},
    ),
    "qwen3_moe": Tiny("qwen3_moe", {**DENSE_FIRST, "num_experts": 5, "mlp_only_layers": [0]}),
    "olmoe": Tiny("olmoe", {**FEW, "intermediate_size": 24, "num_experts": 5}),
    "phimoe": Tiny("phimoe", {**FEW, "intermediate_size": 24, "num_local_experts": 5}),
    "granitemoe": Tiny("granitemoe", {**FEW, "intermediate_size": 24, "num_local_experts": 5}),
    "gpt_oss": Tiny(
        "gpt_oss",
        {**FEW, "head_dim": 12, "intermediate_size": 24, "num_local_experts": 5}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "glm4_moe": Tiny(
        "glm4_moe",
        {**DENSE_FIRST, "n_routed_experts": 5, "first_k_dense_replace": 1}
        | {"n_group": 1, "topk_group": 1},
    ),
    "llama4_text": Tiny(
        "llama4_text",
        {"head_dim": 12, "intermediate_size": 24, "intermediate_size_mlp": 56}
        | {"num_local_experts": 5, "num_experts_per_tok": 1, "num_key_value_heads": 2}
        | {"interleave_moe_layer_step": 2},
    ),
    "ernie4_5_moe": Tiny(
        "ernie4_5_moe",
        {"moe_intermediate_size": 24, "moe_num_experts": 5, "moe_k": 2, "intermediate_size": 56}
        | {"moe_layer_start_index": 1, "moe_num_shared_experts": 1, "num_key_value_heads": 2},
    ),
    "minimax": Tiny(
        "minimax",
        {**FEW, "head_dim": 12, "intermediate_size": 24, "num_local_experts": 5}
        | {"layer_types": ["full_attention"] * 2},
    ),
}


def _row(name: str) -> Tiny:
    return TINY[name] if name in TINY else EXPERTS[name]


def tiny_config(name: str, **overrides: Any) -> PretrainedConfig:
    """The config of a row; `overrides` are fields of its config class."""
    row = _row(name)
    return AutoConfig.for_model(row.model_type, **{**SIZES, **row.config, **overrides})


def tiny_model(
    name: str, seed: int = 0, *, headless: bool = False, **overrides: Any
) -> PreTrainedModel:
    """A random model in evaluation mode: biases and norm weights are random too.

    Args:
        name: a key of `TINY` or `EXPERTS`.
        seed: of the parameters.
        headless: the base model, without its language-model head.
        overrides: fields of its config class.
    """
    masked = _row(name).task == "masked"
    auto = AutoModel if headless else AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model = auto.from_config(
        tiny_config(name, **overrides), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scaled = 0.2 * torch.randn(p.shape, generator=noise)
            p.copy_(scaled if p.ndim > 1 else p + scaled)  # a norm weight stays near its start
    return model
