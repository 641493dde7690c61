"""Replacing dense modules by factored ones, in memory or on the meta device."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tensorllm.compressors.layer import Site
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.models.spec import Stored
from tensorllm.runtime.adapters import ADAPTERS
from tensorllm.runtime.attention import Bias, LatentOutput, become_factored
from tensorllm.runtime.cache import grow_in_place
from tensorllm.runtime.dequantise import Dequantise
from tensorllm.runtime.experts import (
    FactoredExperts,
    JointExperts,
    SeparateExperts,
    become_factored_experts,
)
from tensorllm.runtime.kept_rows import widen_where_needed
from tensorllm.runtime.one_query import pack_groups
from tensorllm.runtime.one_token import become_one_token
from tensorllm.runtime.sites import (
    Held,
    Order,
    RoleLinear,
    SiteModule,
    dense_linear,
    module_for,
)
from tensorllm.tensors.factors import Factors
from tensorllm.tensors.stacking import ATTENTION, expert_role, family


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a stored tensor is in the model.

    Attributes:
        site: the site's name; empty for a matrix that stays dense in a replaced parameter.
        tensor: the tensor's short name in the factors; `layer.role` for a matrix that stays dense.
        parameter: the model's parameter that holds it.
        order: the stored modes in the order in which they are held; None: as stored.
    """

    site: str
    tensor: str
    parameter: str
    order: Order = None


def install(
    model: nn.Module, sites: Sequence[tuple[Site, Factors]], *, dense_cache: Collection[str] = ()
) -> list[Placement]:
    """Replace the modules of the sites' matrices by factored ones, in place.

    All code that turns factors into modules goes through here.

    Args:
        model: dense, of a known architecture; with its weights, or on the meta device.
        sites: the sites to replace, with their factors in the dtype and on the device to run in;
            quantised factors stay so, and are dequantised for each use.
        dense_cache: names of sites whose attention caches keys and values of full width; the others
            cache latents, if the architecture can.

    Returns:
        Where each stored tensor is.

    Raises:
        UserError: a site's factors cannot run as they are, such as the authors' layout.
    """
    plain = [(site, factors.plain()) for site, factors in sites]
    modules = [module_for(*each) for each in plain]
    for (site, factors), module in zip(plain, modules, strict=True):
        if module is None:
            raise UserError(
                f"{site.name} holds {factors.kind!r} factors stacked as {site.stacking!r}, which "
                "cannot run factored; write it dense (tensorllm export --format dense), or "
                "compress with layout 'paper'"
            )
    installation = _Installation(model, dense_cache)
    for (site, factors), module in zip(plain, modules, strict=True):
        assert module is not None, "refused above"
        installation.add(site, factors, module)
    placed = installation.finish()
    return _hold_quantised(model, placed, {site.name: factors for site, factors in sites})


def factors_of(model: nn.Module) -> list[nn.Module]:
    """The modules that hold factors; some contain others."""
    return [
        module if isinstance(module, SiteModule) else module.parts
        for module in model.modules()
        if isinstance(module, SiteModule | FactoredLinear | FactoredExperts)
    ]


def train_only_factors(model: nn.Module) -> int:
    """Make the factors of a factored model trainable, and freeze everything else.

    Returns:
        The number of trainable numbers.

    Raises:
        UserError: the model has no factors that can be trained.
    """
    held = {
        parameter
        for owner in factors_of(model)
        for parameter in owner.parameters()
        if parameter.is_floating_point() and parameter.requires_grad
    }
    if not held:
        raise UserError("this model has no factors to train; load a factored folder")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in held)
    return sum(parameter.numel() for parameter in held)


class _Installation:
    """The state of one installation: the model's matrices, and the placements so far."""

    def __init__(self, model: nn.Module, dense_cache: Collection[str]) -> None:
        self.model: Any = model
        self.modules: dict[str, Any] = dict(model.named_modules())
        self.names = [name for name, _ in model.named_parameters()]
        self.roles = RoleMatrices(model.config, self.names)
        self.placed: list[Placement] = []
        config: Any = self.model.config
        known = config.model_type in ADAPTERS
        self.adapter = ADAPTERS[config.model_type] if known else None
        self.whole = self.adapter is not None and self.adapter.latent(config)
        self.dense_cache = dense_cache
        self.parts: dict[str, dict[str, tuple[Site, Held]]] = defaultdict(dict)
        self.where: dict[str, tuple[int, Stored]] = {}
        self.experts: dict[int, dict[str, tuple[Site, Held]]] = defaultdict(dict)

    def add(self, site: Site, factors: Factors, module: type[SiteModule]) -> None:
        """Add a site: install its attention now, or collect its linear layers for `finish`."""
        if self.whole and module.latent_attention:
            self._attention(site, factors, module)
            return
        geometry = self.roles.spec.geometry(site.layers[0])
        made = module.roles(site, factors, geometry)
        widen_where_needed(site, [held.module for held in made.values()], self.roles, self.names)
        for (layer, role), held in made.items():
            stored = self.roles.stored(layer, role)
            if stored.experts is not None:
                self.experts[layer][role] = (site, held)
                continue
            name = self.roles.name(layer, role)
            self.parts[name][role] = (site, held)
            self.where[name] = (layer, stored)

    def finish(self) -> list[Placement]:
        for name, by_role in self.parts.items():
            self._linear(name, *self.where[name], by_role)
        for layer, by_role in self.experts.items():
            self._experts(layer, by_role)
        for module in self.modules.values():
            pack_groups(module)
            become_one_token(module)
        grow_in_place(self.model)
        return self.placed

    def _linear(
        self, name: str, layer: int, stored: Stored, by_role: dict[str, tuple[Site, Held]]
    ) -> None:
        path = name.removesuffix(".weight")
        dense = self.modules[path]
        modules: dict[str, nn.Module] = {}
        for role in stored.roles:
            below = f"{path}.parts.{part_name(role)}"
            if role in by_role:
                site, held = by_role[role]
                modules[role] = held.module
                for short, (inner, order) in held.tensors.items():
                    self.placed.append(Placement(site.name, short, f"{below}.{inner}", order))
            else:
                w_ID = self.roles.read({name: dense.weight.data}, layer, role).clone()
                modules[role] = dense_linear(w_ID, role)
                self.placed.append(Placement("", f"{layer}.{role}", f"{below}.weight"))
        geo = self.roles.spec.geometry(layer)
        linear = FactoredLinear(modules, _bias_of(dense), blocks=stored.count(geo))
        self._replace(path, linear)

    def _attention(self, site: Site, factors: Factors, kind: type[SiteModule]) -> None:
        (layer,) = site.layers
        geometry = self.roles.spec.geometry(layer)
        latents: Any = kind(factors, site, geometry)
        latents.finish()
        block = self.roles.name(layer, "q").removesuffix(".weight").rpartition(".")[0]
        module: Any = self.model.get_submodule(block)
        assert self.adapter is not None, "asked only where there is one"
        become_factored(
            module,
            self.model.config,
            self.adapter,
            geometry,
            latents,
            latent=site.name not in self.dense_cache,
        )
        here = self.roles.stored_in(layer)
        for stored in (each for each in here if set(each.roles) <= set(ATTENTION)):
            path = self.roles.name(layer, stored.roles[0]).removesuffix(".weight")
            bias = _bias_of(self.model.get_submodule(path))
            if stored.roles == ("o",):
                output = LatentOutput(bias, latents, geometry.G)
                self._replace(path, output)
                if path.startswith(f"{block}."):
                    module.__dict__["output"] = output  # already registered under its own name
            else:
                left = Bias(bias)
                self._replace(path, left)
                layout = "grouped" if stored.grouped else stored.roles
                module.biases.append((layout, left))
        for short, (inner, order) in latents.places.items():
            self.placed.append(Placement(site.name, short, f"{block}.factors.{inner}", order))

    def _experts(self, layer: int, by_role: dict[str, tuple[Site, Held]]) -> None:
        """Replace the mixture of a layer, with parts for everything a removed parameter held."""
        where = self.roles.mixtures[layer].experts
        path = f"{self.roles.layer_path(layer)}.{where.path}"
        module: Any = self.model.get_submodule(path)
        touched = {family(role).rpartition(".")[2] for role in by_role}
        replaced = [
            name for name in (where.inputs, where.outputs) if touched & set(where.kinds_of(name))
        ]
        weights = {f"{path}.{name}": getattr(module, name).data for name in replaced}
        parts: dict[str, nn.Module] = {}
        for kind in (kind for name in replaced for kind in where.kinds_of(name)):
            roles = [expert_role(kind, n) for n in range(where.count)]
            below = f"{path}.parts.role_{kind}"
            first = by_role.get(roles[0])
            if first is not None and isinstance(first[1].module, RoleLinear):
                parts[kind] = self._together(kind, first, below)
                continue
            modules: list[nn.Module] = []
            for number, role in enumerate(roles):
                at = f"{below}.experts.{number}"
                if role in by_role:
                    site, held = by_role[role]
                    modules.append(held.module)
                    for short, (inner, order) in held.tensors.items():
                        self.placed.append(Placement(site.name, short, f"{at}.{inner}", order))
                else:
                    w_FD = self.roles.read(weights, layer, role).clone()
                    modules.append(dense_linear(w_FD, role))
                    self.placed.append(Placement("", f"{layer}.{role}", f"{at}.weight"))
            parts[kind] = SeparateExperts(modules)
        become_factored_experts(module, where, parts, replaced)

    def _together(self, kind: str, first: tuple[Site, Held], below: str) -> nn.Module:
        """One kind of matrix of a site of all experts; the first kind owns the tensors."""
        site, held = first
        linear: Any = held.module
        (shared,) = linear._site
        matrix = site.families.index(f"experts.{kind}")
        for short, (inner, order) in held.tensors.items():
            self.placed.append(Placement(site.name, short, f"{below}.{inner}", order))
        return JointExperts(shared, matrix, output=kind == "out", owner=matrix == 0)

    def _replace(self, path: str, module: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        if not self.model.training:  # new modules are; to tell them so takes a while
            module.eval()
        setattr(self.modules[parent], name, module)


def part_name(role: str) -> str:
    """The name of a role's module; torch allows no dots."""
    return f"role_{role.replace('.', '_')}"


class FactoredLinear(nn.Module):
    """Replaces one `nn.Linear` (or `Conv1D`): concatenated outputs of its parts, plus the bias.

    Args:
        parts: role -> module from the layer's input to that role's output, in the stored order.
        bias: of all the roles, in the stored order.
        blocks: number of blocks of the outputs, each with a part of every role.
    """

    bias: nn.Parameter | None
    blocks: int
    alone: bool

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        bias: Tensor | None,
        *,
        blocks: int = 1,
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        for role, part in parts.items():
            self.parts.add_module(part_name(role), part)
        alone = len(parts) == 1 and bias is None and blocks == 1
        vars(self).update(bias=None, blocks=blocks, alone=alone)  # as in `RoleLinear`
        if bias is not None:
            self.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        parts: Any = self._modules["parts"]  # attribute access would cost microseconds
        if self.alone:
            (part,) = parts._modules.values()
            y: Tensor = part.forward(x) if type(part) is RoleLinear else part(x)
            return y
        outs = [part(x) for part in parts._modules.values()]
        if self.blocks > 1:  # such as each group's queries, key and value
            split = [out.view(*x.shape[:-1], self.blocks, -1) for out in outs]
            y = torch.cat(split, dim=-1).flatten(-2)
        else:
            y = outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)
        return y if self.bias is None else y + self.bias


def _hold_quantised(
    model: Any, placements: Sequence[Placement], factors: Mapping[str, Factors]
) -> list[Placement]:
    """Replace parameters by their quantised form.

    By torch's parametrizations: reading the parameter dequantises it. This saves memory, not time.
    """
    out = []
    for place in placements:
        parts = factors[place.site].quantised_parts(place.tensor) if place.site in factors else {}
        if not parts:
            out.append(place)
            continue
        path, _, name = place.parameter.rpartition(".")
        module = model.get_submodule(path)
        getattr(module, name).requires_grad_(False)
        dequantise = Dequantise(tuple(parts.values()), place.order)
        parametrize.register_parametrization(module, name, dequantise, unsafe=True)
        held = f"{path}.parametrizations.{name}.original"
        out += [Placement(place.site, n, f"{held}{i}") for i, n in enumerate(parts)]
    return out


def _bias_of(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.data
