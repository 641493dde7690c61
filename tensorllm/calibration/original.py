"""A layer's module with its role matrices, and the original layer's run on the calibration set.

Shapes: B sequences, T positions, D model width, N tokens of a batch, X input width.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from torch import Tensor, nn

from tensorllm.calibration.layers import Layers, Tap
from tensorllm.calibration.module_cache import ModuleCache, Rebuild, watched
from tensorllm.calibration.store import Store
from tensorllm.compressors.layer import Site
from tensorllm.models import RoleMatrices
from tensorllm.tensors.factors import Factors, cast
from tensorllm.tensors.stacking import ATTENTION_ROLES, is_output_projection
from tensorllm.weights import dense_matrices


class LayerModule:
    """A layer's module and the role matrices in it."""

    def __init__(self, roles: RoleMatrices, number: int, block: nn.Module) -> None:
        self.roles, self.number, self.block = roles, number, block
        self.path = roles.layer_path(number)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The layer's parameters, by their names in the model."""
        return {f"{self.path}.{name}": p for name, p in self.block.named_parameters()}

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: p.data for name, p in self.parameters.items()}

    def replace(self, site: Site, factors: Factors) -> None:
        """Replace the weights by those the factors, cast to the weights' dtype, stand for."""
        weights = self.weights
        dtype = weights[self.roles.name(self.number, site.roles[0])].dtype
        parts = dense_matrices(site, cast(factors, dtype), self.roles)
        for role, w_ID in zip(site.roles, parts, strict=True):
            self.roles.write(weights, self.number, role, w_ID)

    def below(self, role: str) -> str:
        """The path within the layer of the module that multiplies by a role's matrix."""
        return self.roles.stored(self.number, role).path

    def tap(self, roles: Sequence[str]) -> Tap:
        """A tap at the model's width for roles that read the same input."""
        if is_output_projection(roles[0]):
            return Tap(self.below(roles[0]), of_output=True)
        path, *others = dict.fromkeys(map(self.below, roles))
        return Tap(path, others=tuple(others))

    @property
    def attention(self) -> str:
        """The path within the layer of the module that holds the attention's matrices; "": none."""
        there = self.roles.spec.geometry(self.number).roles
        paths = [self.below(role).split(".") for role in ATTENTION_ROLES if role in there]
        if not paths:
            return ""
        shared = [parts[0] for parts in zip(*paths, strict=False) if len(set(parts)) == 1]
        return ".".join(shared[: min(map(len, paths)) - 1])

    @property
    def ffn(self) -> str:
        """The path of the module that encloses the FFN's output matrix; "": none."""
        there = "out" in self.roles.spec.geometry(self.number).roles
        return self.below("out").rpartition(".")[0] if there else ""


class Original:
    """The original layer on its own inputs: its outputs, and signals at the model's width.

    It runs once, on the first request; the results are kept while the layer is fitted.

    Args:
        layers: how the layer is run.
        module: the layer.
        hidden: states before it, per batch.
        store: for the results.
        taps: by name, the signals to keep besides the outputs, if a fit asks for any.

    Attributes:
        inside: tap at an output projection -> path of the module that encloses it.
        rebuilds: such a tap -> how the return value of the enclosing module follows from the tap's
            signal; known once the layer has run.
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
        paths = {"o": module.attention, "out": module.ffn}
        self.inside = {name: path for name, path in paths.items() if path and name in taps}
        self.rebuilds: dict[str, Rebuild | None] = {}
        self._first = next(iter(taps), "")  # not kept: cheap to run again, as little precedes it
        self._kept: set[str] = set()

    def outputs(self) -> Iterator[Tensor]:
        """Hidden states (B, T, D) after the layer, batch by batch."""
        if "output" not in self._kept:
            yield from self.layers.run(self.module.number, self.module.block, self.hidden)
            return
        yield from self.signals("output")

    def output(self, number: int) -> Tensor:
        """Hidden states (B, T, D) after the layer, of one batch."""
        self._keep("output")
        return self._load("output", number)

    def signals(self, name: str) -> Iterator[Tensor]:
        """The signal (N, X) of a tap, batch by batch."""
        if name == self._first:
            block, nothing = self.module.block, ModuleCache(self.module.block, "")
            tap, layer = self.taps[name], self.module.number
            yield from self.layers.signals(layer, block, self.hidden, tap, nothing)
            return
        self._keep(name)
        for number in range(len(self.layers.batches)):
            yield self._load(name, number)

    def drop(self, *names: str) -> None:
        """Drop the signals of these taps, or everything; a later request runs the layer again."""
        for name in self._kept & set(names) if names else set(self._kept):
            for number in range(len(self.layers.batches)):
                self.store.drop(f"original-{name}-{number}")
            self._kept.discard(name)

    def _keep(self, name: str) -> None:
        if name in self._kept:
            return
        kept = {each: tap for each, tap in self.taps.items() if each != self._first}
        taps = kept if name in kept else {}
        layer, block = self.module.number, self.module.block
        with ExitStack() as watching:
            for each, path in self.inside.items():
                note = partial(self.rebuilds.__setitem__, each)
                watching.enter_context(watched(block, path, self.taps[each].path, note))
            for number, (out_BTD, seen) in enumerate(
                self.layers.run_tapped(layer, block, self.hidden, taps)
            ):
                for each, signal in {"output": out_BTD, **seen}.items():
                    self.store.save(f"original-{each}-{number}", {each: signal})
        self._kept |= {"output", *taps}

    def _load(self, name: str, number: int) -> Tensor:
        found = self.store.load(f"original-{name}-{number}")[name]
        return found.to(self.layers.start[0].device)
