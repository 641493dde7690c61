"""Read runs from disk: folders or JSON files that tensorllm wrote."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorllm.compression.card import REPORT
from tensorllm.compression.details import DETAILS
from tensorllm.errors import UserError, first_line
from tensorllm.evaluation.predictions import Prediction, read_predictions
from tensorllm.evaluation.results import BEFORE, RESULTS, read_results
from tensorllm.io import from_json

TRIALS = "trials.parquet"
Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Compressed:
    """A checkpoint that `compress` or `export` wrote; `details` by the site's name."""

    path: Path
    report: Json
    details: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An evaluation that `evaluate` wrote; without rows if only its JSON file is given."""

    path: Path
    results: Json
    rows: Sequence[Prediction] = ()
    before: Sequence[Prediction] = ()


@dataclass(frozen=True, slots=True)
class Searched:
    """A finished study of `search-ranks`; `trials` are the rows of its table."""

    path: Path
    results: Json
    trials: Sequence[Json] = ()


@dataclass(frozen=True, slots=True)
class Benched:
    """The output of `bench --json`."""

    path: Path
    found: Json


Run = Compressed | Evaluated | Searched | Benched


def read_run(path: Path) -> Run:
    """The run in a folder or JSON file.

    Raises:
        UserError: there is none, or it is damaged.
    """
    if not path.exists():
        raise UserError(f"no run at {path}: no such file or folder")
    if path.is_file():
        return _of_json(path, _json(path))
    if (path / REPORT).is_file():
        details = _json(path / DETAILS) if (path / DETAILS).is_file() else []
        try:
            known = {record["site"]: record for record in details}
        except (TypeError, KeyError):
            raise UserError(f"{path / DETAILS} is damaged") from None
        return Compressed(path, _checked(path, _json(path / REPORT), Compressed), known)
    if not (path / RESULTS).is_file():
        raise UserError(
            f"{path} is no run: it holds neither {REPORT} (a compressed model) nor {RESULTS} "
            "(an evaluation or a search)"
        )
    found = _of_json(path, _json(path / RESULTS))
    if isinstance(found, Searched):
        return Searched(path, found.results, _trials(path / TRIALS))
    results, rows = read_results(path)
    before = read_predictions(path / BEFORE) if (path / BEFORE).is_file() else []
    return Evaluated(path, results, rows, before)


KEYS: dict[type[Run], set[str]] = {  # by which the kinds are recognised
    Searched: {"winner", "trials", "original"},
    Evaluated: {"metrics", "dataset", "protocol", "split", "examples", "model"},
    Compressed: {"mode", "settings", "sites", "ratios", "totals", "layer_roles"},
    Benched: {"models", "ratios", "sites"},
}


def _of_json(path: Path, values: Any) -> Run:
    keys = values.keys() if isinstance(values, dict) else set()
    for kind, wanted in KEYS.items():
        if wanted <= keys:
            return kind(path, values)
    raise UserError(
        f"{path} is no run: a compressed model, an evaluation, a search, or what "
        "`tensorllm bench --json` printed"
    )


def _checked(path: Path, values: Any, kind: type[Run]) -> Json:
    found = _of_json(path, values)
    if not isinstance(found, kind) or not isinstance(values, dict):
        raise UserError(f"{path / REPORT} is damaged")
    return values


def _json(path: Path) -> Any:
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is no run: it is not JSON") from None


def _trials(path: Path) -> list[Json]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        return []
    try:
        with path.open("rb") as file:
            return list(pq.read_table(file).to_pylist())
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is damaged: {first_line(error)[:120]}") from None
