"""Experts: where a layer keeps its mixture, in memory and in files.

In memory the experts of a layer are two parameters of one module: the input matrices (gate and in,
or in alone) and the output matrices. Files may hold each matrix of each expert under a name of its
own.

Shapes: E experts, F their inner width, D model width, N tokens, M tokens of one expert, K experts
per token, I outputs of a fused parameter.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensorllm.tensors.stacking import expert_role

# Names that files and modules use for the matrices of an expert.
KINDS = {"gate_proj": "gate", "up_proj": "in", "down_proj": "out"} | {
    "w1": "gate",
    "w3": "in",
    "w2": "out",
}
FUSED_INPUTS, FUSED_IN, FUSED_OUTPUTS = "gate_up_proj", "up_proj", "down_proj"
# Names that files use for the fused parameters, where they differ from the module's.
ELSEWHERE = {
    FUSED_INPUTS: ("input_linear.weight", "experts.fc1.weight"),
    FUSED_OUTPUTS: ("output_linear.weight", "experts.fc2.weight"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The experts of one layer, as their module keeps them.

    Attributes:
        path: of their module, below the layer.
        count: E.
        width: F.
        gated: whether they have a gate.
        transposed: parameters are (E, in, out) instead of (E, out, in).
        interleaved: rows of gate and in alternate instead of following each other.
        routed: the module is called with each token's experts; otherwise with all tokens, sorted by
            expert.
    """

    path: str
    count: int
    width: int
    gated: bool = True
    transposed: bool = False
    interleaved: bool = False
    routed: bool = True

    @property
    def inputs(self) -> str:
        """Name of the parameter that holds the input matrices."""
        return FUSED_INPUTS if self.gated else FUSED_IN

    @property
    def outputs(self) -> str:
        """Name of the parameter that holds the output matrices."""
        return FUSED_OUTPUTS

    @property
    def inputs_in_order(self) -> tuple[str, ...]:
        """The kinds of input matrices, in stored order."""
        return ("gate", "in") if self.gated else ("in",)

    @property
    def kinds(self) -> tuple[str, ...]:
        return (*self.inputs_in_order, "out")

    def parameter(self, kind: str) -> str:
        """Name of the parameter that holds a kind of matrix."""
        return self.outputs if kind == "out" else self.inputs

    def kinds_of(self, parameter: str) -> tuple[str, ...]:
        """The kinds that a parameter holds."""
        return ("out",) if parameter == self.outputs else self.inputs_in_order

    def roles_of(self, parameter: str) -> tuple[str, ...]:
        """The roles that a parameter holds."""
        return tuple(
            expert_role(kind, n) for kind in self.kinds_of(parameter) for n in range(self.count)
        )

    def view(self, parameter: Tensor, kind: str) -> Tensor:
        """The role matrices (E, F, D) of one kind, as a view of the fused parameter."""
        if kind == "out":
            return parameter if self.transposed else parameter.mT
        w_EID = parameter.mT if self.transposed else parameter
        kinds = self.inputs_in_order
        shape = (self.width, len(kinds)) if self.interleaved else (len(kinds), self.width)
        return w_EID.unflatten(1, shape).select(2 if self.interleaved else 1, kinds.index(kind))

    def parameter_shape(self, parameter: str, width: int) -> tuple[int, int, int]:
        """The shape of a fused parameter in a model of width D = `width`."""
        inner = self.width * len(self.kinds_of(parameter))
        out_in = (width, inner) if parameter == self.outputs else (inner, width)
        return (self.count, *(reversed(out_in) if self.transposed else out_in))


def experts_in(block: nn.Module, width: int) -> Experts | None:
    """Find a layer's experts by the structure of its module; None if it has none.

    Args:
        block: a layer, on the meta device or not.
        width: the model width D.
    """
    for path, module in block.named_modules():
        shapes = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
        found = _experts_of(path, module, shapes, width)
        if found is not None:
            return found
    return None


def _experts_of(
    path: str, module: Any, shapes: Mapping[str, tuple[int, ...]], width: int
) -> Experts | None:
    gated = FUSED_INPUTS in shapes
    inputs = shapes.get(FUSED_INPUTS if gated else FUSED_IN, ())
    outputs = shapes.get(FUSED_OUTPUTS, ())
    if len(inputs) != 3 or len(outputs) != 3 or inputs[0] != outputs[0]:
        return None
    if getattr(module, "has_post_expert_norm", False):
        return None  # an expert's output is then not linear in that of its last matrix
    routed = hasattr(module, "is_transposed")
    transposed = module.is_transposed if routed else inputs[1] == width
    found = Experts(
        path=path,
        count=inputs[0],
        width=outputs[1 if transposed else 2],
        gated=gated,
        transposed=transposed,
        interleaved=routed and not module.is_concatenated,
        routed=routed,
    )
    same = (inputs, outputs) == tuple(
        found.parameter_shape(name, width) for name in (found.inputs, found.outputs)
    )
    return found if same else None


@dataclass(frozen=True, slots=True)
class StoredExperts:
    """Where the stored tensors of one layer hold its experts.

    Attributes:
        fused: parameter -> stored name, for those that are stored as in the module.
        apart: role -> stored name of the expert's own matrix, (out, in) as in `nn.Linear`.
    """

    fused: Mapping[str, str]
    apart: Mapping[str, str]

    def is_apart(self, role: str) -> bool:
        """Whether this kind of matrix is stored under a separate name for each expert."""
        kind = role.split(".")[2]
        return any(known.endswith(f".{kind}") for known in self.apart)

    def missing(self, role: str) -> str:
        """The name that a missing matrix would have, after another expert's."""
        _, expert, kind = role.split(".")
        like = next((n for r, n in self.apart.items() if r.endswith(f".{kind}")), "")
        return re.sub(r"experts\.\d+\.", f"experts.{expert}.", like)


def stored_experts(experts: Experts, layer_path: str, names: Collection[str]) -> StoredExperts:
    """Where tensors of these names hold the experts of a layer.

    Args:
        experts: as the layer's module keeps them.
        layer_path: prefix of the layer's names.
        names: of all stored tensors.
    """
    below = {n.removeprefix(f"{layer_path}."): n for n in names if n.startswith(f"{layer_path}.")}
    fused = {}
    for parameter in (experts.inputs, experts.outputs):
        own = f"{experts.path}.{parameter}"
        others = (n for end in ELSEWHERE.get(parameter, ()) for n in below if n.endswith(f".{end}"))
        found = own if own in below else next(others, None)
        if found is not None:
            fused[parameter] = below[found]
    apart = {r: n for r, n in _apart(below) if experts.parameter(r.split(".")[2]) not in fused}
    return StoredExperts(fused, apart)


def _apart(below: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for short, name in below.items():
        found = re.fullmatch(r"(?:.*\.)?experts\.(\d+)\.(\w+)\.weight", short)
        if found and found[2] in KINDS:
            yield expert_role(KINDS[found[2]], int(found[1])), name


def routing_of(given: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The experts (N, K) of each token and their weights, given in either order."""
    first, second = given[:2]
    return (second, first) if first.is_floating_point() else (first, second)


def gated(module: Any, experts: Experts, parts: Sequence[Tensor], bias_I: Tensor | None) -> Tensor:
    """The input of the output matrix, (M, F): after activation and gate, by the module's own code.

    Args:
        module: of the experts.
        experts: its description.
        parts: (M, F) of each input matrix, in stored order.
        bias_I: of one expert, in the layout of the fused parameter.
    """
    if len(parts) == 1:
        inner_MF = parts[0] if bias_I is None else parts[0] + bias_I
        plain: Tensor = module.act_fn(inner_MF)
        return plain
    if not hasattr(module, "_apply_gate"):
        gate_MF, up_MF = parts
        product_MF: Tensor = up_MF * module.act_fn(gate_MF)
        return product_MF
    if experts.interleaved:
        joined_MI = torch.stack(list(parts), -1).flatten(-2)
    else:
        joined_MI = torch.cat(list(parts), -1)
    hidden_MF: Tensor = module._apply_gate(joined_MI if bias_I is None else joined_MI + bias_I)
    return hidden_MF


def bias_of(module: Any, parameter: str) -> Tensor | None:
    """The biases (E, outputs) of a fused parameter; None if it has none."""
    found: Tensor | None = getattr(module, f"{parameter}_bias", None)
    return found


def tokens_at_experts(
    module: Any, experts: Experts, x: Tensor, routing: Sequence[Tensor], kept_N: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield for each expert the inputs of its matrices, over the tokens routed to it.

    Args:
        module: the dense module of the experts.
        experts: its description.
        x: the module's first argument.
        routing: its other arguments.
        kept_N: tokens that count; padding does not.

    Yields:
        The expert; the inputs (M, D) of its input matrices; and the hidden states (M, F) that its
        output matrix reads, times the router's weights.
    """
    bias_EI = bias_of(module, experts.inputs)
    for expert in range(experts.count):
        if experts.routed:
            index_NK, weights_NK = routing_of(routing)
            token_M, place_M = ((index_NK == expert) & kept_N[:, None]).nonzero(as_tuple=True)
            x_MD, weight_M1 = x.flatten(0, -2)[token_M], weights_NK[token_M, place_M, None]
        else:
            x_ND = x.unflatten(0, (experts.count, -1))[expert]
            x_MD = x_ND[kept_N & (x_ND != 0).any(1)]  # tokens of other experts are zero here
            weight_M1 = x_MD.new_ones(len(x_MD), 1)
        parts = [
            x_MD @ experts.view(getattr(module, experts.inputs), kind)[expert].mT
            for kind in experts.inputs_in_order
        ]
        bias_I = None if bias_EI is None else bias_EI[expert]
        yield expert, x_MD, gated(module, experts, parts, bias_I) * weight_M1
