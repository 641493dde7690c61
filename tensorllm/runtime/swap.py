"""Putting factored modules in the place of dense ones, in memory or on the meta device."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tensorllm.compressors.base import Site
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.models.spec import FALLING, Stored
from tensorllm.runtime.attention import Bias, LatentOutput, become_factored
from tensorllm.runtime.heads import CORE_ORDER, HeadsSite
from tensorllm.runtime.linear import FactoredLinear, dense_linear
from tensorllm.runtime.parts import (
    Held,
    Order,
    can_run_factored,
    heads_names,
    is_shared_heads,
    parts_of,
)
from tensorllm.runtime.wiring import WIRINGS
from tensorllm.tensors.factors import Factors


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
            if self.latent and is_shared_heads(site, factors):
                self._attention(site, factors)
                continue
            for (layer, role), held in parts_of(site, factors, self.roles.geometry).items():
                name = self.roles.name(layer, role)
                parts[name][role] = (site, held)
                where[name] = (layer, self.roles.architecture.stored(role))
        for name, by_role in parts.items():
            self._linear(name, *where[name], by_role)
        return self.placed

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
        names = {"core": ("core_SGRP", CORE_ORDER)} | heads_names()
        for short, (inner, order) in names.items():
            self.placed.append(Placement(site.name, short, f"{block}.factors.{inner}", order))

    def _replace(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, module.train(self.model.training))


def _bias_of(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.data
