"""`tensorllm reproduce`: the published tables, ours beside theirs, cell by cell."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorllm.commands import search_ranks
from tensorllm.commands.cells import Cell, cells
from tensorllm.commands.models import Loader, dtype_of
from tensorllm.commands.places import check_data, data_file, weights_of
from tensorllm.commands.search import SearchRequest
from tensorllm.compression.engine import compressed
from tensorllm.environment import environment
from tensorllm.errors import Incomplete, UserError
from tensorllm.evaluation.evaluate import evaluate_model, make_dataset
from tensorllm.progress import Progress, quiet

PROTOCOL = "paper"
RANKS = ("r1", "r2", "r3")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceRequest:
    """What is to be reproduced.

    Attributes:
        model: the short name whose published cells are run.
        weights: local folder of its weights, instead of the hub.
        layer: layer for the cells whose layer was never published, instead of a search.
        candidates: layers among which it is searched; None: all.
        data: folder with `<dataset>.jsonl` (or json, csv, parquet), or with copies of the hub's
            repositories, instead of the hub.
        out: folder that keeps a file per finished cell; these are not run again.
    """

    model: str
    weights: str | None = None
    datasets: Sequence[str] | None = None
    data: Path | None = None
    layer: int | None = None
    candidates: tuple[int, ...] | None = None
    limit: int | None = None
    dtype: str | None = None
    device: str = "cpu"
    out: Path = Path("reproduction")

    def searches(self, cell: Cell) -> bool:
        """Whether the cell's layer has to be found."""
        return cell.searched and self.layer is None


@dataclass(frozen=True, slots=True)
class Outcome:
    """A cell and its metrics; `origin` is where its layer comes from."""

    cell: Cell
    metrics: dict[str, Any]
    origin: str

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.cell.model,
            "dataset": self.cell.dataset,
            "cell": self.cell.name,
            "layers": self.metrics.get("layers"),
            "layers_origin": self.origin,
            "published": self.cell.published,
            "ours": self.metrics,
        }


def reproduce(request: ReproduceRequest, progress: Progress = quiet) -> list[Outcome]:
    """Run every published cell that is not finished yet; each is kept as soon as it is.

    Raises:
        UserError: weights or data are missing, or the folder holds another run's cells.
    """
    return reproduce_cells(cells(request.model, request.datasets), request, progress)


def reproduce_cells(
    wanted: Sequence[Cell], request: ReproduceRequest, progress: Progress = quiet
) -> list[Outcome]:
    """The same for the given cells."""
    kept = [_read(request, cell) for cell in wanted]
    to_do = [cell for cell, metrics in zip(wanted, kept, strict=True) if metrics is None]
    new = _run(to_do, request, lambda done, what: progress(done, len(to_do), what)) if to_do else []
    following = iter(new)
    found = [next(following) if metrics is None else metrics for metrics in kept]
    return [Outcome(c, m, _origin(c, request)) for c, m in zip(wanted, found, strict=True)]


def _run(
    to_do: Sequence[Cell], request: ReproduceRequest, progress: Callable[[int, str], None]
) -> list[dict[str, Any]]:
    """The metrics of these cells, in their order."""
    check_data(list(dict.fromkeys(cell.dataset for cell in to_do)), request.data)
    folder = weights_of(request.model, request.weights).folder
    loader = Loader(folder, dtype_of(request.dtype), request.device)
    model = tokenizer = None
    found: dict[int, dict[str, Any]] = {}
    # Searches load a model of their own: they come first, so that there is one at a time.
    order = sorted(range(len(to_do)), key=lambda i: not request.searches(to_do[i]))
    for done, i in enumerate(order):
        cell = to_do[i]
        progress(done, f"{cell.dataset} {cell.name}")
        if request.searches(cell):
            found[i] = search_cell(cell, folder, request)
        else:
            if model is None:
                model, tokenizer = loader(), loader.tokenizer()
            found[i] = score_cell(cell, model, tokenizer, request)
        _write(request, cell, found[i])
    progress(len(to_do), "done")
    return [found[i] for i in range(len(to_do))]


def score_cell(cell: Cell, model: Any, tokenizer: Any, request: ReproduceRequest) -> dict[str, Any]:
    """Accuracy and loss of one cell, by the papers' protocol on their test part."""
    file = data_file(cell.dataset, request.data)
    data = make_dataset(cell.dataset, data_file=file, limit=request.limit)
    if cell.recipe is None:
        return evaluate_model(model, tokenizer, data, PROTOCOL)
    layout = {} if cell.layout is None else {"layout": cell.layout}
    layers = cell.recipe.layers if cell.recipe.layers is not None else (request.layer or 0,)
    with compressed(model, cell.recipe.compressor(**layout), layers) as report:
        metrics = evaluate_model(model, tokenizer, data, PROTOCOL)
    facts = {"ratios": report.ratios(), "settings": report.settings, "layers": list(layers)}
    return metrics | facts


def search_cell(cell: Cell, folder: Path, request: ReproduceRequest) -> dict[str, Any]:
    """The same for a cell whose layer was never published: the best one on the validation part.

    Everything else is the recipe's. The study stays in the output folder: a search that was killed
    goes on from its finished trials.
    """
    study = _path(request, cell).with_suffix("")
    found = search_ranks.run(search_of(cell, folder, request, study)).results
    winner = dict(found["winner"])
    test, validation, layers = (winner.pop(name) for name in ("test", "validation", "layers"))
    facts = {"settings": winner, "layers": layers, "validation": validation}
    return {**test, **facts, "trials": found["trials"]}


def search_of(cell: Cell, folder: Path, request: ReproduceRequest, study: Path) -> SearchRequest:
    """The search over layers that finds a cell's."""
    assert cell.recipe is not None
    settings = dict(cell.recipe.settings)
    if cell.layout is not None:
        settings["layout"] = cell.layout
    chosen: dict[str, Any] = {}
    for name, rank in zip(RANKS, settings.pop("ranks", ()), strict=False):
        chosen[name] = (rank,)
    if "rho" in settings:
        chosen["rho"] = (settings.pop("rho"),)
    if "matrices" in settings:
        chosen["matrices"] = ("+".join(settings.pop("matrices")),)
    return SearchRequest(
        model=str(folder),
        dataset=cell.dataset,
        data_file=data_file(cell.dataset, request.data),
        mode=cell.recipe.mode,
        protocol=PROTOCOL,
        limit=request.limit,
        dtype=request.dtype,
        layers=request.candidates,
        fixed=settings,
        sampler="grid",
        study=study,
        device=request.device,
        **chosen,
    )


def _origin(cell: Cell, request: ReproduceRequest) -> str:
    if cell.recipe is None:
        return ""
    return "published" if not cell.searched else "searched" if request.searches(cell) else "given"


def _path(request: ReproduceRequest, cell: Cell) -> Path:
    name = cell.name.replace(" (", "-").rstrip(")")
    return request.out / cell.model / cell.dataset / f"{name}.json"


def _facts(request: ReproduceRequest, cell: Cell) -> dict[str, Any]:
    """What a kept cell must agree with, or it is another experiment."""
    return {
        "weights": request.weights,
        "data": None if request.data is None else str(request.data),
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
        asked, metrics = dict(kept["request"]), dict(kept["metrics"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a result of reproduce; move it away") from None
    wanted = _facts(request, cell)
    if asked == wanted:
        return metrics
    raise UserError(
        f"{path} is of another run: {_differences(asked, wanted)}; give another --out, or the same "
        "settings"
    )


def _differences(asked: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} was {asked.get(name)} and is {value}"
        for name, value in wanted.items()
        if asked.get(name) != value
    )


def _write(request: ReproduceRequest, cell: Cell, metrics: dict[str, Any]) -> None:
    path = _path(request, cell)
    facts = {"request": _facts(request, cell), "metrics": metrics, **environment()}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(facts, indent=2) + "\n")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Incomplete(
            f"cannot keep {path}: {error.strerror or error}; run the same command again to go on"
        ) from None
