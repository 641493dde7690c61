"""Attention and FFN of one layer, written as loops over heads from role matrices alone.

What the real module computes is taken by hooks at the stored projections and compared. Positions
are all zero, where a rotary embedding is the identity. Shapes: T tokens, D model width, H query
heads, G key/value heads, K head width, F FFN width.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.tensors.stacking import Geometry

TOKENS = torch.tensor([[7, 41, 19, 88, 5, 63]])

# Output feature at which a head starts in a fused projection, from the modelling files' own views.
FIRST_FEATURE: dict[str, Callable[[str, int, Geometry], int]] = {
    # split role by role: all queries, all keys, all values
    "gpt2": lambda role, h, geo: geo.K * (h + {"q": 0, "k": geo.H, "v": 2 * geo.H}[role]),
    "phi3": lambda role, h, geo: geo.K * (h + {"q": 0, "k": geo.H, "v": geo.H + geo.G}[role]),
    # view(heads, 3 K), then chunk(3)
    "gpt_neox": lambda role, h, geo: geo.K * (3 * h + "qkv".index(role)),
    # view(KV heads, queries of the group + key + value, K)
    "falcon": lambda role, h, geo: geo.K * _falcon_slot(role, h, geo.H // geo.G),
}


def _falcon_slot(role: str, h: int, g: int) -> int:
    return (h // g) * (g + 2) + h % g if role == "q" else h * (g + 2) + g + "kv".index(role)


class Seen(NamedTuple):
    """What went into a module and what came out, for the one sequence: `(T, features)`."""

    input: Tensor
    output: Tensor


class Layer:
    """The first layer of a model: its role matrices per head, and what passes its projections."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.config = model, model.config
        self.weights = parameters_of(model)
        self.roles = RoleMatrices(model.config, self.weights)
        self.geo = self.roles.spec.geometry(0)

    def module(self, role: str) -> Any:
        return self.model.get_submodule(self.roles.name(0, role).removesuffix(".weight"))

    def read(self, role: str) -> Tensor:
        return self.roles.read(self.weights, 0, role)

    def head(self, role: str, h: int) -> Tensor:
        """`(K, D)`: rows h K to (h + 1) K of the role matrix."""
        return self.read(role)[h * self.geo.K : (h + 1) * self.geo.K]

    def features(self, role: str, h: int) -> slice:
        """Where the head's outputs are among the outputs of the stored projection."""
        first = FIRST_FEATURE.get(self.config.model_type, lambda role, h, geo: geo.K * h)
        start = first(role, h, self.geo)
        return slice(start, start + self.geo.K)

    def run(self) -> dict[str, Seen]:
        """One forward pass; what each role's stored projection saw."""
        seen: dict[str, Seen] = {}
        hooks = [
            self.module(role).register_forward_hook(
                # copies: Falcon adds the attention's output to the FFN's in place
                lambda _m, args, out, role=role: seen.update(
                    {role: Seen(args[0][0].clone(), out[0].clone())}
                )
            )
            for role in self.geo.roles
        ]
        extra = {"position_ids": torch.zeros_like(TOKENS), "use_cache": False}
        with torch.no_grad():
            # A mask is given, or falling positions would be taken for packed sequences.
            self.model(
                TOKENS,
                attention_mask=torch.ones_like(TOKENS),
                **(extra if self.roles.task == "causal" else {}),
            )
        for hook in hooks:
            hook.remove()
        return seen


def _bias(module: Any, where: slice | None = None) -> Tensor | float:
    bias = getattr(module, "bias", None)
    return 0.0 if bias is None else bias.data if where is None else bias.data[where]


def naive_heads(layer: Layer, x_TD: Tensor) -> list[Tensor]:
    """Each query head's output `(T, K)`, before the output projection."""
    config, geo = layer.config, layer.geo
    scale = getattr(config, "query_pre_attn_scalar", None) or geo.K
    softcap = getattr(config, "attn_logit_softcapping", None)
    attention = layer.model.get_submodule(layer.roles.name(0, "q").rsplit(".", 2)[0])

    def project(role: str, h: int) -> Tensor:
        bias = _bias(layer.module(role), layer.features(role, h))
        x_TK = x_TD @ layer.head(role, h).T + bias
        norm = getattr(attention, f"{role}_norm", None)
        return norm(x_TK) if norm is not None else x_TK

    outputs = []
    for h in range(geo.H):
        group = h * geo.G // geo.H
        q_TK, k_TK, v_TK = project("q", h), project("k", group), project("v", group)
        out_TK = torch.empty_like(q_TK)
        for t in range(len(x_TD)):
            sees = t + 1 if layer.roles.task == "causal" else len(x_TD)
            scores = torch.stack([q_TK[t] @ k_TK[s] for s in range(sees)]) / math.sqrt(scale)
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            out_TK[t] = scores.softmax(0) @ v_TK[:sees]
        outputs.append(out_TK)
    return outputs


@torch.no_grad()
def assert_heads_are_the_modules(layer: Layer) -> None:
    """Every head's q, k, v and o slice is what the real attention module uses for that head."""
    seen, geo = layer.run(), layer.geo
    heads = naive_heads(layer, seen["q"].input)
    into_o = seen["o"].input
    assert into_o.shape[1] == geo.H * geo.K
    for h, out_TK in enumerate(heads):
        torch.testing.assert_close(into_o[:, h * geo.K : (h + 1) * geo.K], out_TK)
    out_TD = sum(out_TK @ layer.head("o", h) for h, out_TK in enumerate(heads))
    torch.testing.assert_close(seen["o"].output, out_TD + _bias(layer.module("o")))


@torch.no_grad()
def assert_ffn_is_the_modules(layer: Layer) -> None:
    """The in, gate and out matrices are what the real FFN uses them for."""
    seen, config = layer.run(), layer.config
    names = ("hidden_act", "activation_function", "hidden_activation", "activation")
    act = ACT2FN[next(getattr(config, name) for name in names if hasattr(config, name))]
    x_TD = seen["in"].input
    inner_TF = x_TD @ layer.read("in").T + _bias(layer.module("in"))
    if layer.geo.gated:
        gate_TF = x_TD @ layer.read("gate").T + _bias(layer.module("gate"))
        inner_TF = act(gate_TF) * inner_TF
    else:
        inner_TF = act(inner_TF)
    torch.testing.assert_close(seen["out"].input, inner_TF)
    out_TD = inner_TF @ layer.read("out") + _bias(layer.module("out"))
    torch.testing.assert_close(seen["out"].output, out_TD)
