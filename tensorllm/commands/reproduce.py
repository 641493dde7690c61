"""`tensorllm reproduce`: measure the published tables again, cell by cell."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tensorllm.checkpoint.loader import Loader, device_of, dtype_of
from tensorllm.commands import search
from tensorllm.errors import UserError
from tensorllm.io import check_writable
from tensorllm.model_names import short_names
from tensorllm.progress import Progress, quiet
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
from tensorllm.requests.reproduce import ReproduceRequest
from tensorllm.requests.search import SearchRequest


def reproduce(request: ReproduceRequest, progress: Progress = quiet) -> list[Outcome]:
    """Run every published cell that is not finished yet; each is saved as soon as it is.

    Raises:
        UserError: weights or data are missing, the folder holds another run's cells or cannot be
            written, or `layer` fits none of the cells.
    """
    request = replace(request, device=device_of(request.device, decomposes=True))
    check_writable(request.out)
    return _reproduce(_wanted(request), request, progress)


def rehearse(request: ReproduceRequest, progress: Progress = quiet) -> ReproductionPlan:
    """Run every cell on a tiny random model of the architecture, and predict the real run's cost.

    Nothing is kept of the tiny runs.

    Args:
        request: as for the real run.
        progress: called with (cells that ran, cells in all, the cell).
    """
    request = replace(request, device=device_of(request.device, decomposes=True))
    wanted = _wanted(request)
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
        _reproduce(tiny.cells, on_tiny, progress)
    where = request.weights, request.data
    counts = {name: count_examples(request.model, name, *where, request.limit) for name in datasets}
    dtype = dtype_of(request.dtype) or getattr(torch, short_names()[request.model]["dtype"])
    searched = [_searches(cell, request) for cell in wanted]
    predicted, plain = (
        predict(wanted, counts, searched, dtype=kind, device=request.device)
        for kind in (dtype, torch.float32)
    )
    seconds, other = (sum(r.seconds for r in every) for every in (predicted, plain))
    faster = other if other < seconds / 2 else None
    return ReproductionPlan(request.model, hub_id(request.model), predicted, lacking, faster)


def _wanted(request: ReproduceRequest) -> list[Cell]:
    """The requested cells; refuses a layer that none of them can use."""
    wanted = cells(request.model, request.datasets)
    layers = short_names()[request.model]["sizes"]["layers"]
    if request.layer is not None and not 0 <= request.layer < layers:
        raise UserError(f"--layer must be in 0..{layers - 1}, got {request.layer}")
    if request.layer is not None and not any(cell.searched for cell in wanted):
        raise UserError("--layer does nothing here: the layers of all these cells were published")
    return wanted


def _reproduce(
    wanted: Sequence[Cell], request: ReproduceRequest, progress: Progress
) -> list[Outcome]:
    kept = [_file(cell, request).read() for cell in wanted]
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
    # Searches load a model of their own: they run first, so that only one is in memory.
    order = sorted(range(len(to_do)), key=lambda i: not _searches(to_do[i], request))
    for done, i in enumerate(order):
        cell = to_do[i]
        progress(done, f"{cell.dataset} {cell.name}")
        if _searches(cell, request):
            found[i] = _search_cell(cell, folder, request)
        else:
            if model is None:
                model, tokenizer = loader(), loader.tokenizer()
            file = data_file(cell.dataset, request.data)
            found[i] = score_cell(
                cell, model, tokenizer, layer=request.layer, data_file=file, limit=request.limit
            )
        _file(cell, request).write(found[i])
    progress(len(to_do), "done")
    return [found[i] for i in range(len(to_do))]


def _search_cell(cell: Cell, folder: Path, request: ReproduceRequest) -> dict[str, Any]:
    """Metrics of a cell whose layer was never published: the best layer on the validation part.

    All other settings are the recipe's. The study stays in the output folder, so that a search that
    was killed resumes from its finished trials.
    """
    found = search.run(_search_of(cell, folder, request)).results
    winner = dict(found["winner"])
    test, validation, layers = (winner.pop(name) for name in ("test", "validation", "layers"))
    facts = {"settings": winner, "layers": layers, "validation": validation}
    return {**test, **facts, "trials": found["trials"]}


def _search_of(cell: Cell, folder: Path, request: ReproduceRequest) -> SearchRequest:
    """The search over layers for a cell."""
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
        min_ratio=0,  # a published rank may be large
        sampler="grid",
        study=_path(cell, request).with_suffix(""),
        device=request.device,
        **grid,
    )


def _searches(cell: Cell, request: ReproduceRequest) -> bool:
    """Whether the cell's layer must be searched."""
    return cell.searched and request.layer is None


def _origin(cell: Cell, request: ReproduceRequest) -> str:
    """Where the cell's layer comes from."""
    if cell.recipe is None:
        return ""
    if not cell.searched:
        return "published"
    return "searched" if _searches(cell, request) else "given"


def _path(cell: Cell, request: ReproduceRequest) -> Path:
    """Where the finished cell is saved."""
    name = cell.name.replace(" (", "-").rstrip(")")
    return request.out / cell.model / cell.dataset / f"{name}.json"


def _file(cell: Cell, request: ReproduceRequest) -> CellFile:
    """The file of a cell, with the facts that another run must agree with."""
    facts = {
        "weights_identity": weights_identity(request.model, request.weights),
        "data_identity": data_identity(cell.dataset, request.data),
        "limit": request.limit,
        "dtype": request.dtype,
        "protocol": PROTOCOL,
        "layer": request.layer if cell.searched else None,
    }
    return CellFile(_path(cell, request), facts)
