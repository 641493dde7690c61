"""Share one budget out among all sites of a model, from the weights alone."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tensorllm.compression.plan import decompositions
from tensorllm.compressors import Compressor, Job, Leaf
from tensorllm.compressors.allocation import share_out, with_whole
from tensorllm.compressors.base import ErrorCurve
from tensorllm.compressors.budget import Budget
from tensorllm.compressors.layer import Site, Size
from tensorllm.compressors.per_layer import PerLayer
from tensorllm.compressors.settings import settings_of
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.progress import Progress, quiet
from tensorllm.weights import stacked

ReadWeights = Callable[[Iterable[str]], Mapping[str, Tensor]]  # parameters by name


def meet_budget(
    compressor: Compressor,
    roles: RoleMatrices,
    read: ReadWeights,
    total: int,
    budget: Budget,
    layers: Sequence[int] | None = None,
    *,
    progress: Progress = quiet,
) -> PerLayer:
    """The strategy with a size for each site that meets a budget at about the least error.

    Args:
        compressor: with any sizes (`Compressor.budget_settings`).
        roles: of the model.
        read: reads parameters of the model by name.
        total: parameters of the whole model.
        budget: the target.
        layers: counted from 0; None: all.
        progress: called with (sites done, sites in all, what is done).

    Returns:
        One edit per site whose size is not zero.

    Raises:
        UserError: a strategy that needs a text or has no error curves, or a target out of reach.
    """
    if budget.max_loss_increase is not None:
        raise UserError("max_loss_increase is measured on a text: give --calibration FILE")
    jobs = decompositions(compressor, roles, layers).jobs
    geometry = roles.spec.geometry
    before = sum(geometry(n).numel(r) for job in jobs for n, r in job.site.matrices)
    budget.numbers(before, total)  # refuse impossible targets before spectra are computed
    curves = _curves(jobs, roles, read, progress)
    least = sum(int(curve.cost_N[0]) for curve in curves.values())
    numbers = budget.numbers(before, total, least)
    sizes = share_out([[[job]] for job in jobs], curves, numbers).sizes
    chosen = {site: size for site, size in sizes.items() if any(size)}
    mode, _ = settings_of(compressor)
    stored = stored_in(curves, sizes)
    in_bytes = budget.target_bytes is not None
    chosen_by = {
        "mode": mode,
        **budget.settings,
        **(
            {"bytes": stored + (budget.other_bytes or 0)}
            if in_bytes
            else {"ratio": round(before / stored, 4)}
        ),
        "unchanged": [site.name for site in sizes if site not in chosen],
    }
    leaves = {job.site: job.compressor for job in jobs}
    edits = [_edit(leaves[site], site, size) for site, size in chosen.items()]
    return PerLayer(edits=tuple(edits), chosen_by=chosen_by)


def stored_in(curves: Mapping[Site, ErrorCurve], sizes: Mapping[Site, Size]) -> int:
    """Numbers, or bytes, that all sites store at these sizes."""
    return sum(
        int(curves[site].cost_N[curves[site].sizes_NC.tolist().index(list(size))])
        for site, size in sizes.items()
    )


def _curves(
    jobs: Sequence[Job], roles: RoleMatrices, read: ReadWeights, progress: Progress
) -> dict[Site, ErrorCurve]:
    out = {}
    for index, job in enumerate(jobs):
        site = job.site
        progress(index, len(jobs), f"spectrum of {site.name}")
        weights = read(sorted({roles.name(*matrix) for matrix in site.matrices}))
        assert isinstance(job.compressor, Leaf), "what needs a text was refused"
        try:
            w = stacked(site, roles, weights)
            out[site] = with_whole(job.compressor.curve(site, w), w.numel())
        except UserError as error:
            raise UserError(f"{site.name}: {error}") from None
    progress(len(jobs), len(jobs), "spectra done")
    return out


def _edit(leaf: Any, site: Site, size: Size) -> dict[str, Any]:
    """The site's edit, as `PerLayer` takes it."""
    mode, settings = settings_of(leaf.at_size(site, size))
    return {"layers": list(site.layers), "mode": mode, **settings}
