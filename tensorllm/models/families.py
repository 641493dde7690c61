"""Families: the ways in which models store attention and FFN, and which of them a layer matches.

A family is data. It proposes; `verify` decides, by what the modules of the layer really compute.
In its paths `@` is the module that holds the matrices, `@@` the one around it, `|` separates
alternatives.

Shapes: D model width, H query heads, G key/value heads, K head_dim, F FFN width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from tensorllm.models.skeleton import linears
from tensorllm.models.spec import Stored
from tensorllm.models.task import text_config_of
from tensorllm.tensors.stacking import ATTENTION, FFN, MLA, Geometry

OUTPUT_GATE = "output_gate"  # stored with the queries and left unchanged: not a role


@dataclass(frozen=True, slots=True)
class Family:
    """One way to store attention or FFN; `Stored.path` holds alternatives."""

    name: str
    stored: tuple[Stored, ...]


def _family(name: str, *stored: tuple[str, str], **how: Any) -> Family:
    """A family from (roles, path) pairs; `+` joins fused roles, to which `how` applies."""
    return Family(
        name,
        tuple(
            Stored(path, tuple(roles.split("+")), **(how if "+" in roles else {}))
            for roles, path in stored
        ),
    )


_OUT = "@.o_proj|@.out_proj|@.dense|@.Wo|@.c_proj|@.attention_out|@.post_proj|@.o|@.proj"
_FUSED = "@.qkv_proj|@.query_key_value|@.Wqkv|@.qkv|@.c_attn|@.in_proj"
_FUSED_OUT = f"{_OUT}|@@.output.dense"

ATTENTION_FAMILIES = (
    _family(
        "separate q, k, v, o",
        ("q", "@.q_proj|@.query_proj|@.Wq|@.q|@.q_head|@.project_q"),
        ("k", "@.k_proj|@.key_proj|@.Wk|@.k|@.k_head|@.project_k"),
        ("v", "@.v_proj|@.value_proj|@.Wv|@.v|@.v_head|@.project_v"),
        ("o", f"{_OUT}|@@.output.dense|@.output_projection.o_proj"),
    ),
    _family(
        "separate query, key, value (BERT)",
        ("q", "@.query"),
        ("k", "@.key"),
        ("v", "@.value"),
        ("o", "@@.output.dense|@.dense|@.output"),
    ),
    _family(
        "separate q, k, v, o (XLM)",
        ("q", "@.q_lin"),
        ("k", "@.k_lin"),
        ("v", "@.v_lin"),
        ("o", "@.out_lin"),
    ),
    _family(
        "separate q, k, v, o with a layer inside each",
        ("q", "@.q_proj.linear"),
        ("k", "@.k_proj.linear"),
        ("v", "@.v_proj.linear"),
        ("o", "@.o_proj.linear"),
    ),
    _family("q, k, v fused role by role", ("q+k+v", _FUSED), ("o", _FUSED_OUT)),
    _family("q, k, v fused group by group", ("q+k+v", _FUSED), ("o", _FUSED_OUT), grouped=True),
    _family("q, v, k fused in four blocks", ("q+v+k", _FUSED), ("o", _FUSED_OUT), blocks=4),
    _family(
        "latent attention (MLA)",
        ("q_a", "@.q_a_proj"),
        ("q_b", "@.q_b_proj"),
        ("kv_a", "@.kv_a_proj_with_mqa"),
        ("kv_b", "@.kv_b_proj"),
        ("o", "@.o_proj"),
    ),
    _family(
        "latent attention (MLA) with whole queries",
        ("q", "@.q_proj"),
        ("kv_a", "@.kv_a_proj_with_mqa"),
        ("kv_b", "@.kv_b_proj"),
        ("o", "@.o_proj"),
    ),
)

_DOWN = "@.down_proj|@.w2|@.Wo|@.wo|@.proj_down|@.w_out|@.linear_out|@.out_proj|@.fc2|@.c_proj"
FFN_FAMILIES = (
    _family(
        "gated FFN",
        ("in", "@.up_proj|@.w3|@.proj_up|@.w_in.w_1"),
        ("gate", "@.gate_proj|@.w1|@.proj_up_gate|@.w_in.w_0"),
        ("out", _DOWN),
    ),
    _family(
        "gate and in fused",
        ("gate+in", "@.gate_up_proj|@.Wi|@.input_linear|@.fc1|@.up_gate_proj|@.fc11"),
        ("out", f"{_DOWN}|@.output_linear"),
    ),
    _family(
        "in and gate fused",
        ("in+gate", "@.gate_up_proj|@.Wi|@.input_linear|@.fc1|@.up_gate_proj"),
        ("out", f"{_DOWN}|@.output_linear"),
    ),
    _family(
        "plain FFN",
        (
            "in",
            "@.up_proj|@.fc1|@.c_fc|@.fc_in|@.dense_h_to_4h|@.lin1|@.intermediate|@.linear_1"
            "|@.layer_1|@.wi|@.dense1|@.Wi",
        ),
        (
            "out",
            "@.down_proj|@.fc2|@.c_proj|@.fc_out|@.dense_4h_to_h|@.lin2|@.output|@.linear_2"
            "|@.layer_2|@.wo|@.dense2|@.Wo",
        ),
    ),
    _family("plain FFN (BERT)", ("in", "@.intermediate.dense"), ("out", "@.output.dense")),
    _family("plain FFN (numbered)", ("in", "@.0"), ("out", "@.2")),
)

# Not the layer's own attention or FFN: cross-attention, other mixers, experts.
OTHER = (
    "cross", "encoder_attn", "encdec", "encoder_decoder", "indexer", "compressor", "linear_attn",
    "mamba", "expert", "adapter", "bottleneck", "_hc", "layernorm", "router", "laurel", "perceiver",
)  # fmt: skip

WIDTHS = ("head_dim", "attention_head_size", "head_size", "dim_per_head", "d_kv", "kv_channels")
COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "decoder_attention_heads",
          "encoder_attention_heads", "num_q_heads")  # fmt: skip


@dataclass(frozen=True)
class Match:
    """A family that may describe a layer, with the paths found there.

    Attributes:
        family: its name.
        stored: with paths below the layer.
        shapes: (role, (rows, columns)) of each role.
        heads: (H, G, K) of attention whose heads can be told apart.
        width_from: where head_dim was found.
    """

    family: str
    stored: tuple[Stored, ...]
    shapes: tuple[tuple[str, tuple[int, int]], ...]
    heads: tuple[int, int, int] = (0, 0, 0)
    width_from: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """Identifies the match, whatever the sizes."""
        return (
            self.family,
            self.width_from,
            *(f"{one.path}:{one.roles}:{one.per_head}" for one in self.stored),
        )


def attention_matches(block: nn.Module, config: Any) -> list[Match]:
    """All families that may describe the layer's attention, likeliest first."""
    modules = linears(block)
    return [
        match
        for family, stored in _found(ATTENTION_FAMILIES, modules)
        for match in attention_with(family.name, stored, block, config)
    ]


def ffn_matches(block: nn.Module) -> list[Match]:
    """All families that may describe the layer's FFN, likeliest first."""
    return [
        match
        for family, stored in _found(FFN_FAMILIES, linears(block))
        for match in ffn_with(family.name, stored, block)
    ]


def ffn_with(name: str, stored: tuple[Stored, ...], block: nn.Module) -> list[Match]:
    """The match of an FFN stored this way; empty if its matrices' shapes are inconsistent."""
    modules = linears(block)
    shapes: dict[str, tuple[int, int]] = {}
    for one in stored:
        rows, columns = _size(one, modules)
        shapes |= {role: (rows // len(one.roles), columns) for role in one.roles}
    if len(set(shapes.values())) > 1:  # all are (F, D)
        return []
    return [Match(name, stored, tuple((role, shapes[role]) for role in FFN if role in shapes))]


def geometry_of(attention: Match | None, ffn: Match | None, width: int) -> Geometry:
    """The sizes of a layer with these parts; shapes are included only if they are unusual."""
    shapes = (attention.shapes if attention else ()) + (ffn.shapes if ffn else ())
    heads, groups, head_dim = attention.heads if attention else (0, 0, 0)
    inner = ffn.shapes[0][1][0] if ffn else 0
    gated = bool(ffn and any(role == "gate" for role, _ in ffn.shapes))
    usual = Geometry(width, heads, groups, head_dim, inner, gated)
    if attention and ffn and tuple((r, usual.shape(r)) for r in usual.roles) == shapes:
        return usual
    return replace(usual, shapes=shapes)


def _found(
    families: Sequence[Family], modules: Mapping[str, nn.Module]
) -> Iterator[tuple[Family, tuple[Stored, ...]]]:
    """Families of which every path exists exactly once, with those paths."""
    from transformers.pytorch_utils import Conv1D

    own = [path for path in modules if not any(word in path.lower() for word in OTHER)]
    # a parameter's holder, and what holds that, as in `q_proj.linear`
    holders = dict.fromkeys(
        holder
        for path in own
        for holder in (path.rpartition(".")[0], path.rpartition(".")[0].rpartition(".")[0])
    )
    for family in families:
        found = []
        for holder in holders:
            paths = [_path(one.path, holder, own) for one in family.stored]
            if all(paths):
                found.append(
                    tuple(
                        replace(one, path=path, conv1d=isinstance(modules[path], Conv1D))
                        for one, path in zip(family.stored, paths, strict=True)
                    )
                )
        if len(found) == 1:
            yield family, found[0]


def _path(pattern: str, holder: str, paths: Sequence[str]) -> str:
    around = holder.rpartition(".")[0]
    for alternative in pattern.split("|"):
        path = alternative.replace("@@", around).replace("@", holder).lstrip(".")
        if path in paths:
            return path
    return ""


def _size(stored: Stored, modules: Mapping[str, nn.Module]) -> tuple[int, int]:
    """Rows and columns of a stored parameter, oriented as its role matrices are."""
    module: Any = modules[stored.path]
    rows, columns = module.weight.shape
    return (columns, rows) if stored.transposed else (rows, columns)


def attention_with(
    name: str, stored: tuple[Stored, ...], block: nn.Module, config: Any
) -> list[Match]:
    """The matches of attention stored this way: one for each possible head_dim."""
    modules = linears(block)
    sizes = {one.roles: _size(one, modules) for one in stored}
    if {role for one in stored for role in one.roles} & set(MLA):
        shapes = tuple((one.roles[0], sizes[one.roles]) for one in stored)
        return [Match(name, stored, shapes)]
    holder = block.get_submodule(stored[0].path.rpartition(".")[0])
    out: dict[tuple[object, ...], Match] = {}
    for source, width in _head_widths(holder, config, sizes):
        for match in _of_width(name, stored, sizes, width):
            out.setdefault((match.stored, match.heads), replace(match, width_from=source))
    return list(out.values())


Sizes = Mapping[tuple[str, ...], tuple[int, int]]


def _of_width(family: str, stored: tuple[Stored, ...], sizes: Sizes, width: int) -> Iterator[Match]:
    """Matches with this head_dim for the queries; none if sizes do not divide by it."""
    inner, model = sizes[("o",)]
    fused = next((roles for roles in sizes if len(roles) > 1), None)
    if fused is not None:
        rows, columns = sizes[fused]
        heads = inner // width
        groups = (rows // width - heads) // 2
        shapes = {"q": (heads * width, columns), "k": (groups * width, columns)}
        shapes |= {"v": shapes["k"], "o": (inner, model)}
        if sum(shapes[role][0] for role in "qkv") == rows:
            yield from _divisible(family, stored, shapes, width)
        return
    shapes = {role: sizes[(role,)] for role in ATTENTION}
    yield from _divisible(family, stored, shapes, width)
    if shapes["q"][0] == 2 * inner:  # an output gate is stored with each head's queries
        first = replace(stored[0], roles=("q", OUTPUT_GATE), per_head=True)
        shapes["q"] = (inner, shapes["q"][1])
        yield from _divisible(family, (first, *stored[1:]), shapes, width)


def _divisible(
    family: str, stored: tuple[Stored, ...], shapes: Mapping[str, tuple[int, int]], width: int
) -> Iterator[Match]:
    heads, groups = shapes["q"][0] // width, shapes["k"][0] // width
    if not heads or not groups or heads % groups or shapes["v"][0] % groups:
        return
    values = shapes["v"][0] // groups
    whole = {"q": heads * width, "k": groups * width, "o": heads * values}
    if all(shapes[role][0] == rows for role, rows in whole.items()):
        yield Match(family, stored, tuple(shapes.items()), (heads, groups, width))


def _head_widths(holder: nn.Module, config: Any, sizes: Sizes) -> Iterator[tuple[str, int]]:
    """Candidates for head_dim, from the module, the config, or rows / heads, with their source."""
    rows = {roles[0]: sizes[roles][0] for roles in (("q",), ("o",)) if roles in sizes}
    owners = {
        "module": holder,
        "module's config": getattr(holder, "config", None),
        "config": text_config_of(config),
    }
    for called, owner in owners.items():
        for name in WIDTHS:
            found = size_of(owner, name)
            if found:
                yield f"{called}.{name}", found
        for name in COUNTS:
            found = size_of(owner, name)
            for role, n in rows.items():
                if found and n % found == 0:
                    yield f"{role} / {called}.{name}", n // found


def size_of(owner: Any, name: str) -> int:
    """A positive whole number that a module or config has under this name; otherwise 0."""
    try:
        found = getattr(owner, name, 0)
    except Exception:  # a config whose layers differ refuses a single value
        return 0
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else 0
