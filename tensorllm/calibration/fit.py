"""Fitting a strategy to text: measure, allocate the budget, compute factors layer by layer.

`fit` takes a model in memory, `fit_folder` a checkpoint on disk whose layers are read one at a
time; both use the same code on a `LayerSource` and a `Store`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensorllm.calibration.covariances import Covariances
from tensorllm.calibration.layers import InMemory, OnDisk
from tensorllm.calibration.ranks import all_ranks
from tensorllm.calibration.sequences import Calibration
from tensorllm.calibration.smallest import STEPS, next_token_loss, smallest, with_factors
from tensorllm.calibration.statistics import frozen
from tensorllm.calibration.store import Store
from tensorllm.calibration.sweeps import Sweeps
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.compressors.base import Compressor
from tensorllm.compressors.budget import Budget, without_sizes
from tensorllm.compressors.layer import Site
from tensorllm.compressors.settings import settings_of
from tensorllm.environment import versions
from tensorllm.errors import UserError
from tensorllm.progress import Progress, quiet
from tensorllm.tensors.factors import Factors


@dataclass(frozen=True, eq=False)
class Fitted:
    """A strategy with the factors it computed for a model and a text.

    Attributes:
        compressor: the strategy.
        layers: those it was fitted to.
        sites: those that have factors.
        budget: the target for which sizes were chosen.
        calibration: facts about the text, for reports.
        store: where the factors are; they are read one site at a time.
        missing_roles: layer -> the roles that it lacks.
    """

    compressor: Compressor
    layers: tuple[int, ...]
    sites: tuple[Site, ...]
    budget: Budget | None
    calibration: dict[str, Any]
    store: Store
    missing_roles: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def factors(self, site: Site) -> Factors:
        """The site's factors."""
        return self.store.factors(site)

    def parameters(self, layer: int) -> dict[str, Tensor]:
        """Norms and biases that were fitted with a layer, by their names within it."""
        return self.store.part(f"factors-{layer}", "parameters/")

    @property
    def settings(self) -> tuple[str, dict[str, Any]]:
        """The mode's name, and its settings with the text and the target.

        The target takes the place of sizes and of any other target.
        """
        mode, settings = settings_of(self.compressor)
        if self.budget is not None:
            settings = (
                without_sizes(settings, self.compressor.named.size_settings) | self.budget.settings
            )
        return mode, settings | {"calibration": self.calibration}


def fit(
    compressor: Compressor,
    model: nn.Module,
    calibration: Calibration,
    layers: Sequence[int] | None = None,
    *,
    budget: Budget | None = None,
    covariances: Covariances | None = None,
    spill: Path | None = None,
    store: Store | None = None,
    progress: Progress = quiet,
) -> Fitted:
    """Fit a strategy to a model and a text; `compress` and `compress_folder` then apply the result.

    Args:
        compressor: the strategy.
        model: is not changed.
        calibration: the text.
        layers: counted from 0; all layers by default.
        budget: for a strategy that has no target among its own settings.
        covariances: those of this model and text, if they were measured before (`measure_for`).
        spill: a folder for the covariances of the loss's gradients, if memory is short.
        store: where finished layers are kept (`store_for`); an interrupted fit is resumed from
            there.
        progress: called with (parts done, parts, what is done).

    Raises:
        UserError: a text that is too short or not for this model, an unreachable target,
            activations that are not finite, or a strategy that needs no text.
    """
    with frozen(model):
        work = Sweeps(
            compressor, InMemory(model), calibration, layers,
            store=store, progress=progress, ranks=all_ranks(),
        )  # fmt: skip
        _check_budget(work, budget)
        work.known = covariances
        if covariances is None and work.planned.gradient_of == "loss":
            work.known = work.measured(model, spill)
        target = budget or compressor.budget
        if target is not None and target.max_loss_increase is not None:
            return _smallest(work, model, calibration, target)
        sites = work.run(target)
        _train(work, sites, budget, calibration)
        return _fitted(work, sites, budget, _facts(work, calibration))


def fit_sizes(
    compressor: Compressor,
    model: nn.Module,
    calibration: Calibration,
    targets: Sequence[Budget],
    layers: Sequence[int] | None = None,
    *,
    progress: Progress = quiet,
) -> list[Fitted]:
    """Fit a strategy at several sizes from one measurement.

    Args:
        compressor: with a target of its own, which is replaced, or without.
        model: is not changed.
        calibration: the text.
        targets: ratios or parameter counts.
        layers: counted from 0; all layers by default.
        progress: called with (parts done, parts, what is done).

    Returns:
        The fitted strategy of each target, in order.

    Raises:
        UserError: as `fit`, for any target before the first one is fitted; also for a limit of the
            loss, which tries sizes itself.
    """
    if any(target.max_loss_increase is not None for target in targets):
        raise UserError("max_loss_increase searches for one size; give ratios or parameters")
    own = [compressor.with_budget(target) for target in targets]
    with frozen(model):
        work = Sweeps(own[0], InMemory(model), calibration, layers, progress=progress)
        _check_budget(work, targets[0])
        work.several = True
        if work.planned.gradient_of == "loss":
            work.known = work.measured(model)
        sizes = work.sizes(targets)
        out = []
        for strategy, target, chosen in zip(own, targets, sizes, strict=True):
            work.store = Store()
            sites = work.factors(chosen)
            _train(work, sites, target, calibration)
            found = _fitted(work, sites, target, _facts(work, calibration))
            given = None if strategy.budget is not None else target
            out.append(replace(found, compressor=strategy, budget=given))
    return out


def _train(work: Sweeps, sites: list[Site], budget: Budget | None, text: Calibration) -> None:
    """Train the factors for as many steps as the strategy asks for, and replace the stored ones."""
    steps = work.compressor.training_steps
    if not steps:
        return
    from tensorllm.calibration.distill import distill  # Lightning takes seconds to import

    made = _fitted(work, sites, budget, {})
    before = {site: made.factors(site) for site in sites}
    model, text = work.source.model, text.to_distill or text
    work.keep(distill(model, work.source.roles, before, text, steps, work.progress))


def measure_for(compressor: Compressor, model: nn.Module, calibration: Calibration) -> Covariances:
    """The covariances of all layers that `fit` needs, to be used for several targets."""
    with frozen(model):
        return Sweeps(compressor, InMemory(model), calibration, None).measured(model)


def fit_folder(
    compressor: Compressor,
    folder: Path,
    calibration: Calibration,
    layers: Sequence[int] | None = None,
    *,
    work: Path,
    budget: Budget | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    progress: Progress = quiet,
) -> Fitted:
    """`fit` for a checkpoint that does not fit in memory: one layer is read at a time.

    Args:
        compressor: the strategy.
        folder: of the checkpoint.
        calibration: the text.
        layers: counted from 0; all layers by default.
        work: a folder for hidden states and finished factors, from which an interrupted fit is
            resumed. The result reads its factors from there, so delete it only after use.
        budget: for a strategy that has no target among its own settings.
        dtype: in which layers run; by default that of the config or the files.
        device: on which layers run.
        progress: called with (parts done, parts, what is done).

    Raises:
        UserError: as `fit`; also for what needs the whole model: gradients of the loss,
            distillation, a limit of the loss.
    """
    target = budget or compressor.budget
    if compressor.training_steps:
        raise UserError("distillation trains against the whole model and cannot be streamed")
    if target is not None and target.max_loss_increase is not None:
        raise UserError("max_loss_increase tries many sizes and cannot be streamed; give a target")
    source = OnDisk(folder, dtype, device)
    ranks = all_ranks()
    store = store_for(work, compressor, folder, calibration, layers, source.dtype, budget)
    found = Sweeps(
        compressor, source, calibration, layers, store=store, progress=progress, ranks=ranks
    )
    _check_budget(found, budget)
    if found.planned.gradient_of == "loss":
        raise UserError(
            "gradients of the loss (weighting=loss) run the whole model backwards and cannot be "
            "streamed; weighting=outputs needs one layer at a time"
        )
    sites = found.run(target)
    return _fitted(found, sites, budget, _facts(found, calibration))


def _facts(work: Sweeps, calibration: Calibration) -> dict[str, Any]:
    """Facts for reports: the text, the dtype it was run in, and experts that it did not reach."""
    dtype = str(work.source.dtype).removeprefix("torch.")
    missed = {str(layer): sorted(experts) for layer, experts in sorted(work.unreached.items())}
    unreached = {"experts_not_reached": missed} if missed else {}
    return calibration.facts() | {"dtype": dtype} | unreached


def _fitted(
    work: Sweeps, sites: Sequence[Site], budget: Budget | None, facts: dict[str, Any]
) -> Fitted:
    layers, passed = tuple(work.planned.layers), work.planned.missing_roles
    return Fitted(work.compressor, layers, tuple(sites), budget, facts, work.store, passed)


def _check_budget(work: Sweeps, budget: Budget | None) -> None:
    """Refuse a target that no recipe of the strategy could name, before anything is measured."""
    if budget is not None and work.compressor.budget is None:
        strategy = work.compressor.named
        rest = without_sizes(settings_of(strategy)[1], strategy.size_settings)
        strategy.budget_settings(work.source.roles.spec, rest)


def _smallest(work: Sweeps, model: nn.Module, calibration: Calibration, target: Budget) -> Fitted:
    """The smallest fit whose loss on the calibration text is within the limit."""
    limit = target.max_loss_increase
    assert limit is not None, "asked only for a limit of the loss"
    if work.source.roles.task != "causal":
        raise UserError("max_loss_increase needs a model that predicts the next token")
    work.several = True
    curves = work.curves()
    before = next_token_loss(model, work.batches)
    progress, tried = work.progress, -1

    def report(done: int, total: int, what: str) -> None:
        most = STEPS + 1
        progress(tried * total + done, most * total, f"trying size {tried + 1} of {most}")

    def attempt(numbers: int) -> tuple[tuple[list[Site], Store], float]:
        nonlocal tried
        tried, work.progress, work.store = tried + 1, report, Store()
        sites = work.factors(work.planned.allocate(curves, numbers))
        found = _fitted(work, sites, target, {})
        smaller = with_factors(
            model, work.source.roles, {site: found.factors(site) for site in sites}
        )
        return (sites, work.store), next_token_loss(smaller, work.batches) - before

    (sites, work.store), lost = smallest(
        work.planned.min_parameters(curves), work.planned.numbers, limit, attempt
    )
    facts = _facts(work, calibration) | {"loss": before, "loss_increase": lost}
    given = None if work.compressor.budget is not None else target
    return _fitted(work, sites, given, facts)


def store_for(
    work: Path,
    compressor: Compressor,
    folder: Path,
    calibration: Calibration,
    layers: Sequence[int] | None,
    dtype: torch.dtype | None,
    budget: Budget | None = None,
) -> Store:
    """A store in the folder `work`, from which an interrupted fit of the checkpoint is resumed.

    With several processes, each has a folder of its own in it. Anything left by another checkpoint,
    strategy, text, version or dtype is deleted.
    """
    ranks = all_ranks()
    if ranks.size > 1:
        work /= f"rank-{ranks.rank}-of-{ranks.size}"
    fingerprint = {
        **Checkpoint(folder).fingerprint(),
        "compressor": list(settings_of(compressor)),
        "budget": budget.settings if budget else None,
        "calibration": calibration.facts(),
        "layers": None if layers is None else list(layers),
        "dtype": str(dtype),
        "versions": versions(),
    }
    return Store(work, fingerprint)
