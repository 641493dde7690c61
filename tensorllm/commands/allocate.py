"""`tensorllm compress --target-ratio` without data: ranks of a whole model out of one budget."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tensorllm.compression.jobs import plan_jobs
from tensorllm.compression.task import FolderTask
from tensorllm.compression.units import open_checkpoint
from tensorllm.compressors import COMPRESSORS, Compressor
from tensorllm.compressors.per_layer import PerLayer
from tensorllm.compressors.settings import fields_of, make_compressor
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.progress import Progress, quiet
from tensorllm.search.energy import by_ratio, by_size, edits_of, least_size
from tensorllm.search.sites import SiteEnergy, site_energy
from tensorllm.tensors.stacking import ATTENTION, FFN

TARGETS = ("target_ratio", "target_params")
# Ranks that fit every model: the strategy that the budget's ranks are then put into.
ANY: dict[str, dict[str, Any]] = {
    "shared-tucker": {"ranks": (1, 1, 1)},
    "per-matrix-tucker": {"ranks": (1, 1)},
    "laser": {"rank": 1},
    "hybrid": {"ranks": (1, 1, 1), "rank": 1},
}
PART = {"ranks": "attention", "rank": "ffn"}  # what a hybrid may have in place of these
ALL = {"laser": ATTENTION + FFN, "hybrid": FFN}  # beyond the few matrices of their default


@dataclass(frozen=True, slots=True)
class Budget:
    """A size to be met, and the mode with its other settings.

    Attributes:
        target_ratio: numbers in the mode's matrices before over after; or
        target_params: parameters of the whole model afterwards.
    """

    mode: str
    settings: Mapping[str, Any]
    target_ratio: float | None
    target_params: int | None

    def __post_init__(self) -> None:
        if (self.target_ratio is None) == (self.target_params is None):
            raise UserError("give one of --target-ratio and --target-params, got both")
        if self.target_ratio is not None and not self.target_ratio > 1:
            raise UserError(f"target_ratio must be above 1, got {self.target_ratio}")
        if self.target_params is not None and self.target_params < 1:
            raise UserError(f"target_params must be 1 or more, got {self.target_params}")

    def compressor(self, roles: RoleMatrices | None = None) -> Compressor:
        """The mode with its settings; of a model whose roles are given, on all its matrices."""
        return at_any_ranks(self.mode, self.settings, roles)


def at_any_ranks(
    mode: str, settings: Mapping[str, Any], roles: RoleMatrices | None = None
) -> Compressor:
    """A strategy at ranks that mean nothing yet.

    Args:
        roles: of the model; the strategy is then on all matrices that the mode can take, unless
            the settings name some.
    """
    given = dict(settings)
    if roles is not None and mode in ALL and not {"matrices", "ffn"} & given.keys():
        given["matrices"] = [role for role in roles.geometry.roles if role in ALL[mode]]
    own = {key: value for key, value in ANY[mode].items() if PART[key] not in given}
    return make_compressor(mode, own | given)


def budget_of(mode: str, settings: Mapping[str, Any]) -> Budget | None:
    """The budget that these settings ask for; None where there is none or the mode takes it.

    Raises:
        UserError: the mode's ranks cannot be told from the weights, or a value is out of range.
    """
    wanted = {name: settings[name] for name in TARGETS if name in settings}
    if not wanted or set(TARGETS) <= set(fields_of(mode)):
        return None
    name = COMPRESSORS.name_of(COMPRESSORS[mode])
    if name not in ANY:
        raise UserError(f"a target size is for the modes {', '.join(ANY)}, got {mode!r}")
    rest = {key: value for key, value in settings.items() if key not in TARGETS}
    return Budget(name, rest, wanted.get("target_ratio"), wanted.get("target_params"))


def allocated(task: FolderTask, budget: Budget, progress: Progress = quiet) -> FolderTask:
    """The task with ranks for every layer, mode and matrix.

    Raises:
        UserError: the budget cannot be met; says the best reachable ratio.
    """
    checkpoint, roles = open_checkpoint(task.source)
    wanted = budget.compressor(roles)
    sites = energies(task.source, wanted, task.layers, device=task.device, progress=progress)
    before = sum(site.numbers for site in sites)
    untouched = checkpoint.parameters - before
    if budget.target_ratio is not None:
        found = by_ratio(sites, budget.target_ratio)
    else:
        assert budget.target_params is not None
        least = untouched + least_size(sites)
        if not least <= budget.target_params < checkpoint.parameters:
            raise UserError(
                f"target_params must be in {least}..{checkpoint.parameters - 1}, "
                f"got {budget.target_params}"
            )
        found = by_size(sites, budget.target_params - untouched)
    alone = [site.job.site for site, r in zip(sites, found.ranks, strict=True) if r is None]
    chosen_by = {
        "mode": budget.mode,
        **{key: v for key, v in asdict(budget).items() if key in TARGETS and v is not None},
        "ratio": round(found.ratio, 4),
        "left_alone": [site.name for site in alone],
    }
    return replace(
        task, compressor=PerLayer(edits=tuple(edits_of(sites, found)), chosen_by=chosen_by)
    )


def energies(
    folder: Path,
    compressor: Compressor,
    layers: Sequence[int] | None = None,
    *,
    device: str = "cpu",
    progress: Progress = quiet,
) -> list[SiteEnergy]:
    """The energies of all sites of a compression, read site by site from a folder's files."""
    checkpoint, roles = open_checkpoint(folder)
    jobs = plan_jobs(compressor, roles, range(roles.layers) if layers is None else layers)
    out = []
    for index, job in enumerate(jobs):
        progress(index, len(jobs), f"spectrum of {job.site.name}")
        names = sorted({roles.name(*matrix) for matrix in job.site.matrices})
        weights = {name: w.to(device) for name, w in checkpoint.read(names).items()}
        w = job.site.stack([roles.read(weights, *m) for m in job.site.matrices], roles.geometry)
        try:
            out.append(site_energy(job, w))
        except UserError as error:
            raise UserError(f"{job.site.name}: {error}") from None
    progress(len(jobs), len(jobs), "spectra done")
    return out
