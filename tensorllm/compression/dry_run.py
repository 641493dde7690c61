"""What a compression would do and cost, before any weight is read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar

from tensorllm.compression.cost import decomposition_seconds, gemm_speed
from tensorllm.compression.narrow import foreseen
from tensorllm.compression.plan import decompositions
from tensorllm.compression.prepare import check_fit, prepared
from tensorllm.compression.task import FolderTask
from tensorllm.compression.units import open_checkpoint, units
from tensorllm.compressors import Compressor, Job
from tensorllm.compressors.placing import placed
from tensorllm.models import RoleMatrices

# Memory, fitted to one run: GPT-J's sizes in bfloat16 at (304, 19, 2) peaked at 1.69 GiB.
BASE_BYTES = 450 * 2**20  # the interpreter with torch and transformers
WORKING_COPIES = 2  # float32 copies of a stacked tensor that exist at once
DISK = 400e6  # bytes read or written per second, checked and hashed; an ordinary SSD


@dataclass(frozen=True, slots=True)
class PlannedSite:
    """A site and its parameters before and after; None if only the decomposition can tell."""

    name: str
    shape: tuple[int, ...]
    parameters_before: int
    parameters_after: int | None


@dataclass(frozen=True, slots=True)
class DryRun:
    """What `--dry-run` prints.

    Attributes:
        seconds: predicted for decompositions at this machine's GEMM speed, and for reading and
            writing at `DISK` bytes per second; None if a strategy is first fitted to a text.
        peak_bytes: predicted peak of resident memory.
    """

    logged_to: ClassVar[Path | None] = None  # nothing is done yet

    sites: list[PlannedSite]
    parameters_before: int
    parameters_after: int | None
    bytes_before: int
    bytes_after: int | None
    seconds: float | None
    peak_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        out = asdict(self)
        for site, record in zip(self.sites, out["sites"], strict=True):
            after = site.parameters_after
            record["compression_ratio"] = site.parameters_before / after if after else None
        return out


def dry_run(task: FolderTask) -> DryRun:
    """What a task would do; it is checked as the task itself would be.

    A budget without a text is shared out, from the weights' spectra; a fit to a text is not made.
    """
    checkpoint, roles = open_checkpoint(task.source)
    stored = None
    cut = foreseen(task, roles) if task.format == "narrow" else None
    compressor = task.strategy if task.calibration is not None else prepared(task)
    assert isinstance(compressor, Compressor), "a dry run fits nothing, and nothing is fitted yet"
    if task.calibration is not None:
        jobs = placed(compressor, roles, task.layers).jobs
        stored = check_fit(task, jobs, checkpoint, roles)
    else:
        jobs = decompositions(compressor, roles, task.layers).jobs
    sites = [_planned(job, roles, known=not _measured_for(task)) for job in jobs]
    known = [site.parameters_after for site in sites]
    if None not in known:
        stored = sum(n or 0 for n in known)
    before = checkpoint.parameters
    width = task.dtype.itemsize if task.dtype is not None else checkpoint.bytes / before
    rest = before - sum(site.parameters_before for site in sites)
    after = None if stored is None else rest + stored
    if task.format == "narrow":  # with narrower FFNs, low-rank matrices are written as dense ones
        after = None if cut is None else before - cut.removed(checkpoint.weights)
    written = before if task.format == "dense" else after
    largest = max(prod(site.shape) for site in sites)
    work = units(checkpoint, roles, [job.site for job in jobs])
    heaviest = max(sum(checkpoint.entries[n].bytes for n in unit.names) for unit in work)
    seconds = decomposition_seconds((site.shape for site in sites), gemm_speed())
    seconds += (checkpoint.bytes + width * (written or before)) / DISK
    return DryRun(
        sites=sites,
        parameters_before=before,
        parameters_after=after,
        bytes_before=checkpoint.bytes,
        bytes_after=_bytes_after(task, jobs, roles, width, rest, written),
        seconds=None if task.calibration is not None else seconds,
        peak_bytes=BASE_BYTES + task.shard_bytes + 2 * heaviest + WORKING_COPIES * 4 * largest,
    )


def _measured_for(task: FolderTask) -> bool:
    """Whether sizes depend on measurements on a text; until then jobs have the smallest ones."""
    return task.calibration is not None and task.aim is not None


def _bytes_after(
    task: FolderTask,
    jobs: Sequence[Job],
    roles: RoleMatrices,
    width: float,
    rest: int,
    written: int | None,
) -> int | None:
    """Bytes of the weight files.

    Args:
        width: bytes per number that is not quantised.
        rest: numbers that no job touches.
        written: numbers in all; None: not known.
    """
    if task.aim is not None and task.aim.target_bytes is not None:
        return task.aim.target_bytes  # or slightly less
    if task.format == "factored" and not _measured_for(task):
        shapes = [job.site.shape(roles.spec.geometry(job.site.layers[0])) for job in jobs]
        sizes = [
            job.compressor.stored_bytes(shape, round(width))
            for job, shape in zip(jobs, shapes, strict=True)
        ]
        if None not in sizes:
            return round(width * rest) + sum(n or 0 for n in sizes)
    return None if written is None else round(width * written)


def _planned(job: Job, roles: RoleMatrices, *, known: bool) -> PlannedSite:
    shape = job.site.shape(roles.spec.geometry(job.site.layers[0]))
    after = job.compressor.stored_parameters(shape) if known else None
    return PlannedSite(job.site.name, shape, prod(shape), after)
