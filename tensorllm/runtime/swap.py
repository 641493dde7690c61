"""Putting factored modules in the place of dense ones, in memory or on the meta device."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from tensorllm.architectures import RoleMatrices
from tensorllm.architectures.spec import Stored
from tensorllm.compressors.base import Site
from tensorllm.errors import UserError
from tensorllm.runtime.attention import Bias, LatentOutput, become_factored
from tensorllm.runtime.heads import CORE_ORDER, HeadsSite
from tensorllm.runtime.linear import (
    FactoredLinear,
    HeadPart,
    HeadsPart,
    StackPart,
    StackSite,
    dense_linear,
    low_rank_linears,
    role_rows,
)
from tensorllm.runtime.wiring import WIRINGS
from tensorllm.tensors.factors import CP, Factors, LowRank, Tucker

Order = tuple[int, ...] | None
FALLING = ("o", "out")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a stored tensor went.

    Attributes:
        site: the site's name; empty for a matrix left alone in a replaced parameter.
        tensor: the tensor's short name in the factors; `layer.role` for a matrix left alone.
        parameter: the model's parameter that holds it now.
        order: the stored dimensions in the order in which they are held; None: as stored.
    """

    site: str
    tensor: str
    parameter: str
    order: Order = None


class Held(NamedTuple):
    """A part of a factored linear and where its tensors are: short name -> (below it, order)."""

    module: nn.Module
    tensors: Mapping[str, tuple[str, Order]]


def can_run_factored(site: Site, factors: Factors) -> bool:
    """Whether there is a module for a site's factors."""
    return (type(factors), site.stacking) in _MAKERS or _is_shared_heads(site, factors)


def install(
    model: nn.Module, sites: Sequence[tuple[Site, Factors]], *, latent: bool = True
) -> list[Placement]:
    """Replace the modules of the sites' matrices by factored ones, in place.

    Args:
        model: dense, of a known architecture; with its weights, or on the meta device.
        sites: what is replaced, each with its factors, in the dtype and on the device to run in.
        latent: run the attention in its latents where it can be.

    Raises:
        UserError: a site's factors cannot run as they are, such as the authors' layout.
    """
    for site, factors in sites:
        if not can_run_factored(site, factors):
            raise UserError(
                f"{site.name} is stacked as {site.stacking!r}, which cannot run factored; write it "
                "dense (tensorllm export --format dense), or compress with layout 'paper'"
            )
    return _Swap(model, latent).run(sites)


class _Swap:
    """One installation: the model's matrices, and what has been placed."""

    def __init__(self, model: nn.Module, latent: bool) -> None:
        self.model: Any = model
        self.roles = RoleMatrices(model.config, [name for name, _ in model.named_parameters()])
        self.placed: list[Placement] = []
        config: Any = self.model.config
        wired = config.model_type in WIRINGS
        self.wiring = WIRINGS[config.model_type] if wired else None
        self.latent = latent and self.wiring is not None and self.wiring.latent(config)

    def run(self, sites: Sequence[tuple[Site, Factors]]) -> list[Placement]:
        parts: dict[str, dict[str, tuple[Site, Held]]] = defaultdict(dict)
        where: dict[str, tuple[int, Stored]] = {}
        for site, factors in sites:
            if self.latent and _is_shared_heads(site, factors):
                self._attention(site, factors)
                continue
            for (layer, role), held in self._held(site, factors).items():
                name = self.roles.name(layer, role)
                parts[name][role] = (site, held)
                where[name] = (layer, self.roles.architecture.stored(role))
        for name, by_role in parts.items():
            self._linear(name, *where[name], by_role)
        return self.placed

    def _held(self, site: Site, factors: Factors) -> dict[tuple[int, str], Held]:
        if _is_shared_heads(site, factors):
            return _heads_parts(site, factors, self.roles.geometry)
        return _MAKERS[type(factors), site.stacking](site, factors)

    def _linear(
        self, name: str, layer: int, stored: Stored, by_role: dict[str, tuple[Site, Held]]
    ) -> None:
        path = name.removesuffix(".weight")
        dense = self.model.get_submodule(path)
        weights = {name: dense.weight.data}
        modules: dict[str, nn.Module] = {}
        for role in stored.roles:
            below = f"{path}.parts.role_{role}"
            if role in by_role:
                site, held = by_role[role]
                modules[role] = held.module
                for short, (inner, order) in held.tensors.items():
                    self.placed.append(Placement(site.name, short, f"{below}.{inner}", order))
            else:
                w_ID = self.roles.read(weights, layer, role).clone()
                modules[role] = dense_linear(w_ID, rises=role not in FALLING)
                self.placed.append(Placement("", f"{layer}.{role}", f"{below}.weight"))
        geo = self.roles.geometry
        grouped = {"grouped": geo.G, "head_dim": geo.K} if stored.grouped else {}
        linear = FactoredLinear(modules, _bias_of(dense), **grouped)
        self._replace(path, linear)

    def _attention(self, site: Site, factors: Any) -> None:
        (layer,) = site.layers
        heads = HeadsSite(factors)
        heads.absorb()
        block = self.roles.name(layer, "q").removesuffix(".weight").rpartition(".")[0]
        module: Any = self.model.get_submodule(block)
        assert self.wiring is not None, "asked only where there is one"
        become_factored(module, self.model.config, self.wiring, self.roles.geometry, heads)
        for stored in self.roles.architecture.attention:
            path = self.roles.name(layer, stored.roles[0]).removesuffix(".weight")
            bias = _bias_of(self.model.get_submodule(path))
            if stored.roles == ("o",):
                output = LatentOutput(bias, heads, self.roles.geometry.G)
                self._replace(path, output)
                if path.startswith(f"{block}."):
                    module.__dict__["output"] = output  # registered under its own name already
            else:
                left = Bias(bias)
                self._replace(path, left)
                layout = "grouped" if stored.grouped else stored.roles
                module.biases.append((layout, left))
        names = {"core": ("core_SGRP", CORE_ORDER)} | _heads_names()
        for short, (inner, order) in names.items():
            self.placed.append(Placement(site.name, short, f"{block}.factors.{inner}", order))

    def _replace(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, module.train(self.model.training))


def _bias_of(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.data


def _is_shared_heads(site: Site, factors: Factors) -> bool:
    return (
        site.stacking == "heads"
        and isinstance(factors, Tucker)
        and set(factors.factors) == {0, 1, 2}
    )


def _heads_names() -> dict[str, tuple[str, Order]]:
    return {f"factor_{n}": (name, None) for n, name in enumerate(("u_DP", "u_KR", "u_MS"))}


def _low_rank(site: Site, factors: Any) -> dict[tuple[int, str], Held]:
    ((layer, role),) = site.matrices
    rises = role not in FALLING
    order = None if rises else (1, 0)
    names = ("1.weight", "0.weight") if rises else ("0.weight", "1.weight")
    module = low_rank_linears(factors, rises=rises)
    return {(layer, role): Held(module, {s: (n, order) for s, n in zip("uv", names, strict=True)})}


def _head(site: Site, factors: Any) -> dict[tuple[int, str], Held]:
    ((layer, role),) = site.matrices
    names = {
        "core": ("core_hRP", (2, 1, 0)),
        "factor_0": ("u_DP", None),
        "factor_1": ("u_KR", None),
    }
    return {(layer, role): Held(HeadPart(factors, rises=role not in FALLING), names)}


def _stack(site: Site, factors: Any) -> dict[tuple[int, str], Held]:
    shared = StackSite(factors)
    middle = "weights" if isinstance(factors, CP) else "core"
    short = {middle: "middle", "factor_0": "u_IP", "factor_1": "u_DR", "factor_2": "u_MS"}
    names = {stored: (f"factors.{name}", None) for stored, name in short.items()}
    return {
        matrix: Held(
            StackPart(shared, index, rises=matrix[1] not in FALLING, owner=index == 0),
            names if index == 0 else {},
        )
        for index, matrix in enumerate(site.matrices)
    }


def _heads_parts(site: Site, factors: Any, geometry: Any) -> dict[tuple[int, str], Held]:
    shared = HeadsSite(factors)
    shared.absorb()
    names = {"core": ("core_SGRP", CORE_ORDER)} | _heads_names()
    below = {short: (f"factors.{name}", order) for short, (name, order) in names.items()}
    rows = role_rows(geometry)
    out = {}
    for layer, role in site.matrices:
        first = role == site.roles[0]
        part = HeadsPart(shared, rows[role], geometry, rises=role not in FALLING, owner=first)
        out[layer, role] = Held(part, below if first else {})
    return out


_MAKERS: dict[tuple[type, str], Callable[[Site, Any], dict[tuple[int, str], Held]]] = {
    (LowRank, "matrix"): _low_rank,
    (Tucker, "head"): _head,
    (CP, "matrices"): _stack,
    (Tucker, "matrices"): _stack,
}
