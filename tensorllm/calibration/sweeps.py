"""Passes through a model's layers: one measures error curves, one computes factors.

Strategies are used, layer by layer, through the interface of `compressors.base` only.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensorllm.calibration.context import Context
from tensorllm.calibration.covariances import Covariances
from tensorllm.calibration.experts import is_of_experts
from tensorllm.calibration.forecast import FITTING, MEASURING, Forecast, StageName, stages_ahead
from tensorllm.calibration.layers import Layers, LayerSource
from tensorllm.calibration.original import LayerModule, Original
from tensorllm.calibration.planned import Planned
from tensorllm.calibration.ranks import ALONE, Ranks
from tensorllm.calibration.sequences import Calibration
from tensorllm.calibration.statistics import MEASURED_TOKENS, Measurement, measure_loss, sampled
from tensorllm.calibration.store import Counted, Hidden, States, Store, Sweep, as_stored
from tensorllm.compressors.allocation import with_whole
from tensorllm.compressors.base import Compressor, ErrorCurve, LayerFit
from tensorllm.compressors.budget import Budget
from tensorllm.compressors.layer import Site, Size
from tensorllm.models.task import context_length, text_config_of
from tensorllm.progress import Progress, quiet
from tensorllm.tensors.factors import Factors

HELD_OUT = 1024  # most tokens of the held-out batch, unless one sequence is longer
BATCH = 1024  # tokens of a batch, at least one per unit of the model's width
Curves = dict[Site, ErrorCurve]


class Sweeps:
    """One fit of one strategy.

    Args:
        compressor, source, calibration: the strategy, the model and the text.
        layers: those to compress; all by default.

    Attributes:
        known: covariances that need not be measured.
        unreached: layer -> experts that no token of the measured text was routed to.
        planned: what is to be done.
        store: for factors and hidden states; may be replaced between fits of several sizes.
        measures: store for covariances.
    """

    def __init__(
        self,
        compressor: Compressor,
        source: LayerSource,
        calibration: Calibration,
        layers: Sequence[int] | None,
        *,
        store: Store | None = None,
        progress: Progress = quiet,
        ranks: Ranks = ALONE,
    ) -> None:
        self.compressor, self.source, self.progress = compressor, source, progress
        self.store = store or Store()
        self.measures = self.store
        self.ranks = ranks
        self.known: Covariances | None = None
        self.unreached: dict[int, set[int]] = {}
        self.several = False  # whether covariances are kept for a fit of other sizes
        self.keep_input_covariances = False  # beyond what the strategy asks for
        self._layers: Layers | None = None
        self._measured: Layers | None = None
        self.planned = Planned(compressor, source.roles, layers)
        config: Any = text_config_of(source.model.config)
        planned = self.planned
        calibration.check(config.vocab_size, planned.width, context_length(config))
        self.batches = calibration.batches(max(BATCH, planned.spec.geometry(0).D), ranks)
        self._forecast: Forecast | None = None

    @property
    def seed(self) -> int:
        """The seed of the random vectors or labels for which gradients are sampled."""
        return self.compressor.seed_of_fit

    def run(self, budget: Budget | None) -> list[Site]:
        """Measure, allocate and fit; returns the sites that now have factors in the store.

        Args:
            budget: None if the strategy sets its sizes itself.

        Raises:
            UserError: an unreachable target; if possible before anything is measured.
        """
        if budget is None:
            return self.factors({job.site: None for job in self.planned.jobs})
        return self.factors(self.sizes([budget])[0])

    def sizes(self, budgets: Sequence[Budget]) -> list[dict[Site, Size | None]]:
        """The sites and sizes that each budget chooses, from one measurement."""
        total, least = self.source.parameters, self.planned.known_min_parameters
        for budget in budgets:
            budget.numbers(self.planned.numbers, total, least)
        curves = self.curves()
        least = self.planned.min_parameters(curves)
        return [
            self.planned.allocate(curves, b.numbers(self.planned.numbers, total, least))
            for b in budgets
        ]

    @property
    def all_layers(self) -> Layers:
        """The layers up to the last fitted one, and how they are called."""
        if self._layers is None:
            self._layers = Layers(self.source, self.batches, self.planned.layers[-1] + 1)
        return self._layers

    @property
    def measured_layers(self) -> Layers:
        """The same on the text for choosing sizes, with a held-out batch last if one is needed."""
        if self._measured is None:
            self._measured = self._some_layers()
        return self._measured

    def _some_layers(self) -> Layers:
        if self.planned.wanted.matrices or self.known is not None:
            return self.all_layers  # what is measured is what is fitted
        width = self.source.roles.spec.geometry(0).D
        chosen_B = sampled(self.batches, width, MEASURED_TOKENS)
        some = [batch for batch, yes in zip(self.batches, chosen_B, strict=True) if yes]
        if len(some) == len(self.batches):
            return self.all_layers
        held_out = int(self.planned.holds_out)
        unseen = self.batches[chosen_B.tolist().index(False)].first(HELD_OUT, self.ranks)
        some += [unseen] * held_out
        return Layers(self.source, some, self.planned.layers[-1] + 1, held_out)

    def measured(self, model: nn.Module, spill: Path | None = None) -> Covariances:
        """The covariances of all layers of a model in memory."""
        if self.planned.gradient_of == "loss":
            return measure_loss(
                model,
                self.source.roles,
                self.planned.keys,
                self.batches,
                self.planned.wanted,
                seed=self.seed,
                spill=spill,
                progress=self.progress,
                ranks=self.ranks,
            )
        self.keep_input_covariances = True
        self.curves()
        out = Covariances()
        for layer in self.planned.layers:
            out |= self._kept(layer)
        return out

    def curves(self) -> Curves:
        """The error curves of all candidate sites, from one sweep over the original's layers."""
        layers = self.measured_layers
        candidates = self.planned.candidates
        sweep = Sweep(self.store, "errors", ("measured",), layers.start, layers.layers)
        for layer, (kept,), after in sweep:
            before = self.counted(kept, layer, MEASURING)
            found: dict[str, Tensor] = {}
            with self.source.block(layer) as block:
                covariances = self.known
                if covariances is None and layer in self.planned.layers:
                    run = self._measurement(layers, layer, block, before)
                    after(run)
                    covariances = run.covariances
                    self._note_unreached(covariances)
                    self._keep(layer, covariances)
                elif covariances is None:
                    after(layers.run(layer, block, before))
                if layer in self.planned.layers:
                    assert covariances is not None
                    here = [site for site in candidates if site.layers == (layer,)]
                    own = LayerModule(self.source.roles, layer, block)
                    for site, curve in self._curves_of(own, covariances, kept, here).items():
                        found |= {f"{site.name}/{n}": t for n, t in curve._asdict().items()}
            sweep.done(found)
        self._measured = None  # free memory
        return {
            site: ErrorCurve(**self.store.part(f"errors-{site.layers[0]}", f"{site.name}/"))
            for site in candidates
        }

    def _curves_of(
        self, own: LayerModule, covariances: Covariances, before: States, sites: Sequence[Site]
    ) -> Curves:
        measured = self.measured_layers
        context = self._context(measured, own, own, lambda: covariances, (before, before), {})
        out: Curves = {}
        for strategy, mine in self.planned.strategies(own.number, sites):
            if isinstance(strategy, LayerFit):  # it may train what is as large as the matrix
                out |= strategy.curves(mine, context)
                continue
            for site in mine:
                curve = strategy.curve(site, *_tensor_and_statistics(context, site))
                out[site] = with_whole(curve, site.numel(context.geometry))
        return {site: ErrorCurve(*(t.cpu() for t in curve)) for site, curve in out.items()}

    def counted(self, states: States, layer: int, stage: StageName) -> Counted:
        """The states before one layer; reading them reports progress, forecast for all stages."""
        measures = stage == MEASURING
        batches = self.measured_layers.batches if measures else self.batches
        if self._forecast is None or not self._forecast.goes_on(stage, layer):
            ahead = stages_ahead(self.planned, stage, batches, self.batches, alone=self.several)
            self._forecast = Forecast(ahead, lambda *parts: self.progress(*parts))
        forecast = self._forecast
        reads = len(batches) * (1 if measures else self.planned.passes)
        return Counted(states, lambda read: forecast.at(stage, layer, read / reads))

    def _measurement(
        self, layers: Layers, layer: int, block: nn.Module, hidden: Iterable[Tensor]
    ) -> Measurement:
        keys = [key for key in self.planned.keys if key[0] == layer]
        return Measurement(
            layers,
            layer,
            block,
            keys,
            hidden,
            self.planned.wanted,
            seed=self.seed,
            ranks=self.ranks,
        )

    def _keep(self, layer: int, covariances: Covariances) -> None:
        """Keep the covariances that the fits of the second sweep need."""
        inputs = self.keep_input_covariances or any(
            job.compressor.needs_input_covariances for job in self.planned.of(layer)
        )
        self.measures.save(f"covariances-{layer}", covariances.tensors(inputs=inputs))

    def _kept(self, layer: int) -> Covariances:
        device = self.all_layers.start[0].device
        return Covariances.from_tensors(self.measures.load(f"covariances-{layer}"), device)

    def covariances(self, layer: int, block: nn.Module, hidden: Iterable[Tensor]) -> Covariances:
        """Covariances for at least the layer's keys, on the original's hidden states before it."""
        if self.known is not None:
            return self.known
        if self.measures.has(f"covariances-{layer}"):
            return self._kept(layer)
        found = self._measurement(self.all_layers, layer, block, hidden).covariances
        self._note_unreached(found)
        return found

    def _note_unreached(self, found: Covariances) -> None:
        """Record the experts that no token of the text was routed to."""
        for (layer, roles), tokens in found.tokens.items():
            if not int(tokens):
                self.unreached.setdefault(layer, set()).add(int(roles[0].split(".")[1]))

    def factors(self, sizes: Mapping[Site, Size | None]) -> list[Site]:
        """Compute the factors of these sizes layer by layer, and store them.

        A `LayerFit` gets the inputs that the compressed layers below produce.
        """
        layers = self.all_layers
        fits = any(isinstance(job.compressor, LayerFit) for job in self.planned.jobs)
        names = ("original", "compressed") if fits else ("original",)
        sweep = Sweep(self.store, "factors", names, layers.start, layers.layers)
        for layer, states, after in sweep:
            sites = {site: size for site, size in sizes.items() if site.layers == (layer,)}
            counted = self.counted(states[-1], layer, FITTING)
            original = states[0] if fits else counted
            with self.source.block(layer) as block:
                own = LayerModule(self.source.roles, layer, block)
                smaller = (
                    LayerModule(self.source.roles, layer, copy.deepcopy(block)) if fits else own
                )
                context = self._context(
                    layers,
                    own,
                    smaller,
                    partial(self.covariances, layer, block, original),
                    (original, counted),
                    sites,
                )
                found = self._fit_layer(context)
                runs = [context.original_run.outputs()]
                if fits:
                    runs.append(context.outputs())
                after(*runs)
                context.original_run.drop()
            sweep.done(found)
            if not self.several:
                sweep.forget_start()
                self.measures.drop(f"covariances-{layer}")
        self.ranks.sum(torch.zeros(1, device=layers.start[0].device))  # wait for the others
        if not self.several:
            self._layers = None  # their start states have been freed
        return [site for site in sizes if self.store.has_factors(site)]

    def keep(self, factors: Mapping[Site, Factors]) -> None:
        """Replace factors in the store by these."""
        for layer in self.planned.layers:
            held = self.store.load(f"factors-{layer}")
            for site, now in factors.items():
                if site.layers == (layer,):
                    held |= as_stored(site, now)
            self.store.save(f"factors-{layer}", held)

    def _fit_layer(self, context: Context) -> dict[str, Tensor]:
        """The tensors of one layer's factors, by the names under which they are stored."""
        out: dict[str, Tensor] = {}
        sites = context.sites
        for strategy, mine in self.planned.strategies(context.layer, list(sites)):
            context.sites = {site: sites[site] for site in mine}
            if isinstance(strategy, LayerFit):
                result = strategy.fit_layer(context)
                found = dict(result.factors)
                out |= {f"parameters/{name}": t for name, t in result.parameters.items()}
            else:
                found = {}
                for site, size in context.sites.items():
                    leaf = strategy if size is None else strategy.at_size(site, size)
                    found[site] = leaf.decompose(*_tensor_and_statistics(context, site))
                    if context.compressed is not context.original:
                        context.replace(site, found[site])
            for site, factors in found.items():
                out |= as_stored(site, factors)
        return out

    def _context(
        self,
        layers: Layers,
        own: LayerModule,
        smaller: LayerModule,
        measure: Callable[[], Covariances],
        before: tuple[Hidden, Hidden],
        sites: Mapping[Site, Size | None],
    ) -> Context:
        keys = [key for key in self.planned.keys if key[0] == own.number]
        taps = {key[1][0]: own.tap(key[1]) for key in keys if not is_of_experts(own.roles, key)}
        run = Original(layers, own, before[0], self.store, taps)
        return Context(layers, own, smaller, measure, keys, before, run, sites, self.ranks)


def _tensor_and_statistics(context: Context, site: Site) -> tuple[Tensor, list[Any]]:
    w = site.stack([context.weight(role) for role in site.roles], context.geometry)
    return w, context.statistics(site)
