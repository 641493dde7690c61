"""What a compression would do and cost, told before any weight is read."""

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from tensorllm.compression.cost import decomposition_seconds, gemm_speed
from tensorllm.compression.jobs import plan_jobs
from tensorllm.compression.task import FolderTask
from tensorllm.compression.units import open_checkpoint, units
from tensorllm.compressors import Job
from tensorllm.tensors.stacking import Geometry

# Memory, fitted to one run: GPT-J's sizes in bfloat16 at (304, 19, 2) peaked at 1.69 GiB.
BASE_BYTES = 450 * 2**20  # the interpreter with torch and transformers
WORKING_COPIES = 2  # float32 copies of a stacked tensor that are alive at once
DISK = 400e6  # bytes read or written in a second, checked and hashed; an ordinary SSD


@dataclass(frozen=True, slots=True)
class PlannedSite:
    """A site and its parameters before and after; None where only the decomposition can tell."""

    name: str
    shape: tuple[int, ...]
    parameters_before: int
    parameters_after: int | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What `--dry-run` prints.

    Attributes:
        seconds: predicted for decompositions at the GEMM speed of this machine, and for reading
            and writing at `DISK` bytes per second; None where a fit to text comes first.
        peak_bytes: predicted peak of resident memory.
    """

    sites: list[PlannedSite]
    parameters_before: int
    parameters_after: int | None
    bytes_before: int
    bytes_after: int | None
    seconds: float | None
    peak_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON values."""
        out = asdict(self)
        for site, record in zip(self.sites, out["sites"], strict=True):
            after = site.parameters_after
            record["compression_ratio"] = site.parameters_before / after if after else None
        return out


def plan_folder(task: FolderTask, stored: int | None = None) -> Plan:
    """The plan of a task; it is checked as the task itself would be.

    Args:
        stored: numbers that all sites will hold together, where that is known beforehand.
    """
    checkpoint, roles = open_checkpoint(task.source)
    layers = tuple(range(roles.layers)) if task.layers is None else tuple(task.layers)
    jobs = plan_jobs(task.compressor, roles, layers)
    sites = [_planned(job, roles.geometry) for job in jobs]
    known = [site.parameters_after for site in sites]
    if None not in known:
        stored = sum(n or 0 for n in known)
    before = checkpoint.parameters
    width = task.dtype.itemsize if task.dtype is not None else checkpoint.bytes / before
    rest = before - sum(site.parameters_before for site in sites)
    after = None if stored is None else rest + stored
    written = before if task.format == "dense" else after
    largest = max(prod(site.shape) for site in sites)
    work = units(checkpoint, roles, jobs)
    heaviest = max(sum(checkpoint.entries[n].bytes for n in unit.names) for unit in work)
    work_seconds = decomposition_seconds((site.shape for site in sites), gemm_speed())
    traffic = checkpoint.bytes + (width * (written or before))
    return Plan(
        sites=sites,
        parameters_before=before,
        parameters_after=after,
        bytes_before=checkpoint.bytes,
        bytes_after=None if written is None else round(width * written),
        seconds=work_seconds + traffic / DISK,
        peak_bytes=BASE_BYTES + task.shard_bytes + 2 * heaviest + WORKING_COPIES * 4 * largest,
    )


def _planned(job: Job, geometry: Geometry) -> PlannedSite:
    shape = job.site.shape(geometry)
    after = job.compressor.stored_parameters(shape)
    return PlannedSite(job.site.name, shape, prod(shape), after)
