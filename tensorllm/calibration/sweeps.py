"""Walks through a model's layers: one measures error curves, one makes factors.

A strategy is asked layer by layer, by the contract of `compressors.base` only.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tensorllm.calibration.context import Context, LayerModule
from tensorllm.calibration.experts import Key
from tensorllm.calibration.layers import Layers, LayerSource
from tensorllm.calibration.sequences import Calibration
from tensorllm.calibration.statistics import (
    Covariances,
    measure_inputs,
    measure_loss,
    measure_outputs,
)
from tensorllm.calibration.store import Counted, States, Store, Sweep
from tensorllm.compressors.base import (
    Compressor,
    ErrorCurve,
    GradientOf,
    Job,
    LayerFit,
    Leaf,
    Site,
    Size,
    Ways,
)
from tensorllm.compressors.budget import Budget, share_out
from tensorllm.compressors.placing import placed
from tensorllm.errors import UserError
from tensorllm.models.task import text_config_of
from tensorllm.progress import Progress, quiet
from tensorllm.tensors.factors import Factors
from tensorllm.tensors.shared_input import reading_together

Curves = dict[Site, ErrorCurve]


class Sweeps:
    """One fit of one strategy.

    Args:
        layers: those to compress; all by default.

    Attributes:
        known: covariances that need not be measured.
        unreached: layer -> experts that the text, as far as it was measured, never reached.
        keeps_covariances: those of all layers are held from the first sweep to the second.
        numbers: in the matrices that are compressed.
        passed_over: layer -> the roles that a job wanted and the layer lacks.
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
    ) -> None:
        self.compressor, self.source, self.progress = compressor, source, progress
        self.store = store or Store()
        self.known: Covariances | None = None
        self.keeps_covariances = True
        self._measured: dict[int, Covariances] = {}
        self.unreached: dict[int, list[int]] = {}
        self._layers: Layers | None = None
        self.roles = roles = source.roles
        found = placed(compressor, roles, layers)
        self.jobs, self.passed_over = found.jobs, found.passed_over
        _check_jobs(self.jobs)
        self.layers = sorted({job.site.layers[0] for job in self.jobs})
        self.keys: list[Key] = [
            (layer, roles_here)
            for layer in self.layers
            for roles_here in reading_together(
                [role for job in self._jobs(layer) for role in job.site.roles]
            )
        ]
        geometry = roles.spec.geometry
        widths = {(n, r): geometry(n).inputs(r) for n, together in self.keys for r in together}
        self.numbers = sum(geometry(n).numel(r) for n, together in self.keys for r in together)
        config: Any = text_config_of(source.model.config)
        context = getattr(config, "max_position_embeddings", None)
        calibration.check(config.vocab_size, max(widths.values()), context)
        self.batches = calibration.batches()

    @property
    def gradient_of(self) -> GradientOf | None:
        """Whose gradients the strategy needs; None: inputs alone."""
        wanted = {
            job.compressor.gradient_of for job in self.jobs if job.compressor.needs == "gradients"
        }
        if len(wanted) > 1:
            raise UserError("one fit takes gradients of the outputs or of the loss, not of both")
        return next(iter(wanted), None)

    @property
    def seed(self) -> int:
        """Of the random vectors or labels that gradients are sampled with."""
        return int(getattr(self.compressor, "seed", 0))

    def run(self, budget: Budget | None) -> list[Site]:
        """Measured, shared out and fitted: the sites that have factors in the store now.

        Raises:
            UserError: an unreachable target; where that can be known, before anything is measured.
        """
        if budget is None:
            sizes: dict[Site, Size | None] = {job.site: None for job in self.jobs}
            return self.factors(sizes)
        total, least = self.source.parameters, self._least_known()
        budget.numbers(self.numbers, total, least)
        curves = self.curves()
        return self.factors(
            self.sized(curves, budget.numbers(self.numbers, total, self.least(curves)))
        )

    def _least_known(self) -> int | None:
        strategies = {id(job.compressor): job.compressor for job in self.jobs}.values()
        found = [
            one.least_parameters(self.roles.spec, self.layers)
            for one in strategies
            if isinstance(one, LayerFit)
        ]
        return found[0] if len(found) == 1 and len(strategies) == 1 else None

    def least(self, curves: Mapping[Site, ErrorCurve]) -> int:
        """Numbers stored at the smallest sizes."""
        least = 0
        for ways in self._ways():
            least += min(sum(int(curves[job.site].cost_N[0]) for job in way) for way in ways)
        return least

    def sized(self, curves: Mapping[Site, ErrorCurve], numbers: int) -> dict[Site, Size | None]:
        """The sites, each with its size, that a budget chooses."""
        found = share_out(self._ways(), curves, numbers).sizes
        return {site: size for site, size in found.items() if any(size)}

    def _ways(self) -> list[Ways]:
        out: list[Ways] = []
        for layer in self.layers:
            for strategy, sites in self._strategies(layer, [j.site for j in self._jobs(layer)]):
                if isinstance(strategy, LayerFit):
                    out += strategy.ways(self.roles.spec.geometry(layer), layer, sites)
                else:
                    out += [[[Job(site, strategy)]] for site in sites]
        return out

    def _jobs(self, layer: int) -> list[Job]:
        return [job for job in self.jobs if job.site.layers == (layer,)]

    def _strategies(
        self, layer: int, sites: Sequence[Site]
    ) -> Iterator[tuple[Leaf | LayerFit, list[Site]]]:
        """Each strategy of a layer with its sites: those that contain matrices that it planned."""
        planned: dict[int, tuple[Leaf | LayerFit, set[tuple[int, str]]]] = {}
        for job in self._jobs(layer):
            _, matrices = planned.setdefault(id(job.compressor), (job.compressor, set()))
            matrices |= set(job.site.matrices)
        for strategy, matrices in planned.values():
            yield strategy, [site for site in sites if set(site.matrices) <= matrices]

    @property
    def all_layers(self) -> Layers:
        """The layers up to the last one that is fitted, and how they are called."""
        if self._layers is None:
            self._layers = Layers(self.source, self.batches, self.layers[-1] + 1)
        return self._layers

    def measured(self, model: nn.Module, spill: Path | None = None) -> Covariances:
        """The covariances of all layers at once, of a model that is in memory."""
        if self.gradient_of == "loss":
            return measure_loss(
                model,
                self.roles,
                self.keys,
                self.batches,
                seed=self.seed,
                spill=spill,
                progress=self.progress,
            )
        self.curves()
        found = self._measured.values()
        return Covariances(
            {key: m for each in found for key, m in each.inputs.items()},
            {key: m for each in found for key, m in each.sizes.items()},
            {key: m for each in found for key, m in each.gradients.items()},
            {key: n for each in found for key, n in each.tokens.items()},
        )

    def curves(self) -> Curves:
        """What every candidate's sizes cost, from one sweep over the original's layers."""
        layers = self.all_layers
        candidates = {job.site for ways in self._ways() for way in ways for job in way}
        sweep = Sweep(self.store, "errors", ("measured",), layers.start, layers.layers)
        for layer, (kept,), after in sweep:
            before = self.counted(kept, layer, layers.layers, 2, "measuring layers")
            found: dict[str, Tensor] = {}
            with self.source.block(layer) as block:
                if layer in self.layers:
                    here = [site for site in candidates if site.layers == (layer,)]
                    for site, curve in self._curves_of(layer, block, before, here).items():
                        found |= {f"{site.name}/{n}": t for n, t in curve._asdict().items()}
                if self.known is None:
                    after(layers.run(layer, block, before))
            sweep.done(found)
        return {
            site: ErrorCurve(**self.store.part(f"errors-{site.layers[0]}", f"{site.name}/"))
            for site in candidates
        }

    def _curves_of(
        self, layer: int, block: nn.Module, hidden: Iterable[Tensor], sites: Sequence[Site]
    ) -> Curves:
        own = LayerModule(self.roles, layer, block)
        covariances = self.covariances(layer, block, hidden)
        context = self._context(own, own, covariances, (hidden, hidden), (), {})
        out: Curves = {}
        for strategy, mine in self._strategies(layer, sites):
            if isinstance(strategy, LayerFit):
                out |= strategy.curves(mine, context)
            else:
                for site in mine:
                    out[site] = strategy.curve(site, *_tensor_and_statistics(context, site))
        return out

    def counted(
        self, states: Iterable[Tensor], layer: int, layers: int, passes: int, what: str
    ) -> Counted:
        """The states before one layer; each batch that is read of them counts as progress."""
        steps = passes * len(self.batches)

        def report(read: int) -> None:
            self.progress(layer * steps + min(read, steps), layers * steps, what)

        return Counted(states, report)

    def covariances(self, layer: int, block: nn.Module, hidden: Iterable[Tensor]) -> Covariances:
        """Those of the layer's own keys at least, on the original's hidden states before it."""
        if self.known is not None:
            return self.known
        if layer in self._measured:
            return self._measured[layer]
        keys = [key for key in self.keys if key[0] == layer]
        if self.gradient_of == "outputs":
            found = measure_outputs(self.all_layers, layer, block, keys, hidden, seed=self.seed)
        else:
            found = measure_inputs(self.all_layers, layer, block, keys, hidden)
        self._note_unreached(found)
        if self.keeps_covariances:
            self._measured[layer] = found
        return found

    def _note_unreached(self, found: Covariances) -> None:
        """Remember the experts that no token of the text was routed to."""
        for (layer, roles), tokens in found.tokens.items():
            if not tokens:
                experts = self.unreached.setdefault(layer, [])
                number = int(roles[0].split(".")[1])
                if number not in experts:
                    experts.append(number)

    def factors(self, sizes: Mapping[Site, Size | None]) -> list[Site]:
        """Layer after layer the factors of these sites, into the store.

        A `LayerFit` sees the inputs that the compressed layers below give.
        """
        layers = self.all_layers
        fits = any(isinstance(job.compressor, LayerFit) for job in self.jobs)
        names = ("original", "compressed") if fits else ("original",)
        sweep = Sweep(self.store, "factors", names, layers.start, layers.layers)
        for layer, states, after in sweep:
            sites = {site: size for site, size in sizes.items() if site.layers == (layer,)}
            passes = 1 + sum(
                one.passes(mine) if isinstance(one, LayerFit) else 0
                for one, mine in self._strategies(layer, list(sites))
            )
            counted = self.counted(states[-1], layer, layers.layers, passes, "fitting layers")
            original = states[0] if fits else counted
            with self.source.block(layer) as block:
                own = LayerModule(self.roles, layer, block)
                smaller = LayerModule(self.roles, layer, copy.deepcopy(block)) if fits else own
                found = self._fit_layer(own, smaller, (original, counted), sites)
                runs = [layers.run(layer, own.block, original)]
                if fits:
                    runs.append(layers.run(layer, smaller.block, counted))
                after(*runs)
            sweep.done(found)
        return [
            site for site in sizes if self.store.holds(f"factors-{site.layers[0]}", f"{site.name}/")
        ]

    def keep(self, factors: Mapping[Site, Factors]) -> None:
        """Let these factors take the place of those in the store."""
        for layer in self.layers:
            held = self.store.load(f"factors-{layer}")
            for site, now in factors.items():
                if site.layers == (layer,):
                    held |= _named(site, now)
            self.store.save(f"factors-{layer}", held)

    def _fit_layer(
        self,
        own: LayerModule,
        smaller: LayerModule,
        before: tuple[Iterable[Tensor], Iterable[Tensor]],
        sites: Mapping[Site, Size | None],
    ) -> dict[str, Tensor]:
        """The tensors of one layer's factors, by the names under which they are stored."""
        out: dict[str, Tensor] = {}
        if not sites:
            return out
        layers = self.all_layers
        covariances = self.covariances(own.number, own.block, before[0])
        targets = Targets(
            States(self.store, "target", len(self.batches), layers.start[0].device),
            lambda: layers.run(own.number, own.block, before[0]),
        )
        for strategy, mine in self._strategies(own.number, list(sites)):
            sized = {site: sites[site] for site in mine}
            context = self._context(own, smaller, covariances, before, targets, sized)
            if isinstance(strategy, LayerFit):
                result = strategy.fit_layer(context)
                found = dict(result.factors)
                out |= {f"parameters/{name}": t for name, t in result.parameters.items()}
            else:
                found = {}
                for site, size in sized.items():
                    leaf = strategy if size is None else strategy.at_size(site, size)
                    found[site] = leaf.decompose(*_tensor_and_statistics(context, site))
                    if smaller is not own:
                        context.put(site, found[site])
            for site, factors in found.items():
                out |= _named(site, factors)
        targets.drop()
        return out

    def _context(
        self,
        own: LayerModule,
        smaller: LayerModule,
        covariances: Covariances,
        before: tuple[Iterable[Tensor], Iterable[Tensor]],
        targets: Iterable[Tensor],
        sites: Mapping[Site, Size | None],
    ) -> Context:
        keys = [key for key in self.keys if key[0] == own.number]
        return Context(self.all_layers, own, smaller, covariances, keys, before, targets, sites)


class Targets:
    """Hidden states after the original's layer: computed when first asked for, and then kept."""

    def __init__(self, states: States, compute: Callable[[], Iterator[Tensor]]) -> None:
        self.states, self.compute, self._there = states, compute, False

    def __iter__(self) -> Iterator[Tensor]:
        if not self._there:
            self.states.keep(self.compute())
            self._there = True
        return iter(self.states)

    def drop(self) -> None:
        self.states.drop()


def _check_jobs(jobs: Sequence[Job]) -> None:
    if not any(job.compressor.needs != "weights" for job in jobs):
        raise UserError("this mode decomposes weights alone and takes no calibration text")
    for job in jobs:
        if len(job.site.layers) > 1:
            raise UserError(
                f"{job.site.name} spans several layers, and a fit to text goes layer by layer"
            )


def _tensor_and_statistics(context: Context, site: Site) -> tuple[Tensor, list[Any]]:
    w = site.stack([context.weight(role) for role in site.roles], context.geometry)
    return w, context.statistics(site)


def _named(site: Site, factors: Factors) -> dict[str, Tensor]:
    kind = factors.kind
    return {f"{site.name}/{kind}/{name}": t for name, t in factors.tensors().items()}
