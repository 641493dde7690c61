"""One row per architecture; the key is the config's `model_type`.

Paths are those of the transformers 5 modelling files (`models/<model_type>/modeling_*.py`).
"""

from dataclasses import replace

from tensorllm.models.spec import ARCHITECTURES, Architecture, Stored


def _separate(**paths: str) -> tuple[Stored, ...]:
    """One `nn.Linear` per role; `in` is a Python keyword, hence `in_`."""
    return tuple(Stored(path, (role.rstrip("_"),)) for role, path in paths.items())


_LLAMA_FFN = _separate(in_="mlp.up_proj", gate="mlp.gate_proj", out="mlp.down_proj")
_LLAMA = Architecture(
    block="layers.{i}",
    attention=_separate(
        q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.o_proj"
    ),
    ffn=_LLAMA_FFN,
    tested=True,
)
for _name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"):
    ARCHITECTURES.register(_name)(_LLAMA)
for _name in ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "phimoe", "granitemoe"):
    ARCHITECTURES.register(_name)(_LLAMA)  # experts are found by structure
for _name in ("gpt_oss", "glm4_moe", "ernie4_5_moe", "minimax"):
    ARCHITECTURES.register(_name)(_LLAMA)
ARCHITECTURES.register("llama4_text")(
    replace(
        _LLAMA,
        ffn=_separate(
            in_="feed_forward.up_proj",
            gate="feed_forward.gate_proj",
            out="feed_forward.down_proj",
        ),
    )
)

_BERT = Architecture(
    block="encoder.layer.{i}",
    tested=True,
    attention=_separate(
        q="attention.self.query",
        k="attention.self.key",
        v="attention.self.value",
        o="attention.output.dense",
    ),
    ffn=_separate(in_="intermediate.dense", out="output.dense"),
    task="masked",
)
for _name in ("bert", "roberta"):
    ARCHITECTURES.register(_name)(_BERT)

ARCHITECTURES.register("gptj")(
    Architecture(
        block="h.{i}",
        tested=True,
        attention=_separate(q="attn.q_proj", k="attn.k_proj", v="attn.v_proj", o="attn.out_proj"),
        ffn=_separate(in_="mlp.fc_in", out="mlp.fc_out"),
    )
)
ARCHITECTURES.register("gpt2")(
    Architecture(
        block="h.{i}",
        tested=True,
        attention=(
            Stored("attn.c_attn", ("q", "k", "v"), conv1d=True),
            Stored("attn.c_proj", ("o",), conv1d=True),
        ),
        ffn=(
            Stored("mlp.c_fc", ("in",), conv1d=True),
            Stored("mlp.c_proj", ("out",), conv1d=True),
        ),
    )
)
ARCHITECTURES.register("gpt_neox")(
    Architecture(
        block="layers.{i}",
        tested=True,
        attention=(
            Stored("attention.query_key_value", ("q", "k", "v"), grouped=True),
            Stored("attention.dense", ("o",)),
        ),
        ffn=_separate(in_="mlp.dense_h_to_4h", out="mlp.dense_4h_to_h"),
    )
)
ARCHITECTURES.register("falcon")(
    Architecture(
        block="h.{i}",
        tested=True,
        attention=(
            Stored("self_attention.query_key_value", ("q", "k", "v"), grouped=True),
            Stored("self_attention.dense", ("o",)),
        ),
        ffn=_separate(in_="mlp.dense_h_to_4h", out="mlp.dense_4h_to_h"),
    )
)
ARCHITECTURES.register("phi")(
    replace(
        _LLAMA,
        attention=_separate(
            q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.dense"
        ),
        ffn=_separate(in_="mlp.fc1", out="mlp.fc2"),
    )
)
ARCHITECTURES.register("phi3")(
    replace(
        _LLAMA,
        attention=(
            Stored("self_attn.qkv_proj", ("q", "k", "v")),
            Stored("self_attn.o_proj", ("o",)),
        ),
        ffn=(Stored("mlp.gate_up_proj", ("gate", "in")), Stored("mlp.down_proj", ("out",))),
    )
)
ARCHITECTURES.register("opt")(
    Architecture(
        block="decoder.layers.{i}",
        tested=True,
        attention=_separate(
            q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", o="self_attn.out_proj"
        ),
        ffn=_separate(in_="fc1", out="fc2"),
    )
)
ARCHITECTURES.register("distilbert")(
    Architecture(
        block="transformer.layer.{i}",
        tested=True,
        attention=_separate(
            q="attention.q_lin", k="attention.k_lin", v="attention.v_lin", o="attention.out_lin"
        ),
        ffn=_separate(in_="ffn.lin1", out="ffn.lin2"),
        task="masked",
    )
)
