"""Fitting factors to text.

`fit` takes a model that is in memory, `fit_folder` a checkpoint on disk whose layers are read one
at a time; both are the same work on a `LayerSource` and a `Store`.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from tensorllm.calibration.fitter import Fit
from tensorllm.calibration.moments import Moments, frozen
from tensorllm.calibration.sequences import Calibration
from tensorllm.calibration.sizes import least_numbers, numbers
from tensorllm.calibration.smallest import STEPS, next_token_loss, smallest, with_factors
from tensorllm.calibration.source import InMemory, OnDisk
from tensorllm.calibration.store import Store
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.compressors import ActivationTucker, Job
from tensorllm.compressors.settings import settings_of
from tensorllm.environment import versions
from tensorllm.errors import UserError
from tensorllm.progress import Progress, quiet


def fit(
    compressor: ActivationTucker,
    model: nn.Module,
    calibration: Calibration,
    layers: Sequence[int] | None = None,
    *,
    moments: Moments | None = None,
    spill: Path | None = None,
    store: Store | None = None,
    progress: Progress = quiet,
) -> ActivationTucker:
    """The strategy fitted to a model and a text; `compress` and `compress_folder` then take it.

    Args:
        model: stays as it is.
        layers: counted from 0; all layers by default, and the same as are compressed then.
        moments: those of this model and text, where they were measured before (`measure_for`).
        spill: a folder for the moments of `weighting=loss`, where memory is short.
        store: where finished layers are kept (`store_for`); an interrupted fit goes on from there.

    Raises:
        UserError: text too short or not the model's, an unreachable target, activations that are
            not finite.
    """
    with frozen(model):
        source = InMemory(model)
        work = Fit(compressor, source, calibration, layers, store=store, progress=progress)
        work.known = moments
        if moments is None and compressor.weighting == "loss":
            work.known = work.measured(model, spill)
        if compressor.max_loss_increase is not None:
            return _smallest(work, model, calibration, compressor.max_loss_increase)
        jobs = work.run()
        if compressor.distill_steps:
            from tensorllm.calibration.distill import distill  # Lightning takes seconds to import

            steps = compressor.distill_steps
            jobs = distill(model, work.roles, jobs, calibration, steps, progress)
        return compressor.with_fit(jobs, calibration.facts())


def measure_for(
    compressor: ActivationTucker, model: nn.Module, calibration: Calibration
) -> Moments:
    """The moments of all layers that `fit` wants, for several targets."""
    with frozen(model):
        return Fit(compressor, InMemory(model), calibration, None).measured(model)


def fit_folder(
    compressor: ActivationTucker,
    folder: Path,
    calibration: Calibration,
    layers: Sequence[int] | None = None,
    *,
    work: Path,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    progress: Progress = quiet,
) -> ActivationTucker:
    """The same for a checkpoint that does not fit in memory: one layer is read at a time.

    Args:
        work: a folder for hidden states and finished factors. An interrupted fit goes on from what
            it holds; the result reads its factors from there, so it is deleted only after use.
        dtype: in which layers run; as they are stored by default.

    Raises:
        UserError: as `fit`; also for what needs the whole model: weighting=loss.
    """
    if compressor.weighting == "loss":
        raise UserError(
            "weighting=loss runs the whole model backwards and cannot be streamed; leave it at "
            "outputs, which needs one layer at a time"
        )
    if compressor.distill_steps:
        raise UserError("distillation trains against the whole model and cannot be streamed")
    if compressor.max_loss_increase is not None:
        raise UserError("max_loss_increase tries many sizes and cannot be streamed; give a target")
    source = OnDisk(folder, dtype, device)
    store = store_for(work, compressor, folder, calibration, layers, source.dtype)
    found = Fit(compressor, source, calibration, layers, store=store, progress=progress)
    found.keeps_moments = False  # measured again rather than held for all layers
    return compressor.with_fit(found.run(), calibration.facts())


def _smallest(
    work: Fit, model: nn.Module, calibration: Calibration, limit: float
) -> ActivationTucker:
    """The smallest fit whose loss on the calibration text is within the limit."""
    if work.compressor.distill_steps:
        raise UserError("give either max_loss_increase or distill_steps")
    if work.roles.architecture.task != "causal":
        raise UserError("max_loss_increase needs a model that predicts the next token")
    blocks = work.blocks()
    errors = work.errors(blocks)
    before = next_token_loss(model, work.batches)
    progress, tried = work.progress, -1

    def told(done: int, total: int, what: str) -> None:
        most = STEPS + 1
        progress(tried * total + done, most * total, f"trying size {tried + 1} of {most}")

    def attempt(budget: int) -> tuple[list[Job], float]:
        nonlocal tried
        tried, work.progress = tried + 1, told
        jobs = work.factors(blocks, Store(), errors, budget)
        smaller = with_factors(model, work.roles, jobs)
        return jobs, next_token_loss(smaller, work.batches) - before

    geometry = work.roles.geometry
    least, most = (
        least_numbers(work.keys, geometry, work.compressor.sharing),
        numbers(work.keys, geometry),
    )
    jobs, lost = smallest(least, most, limit, attempt)
    facts = calibration.facts() | {"loss": before, "loss_increase": lost}
    return work.compressor.with_fit(jobs, facts)


def store_for(
    work: Path,
    compressor: ActivationTucker,
    folder: Path,
    calibration: Calibration,
    layers: Sequence[int] | None,
    dtype: torch.dtype | None,
) -> Store:
    """A store in the folder `work` that an interrupted fit of the checkpoint goes on from.

    What is there of another checkpoint, strategy, text, version or dtype is thrown away.
    """
    fingerprint = {
        **Checkpoint(folder).fingerprint(),
        "compressor": list(settings_of(compressor)),
        "calibration": calibration.facts(),
        "layers": None if layers is None else list(layers),
        "dtype": str(dtype),
        "versions": versions(),
    }
    return Store(work, fingerprint)
