"""One layer of the original beside the compressed one: what a `LayerFit` may ask for.

Shapes: B sequences, T positions, D model width, N tokens of a batch, X width of an input, Y of
joint outputs, I rows of a role matrix.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tensorllm.calibration.covariances import Covariances, Key
from tensorllm.calibration.layers import Layers, Remembered, Tap
from tensorllm.calibration.ranks import ALONE, Ranks
from tensorllm.calibration.store import Hidden, Store
from tensorllm.compressors.layer import MatrixStatistics, Site, Size
from tensorllm.models import RoleMatrices
from tensorllm.tensors.factors import Factors, cast
from tensorllm.tensors.stacking import ATTENTION_ROLES, Geometry, is_output_projection
from tensorllm.tensors.unfold import gram_of_columns
from tensorllm.weights import dense_matrices

ONE = torch.ones(1)
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

    def below(self, role: str) -> str:
        """The path below the layer of the module that multiplies by a role's matrix."""
        return self.roles.stored(self.number, role).path

    def tap(self, roles: Sequence[str]) -> Tap:
        """Where roles that read one input meet the model's width."""
        return Tap(self.below(roles[0]), of_output=is_output_projection(roles[0]))

    @property
    def attention(self) -> str:
        """The path below the layer of the module that holds its attention's matrices; "": none."""
        there = self.roles.spec.geometry(self.number).roles
        paths = [self.below(role).split(".") for role in ATTENTION_ROLES if role in there]
        if not paths:
            return ""
        shared = [parts[0] for parts in zip(*paths, strict=False) if len(set(parts)) == 1]
        return ".".join(shared[: min(map(len, paths)) - 1])


class Original:
    """The original's layer on its own inputs, run once: its outputs, and what its matrices read or
    give at the model's width. Kept while the layer is fitted, if a fit asks for any of it.

    Args:
        taps: by name, what is kept beside the outputs where a fit asks for it.
    """

    def __init__(
        self,
        layers: Layers,
        module: LayerModule,
        hidden: Iterable[Tensor],
        store: Store,
        taps: Mapping[str, Tap],
    ) -> None:
        self.layers, self.module, self.hidden = layers, module, hidden
        self.store, self.taps = store, taps
        self._kept: set[str] = set()

    def outputs(self) -> Iterator[Tensor]:
        """Hidden states (B, T, D) after the layer, batch by batch."""
        if not self._kept:
            yield from self.layers.run(self.module.number, self.module.block, self.hidden)
            return
        for number in range(len(self.layers.batches)):
            yield self.output(number)

    def output(self, number: int) -> Tensor:
        """Those of one batch."""
        self._keep("output")
        return self._load(number, "output")

    def signals(self, name: str) -> Iterator[Tensor]:
        """What a tap gave (N, X), batch by batch."""
        self._keep(name)
        for number in range(len(self.layers.batches)):
            yield self._load(number, name)

    def drop(self) -> None:
        for number in range(len(self.layers.batches) * bool(self._kept)):
            self.store.drop(f"original-{number}")

    def _keep(self, name: str) -> None:
        if name in self._kept:
            return
        taps = self.taps if name in self.taps else {}
        layer, block = self.module.number, self.module.block
        for number, (out_BTD, seen) in enumerate(
            self.layers.run_tapped(layer, block, self.hidden, taps)
        ):
            self.store.save(f"original-{number}", {"output": out_BTD, **seen})
        self._kept = {"output", *taps}

    def _load(self, number: int, name: str) -> Tensor:
        found = self.store.load(f"original-{number}", name)[name]
        return found.to(self.layers.start[0].device)


class Context:
    """See `compressors.layer.LayerContext`, which this implements.

    Args:
        original, compressed: the layer twice; what is `put` goes into the compressed one.
        measure: gives covariances of the original, of this layer's `keys` at least.
        keys: sets of roles of this layer that read the same input.
        before: hidden states before the layer, per batch, of the original and of the compressed
            model; read again and again.
        run: of the original.
        sites: the strategy's sites of this layer, with their sizes.
        ranks: the processes that this one fits with.
    """

    def __init__(
        self,
        layers: Layers,
        original: LayerModule,
        compressed: LayerModule,
        measure: Callable[[], Covariances],
        keys: Sequence[Key],
        before: tuple[Hidden, Hidden],
        run: Original,
        sites: Mapping[Site, Size | None],
        ranks: Ranks = ALONE,
    ) -> None:
        self.layers, self.original, self.compressed = layers, original, compressed
        self.keys, self.before, self.run, self.sites = keys, before, run, sites
        self.ranks, self._measure = ranks, measure
        self._attention = Remembered(compressed.block, compressed.attention)
        self._shifted: dict[tuple[Key, str], tuple[Tensor, Tensor]] = {}
        tokens = torch.tensor(sum(int(batch.mask_BT.sum()) for batch in layers.batches))
        tokens = tokens.to(layers.start[0].device)
        ranks.sum(tokens)
        self._tokens = int(tokens)

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

    def compressed_weight(self, role: str) -> Tensor:
        return self.compressed.roles.read(self.compressed.weights, self.layer, role)

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
        return int(self.covariances.felt[self._key(roles[0])])

    def carried_covariance(self, roles: Sequence[str]) -> Tensor:
        key = self._key(roles[0])
        whole_YY = self.covariances.carried[key]
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
                int(found.tokens.get(self._key(role), ONE)),
            )
            for role in site.roles
        ]

    def original_inputs(self, role: str) -> Iterator[Tensor]:
        nothing = Remembered(self.original.block, "")
        tap, block = Tap(self.original.below(role)), self.original.block
        return self.layers.signals(self.layer, block, self.before[0], tap, nothing)

    def original_at_width(self, role: str) -> Iterator[Tensor]:
        return self.run.signals(self._key(role)[1][0])

    def compressed_inputs(self, role: str) -> Iterator[Tensor]:
        tap, block = Tap(self.compressed.below(role)), self.compressed.block
        return self.layers.signals(self.layer, block, self.before[1], tap, self._attention)

    def shifted_covariances(self, role: str) -> tuple[Tensor, Tensor]:
        if not is_output_projection(role):
            return self.shifted_at_width((role,))
        key = (self._key(role), "inputs")
        if key not in self._shifted:
            self._shifted[key] = self._moments(
                self.original_inputs(role), self.compressed_inputs(role)
            )
        return self._shifted[key]

    def shifted_at_width(self, roles: Sequence[str]) -> tuple[Tensor, Tensor]:
        key = (self._key(roles[0]), "width")
        if key not in self._shifted:
            tap, block = self.compressed.tap(key[0][1]), self.compressed.block
            hidden = self.before[1]
            found = self.layers.signals(self.layer, block, hidden, tap, self._attention)
            self._shifted[key] = self._moments(self.run.signals(key[0][1][0]), found)
        return self._shifted[key]

    def _moments(self, x: Iterable[Tensor], y: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """E[x yᵀ] and E[y yᵀ]: products in float32, sums in float64."""
        cross_XX = seen_XX = torch.zeros((), dtype=torch.float64, device=self.device)
        for x_NX, y_NX in zip(x, y, strict=True):
            x_NX, y_NX = x_NX.float(), y_NX.float()
            cross_XX = cross_XX + (x_NX.mT @ y_NX).double()
            seen_XX = seen_XX + gram_of_columns(y_NX).double()
        self.ranks.sum(cross_XX, seen_XX)
        return cross_XX / self._tokens, seen_XX / self._tokens

    def put(self, site: Site, factors: Factors) -> None:
        self.compressed.put(site, factors)
        if set(site.roles) & set(ATTENTION_ROLES):
            self._attention.forget()
        for key in list(self._shifted):
            if not set(site.roles) <= set(key[0][1]):
                del self._shifted[key]  # an input below which a matrix has changed

    def put_parameters(self, parameters: Mapping[str, Tensor]) -> None:
        weights = self.compressed.weights
        self._attention.forget()
        self._shifted.clear()
        for name, w in parameters.items():
            weights[f"{self.compressed.path}.{name}"].copy_(w)

    def outputs(self) -> Iterator[Tensor]:
        """Hidden states after the compressed layer, as it is now."""
        block = self.compressed.block
        return self.layers.run_remembering(self.layer, block, self.before[1], self._attention)

    def output_error(self) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, out_BTD in enumerate(self.outputs()):
            target_BTD = self.run.output(number)
            total += self._distance(number, out_BTD.float(), target_BTD.float()).double()
        self.ranks.sum(total)
        return float(total)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        self.ranks.sum(*tensors)

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
        hidden_BTD, target_BTD = self.before[1][batch], self.run.output(batch)
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
