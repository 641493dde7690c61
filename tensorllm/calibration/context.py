"""One layer of the original beside the compressed one: what a `LayerFit` may ask for.

Shapes: B sequences, T positions, D model width, N tokens of a batch, X width of an input, Y of
joint outputs, I rows of a role matrix.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tensorllm.calibration.experts import Key
from tensorllm.calibration.layers import Layers
from tensorllm.calibration.statistics import Covariances
from tensorllm.compressors.base import MatrixStatistics, Site, Size
from tensorllm.models import RoleMatrices
from tensorllm.tensors.factors import Factors, cast
from tensorllm.tensors.stacking import Geometry, is_output_projection
from tensorllm.weights import dense_matrices

SMALLEST = 1e-20  # of a token's output: its size is divided by


class LayerModule:
    """A layer's module and the role matrices in it."""

    def __init__(self, roles: RoleMatrices, number: int, block: nn.Module) -> None:
        self.roles, self.number, self.block = roles, number, block
        self.path = roles.layer_path(number)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By their names in the model."""
        return {f"{self.path}.{name}": p for name, p in self.block.named_parameters()}

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: p.data for name, p in self.parameters.items()}

    def put(self, site: Site, factors: Factors) -> None:
        """Let the factors, in the dtype they are stored in, take the place of the weights."""
        weights = self.weights
        dtype = weights[self.roles.name(self.number, site.roles[0])].dtype
        parts = dense_matrices(site, cast(factors, dtype), self.roles)
        for role, w_ID in zip(site.roles, parts, strict=True):
            self.roles.write(weights, self.number, role, w_ID)


class Context:
    """See `compressors.base.LayerContext`, which this implements.

    Args:
        original, compressed: the layer twice; what is `put` goes into the compressed one.
        covariances: of the original; of this layer's `keys` at least.
        keys: sets of roles of this layer that read the same input.
        before: hidden states before the layer, per batch, of the original and of the compressed
            model; read again and again.
        targets: hidden states after the original's layer, on its own input.
        sites: the strategy's sites of this layer, with their sizes.
    """

    def __init__(
        self,
        layers: Layers,
        original: LayerModule,
        compressed: LayerModule,
        covariances: Covariances,
        keys: Sequence[Key],
        before: tuple[Iterable[Tensor], Iterable[Tensor]],
        targets: Iterable[Tensor],
        sites: Mapping[Site, Size | None],
    ) -> None:
        self.layers, self.original, self.compressed = layers, original, compressed
        self.covariances, self.keys = covariances, keys
        self.before, self.targets = before, targets
        self.sites = sites
        self._tokens = sum(int(batch.mask_BT.sum()) for batch in layers.batches)

    @property
    def layer(self) -> int:
        return self.original.number

    @property
    def geometry(self) -> Geometry:
        return self.original.roles.spec.geometry(self.layer)

    @property
    def device(self) -> torch.device:
        return next(self.original.block.parameters()).device

    @property
    def batches(self) -> int:
        return len(self.layers.batches)

    def weight(self, role: str) -> Tensor:
        return self.original.roles.read(self.original.weights, self.layer, role)

    def has_bias(self, role: str) -> bool:
        path = self.original.roles.stored(self.layer, role).path
        return f"{self.original.path}.{path}.bias" in self.original.parameters

    def compressed_weight(self, role: str) -> Tensor:
        return self.compressed.roles.read(self.compressed.weights, self.layer, role)

    def _key(self, role: str) -> Key:
        return next(key for key in self.keys if role in key[1])

    def input_covariance(self, role: str) -> Tensor:
        return self.covariances.inputs[self._key(role)]

    def gradient_covariance(self, roles: Sequence[str]) -> Tensor:
        key = self._key(roles[0])
        whole_YY = self.covariances.gradients[key]
        if tuple(roles) == key[1]:
            return whole_YY
        ends = [0, *accumulate(self.geometry.outputs(role) for role in key[1])]
        rows = torch.cat([torch.arange(*ends[i : i + 2]) for i in map(key[1].index, roles)])
        return whole_YY[rows[:, None], rows]

    def statistics(self, site: Site) -> list[MatrixStatistics]:
        measured = self.covariances.gradients
        return [
            MatrixStatistics(
                self.input_covariance(role),
                self.covariances.sizes[self._key(role)],
                self.gradient_covariance((role,)) if self._key(role) in measured else None,
                is_output_projection(role),
                self.covariances.tokens[self._key(role)],
            )
            for role in site.roles
        ]

    def original_inputs(self, role: str) -> Iterator[Tensor]:
        return self._inputs(self.original, self.before[0], role)

    def compressed_inputs(self, role: str) -> Iterator[Tensor]:
        return self._inputs(self.compressed, self.before[1], role)

    def _inputs(self, module: LayerModule, hidden: Iterable[Tensor], role: str) -> Iterator[Tensor]:
        path = module.roles.stored(self.layer, role).path
        return self.layers.inputs(self.layer, module.block, hidden, path)

    def shifted_covariances(self, role: str) -> tuple[Tensor, Tensor]:
        cross_XX, seen_XX, tokens = torch.zeros(()), torch.zeros(()), 0
        both = zip(self.original_inputs(role), self.compressed_inputs(role), strict=True)
        for x_NX, y_NX in both:
            y_NX = y_NX.double()
            cross_XX = cross_XX + (x_NX.double().mT @ y_NX).cpu()
            seen_XX = seen_XX + (y_NX.mT @ y_NX).cpu()
            tokens += len(y_NX)
        return cross_XX / tokens, seen_XX / tokens

    def put(self, site: Site, factors: Factors) -> None:
        self.compressed.put(site, factors)

    def put_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        weights = self.compressed.weights
        for name, w in parameters.items():
            weights[f"{self.compressed.path}.{name}"].copy_(w)

    def output_error(self, roles: Sequence[str]) -> tuple[float, dict[str, Tensor]]:
        module = self.compressed
        names = {module.roles.name(self.layer, role) for role in roles}
        leaves = {name: w for name, w in module.parameters.items() if name in names}
        gradients = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in leaves.items()}
        total = 0.0
        every = zip(self.layers.calls[self.layer], self.before[1], self.targets, strict=True)
        for number, (call, hidden_BTD, target_BTD) in enumerate(every):
            with torch.enable_grad():
                for w in leaves.values():
                    w.requires_grad_()
                out_BTD = call.run(module.block, hidden_BTD).float()
                error = self._distance(number, out_BTD, target_BTD.float())
                found = torch.autograd.grad(error, list(leaves.values()))
            for name, g in zip(leaves, found, strict=True):
                leaves[name].requires_grad_(False)
                gradients[name] += g
            total += error.item()
        return total, {r: module.roles.read(gradients, self.layer, r) for r in roles}

    def output_loss(
        self, batch: int, weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
    ) -> Tensor:
        module = self.compressed
        run: dict[str, Tensor] = {}
        for role, w_ID in weights.items():
            name = module.roles.name(self.layer, role)
            if name not in run:  # a fused parameter is written part by part
                run[name] = module.weights[name].clone()
            module.roles.write(run, self.layer, role, w_ID)
        below = {name.removeprefix(f"{module.path}."): w for name, w in run.items()}
        hidden_BTD, target_BTD = (_nth(each, batch) for each in (self.before[1], self.targets))
        call = self.layers.calls[self.layer][batch]
        with torch.enable_grad():
            arguments = (hidden_BTD, *call.args)
            out = functional_call(module.block, {**below, **parameters}, arguments, call.kwargs)
            out_BTD = (out[0] if isinstance(out, tuple) else out).float()
            return self._distance(batch, out_BTD, target_BTD.float())

    def _distance(self, batch: int, out_BTD: Tensor, target_BTD: Tensor) -> Tensor:
        """Squared, of all tokens relative to their size, over the tokens of all batches."""
        size_BT1 = target_BTD.norm(dim=-1, keepdim=True).clamp(min=SMALLEST)
        mask_BT1 = self.layers.batches[batch].mask_BT.to(size_BT1.device)[..., None]
        return ((out_BTD - target_BTD) * (mask_BT1 / size_BT1)).square().sum() / self._tokens

    def other_parameters(self) -> dict[str, Tensor]:
        module = self.compressed
        roles = module.roles.spec.geometry(self.layer).roles
        matrices = {module.roles.name(self.layer, role) for role in roles}
        return {
            name.removeprefix(f"{module.path}."): w
            for name, w in module.weights.items()
            if name not in matrices
        }


def _nth(states: Iterable[Tensor], number: int) -> Tensor:
    if isinstance(states, Sequence) or hasattr(states, "__getitem__"):
        found: Tensor = states[number]
        return found
    return next(t for n, t in enumerate(states) if n == number)
