"""Which points of a space are feasible: small enough, and no matrix is edited twice."""

import json
import math
from collections.abc import Collection, Iterator, Sequence

from tensorllm.compression.plan import plan_jobs
from tensorllm.compressors import Job
from tensorllm.errors import UserError
from tensorllm.models import RoleMatrices
from tensorllm.options import Value
from tensorllm.search.space import LAYER, Matrices, Space


def ratio_of(jobs: Sequence[Job], roles: RoleMatrices) -> float | None:
    """Numbers in the matrices that are decomposed, over the numbers stored for them.

    None: only the decompositions can tell.
    """
    before = after = 0
    for job in jobs:
        shape = job.site.shape(roles.spec.geometry(job.site.layers[0]))
        stored = job.compressor.stored_parameters(shape)
        if stored is None:
            return None
        before += math.prod(shape)
        after += stored
    return before / after


def collides(jobs: Sequence[Job], excluded: Collection[tuple[int, str]]) -> bool:
    """Whether these jobs touch any of the `excluded` matrices."""
    return any(matrix in excluded for job in jobs for matrix in job.site.matrices)


def feasible(
    space: Space, roles: RoleMatrices, min_ratio: float, excluded: Matrices = frozenset()
) -> list[dict[str, Value]]:
    """The grid's combinations that meet `min_ratio` and touch none of the `excluded` matrices.

    Raises:
        UserError: no combination reaches the ratio; the message names the best one. (If all are
            excluded, the list is empty.)
    """
    free = space.grid if not excluded else list(_free(space, roles, excluded))
    if not min_ratio or not free:
        return free
    known = list(_with_ratios(free, space, roles))
    kept = [values for values, ratio in known if ratio is None or ratio >= min_ratio]
    if not kept:
        best = max(ratio for _, ratio in known if ratio is not None)
        raise UserError(
            f"no choice of settings has a ratio of {min_ratio:g}; the best reachable is {best:.4g}"
        )
    return kept


def _free(space: Space, roles: RoleMatrices, excluded: Matrices) -> Iterator[dict[str, Value]]:
    names = [name for name, values in space.choices.items() if isinstance(values[0], str)]
    known: dict[tuple[Value, ...], bool] = {}  # ranks do not affect which matrices are edited
    for values in space.grid:
        same = (values[LAYER], *(values[name] for name in names))
        if same not in known:
            point = space.point(values)
            known[same] = collides(plan_jobs(point.compressor, roles, point.layers), excluded)
        if not known[same]:
            yield values


def _with_ratios(
    points: Sequence[dict[str, Value]], space: Space, roles: RoleMatrices
) -> Iterator[tuple[dict[str, Value], float | None]]:
    known: dict[str, float | None] = {}  # the ratio is the same in all layers
    for values in points:
        point = space.point(values)
        same = json.dumps(point.settings)
        if same not in known:
            known[same] = ratio_of(plan_jobs(point.compressor, roles, point.layers), roles)
        yield values, known[same]
