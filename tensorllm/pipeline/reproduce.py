"""`tensorllm reproduce`: the published tables, ours beside theirs, cell by cell."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorllm.checkpoint.source import resolve
from tensorllm.compression.model import compressed
from tensorllm.environment import environment
from tensorllm.errors import UserError
from tensorllm.evaluation.evaluate import evaluate_model, make_dataset
from tensorllm.pipeline.cells import Cell, cells
from tensorllm.pipeline.models import Loader, dtype_of

PROTOCOL = "paper"
ENDINGS = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceRequest:
    """What is to be reproduced.

    Attributes:
        model: the short name whose published cells are run.
        weights: local folder of its weights, instead of the hub.
        layer: layer for the cells whose layer was never published.
        data: folder with `<dataset>.jsonl` (or json, csv, parquet), instead of the hub.
        out: folder that keeps a file per finished cell; these are not run again.
    """

    model: str
    weights: str | None = None
    datasets: Sequence[str] | None = None
    data: Path | None = None
    layer: int | None = None
    limit: int | None = None
    dtype: str | None = None
    device: str = "cpu"
    out: Path = Path("reproduction")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A cell and what came of it: metrics, or why it was not run."""

    cell: Cell
    metrics: dict[str, Any] | None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.cell.model,
            "dataset": self.cell.dataset,
            "cell": self.cell.name,
            "published": self.cell.published,
            "ours": self.metrics,
            "note": self.note,
        }


Progress = Callable[[int, int, str], None]


def reproduce(request: ReproduceRequest, progress: Progress) -> list[Outcome]:
    """Run every cell that is not finished yet; each is kept as soon as it is."""
    wanted = cells(request.model, request.datasets)
    loader: Loader | None = None
    model = tokenizer = None
    out = []
    for index, cell in enumerate(wanted):
        progress(index, len(wanted), f"{cell.dataset} {cell.name}")
        kept = _read(request, cell)
        if kept is not None:
            out.append(Outcome(cell, kept, _note(cell, request)))
            continue
        if cell.searched and request.layer is None:
            out.append(Outcome(cell, None, "layer not published: search-ranks finds it"))
            continue
        if model is None:
            source = resolve(request.weights or request.model)
            loader = Loader(source.folder, dtype_of(request.dtype), request.device)
            model, tokenizer = loader(), loader.tokenizer()
        metrics = score_cell(cell, model, tokenizer, request)
        _write(request, cell, metrics)
        out.append(Outcome(cell, metrics, _note(cell, request)))
    progress(len(wanted), len(wanted), "done")
    return out


def score_cell(cell: Cell, model: Any, tokenizer: Any, request: ReproduceRequest) -> dict[str, Any]:
    """Accuracy and loss of one cell, by the papers' protocol on their test part."""
    data = make_dataset(cell.dataset, data_file=data_file(request, cell), limit=request.limit)
    if cell.recipe is None:
        return evaluate_model(model, tokenizer, data, PROTOCOL)
    layout = {} if cell.layout is None else {"layout": cell.layout}
    layers = cell.recipe.layers if cell.recipe.layers is not None else (request.layer or 0,)
    with compressed(model, cell.recipe.compressor(**layout), layers) as report:
        metrics = evaluate_model(model, tokenizer, data, PROTOCOL)
    facts = {"ratios": report.ratios(), "settings": report.settings, "layers": list(layers)}
    return metrics | facts


def data_file(request: ReproduceRequest, cell: Cell) -> Path | None:
    """The local file of a cell's dataset, or None for the hub."""
    if request.data is None:
        return None
    for ending in ENDINGS:
        path = request.data / f"{cell.dataset}{ending}"
        if path.is_file():
            return path
    raise UserError(
        f"{request.data} has no {cell.dataset}.jsonl (nor json, csv, parquet): put the rows of "
        f"{cell.dataset} there, or leave --data out to fetch them from the hub"
    )


def _note(cell: Cell, request: ReproduceRequest) -> str:
    return f"layer {request.layer} given" if cell.searched else ""


def _path(request: ReproduceRequest, cell: Cell) -> Path:
    name = cell.name.replace(" (", "-").rstrip(")")
    return request.out / cell.model / cell.dataset / f"{name}.json"


def _facts(request: ReproduceRequest, cell: Cell) -> dict[str, Any]:
    """What a kept cell must agree with, or it is another experiment."""
    return {
        "weights": request.weights,
        "limit": request.limit,
        "dtype": request.dtype,
        "protocol": PROTOCOL,
        "layer": request.layer if cell.searched else None,
    }


def _read(request: ReproduceRequest, cell: Cell) -> dict[str, Any] | None:
    path = _path(request, cell)
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text())
        if kept["request"] == _facts(request, cell):
            return dict(kept["metrics"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a result of reproduce; move it away") from None
    raise UserError(
        f"{path} is of another run ({kept['request']}); give another --out, or the same settings"
    )


def _write(request: ReproduceRequest, cell: Cell, metrics: dict[str, Any]) -> None:
    path = _path(request, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"request": _facts(request, cell), "metrics": metrics, **environment()}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(facts, indent=2) + "\n")
    temporary.replace(path)
