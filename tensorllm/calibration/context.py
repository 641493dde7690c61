"""One layer of the original and of the compressed model: the interface that a `LayerFit` uses.

Shapes: B sequences, T positions, D model width, N tokens of a batch, X input width, Y concatenated
outputs, I rows of a role matrix.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tensorllm.calibration.covariances import Covariances, Key
from tensorllm.calibration.heap import trim_heap
from tensorllm.calibration.layers import Layers, Tap
from tensorllm.calibration.module_cache import ModuleCache
from tensorllm.calibration.original import LayerModule, Original
from tensorllm.calibration.ranks import ALONE, Ranks
from tensorllm.calibration.store import Hidden
from tensorllm.calibration.trials import Trials
from tensorllm.compressors.layer import MatrixStatistics, OutputMap, Site, Size
from tensorllm.compressors.operators import LinearOperator
from tensorllm.tensors.factors import Factors
from tensorllm.tensors.stacking import ATTENTION_ROLES, Geometry, is_output_projection
from tensorllm.tensors.unfold import add_gram, mirror
from tensorllm.weights import dense_matrices

SMALLEST = 1e-20  # lower bound of the norm of a token's output, which is divided by


class Context:
    """Implements `compressors.layer.LayerContext`; see there.

    Args:
        layers: how the layers are run.
        original: the original layer.
        compressed: a copy whose matrices are replaced by factors.
        measure: gives covariances of the original, at least for this layer's `keys`.
        keys: sets of roles of this layer that read the same input.
        before: hidden states before the layer, per batch, of the original and of the compressed
            model; read repeatedly.
        original_run: of the original layer on its own inputs.
        sites: the strategy's sites of this layer, with their sizes.
        ranks: the processes of the fit.
    """

    def __init__(
        self,
        layers: Layers,
        original: LayerModule,
        compressed: LayerModule,
        measure: Callable[[], Covariances],
        keys: Sequence[Key],
        before: tuple[Hidden, Hidden],
        original_run: Original,
        sites: Mapping[Site, Size | None],
        ranks: Ranks = ALONE,
    ) -> None:
        self.layers, self.original, self.compressed = layers, original, compressed
        self.keys, self.before, self.original_run, self.sites = keys, before, original_run, sites
        self.ranks, self._measure = ranks, measure
        self._attention = ModuleCache(compressed.block, compressed.attention)
        self._ffn = ModuleCache(compressed.block, compressed.ffn)
        self._trials = Trials(layers, compressed, self._attention)
        self._noted: set[str] = set()  # output projections with stored outputs
        self._shifted: dict[tuple[Key, str], tuple[Tensor, Tensor]] = {}
        self._held_out = range(self.batches - layers.held_out, self.batches)
        self._tokens = self._count(range(self._held_out.start))
        self._held_outputs: dict[int, Tensor] = {}  # of the original

    def _count(self, numbers: Iterable[int]) -> int:
        """Tokens of these batches, over all processes."""
        tokens = torch.tensor(sum(int(self.layers.batches[n].mask_BT.sum()) for n in numbers))
        tokens = tokens.to(self.layers.start[0].device)
        self.ranks.sum(tokens)
        return int(tokens)

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
    def tokens(self) -> int:
        return self._tokens

    @property
    def batches(self) -> int:
        return len(self.layers.batches)

    @cached_property
    def covariances(self) -> Covariances:
        return self._measure()

    def weight(self, role: str) -> Tensor:
        return self.original.roles.read(self.original.weights, self.layer, role)

    def has_bias(self, role: str) -> bool:
        path = self.original.roles.stored(self.layer, role).path
        return f"{self.original.path}.{path}.bias" in self.original.parameters

    def _key(self, role: str) -> Key:
        return next(key for key in self.keys if role in key[1])

    def input_covariance(self, role: str) -> Tensor:
        return self.covariances.inputs[self._key(role)].double()

    def gradient_covariance(self, roles: Sequence[str]) -> Tensor:
        key = self._key(roles[0])
        whole_YY = self.covariances.gradients[key].double()
        if tuple(roles) == key[1]:
            return whole_YY
        ends = [0, *accumulate(self.geometry.outputs(role) for role in key[1])]
        rows = torch.cat([torch.arange(*ends[i : i + 2]) for i in map(key[1].index, roles)])
        return whole_YY[rows[:, None], rows]

    def width_covariance(self, roles: Sequence[str]) -> Tensor:
        key = self._key(roles[0])
        here = self.covariances
        return (here.gradients if is_output_projection(roles[0]) else here.inputs)[key].double()

    def gradient_tokens(self, roles: Sequence[str]) -> int:
        return int(self.covariances.gradient_tokens[self._key(roles[0])])

    def propagated_covariance(self, roles: Sequence[str]) -> Tensor:
        key = self._key(roles[0])
        whole_YY = self.covariances.propagated[key]
        width = len(whole_YY) // len(key[1])
        parts = whole_YY.view(len(key[1]), width, len(key[1]), width)
        chosen = [key[1].index(role) for role in roles]
        total_DD = torch.zeros(width, width, dtype=torch.float64, device=whole_YY.device)
        for a in chosen:
            for b in chosen:
                total_DD += parts[a, :, b]
        return total_DD

    def statistics(self, site: Site) -> list[MatrixStatistics]:
        found = self.covariances
        return [
            MatrixStatistics(
                found.inputs[self._key(role)],
                found.sizes[self._key(role)],
                self.gradient_covariance((role,)) if self._key(role) in found.gradients else None,
                is_output_projection(role),
                int(found.tokens.get(self._key(role), 1)),
            )
            for role in site.roles
        ]

    def original_inputs(self, role: str) -> Iterator[Tensor]:
        nothing = ModuleCache(self.original.block, "")
        tap, block = Tap(self.original.below(role)), self.original.block
        return self.layers.signals(self.layer, block, self.before[0], tap, nothing)

    def original_width_activations(self, role: str) -> Iterator[Tensor]:
        return self.original_run.signals(self._key(role)[1][0])

    def compressed_inputs(self, role: str) -> Iterator[Tensor]:
        tap, block = Tap(self.compressed.below(role)), self.compressed.block
        return self.layers.signals(self.layer, block, self.before[1], tap, self._attention)

    def shifted_covariances(self, role: str) -> tuple[Tensor, Tensor]:
        if not is_output_projection(role):
            return self.shifted_width_covariances((role,))
        key = (self._key(role), "inputs")
        if key not in self._shifted:
            self._shifted[key] = self._moments(
                self.original_inputs(role), self.compressed_inputs(role)
            )
        return self._shifted[key]

    def shifted_width_covariances(self, roles: Sequence[str]) -> tuple[Tensor, Tensor]:
        key = (self._key(roles[0]), "width")
        if key not in self._shifted:
            tap, block = self.compressed.tap(key[0][1]), self.compressed.block
            hidden = self.before[1]
            name = key[0][1][0]
            note = partial(self._note, name) if name in self._enclosing else None
            found = self.layers.signals(self.layer, block, hidden, tap, self._attention, note)
            self._shifted[key] = self._moments(self.original_run.signals(name), found)
        return self._shifted[key]

    def _moments(self, x: Iterable[Tensor], y: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """E[x yᵀ] and E[y yᵀ]: products in float32, sums in float64."""
        cross_XX = own_XX = torch.zeros((), dtype=torch.float64, device=self.device)
        for x_NX, y_NX in zip(x, y, strict=True):
            x_NX, y_NX = x_NX.float(), y_NX.float()
            if not cross_XX.ndim:
                size = x_NX.shape[1], y_NX.shape[1]
                cross_XX, own_XX = (cross_XX.new_zeros(size) for _ in range(2))
            cross_XX += x_NX.mT @ y_NX
            add_gram(own_XX, y_NX)
        self.ranks.sum(cross_XX, own_XX)
        return cross_XX.div_(self._tokens), mirror(own_XX).div_(self._tokens)

    def replace(self, site: Site, factors: Factors, output_map: OutputMap | None = None) -> None:
        self.compressed.replace(site, factors)
        self.original_run.drop(self._key(site.roles[0])[1][0])  # its signals are no longer needed
        if set(site.roles) & set(ATTENTION_ROLES):
            self._attention.clear()
        self._ffn.clear()  # every matrix runs before the FFN or in it
        if output_map is not None and site.roles[0] in self._noted:
            self._rebuild(site.roles[0], output_map)
        for key in list(self._shifted):
            if not set(site.roles) <= set(key[0][1]):
                del self._shifted[key]  # a matrix before this input has changed
        self._drop_noted()
        trim_heap()

    def replace_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        weights = self.compressed.weights
        self._attention.clear()
        self._ffn.clear()
        self._shifted.clear()
        self._drop_noted()
        for name, w in parameters.items():
            weights[f"{self.compressed.path}.{name}"].copy_(w)

    @property
    def _enclosing(self) -> dict[str, ModuleCache]:
        """Output projection -> the module that encloses it."""
        found = {"o": self._attention, "out": self._ffn}
        return {name: module for name, module in found.items() if name in self.original_run.inside}

    def _note(self, name: str, number: int, y_BTD: Tensor) -> None:
        """Store the output of the original's projection on the compressed model's inputs."""
        self.original_run.store.save(f"compressed-{name}-{number}", {"given": y_BTD})
        self._noted.add(name)

    def _rebuild(self, name: str, output_map: OutputMap) -> None:
        """Set the cached output of the module that encloses an output projection.

        With the factors' outputs, without running again what comes before the projection.
        """
        rebuild = self.original_run.rebuilds.get(name)
        if rebuild is None:
            return
        module: Any = self.compressed.block.get_submodule(self.compressed.below(name))
        bias = getattr(module, "bias", None)
        for number in range(self.batches):
            y_BTD = self.original_run.store.load(f"compressed-{name}-{number}")["given"].to(
                self.device
            )
            y_BTD = output_map(y_BTD.float()).to(y_BTD.dtype)
            y_BTD = y_BTD if bias is None else y_BTD + bias
            self._enclosing[name].set(number, rebuild(y_BTD))

    def _drop_noted(self) -> None:
        for name in self._noted:
            for number in range(self.batches):
                self.original_run.store.drop(f"compressed-{name}-{number}")
        self._noted.clear()

    def outputs(self) -> Iterator[Tensor]:
        """Hidden states (B, T, D) after the compressed layer in its current state, per batch."""
        caches = [self._attention, *([self._ffn] if self._ffn.filled else [])]
        block = self.compressed.block
        return self.layers.run_cached(self.layer, block, self.before[1], caches)

    def _distance(self, batch: int, out_BTD: Tensor, target_BTD: Tensor) -> Tensor:
        """The squared relative distance of each token's output: its sum over `batch`, per token.

        Divided by the tokens of all batches, so that the sum over batches is the mean.
        """
        size_BT1 = target_BTD.norm(dim=-1, keepdim=True).clamp(min=SMALLEST)
        mask_BT1 = self.layers.batches[batch].mask_BT.to(size_BT1.device)[..., None]
        return ((out_BTD - target_BTD) * (mask_BT1 / size_BT1)).square().sum() / self._tokens

    def output_error(self) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, out_BTD in enumerate(self.outputs()):
            target_BTD = self.original_run.output(number)
            total += self._distance(number, out_BTD.float(), target_BTD.float()).double()
        self.ranks.sum(total)
        return float(total)

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        self.ranks.sum(*tensors)

    def output_loss(
        self,
        batch: int,
        weights: Mapping[str, Tensor | LinearOperator],
        parameters: Mapping[str, Tensor],
    ) -> Tensor:
        target_BTD = self.original_run.output(batch)
        with torch.enable_grad():
            out_BTD = self._trials.output(batch, self.before[1][batch], weights, parameters)
            return self._distance(batch, out_BTD, target_BTD.float())

    @property
    def holds_out(self) -> bool:
        return bool(self._held_out)

    def matrices(self, site: Site, factors: Factors) -> dict[str, Tensor]:
        parts = dense_matrices(site, factors, self.original.roles)
        return dict(zip(site.roles, parts, strict=True))

    @torch.no_grad()
    def held_out_error(self, weights: Mapping[str, Tensor | LinearOperator]) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number in self._held_out:
            hidden_BTD, known = self.before[1].at(number), self._held_outputs
            if number not in known:
                known[number] = self._trials.output(number, hidden_BTD)
            out_BTD = self._trials.output(number, hidden_BTD, weights)
            total += self._distance(number, out_BTD, known[number]).double()
        self.ranks.sum(total)
        return float(total) * self._tokens / self._count(self._held_out)

    def other_parameters(self) -> dict[str, Tensor]:
        module = self.compressed
        roles = module.roles.spec.geometry(self.layer).roles
        matrices = {module.roles.name(self.layer, role) for role in roles}
        return {
            name.removeprefix(f"{module.path}."): w
            for name, w in module.weights.items()
            if name not in matrices
        }
