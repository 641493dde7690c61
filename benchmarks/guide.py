"""`python benchmarks/guide.py`: the order of `search-ranks --guide gradient` beside a whole grid.

Every point of a grid of `laser` edits is examined in full on validation rows; then: how many trials
until one is within half a point of the grid's best, in the order of the guide and in random order;
how predicted and actual changes correlate; and what the best of a guided search's trials scores on
test rows beside the best of the grid. By default the demo model, every point on test, too.

    python benchmarks/guide.py --model smollm2/ --dataset bios_profession --data ROWS.jsonl \
        --layers 20-29 --rho 0.05,0.1,0.2,0.5 --rows 100 --points 120 --folder FOLDER

`--points` takes so many points of the grid at random. What --folder has of a run that was stopped
is not run again.

`--search` measures something else: how long `search-ranks --guide gradient` takes over the grid,
with the test parts of original and winner, as the command line does it.
"""

import argparse
import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr
from support.guide_curvature import second_order
from support.guide_grid import ORIGINAL, Examined, examined
from support.results import STARTED, Comparison, begin, parser, save

from tensorllm.commands.search import run
from tensorllm.io import Journal
from tensorllm.options import layers, values
from tensorllm.requests.search import SearchRequest
from tensorllm.search.guide import EXAMPLES, guided, in_order, trials_for
from tensorllm.search.space import Point
from tensorllm.search.study import Study

NEAR = 0.5  # points of accuracy
WANTED = 20.0  # times fewer trials than the grid
MINUTES = 15.0  # that a search of all layers, matrices and ranks of a 135M model may take


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--model", default="demo")
    options.add_argument("--dataset", default="demo")
    options.add_argument("--data", type=Path, help="the dataset's rows")
    options.add_argument("--layers", default="0-3", help="as search-ranks has it")
    options.add_argument("--matrices", default="in,out,q,k,v,o")
    options.add_argument("--rho", default="0.01,0.02,0.05,0.1,0.2,0.4")
    options.add_argument("--rows", type=int, help="of validation and test part, each")
    options.add_argument("--points", type=int, help="of the grid, at random (default: all)")
    options.add_argument("--folder", type=Path, help="of what was examined; a temporary one")
    options.add_argument("--no-curvature", action="store_true", help="one backward pass less")
    options.add_argument("--seed", type=int, default=0, help="of the order of points")
    options.add_argument("--search", action="store_true", help="time a guided search of the grid")
    args = options.parse_args()
    if args.quick:
        args.rows, args.points, args.layers = 24, 8, "2-3"
    return args


def request_of(args: argparse.Namespace) -> SearchRequest:
    """The search whose grid it is."""
    return SearchRequest(
        model=str(args.model), dataset=args.dataset, data_file=args.data, mode="laser",
        layers=layers("--layers", args.layers), matrices=tuple(args.matrices.split(",")),
        rho=values("--rho", args.rho), limit=args.rows, guide="gradient",
        min_ratio=None if args.search else 0,
    )  # fmt: skip


def part_of(args: argparse.Namespace) -> str:
    """The name of what is saved."""
    model = Path(args.model).name
    return model if args.dataset == "demo" else f"{model}-{args.dataset}"


def searched(args: argparse.Namespace) -> None:
    """Time a guided search from the beginning of this process to its verdict."""
    found = run(request_of(args)).results
    cpu, wall = time.process_time() / 60, (time.monotonic() - STARTED) / 60
    part = f"{part_of(args)}-search"
    took = Comparison(
        ours=cpu, unit="CPU min", peer=MINUTES, peer_name="the most it may take", wanted=1.0
    )
    save(
        "guide", part, {f"a guided search, {part}": took}, args,
        cpu_minutes=cpu, wall_minutes=wall,
        points=math.prod(len(values) for values in found["space"]["choices"].values()),
        **{key: found[key] for key in ("trials", "dtype", "original", "winner", "verdict")},
        correlations=found["guide"],
    )  # fmt: skip


def drawn(study: Study, count: int | None, seed: int) -> list[Point]:
    """Points of the grid in random order, the first ones."""
    points = [study.space.point(values) for values in study.feasible]
    random.Random(seed).shuffle(points)
    return points[:count]


def kept(folder: Path, name: str, predict: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """Predictions by key, from an earlier run where there was one."""
    journal = Journal(folder, name)
    for known in journal.records():
        return dict(known)
    found = dict(predict())
    journal.append([found])
    return found


def best_of(points: Sequence[Point], found: Mapping[str, Examined]) -> Point:
    return min(points, key=lambda point: found[point.key].order)


def held(
    points: Sequence[Point], change: Mapping[str, float], found: Mapping[str, Examined]
) -> tuple[dict[str, Any], list[Point]]:
    """How one ranking does, and the points that a guided search of so many would try."""
    predicted = [change[point.key] for point in points]
    tried = [points[n] for n in in_order(predicted, [point.layers[0] for point in points])]
    top = max(found[point.key].accuracy for point in points)
    near = [found[point.key].accuracy >= top - NEAR for point in tried]
    actual = [found[point.key] for point in points]
    correlations = {
        f"spearman_{name}": float(
            spearmanr(predicted, [getattr(one, name) for one in actual]).statistic
        )
        for name in ("chosen", "loss", "accuracy")
    }
    return {"trials_until_near": near.index(True) + 1, **correlations}, tried


def main() -> None:
    args = arguments()
    begin(args)
    if args.search:
        searched(args)
        return
    study = Study(request_of(args))
    points = drawn(study, args.points, args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        found = examined(study, points, folder)
        first = kept(folder, "gradient", lambda: guided(study.examiner, points).change)
        orders = {"gradient": first, "relative error": {key: found[key].error for key in first}}
        if not args.no_curvature:
            second = kept(folder, "curvature", lambda: second_order(study, points))
            orders["gradient and curvature"] = {key: first[key] + second[key] for key in first}
            orders["curvature"] = second
        rankings, tried = {}, {}
        for name, change in orders.items():
            rankings[name], order = held(points, change, found)
            tried[name] = best_of(order[: trials_for(len(points))], found)
        best = best_of(points, found)
        wanted = list({p.key: p for p in (best, *tried.values())}.values())
        test = examined(study, wanted, folder, part="test")
    top = found[best.key].accuracy
    near = sum(found[point.key].accuracy >= top - NEAR for point in points)
    for name, point in tried.items():
        rankings[name] |= {
            "best": point.recipe(),
            "validation": found[point.key].accuracy,
            "test": test[point.key].accuracy,
            "regret_test": test[best.key].accuracy - test[point.key].accuracy,
        }
    until = rankings["gradient"]["trials_until_near"]
    trials = Comparison(
        ours=until, unit="trials", peer=len(points), peer_name="the grid", wanted=WANTED
    )
    part = part_of(args)
    save(
        "guide", part, {f"trials until within half a point, {part}": trials}, args,
        points=len(points), grid=len(study.feasible), examples=EXAMPLES,
        rows={"validation": len(study.datasets[0].validation.examples),
              "test": len(study.datasets[0].test.examples)},
        original={"validation": found[ORIGINAL].accuracy, "test": test[ORIGINAL].accuracy},
        best={**best.recipe(), "validation": top, "test": test[best.key].accuracy},
        points_near_best=near, trials_in_random_order=(len(points) + 1) / (near + 1),
        trials_of_a_guided_search=trials_for(len(points)),
        seconds_of_a_point=sum(found[p.key].seconds for p in points) / len(points),
        rankings=rankings,
    )  # fmt: skip


if __name__ == "__main__":
    main()
