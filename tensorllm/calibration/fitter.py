"""One fit: measure, share out the budget, fit layer after layer, whatever holds the model."""

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tensorllm.calibration.blocks import Blocks
from tensorllm.calibration.groups import Group, Key, Ranks, input_width, site_of
from tensorllm.calibration.layer import Layer, second_moments
from tensorllm.calibration.moments import Moments, measure_loss, measure_outputs
from tensorllm.calibration.refit import Between, Refit
from tensorllm.calibration.sequences import Calibration
from tensorllm.calibration.sizes import Errors, budget_of, sizes
from tensorllm.calibration.source import LayerSource
from tensorllm.calibration.store import Counted, States, Store, Sweep
from tensorllm.compressors import ActivationTucker, Job
from tensorllm.compressors.activation import Given, GivenInFile
from tensorllm.progress import Progress, quiet
from tensorllm.tensors.pivoted import PivotedLowRank
from tensorllm.tensors.weighted import Metric


class Fit:
    """One fit of one strategy.

    Attributes:
        known: moments that need not be measured.
        keeps_moments: those of all layers are held from the first sweep to the second.
    """

    def __init__(
        self,
        compressor: ActivationTucker,
        source: LayerSource,
        calibration: Calibration,
        layers: Sequence[int] | None,
        *,
        store: Store | None = None,
        progress: Progress = quiet,
    ) -> None:
        self.compressor, self.source, self.progress = compressor, source, progress
        self.store = store or Store()
        self.known: Moments | None = None
        self.keeps_moments = True
        self._measured: dict[int, Moments] = {}
        self.roles = roles = source.roles
        chosen = roles.check_layers(range(roles.layers) if layers is None else layers)
        self.layers = sorted(chosen)
        clusters = compressor.clusters(roles.geometry)
        self.keys: list[Key] = [(layer, cluster) for layer in self.layers for cluster in clusters]
        widest = max(input_width(roles.geometry, cluster[0]) for cluster in clusters)
        config: Any = source.model.config
        context = getattr(config, "max_position_embeddings", None)
        calibration.check(config.vocab_size, widest, context)
        self.batches = calibration.batches()

    def run(self) -> list[Job]:
        """Measured, shared out and fitted: a job with its factors for every group."""
        parameters = self.source.parameters
        budget = budget_of(self.compressor, self.keys, self.roles.geometry, parameters)
        blocks = self.blocks()
        return self.factors(blocks, self.store, self.errors(blocks), budget)

    def blocks(self) -> Blocks:
        """The layers up to the last one that is fitted, and how they are called."""
        return Blocks(self.source, self.batches, self.layers[-1] + 1)

    def measured(self, model: nn.Module, spill: Path | None = None) -> Moments:
        """The moments of all layers at once, of a model that is in memory."""
        if self.compressor.weighting == "loss":
            seed, progress = self.compressor.seed, self.progress
            return measure_loss(
                model,
                self.roles,
                self.keys,
                self.batches,
                seed=seed,
                spill=spill,
                progress=progress,
            )
        self.errors(self.blocks())
        found = self._measured.values()
        return Moments(
            {key: m for each in found for key, m in each.inputs.items()},
            {key: m for each in found for key, m in each.gradients.items()},
        )

    def errors(self, blocks: Blocks) -> Errors:
        """What every candidate's ranks cost, from one sweep over the original's layers."""
        out = {}
        sweep = Sweep(self.store, "errors", ("measured",), blocks.start, blocks.layers)
        for layer, (kept,), after in sweep:
            before = self.counted(kept, layer, blocks.layers, 2, "measuring layers")
            found: dict[str, Tensor] = {}
            with self.source.block(layer) as block:
                keys = [key for key in self.keys if key[0] == layer]
                if keys:
                    moments = self.moments(blocks, layer, block, before)
                    own = Layer(self.roles, layer, block)
                    costs = own.errors(moments, keys, self.compressor.sharing)
                    found = {"-".join(group): cost for group, cost in costs.items()}
                if self.known is None:
                    after(blocks.run(layer, block, before))
            sweep.done(found)
        for layer in self.layers:
            for name, costs_S in self.store.load(f"errors-{layer}").items():
                out[layer, tuple(name.split("-"))] = costs_S
        return out

    def counted(
        self, states: Iterable[Tensor], layer: int, layers: int, passes: int, what: str
    ) -> Counted:
        """The states before one layer; each batch that is read of them is told as progress."""
        steps = passes * len(self.batches)

        def tell(read: int) -> None:
            self.progress(layer * steps + min(read, steps), layers * steps, what)

        return Counted(states, tell)

    def moments(
        self, blocks: Blocks, layer: int, block: nn.Module, hidden: Iterable[Tensor]
    ) -> Moments:
        """Those of the layer's own keys at least, on the original's hidden states before it."""
        if self.known is not None:
            return self.known
        if layer in self._measured:
            return self._measured[layer]
        keys = [key for key in self.keys if key[0] == layer]
        found = measure_outputs(blocks, layer, block, keys, hidden, seed=self.compressor.seed)
        if self.keeps_moments:
            self._measured[layer] = found
        return found

    def factors(self, blocks: Blocks, store: Store, errors: Errors, budget: int) -> list[Job]:
        """Sizes within the budget, and layer after layer the factors of these sizes.

        Each layer is fitted on the inputs that the compressed ones below give it.
        """
        sharing, geometry = self.compressor.sharing, self.roles.geometry
        ranks = sizes(self.keys, errors, geometry, sharing=sharing, budget=budget)
        names = ("original", "compressed")
        sweep = Sweep(store, "factors", names, blocks.start, blocks.layers)
        for layer, (theirs, kept), after in sweep:
            passes = len(self.compressor.clusters(geometry)) + self.compressor.refit_steps + 1
            ours = self.counted(kept, layer, blocks.layers, passes, "fitting layers")
            with self.source.block(layer) as block:
                own, smaller = (Layer(self.roles, layer, b) for b in (block, copy.deepcopy(block)))
                found = self.fit_layer(blocks, own, smaller, ranks, theirs, ours)
                after(
                    blocks.run(layer, own.block, theirs),
                    blocks.run(layer, smaller.block, ours),
                )
            sweep.done(
                {
                    f"{'-'.join(group)}.{name}": tensor
                    for group, factors in found.items()
                    for name, tensor in factors.tensors().items()
                }
            )
        return [_job(store, layer, group) for layer, group in ranks]

    def fit_layer(
        self,
        blocks: Blocks,
        own: Layer,
        smaller: Layer,
        ranks: Ranks,
        theirs: States,
        ours: Iterable[Tensor],
    ) -> dict[Group, PivotedLowRank]:
        """The factors of one layer's groups, in the order in which they run; put into `smaller`."""
        out: dict[Group, PivotedLowRank] = {}
        keys = [key for key in self.keys if key[0] == own.number]
        if not keys:
            return out
        moments = self.moments(blocks, own.number, own.block, theirs)
        for key in keys:
            here = {
                g: r for (n, g), r in ranks.items() if n == own.number and set(g) <= set(key[1])
            }
            if self.compressor.correction:
                path = own.path(key)
                x = blocks.inputs(own.number, own.block, theirs, path)
                y = blocks.inputs(own.number, smaller.block, ours, path)
                found = own.corrected(
                    moments, key, here, *second_moments(x, y), self.compressor.ridge
                )
            else:
                found = own.factors(moments, key, here)
            for group, factors in found.items():
                smaller.put(group, factors)
            out |= found
        if self.compressor.correction and self.compressor.refit_steps:
            return self.refitted(blocks, own, smaller, moments, out, theirs, ours)
        return out

    def refitted(
        self,
        blocks: Blocks,
        own: Layer,
        smaller: Layer,
        moments: Moments,
        fitted: dict[Group, PivotedLowRank],
        theirs: States,
        ours: Iterable[Tensor],
    ) -> dict[Group, PivotedLowRank]:
        """The factors of one layer moved together, towards the original's output of the layer."""
        maps = {}
        for key in (key for key in self.keys if key[0] == own.number):
            seen = Metric(moments.inputs[key])
            for group in (group for group in fitted if set(group) <= set(key[1])):
                felt, rank = own.felt(moments, key, group), fitted[group].rows_R.numel()
                maps[group] = Between(smaller.map(group), felt, seen, rank)
        targets = States(self.store, "target", len(self.batches), blocks.start[0].device)
        targets.keep(blocks.run(own.number, own.block, theirs))
        refit = Refit(smaller, blocks.calls[own.number], self.batches, ours, targets)
        found = refit.run(maps, fitted, self.compressor.refit_steps)
        targets.drop()
        return found


def _job(store: Store, layer: int, group: Group) -> Job:
    """The job whose factors are in the store."""
    name, prefix = f"factors-{layer}", "-".join(group)
    if store.folder is not None:
        return Job(site_of(layer, group), GivenInFile(file=store.path(name), prefix=prefix))
    tensors = store.load(name)
    mine = {key.split(".")[1]: t for key, t in tensors.items() if key.split(".")[0] == prefix}
    return Job(site_of(layer, group), Given(factors=PivotedLowRank.from_tensors(mine)))
