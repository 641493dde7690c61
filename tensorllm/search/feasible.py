"""Which points of a space are small enough."""

import json
import math
from collections.abc import Iterator, Sequence

from tensorllm.architectures import RoleMatrices
from tensorllm.compression.jobs import plan_jobs
from tensorllm.compressors import Job
from tensorllm.errors import UserError
from tensorllm.search.space import Space, Value


def ratio_of(jobs: Sequence[Job], roles: RoleMatrices) -> float:
    """Numbers in the matrices that are decomposed, over the numbers stored for them."""
    before = after = 0
    for job in jobs:
        shape = job.site.shape(roles.geometry)
        before += math.prod(shape)
        after += job.compressor.stored_parameters(shape) or math.prod(shape)
    return before / after


def feasible(space: Space, roles: RoleMatrices, min_ratio: float | None) -> list[dict[str, Value]]:
    """The grid's combinations that meet `min_ratio`; none is an error that names the best."""
    if min_ratio is None:
        return space.grid
    known = list(_with_ratios(space, roles))
    kept = [values for values, ratio in known if ratio >= min_ratio]
    if not kept:
        best = max(ratio for _, ratio in known)
        raise UserError(
            f"no choice of ranks has a ratio of {min_ratio:g}; the best reachable is {best:.4g}"
        )
    return kept


def _with_ratios(space: Space, roles: RoleMatrices) -> Iterator[tuple[dict[str, Value], float]]:
    known: dict[str, float] = {}  # all layers have the same sizes
    for values in space.grid:
        point = space.point(values)
        same = json.dumps(point.settings)
        if same not in known:
            known[same] = ratio_of(plan_jobs(point.compressor, roles, point.layers), roles)
        yield values, known[same]
