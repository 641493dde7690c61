"""The one reader and the one writer of role matrices, for every architecture.

Shapes: I rows of a role matrix, C its columns (mostly the model width D), G key/value heads,
g queries per group, K head width.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tensorllm.errors import UserError
from tensorllm.models.experts import kept_in
from tensorllm.models.mixture import mixtures, with_mixture
from tensorllm.models.spec import ModelSpec, Stored, Task, architecture_of
from tensorllm.tensors.stacking import is_output_projection


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, tied ones under each name; writing to them edits the model."""
    return {name: p.data for name, p in model.named_parameters(remove_duplicate=False)}


class RoleMatrices:
    """Role matrices `(I, C)` of any architecture, read from and written to named parameters.

    Layers may differ: sizes, roles and where they are stored are asked for per layer.

    Args:
        config: the transformers config that the parameters belong to.
        names: all parameter names; they tell the prefix of the base model.
    """

    def __init__(self, config: Any, names: Collection[str]) -> None:
        self.architecture = architecture_of(config)
        self.layers: int = config.num_hidden_layers
        if self.layers < 1:
            raise UserError(f"a model must have 1 layer or more, the config says {self.layers}")
        geometry = self.architecture.geometry(config)
        self._prefix = self._find_prefix(config.model_type, names)
        self.mixtures = mixtures(config, self.architecture.block, self.layers, names)
        self.spec = ModelSpec(
            tuple(
                replace(geometry, shapes=with_mixture(geometry, self.mixtures[layer]))
                if layer in self.mixtures
                else geometry
                for layer in range(self.layers)
            )
        )
        self._kept = {
            layer: kept_in(found.experts, self.layer_path(layer), names)
            for layer, found in self.mixtures.items()
        }

    @property
    def task(self) -> Task:
        """Whether the model predicts the next token or a masked one."""
        return self.architecture.task

    def stored_in(self, layer: int) -> tuple[Stored, ...]:
        """The stored parameters that hold the layer's roles."""
        if layer in self.mixtures:
            return self.architecture.attention + self.mixtures[layer].stored
        return tuple(self.architecture)

    def stored(self, layer: int, role: str) -> Stored:
        """The stored parameter that holds the role.

        Raises:
            UserError: the layer has no such role.
        """
        for stored in self.stored_in(layer):
            if role in stored.roles:
                return stored
        there = ", ".join(self.spec.geometry(layer).roles)
        raise UserError(f"layer {layer} has no matrix {role!r}; it has {there or 'none'}")

    def name(self, layer: int, role: str) -> str:
        """Name of the parameter that holds the role."""
        stored = self.stored(layer, role)
        if stored.experts is None:
            return f"{self.layer_path(layer)}.{stored.path}.weight"
        kept, parameter = self._kept[layer], stored.path.rpartition(".")[2]
        if kept.is_apart(role):
            return kept.apart.get(role) or kept.missing(role)
        return kept.fused.get(parameter, f"{self.layer_path(layer)}.{stored.path}")

    def together(self, layer: int, role: str) -> set[str]:
        """Names of the parameters that a model in memory holds as one, which has the role."""
        return {self.name(layer, each) for each in self.stored(layer, role).roles}

    def layer_path(self, layer: int) -> str:
        """Name of the layer's module in the model."""
        return f"{self._prefix}{self.architecture.block.format(i=layer)}"

    def read(self, weights: Mapping[str, Tensor], layer: int, role: str) -> Tensor:
        """The role matrix `(I, C)`, in the stored dtype; a view where it can be one."""
        part = self._part(weights[self.name(layer, role)], layer, role)
        return part.reshape(self.spec.geometry(layer).shape(role))

    def write(self, weights: Mapping[str, Tensor], layer: int, role: str, w_IC: Tensor) -> None:
        """Overwrite the role matrix `(I, C)` in place, rounded to the stored dtype.

        Gradients flow from the parameter to `w_IC`, where that wants them.
        """
        want = self.spec.geometry(layer).shape(role)
        assert w_IC.shape == want, f"{role} must be {want}, got {tuple(w_IC.shape)}"
        part = self._part(weights[self.name(layer, role)], layer, role)
        part.copy_(w_IC.reshape(part.shape))

    def check_layers(self, layers: Collection[int]) -> tuple[int, ...]:
        """The layers as a tuple; out of range, repeated or missing ones are refused."""
        wrong = [i for i in layers if not 0 <= i < self.layers]
        if wrong:
            raise UserError(f"layers must be in 0..{self.layers - 1}, got {wrong[0]}")
        if len(set(layers)) != len(layers) or not layers:
            raise UserError(f"layers must be given, each once, got {list(layers)}")
        return tuple(layers)

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse stored shapes that contradict the config."""
        for layer in range(self.layers):
            for stored in self.stored_in(layer):
                first = stored.roles[0]
                apart = stored.experts is not None and self._kept[layer].is_apart(first)
                for role in stored.roles if apart else (first,):
                    self._check_shape(layer, stored, role, shapes)

    def _check_shape(
        self, layer: int, stored: Stored, role: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        name, want = self.name(layer, role), self._stored_shape(layer, stored, role)
        if name not in shapes:
            raise UserError(f"the weights have no {name}, which the config asks for")
        if tuple(shapes[name]) != want:
            raise UserError(f"{name} has shape {tuple(shapes[name])}, but the config says {want}")

    def _stored_shape(self, layer: int, stored: Stored, role: str) -> tuple[int, ...]:
        geo = self.spec.geometry(layer)
        if stored.experts is not None:
            if self._kept[layer].is_apart(role):
                return geo.outputs(role), geo.inputs(role)
            return stored.experts.parameter_shape(stored.path.rpartition(".")[2], geo.D)
        rows, columns = sum(map(geo.inner, stored.roles)), geo.shape(stored.roles[0])[1]
        return (columns, rows) if stored.transposed else (rows, columns)

    def _part(self, weight: Tensor, layer: int, role: str) -> Tensor:
        """The view of a stored parameter that is the role's: (I, C) or (G, m, K, C)."""
        stored, geo = self.stored(layer, role), self.spec.geometry(layer)
        if stored.experts is not None:
            _, expert, kind = role.split(".")
            if self._kept[layer].is_apart(role):
                return weight.mT if is_output_projection(role) else weight
            return stored.experts.view(weight, kind)[int(expert)]
        w_IC = weight.mT if stored.transposed else weight
        if stored.grouped:
            w_GmKC = w_IC.view(geo.G, geo.groups + 2, geo.K, -1)
            first = {"q": 0, "k": geo.groups, "v": geo.groups + 1}[role]
            return w_GmKC[:, first : first + (geo.groups if role == "q" else 1)]
        before = stored.roles[: stored.roles.index(role)]
        return w_IC.narrow(0, sum(map(geo.inner, before)), geo.inner(role))

    def _find_prefix(self, model_type: str, names: Collection[str]) -> str:
        """What stands before the base model's own names, such as `transformer.` or nothing."""
        first = self.architecture.attention[0].path
        ending = f"{self.architecture.block.format(i=0)}.{first}.weight"
        found = [n.removesuffix(ending) for n in names if n == ending or n.endswith("." + ending)]
        if len(found) != 1:
            raise UserError(
                f"the weights do not look like a {model_type!r} model: "
                f"expected one parameter ...{ending}, found {len(found)}"
            )
        return found[0]
