"""A mixture of experts that runs in its factors, without ever forming an expert's matrices.

What experts share is multiplied once per token: the input factor before tokens are dispatched to
experts, the output factor after their outputs are summed. Each expert multiplies by its own part of
the core.

Shapes: N tokens, K experts of a token, M = N K rows of tokens at experts, E experts, F their inner
width, D model width, A, B, R, Z the core's sizes along experts, inner width, model width and
matrices.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorllm.compressors.layer import Site
from tensorllm.models.experts import Experts, bias_of, gated, routing_of
from tensorllm.runtime.sites import Cost, SiteModule, runs
from tensorllm.tensors.factors import Factors, Tucker, parameters
from tensorllm.tensors.stacking import Geometry

USED = 2  # experts per token, in predictions of time


@runs(Tucker, "experts")
class ExpertsSite(SiteModule):
    """Factors of an (E, F, D, S) tensor; a mode without a factor keeps its size."""

    core_AZBR: nn.Parameter
    u_EA: nn.Parameter | None
    u_FB: nn.Parameter | None
    u_DR: nn.Parameter | None
    u_SZ: nn.Parameter | None
    names = {  # noqa: RUF012  a constant of the class
        "core": ("core_AZBR", (0, 3, 1, 2)),
        "factor_0": ("u_EA", None),
        "factor_1": ("u_FB", None),
        "factor_2": ("u_DR", None),
        "factor_3": ("u_SZ", None),
    }

    def __init__(self, factors: Factors, site: Site, geometry: Geometry) -> None:
        super().__init__(factors, site, geometry)
        for attribute, _ in self.names.values():
            if attribute not in self._parameters:
                self.register_parameter(attribute, None)

    @classmethod
    def cost(cls, site: Site, factors: Factors, geometry: Geometry) -> Cost:
        """The cost of a token at `USED` experts: shared factors, and as many parts of the core."""
        core = factors.tensors()["core"].numel()
        used = parameters(factors) - core + USED * core // geometry.experts
        return Cost(used, USED * len(site.families) + 2, used)

    @classmethod
    def dense_cost(cls, site: Site, geometry: Geometry) -> Cost:
        """The cost of `USED` dense experts."""
        used = site.numel(geometry) * USED // geometry.experts
        return Cost(used, USED * len(site.families), used)

    def begin(self, x_ND: Tensor) -> Tensor:
        """(N, D) -> (N, R): once per token."""
        return x_ND if self.u_DR is None else x_ND @ self.u_DR

    def end(self, z_NR: Tensor) -> Tensor:
        """(N, R) -> (N, D): once per token."""
        return z_NR if self.u_DR is None else F.linear(z_NR, self.u_DR)

    def input_of(self, z_MR: Tensor, expert: int, matrix: int) -> Tensor:
        """(M, R) -> (M, F) for one expert."""
        y_MB = F.linear(z_MR, self._core(expert, matrix))
        return y_MB if self.u_FB is None else F.linear(y_MB, self.u_FB)

    def output_of(self, h_MF: Tensor, expert: int, matrix: int) -> Tensor:
        """(M, F) -> (M, R) for one expert."""
        h_MB = h_MF if self.u_FB is None else h_MF @ self.u_FB
        return h_MB @ self._core(expert, matrix)

    def _core(self, expert: int, matrix: int) -> Tensor:
        """The expert's part (B, R) of the core, combined from several if its mode has a factor."""
        core: Tensor = self.core_AZBR
        core_ZBR = (
            core[expert] if self.u_EA is None else torch.tensordot(self.u_EA[expert], core, 1)
        )
        if self.u_SZ is None:
            return core_ZBR[matrix]
        return torch.tensordot(self.u_SZ[matrix], core_ZBR, 1)


class ExpertMatrices(Protocol):
    """One kind of matrix (gate, in or out) of all experts."""

    def begin(self, x_ND: Tensor) -> Tensor: ...

    def one(self, x_MX: Tensor, expert: int) -> Tensor: ...

    def end(self, z_NX: Tensor) -> Tensor: ...


class JointExperts(nn.Module):
    """One kind of matrix of all experts, which share factors in one site.

    The first kind of a site owns the site's module.
    """

    def __init__(self, site: ExpertsSite, matrix: int, *, output: bool, owner: bool) -> None:
        super().__init__()
        self.matrix, self.output = matrix, output
        if owner:
            self.factors = site
        self._site = (site,)  # in a tuple, so that only the owner registers it

    @property
    def site(self) -> ExpertsSite:
        return self._site[0]

    def begin(self, x_ND: Tensor) -> Tensor:
        return x_ND if self.output else self.site.begin(x_ND)

    def one(self, x_MX: Tensor, expert: int) -> Tensor:
        run = self.site.output_of if self.output else self.site.input_of
        return run(x_MX, expert, self.matrix)

    def end(self, z_NX: Tensor) -> Tensor:
        return self.site.end(z_NX) if self.output else z_NX


class SeparateExperts(nn.Module):
    """One kind of matrix with a separate module for every expert."""

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def begin(self, x_ND: Tensor) -> Tensor:
        return x_ND

    def one(self, x_MX: Tensor, expert: int) -> Tensor:
        y: Tensor = self.experts[expert](x_MX)
        return y

    def end(self, z_NX: Tensor) -> Tensor:
        return z_NX


class DenseExperts:
    """One kind of matrix that stays dense, in the parameter of the experts' module."""

    def __init__(self, view_EFD: Callable[[], Tensor], *, output: bool) -> None:
        self.view_EFD, self.output = view_EFD, output

    def begin(self, x_ND: Tensor) -> Tensor:
        return x_ND

    def one(self, x_MX: Tensor, expert: int) -> Tensor:
        w_FD = self.view_EFD()[expert]
        return x_MX @ w_FD if self.output else x_MX @ w_FD.mT

    def end(self, z_NX: Tensor) -> Tensor:
        return z_NX


class FactoredExperts(nn.Module):
    """Mixed into the class of a model's experts; uses its gating, biases and settings."""

    where: Experts
    num_experts: int
    parts: nn.ModuleDict

    def prepare(self, where: Experts, parts: Mapping[str, nn.Module]) -> None:
        """Set the parts that are not dense, after the parameters they replace were removed."""
        self.where = where
        self.parts = nn.ModuleDict({f"role_{kind}": part for kind, part in parts.items()})
        self._is_hf_initialized = True  # nothing for transformers to initialise

    def part(self, kind: str) -> ExpertMatrices:
        """The part that runs this kind of matrix."""
        modules: Any = self.parts._modules
        found: ExpertMatrices | None = modules.get(f"role_{kind}")
        if found is not None:
            return found
        parameter = self.where.parameter(kind)
        view = lambda: self.where.view(getattr(self, parameter), kind)  # noqa: E731
        return DenseExperts(view, output=kind == "out")

    def forward(self, hidden_states: Tensor, *routing: Any, **named: Any) -> Tensor:
        if not self.where.routed:
            return self._every_expert(hidden_states)
        return self._routed(hidden_states, *routing_of((*routing, *named.values())))

    def _routed(self, x_ND: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Run each token through its experts; outputs are summed with the router's weights."""
        lead, x_ND = x_ND.shape, x_ND.flatten(0, -2)
        order_M = index_NK.flatten().argsort(stable=True)
        token_M = order_M // index_NK.shape[-1]
        weight_M1 = weights_NK.flatten()[order_M, None].to(x_ND.dtype)
        counts = index_NK.flatten().bincount(minlength=self.num_experts)[: self.num_experts]
        outputs = self.part("out")
        inputs = {kind: part[token_M] for kind, part in self._begun(x_ND).items()}
        made, start = [], 0
        for expert, count in enumerate(counts.tolist()):
            if count:
                rows = slice(start, start + count)
                hidden = self._hidden({kind: z[rows] for kind, z in inputs.items()}, expert)
                made.append(outputs.one(hidden, expert))
                start += count
        z_MX = torch.cat(made) * weight_M1[:start]
        z_NX = z_MX.new_zeros(len(x_ND), z_MX.shape[1]).index_add_(0, token_M[:start], z_MX)
        y_ND = outputs.end(z_NX)
        bias_ED = bias_of(self, self.where.outputs)
        if bias_ED is not None:
            bias_MD = bias_ED[index_NK.flatten()[order_M]] * weight_M1
            y_ND = y_ND.index_add(0, token_M, bias_MD.to(y_ND.dtype))
        return y_ND.view(lead)

    def _every_expert(self, x: Tensor) -> Tensor:
        """Run tokens that are sorted by expert, equally many for each, and already weighted."""
        outputs = self.part("out")
        inputs = {
            kind: z.unflatten(0, (self.num_experts, -1)) for kind, z in self._begun(x).items()
        }
        made = []
        for expert in range(self.num_experts):
            hidden = self._hidden({kind: z[expert] for kind, z in inputs.items()}, expert)
            made.append(outputs.one(hidden, expert))
        return outputs.end(torch.cat(made))

    def _begun(self, x_ND: Tensor) -> dict[str, Tensor]:
        """The input of each input matrix, computed once for kinds that share a site."""
        out: dict[str, Tensor] = {}
        seen: dict[int, Tensor] = {}
        for kind in self.where.inputs_in_order:
            part = self.part(kind)
            key = id(getattr(part, "site", part))
            if key not in seen:
                seen[key] = part.begin(x_ND)
            out[kind] = seen[key]
        return out

    def _hidden(self, inputs: Mapping[str, Tensor], expert: int) -> Tensor:
        """(M, F): hidden activations after activation function and gate."""
        parts = [self.part(kind).one(z, expert) for kind, z in inputs.items()]
        bias_EI = bias_of(self, self.where.inputs)
        return gated(self, self.where, parts, None if bias_EI is None else bias_EI[expert])


@cache  # one class per dense class, so that types compare equal
def _factored_class(dense: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a model's class of experts with our `forward`."""
    return type(f"Factored{dense.__name__}", (FactoredExperts, dense), {})


def become_factored_experts(
    module: Any, where: Experts, parts: Mapping[str, nn.Module], replaced: Sequence[str]
) -> None:
    """Turn a dense module of experts into a factored one, in place.

    Args:
        module: the experts of a layer.
        where: its layout.
        parts: kind (gate, in, out) -> the module that replaces its dense matrices.
        replaced: names of the parameters that are removed.
    """
    for name in replaced:
        del module._parameters[name]
    module.__class__ = _factored_class(cast(Any, type(module)))
    module.prepare(where, parts)
