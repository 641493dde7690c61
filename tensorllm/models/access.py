"""The one reader and the one writer of role matrices, for every architecture.

Shapes: I rows of a role matrix, C its columns (mostly the model width D), G key/value heads,
g queries per group, K head_dim.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from tensorllm.errors import UserError
from tensorllm.models.experts import StoredExperts, stored_experts
from tensorllm.models.layout import layout_of
from tensorllm.models.mixture import Mixture
from tensorllm.models.naming import joined_names, stored_names
from tensorllm.models.skeleton import skeleton
from tensorllm.models.spec import ModelSpec, Stored, Task, part_of
from tensorllm.models.task import text_config_of
from tensorllm.tensors.stacking import family, is_output_projection


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, tied ones under each name; writing to them edits the model."""
    return {name: p.data for name, p in model.named_parameters(remove_duplicate=False)}


class StoredOtherwise(UserError):
    """A checkpoint's files store a matrix in another shape than the model does."""


class RoleMatrices:
    """Role matrices `(I, C)` of any architecture, read from and written to named parameters.

    Layers may differ: sizes, roles and storage are looked up per layer.

    Args:
        config: the transformers config that the parameters belong to.
        names: all parameter names; they determine the prefix of the base model.
    """

    def __init__(self, config: Any, names: Collection[str]) -> None:
        self.layout = layout_of(config)
        self.spec: ModelSpec = self.layout.spec
        self.layers = self.spec.layers
        layers = enumerate(self.layout.layers)
        self.mixtures: dict[int, Mixture] = {n: one.mixture for n, one in layers if one.mixture}
        self._experts: dict[int, StoredExperts] = {}  # set once the layers' names are known
        self._find_names(config, names)
        self._experts = {
            layer: stored_experts(found.experts, self.layer_path(layer), names)
            for layer, found in self.mixtures.items()
        }

    @property
    def task(self) -> Task:
        """Whether the model predicts the next token or a masked one."""
        return self.layout.task

    def stored_in(self, layer: int) -> tuple[Stored, ...]:
        """The stored parameters that hold the layer's roles."""
        return self.layout.layers[layer].stored

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
        if stored.experts is not None:
            return self._expert_name(layer, stored, role)
        return self._named(f"{self.layout.layers[layer].path}.{stored.path}.weight")

    def _expert_name(self, layer: int, stored: Stored, role: str) -> str:
        own, parameter = f"{self.layout.layers[layer].path}.{stored.path}", stored.parameter
        kept = self._experts.get(layer)
        if kept is not None and kept.is_apart(role):
            return kept.apart.get(role) or kept.missing(role)
        if kept is not None and parameter in kept.fused:
            return kept.fused[parameter]
        return self._named(own)

    def together(self, layer: int, role: str) -> set[str]:
        """Names of the stored parameters that make up the in-memory parameter with this role."""
        return {self.name(layer, each) for each in self.stored(layer, role).roles}

    def layer_path(self, layer: int) -> str:
        """Name of the layer's module in the model."""
        own = self.layout.layers[layer].path
        stored = self._single(layer)
        if not stored:
            return self._prefixed(own)
        below = f".{stored[0].path}.weight"
        return self._named(f"{own}{below}").removesuffix(below)

    def read(self, weights: Mapping[str, Tensor], layer: int, role: str) -> Tensor:
        """The role matrix `(I, C)`, in the stored dtype; a view if possible."""
        part = self._part(weights[self.name(layer, role)], layer, role)
        return part.reshape(-1, part.shape[-1])

    def write(self, weights: Mapping[str, Tensor], layer: int, role: str, w_IC: Tensor) -> None:
        """Overwrite the role matrix `(I, C)` in place, rounded to the stored dtype.

        Gradients flow from the parameter to `w_IC`, if it requires them.
        """
        part = self._part(weights[self.name(layer, role)], layer, role)
        want = (part.numel() // part.shape[-1], part.shape[-1])
        assert w_IC.shape == want, f"{role} must be {want}, got {tuple(w_IC.shape)}"
        part.copy_(w_IC.reshape(part.shape))

    def check_layers(self, layers: Collection[int]) -> tuple[int, ...]:
        """The layers as a tuple; refuses an empty list, and layers out of range or repeated."""
        wrong = [i for i in layers if not 0 <= i < self.layers]
        if wrong:
            raise UserError(f"layers must be in 0..{self.layers - 1}, got {wrong[0]}")
        if not layers:
            raise UserError(f"layers must be in 0..{self.layers - 1}, got none")
        if twice := [i for i, times in Counter(layers).items() if times > 1]:
            raise UserError(
                f"layers must be different ones of 0..{self.layers - 1}, "
                f"got {twice[0]} more than once"
            )
        return tuple(layers)

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse stored shapes that contradict the config."""
        for layer in range(self.layers):
            for stored in self.stored_in(layer):
                first = stored.roles[0]
                apart = stored.experts is not None and self._experts[layer].is_apart(first)
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
            if self._experts[layer].is_apart(role):
                return geo.outputs(role), geo.inputs(role)
            return stored.experts.parameter_shape(stored.parameter, geo.D)
        return self.layout.shapes[f"{self.layout.layers[layer].path}.{stored.path}.weight"]

    def _part(self, weight: Tensor, layer: int, role: str) -> Tensor:
        """The view of a stored parameter that is the role's."""
        stored = self.stored(layer, role)
        if stored.experts is None:
            return part_of(stored, weight, role, self.spec.geometry(layer))
        if self._experts[layer].is_apart(role):
            return weight.mT if is_output_projection(role) else weight
        _, expert, kind = role.split(".")
        return stored.experts.view(weight, kind)[int(expert)]

    def _single(self, layer: int) -> list[Stored]:
        """The layer's stored parameters that files name as modules do: all except experts."""
        return [s for s in self.stored_in(layer) if family(s.roles[0]) == s.roles[0]]

    def _named(self, parameter: str) -> str:
        return self._renamed.get(parameter) or self._prefixed(parameter)

    def _prefixed(self, name: str) -> str:
        own, other = self._prefix
        return f"{other}{name.removeprefix(own)}"

    def _find_names(self, config: Any, names: Collection[str]) -> None:
        """Find out how these names differ from the model's.

        `model.layers.0` may be `layers.0` in a base model without its head, and transformers may
        rename anything in a file.
        """
        self._prefix, self._renamed = ("", ""), dict[str, str]()
        wanted = [self.name(n, s.roles[0]) for n in range(self.layers) for s in self._single(n)]
        if not wanted or wanted[0] in names:
            return
        whole = skeleton(config).model
        parts = self.layout.layers[0].path.split(".")
        # of a wrapper only its own base model's prefix: other towers have layers of the same names
        most = 1 if text_config_of(config) is not config else len(parts) - 1
        for count in range(1, most + 1):
            own = "".join(f"{part}." for part in parts[:count])
            ending = wanted[0].removeprefix(own)
            alike = [name for name in names if f".{name}".endswith(f".{ending}")]
            found = [name.removesuffix(ending) for name in alike]
            if len(found) == 1:
                self._prefix = (own, found[0])
                return
        self._renamed = stored_names(whole, names)
        if wanted[0] not in self._renamed:
            if joined_names(whole, names, wanted[0]):
                raise StoredOtherwise(
                    f"these files store {wanted[0]} joined with others or cut, as transformers "
                    "converts it while it loads. Store it as the model holds it, once, in Python: "
                    "model.save_pretrained(NEW_FOLDER, save_original_format=False)"
                )
            raise UserError(
                f"the weights do not look like a {config.model_type!r} model: no tensor is "
                f"{wanted[0]}, by its name or by one that transformers renames to it"
            )
