"""The one reader and the one writer of role matrices, for every architecture.

Shapes: I inner width, D model width, G key/value heads, g queries per group, K head width.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from tensorllm.errors import UserError
from tensorllm.models.spec import ModelSpec, Stored, architecture_of
from tensorllm.tensors.stacking import Geometry


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, tied ones under each name; writing to them edits the model."""
    return {name: p.data for name, p in model.named_parameters(remove_duplicate=False)}


class RoleMatrices:
    """Role matrices `(I, D)` of any architecture, read from and written to named parameters.

    Args:
        config: the transformers config that the parameters belong to.
        names: all parameter names; they tell the prefix of the base model.
    """

    def __init__(self, config: Any, names: Collection[str]) -> None:
        self.architecture = architecture_of(config)
        self.geometry: Geometry = self.architecture.geometry(config)
        self.layers: int = config.num_hidden_layers
        if self.layers < 1:
            raise UserError(f"a model must have 1 layer or more, the config says {self.layers}")
        self.spec = ModelSpec((self.geometry,) * self.layers)
        self._prefix = self._find_prefix(config.model_type, names)

    def name(self, layer: int, role: str) -> str:
        """Name of the parameter that holds the role."""
        stored = self.architecture.stored(role)
        block = self.architecture.block.format(i=layer)
        return f"{self._prefix}{block}.{stored.path}.weight"

    def layer_path(self, layer: int) -> str:
        """Name of the layer's module in the model."""
        return f"{self._prefix}{self.architecture.block.format(i=layer)}"

    def read(self, weights: Mapping[str, Tensor], layer: int, role: str) -> Tensor:
        """The role matrix `(I, D)`, in the stored dtype; a view where it can be one."""
        return self._part(weights[self.name(layer, role)], role).reshape(-1, self.geometry.D)

    def write(self, weights: Mapping[str, Tensor], layer: int, role: str, w_ID: Tensor) -> None:
        """Overwrite the role matrix `(I, D)` in place, rounded to the stored dtype.

        Gradients flow from the parameter to `w_ID`, where that wants them.
        """
        want = (self.geometry.inner(role), self.geometry.D)
        assert w_ID.shape == want, f"{role} must be {want}, got {tuple(w_ID.shape)}"
        part = self._part(weights[self.name(layer, role)], role)
        part.copy_(w_ID.reshape(part.shape))

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
            for stored in self.architecture:
                name = self.name(layer, stored.roles[0])
                want = self._stored_shape(stored)
                if name not in shapes:
                    raise UserError(f"the weights have no {name}, which the config asks for")
                if tuple(shapes[name]) != want:
                    raise UserError(
                        f"{name} has shape {tuple(shapes[name])}, but the config says {want}"
                    )

    def _stored_shape(self, stored: Stored) -> tuple[int, int]:
        rows = sum(self.geometry.inner(role) for role in stored.roles)
        return (self.geometry.D, rows) if stored.transposed else (rows, self.geometry.D)

    def _part(self, weight: Tensor, role: str) -> Tensor:
        """The view of a stored parameter that is the role's: (I, D) or (G, m, K, D)."""
        stored, geo = self.architecture.stored(role), self.geometry
        w_ID = weight.mT if stored.transposed else weight
        if stored.grouped:
            w_GmKD = w_ID.view(geo.G, geo.groups + 2, geo.K, geo.D)
            first = {"q": 0, "k": geo.groups, "v": geo.groups + 1}[role]
            return w_GmKD[:, first : first + (geo.groups if role == "q" else 1)]
        before = stored.roles[: stored.roles.index(role)]
        return w_ID.narrow(0, sum(map(geo.inner, before)), geo.inner(role))

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
