"""`tensorllm reproduce`: the published tables, measured beside published, cell by cell."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tensorllm.checkpoint.loader import Loader, dtype_of
from tensorllm.commands import search
from tensorllm.progress import Progress, quiet
from tensorllm.recipes import short_names
from tensorllm.reproduction.inputs import (
    check_data,
    data_file,
    data_identity,
    hub_id,
    missing,
    weights_identity,
    weights_of,
)
from tensorllm.reproduction.published import (
    PROTOCOL,
    Cell,
    CellFile,
    Outcome,
    cells,
    score_cell,
    search_settings,
)
from tensorllm.reproduction.rehearsal import (
    ReproductionPlan,
    count_examples,
    predict,
    tiny_inputs,
)
from tensorllm.search.request import SearchRequest
from tensorllm.search.worker import Rules


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

    def origin(self, cell: Cell) -> str:
        """Where the cell's layer comes from."""
        if cell.recipe is None:
            return ""
        return "published" if not cell.searched else "searched" if self.searches(cell) else "given"

    def path(self, cell: Cell) -> Path:
        """Where the finished cell is kept."""
        name = cell.name.replace(" (", "-").rstrip(")")
        return self.out / cell.model / cell.dataset / f"{name}.json"

    def file(self, cell: Cell) -> CellFile:
        """The same with what another run must agree with."""
        facts = {
            "weights_identity": weights_identity(self.model, self.weights),
            "data_identity": data_identity(cell.dataset, self.data),
            "limit": self.limit,
            "dtype": self.dtype,
            "protocol": PROTOCOL,
            "layer": self.layer if cell.searched else None,
        }
        return CellFile(self.path(cell), facts)


def reproduce(request: ReproduceRequest, progress: Progress = quiet) -> list[Outcome]:
    """Run every published cell that is not finished yet; each is kept as soon as it is.

    Raises:
        UserError: weights or data are missing, or the folder holds another run's cells.
    """
    return _reproduce(cells(request.model, request.datasets), request, progress)


def rehearse(request: ReproduceRequest) -> ReproductionPlan:
    """Run every cell on a tiny random model of the architecture, of which nothing is kept, and
    predict what the real run takes.
    """
    wanted = cells(request.model, request.datasets)
    datasets = list(dict.fromkeys(cell.dataset for cell in wanted))
    lacking = missing(request.model, datasets, request.weights, request.data)
    with tiny_inputs(request.model, wanted) as tiny:
        on_tiny = replace(
            request,
            weights=str(tiny.folder),
            data=tiny.folder,
            out=tiny.folder / "out",
            limit=None,
            dtype=None,
            layer=None if request.layer is None else 0,
            candidates=tiny.layers,
        )
        _reproduce(tiny.cells, on_tiny, quiet)
    where = request.weights, request.data
    counts = {name: count_examples(request.model, name, *where, request.limit) for name in datasets}
    dtype = dtype_of(request.dtype) or getattr(torch, short_names()[request.model]["dtype"])
    searched = [request.searches(cell) for cell in wanted]
    predicted, plain = (
        predict(wanted, counts, searched, dtype=kind, device=request.device)
        for kind in (dtype, torch.float32)
    )
    seconds, other = (sum(r.seconds for r in every) for every in (predicted, plain))
    faster = other if other < seconds / 2 else None
    return ReproductionPlan(request.model, hub_id(request.model), predicted, lacking, faster)


def _reproduce(
    wanted: Sequence[Cell], request: ReproduceRequest, progress: Progress
) -> list[Outcome]:
    kept = [request.file(cell).read() for cell in wanted]
    to_do = [cell for cell, metrics in zip(wanted, kept, strict=True) if metrics is None]
    new = _run(to_do, request, lambda done, what: progress(done, len(to_do), what)) if to_do else []
    following = iter(new)
    found = [next(following) if metrics is None else metrics for metrics in kept]
    return [Outcome(c, m, request.origin(c)) for c, m in zip(wanted, found, strict=True)]


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
            found[i] = _search_cell(cell, folder, request)
        else:
            if model is None:
                model, tokenizer = loader(), loader.tokenizer()
            file = data_file(cell.dataset, request.data)
            found[i] = score_cell(
                cell, model, tokenizer, layer=request.layer, data_file=file, limit=request.limit
            )
        request.file(cell).write(found[i])
    progress(len(to_do), "done")
    return [found[i] for i in range(len(to_do))]


def _search_cell(cell: Cell, folder: Path, request: ReproduceRequest) -> dict[str, Any]:
    """Metrics of a cell whose layer was never published: the best one on the validation part.

    Everything else is the recipe's. The study stays in the output folder: a search that was killed
    goes on from its finished trials.
    """
    found = search.run(_search_of(cell, folder, request)).results
    winner = dict(found["winner"])
    test, validation, layers = (winner.pop(name) for name in ("test", "validation", "layers"))
    facts = {"settings": winner, "layers": layers, "validation": validation}
    return {**test, **facts, "trials": found["trials"]}


def _search_of(cell: Cell, folder: Path, request: ReproduceRequest) -> SearchRequest:
    """The search over layers that finds a cell's."""
    assert cell.recipe is not None
    fixed, grid = search_settings(cell)
    return SearchRequest(
        model=str(folder),
        dataset=cell.dataset,
        data_file=data_file(cell.dataset, request.data),
        mode=cell.recipe.mode,
        protocol=PROTOCOL,
        limit=request.limit,
        dtype=request.dtype,
        layers=request.candidates,
        fixed=fixed,
        rules=Rules(min_ratio=0),  # a published rank may be large
        sampler="grid",
        study=request.path(cell).with_suffix(""),
        device=request.device,
        **grid,
    )
