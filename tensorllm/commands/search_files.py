"""What a search leaves in its study's folder."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from tensorllm.commands.search_run import SearchRun
from tensorllm.compression.jobs import decomposed
from tensorllm.reporting.search_plots import save_plots
from tensorllm.search.found import Found
from tensorllm.search.queue import REASON, RESULT
from tensorllm.search.space import Point

RECIPE, TRIALS, RESULTS = "best.yaml", "trials.parquet", "results.json"


def write_files(
    folder: Path, run: SearchRun, point: Point, results: dict[str, Any], recipe: str
) -> None:
    """`best.yaml`, `results.json` and, where matplotlib is, the plots."""
    import pyarrow.parquet as pq

    for name, text in ((RECIPE, recipe), (RESULTS, json.dumps(results, indent=2) + "\n")):
        with _whole(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    done = decomposed(point.compressor, run.roles, run.examiner.weights, point.layers)
    rows = pq.read_table(folder / TRIALS).to_pylist()
    sites = [asdict(site.report) for site in done]
    save_plots(folder, rows, results, sites, {site.site.name: site.details for site in done})


def write_trials(folder: Path, run: SearchRun, trials: Sequence[FrozenTrial]) -> None:
    """All trials of a search as a table, one a row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for trial in trials:
        found = trial.user_attrs.get(RESULT, {})
        known = trial.params.keys() >= run.space.choices.keys()
        rows.append(
            {
                "number": trial.number,
                "state": trial.state.name.lower(),
                **{name: trial.params.get(name) for name in run.space.choices},
                "point": run.space.point(trial.params).key if known else None,
                **{name: found.get(name) for name in Found.__dataclass_fields__},
                "reason": trial.user_attrs.get(REASON),
                "started": trial.datetime_start,
                "finished": trial.datetime_complete,
            }
        )
    with _whole(folder / TRIALS) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file to write, which then takes the path's place; other processes have others."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    yield temporary
    temporary.replace(path)
