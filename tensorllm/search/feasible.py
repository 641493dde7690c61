"""Which points of a space are small enough."""

import json
import math
from collections.abc import Iterator, Sequence

from tensorllm.compression.plan import plan_jobs
from tensorllm.compressors import Job
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.search.choices import Value
from tensorllm.search.space import Space


def ratio_of(jobs: Sequence[Job], roles: RoleMatrices) -> float:
    """Numbers in the matrices that are decomposed, over the numbers stored for them."""
    before = after = 0
    for job in jobs:
        shape = job.site.shape(roles.geometry)
        before += math.prod(shape)
        after += job.compressor.stored_parameters(shape) or math.prod(shape)
    return before / after


Taken = frozenset[tuple[int, str]]  # matrices that are edited already: (layer, role)


def collides(jobs: Sequence[Job], taken: Taken) -> bool:
    """Whether a matrix of these jobs is edited already."""
    return any(matrix in taken for job in jobs for matrix in job.site.matrices)


def feasible(
    space: Space, roles: RoleMatrices, min_ratio: float | None, taken: Taken = frozenset()
) -> list[dict[str, Value]]:
    """The grid's combinations that meet `min_ratio` and touch nothing that is `taken`.

    Raises:
        UserError: no combination has the ratio; names the best. (All taken is an empty list.)
    """
    free = space.grid if not taken else list(_free(space, roles, taken))
    if min_ratio is None or not free:
        return free
    known = list(_with_ratios(free, space, roles))
    kept = [values for values, ratio in known if ratio >= min_ratio]
    if not kept:
        best = max(ratio for _, ratio in known)
        raise UserError(
            f"no choice of ranks has a ratio of {min_ratio:g}; the best reachable is {best:.4g}"
        )
    return kept


def _free(space: Space, roles: RoleMatrices, taken: Taken) -> Iterator[dict[str, Value]]:
    known: dict[tuple[Value | None, ...], bool] = {}  # ranks change nothing
    for values in space.grid:
        same = (values["layer"], values.get("matrices"))
        if same not in known:
            point = space.point(values)
            known[same] = collides(plan_jobs(point.compressor, roles, point.layers), taken)
        if not known[same]:
            yield values


def _with_ratios(
    points: Sequence[dict[str, Value]], space: Space, roles: RoleMatrices
) -> Iterator[tuple[dict[str, Value], float]]:
    known: dict[str, float] = {}  # all layers have the same sizes
    for values in points:
        point = space.point(values)
        same = json.dumps(point.settings)
        if same not in known:
            known[same] = ratio_of(plan_jobs(point.compressor, roles, point.layers), roles)
        yield values, known[same]
