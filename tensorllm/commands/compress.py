"""`tensorllm compress`: from a request to a compressed model and its report."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorllm.checkpoint.source import Source, check_name, resolve
from tensorllm.checkpoint.writer import check_target
from tensorllm.commands.allocate import TARGETS, allocated, budget_of
from tensorllm.commands.models import Loader, device_of, dtype_of
from tensorllm.commands.plugins import load_plugins
from tensorllm.compression.card import rewrite_card
from tensorllm.compression.folder import compress_folder
from tensorllm.compression.jobs import plan_jobs
from tensorllm.compression.model import compress
from tensorllm.compression.plan import Plan, plan_folder
from tensorllm.compression.report import CompressionReport
from tensorllm.compression.task import FORMATS, FolderTask, Format
from tensorllm.compression.units import open_checkpoint
from tensorllm.compressors.settings import make_compressor
from tensorllm.errors import UserError
from tensorllm.progress import Progress, quiet
from tensorllm.recipes import Recipe, default_recipe, read_recipe, short_names
from tensorllm.registry import one_of

# Settings of which one excludes the others: giving one drops the recipe's.
EXCLUSIVE = (("ranks", "energy", "error", *TARGETS), ("rho", "rank", *TARGETS))
Evaluate = Callable[[Any, Any, str], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class CompressRequest:
    """What the user asked for; None where a recipe or a default decides.

    Attributes:
        settings: the compressor's fields that were given.
        evaluate: dataset to score before and after.
        calibration: text for the modes that use data; `sequences` of it are drawn by `seed`.
        stream: calibrate on the model's layers one at a time, from disk.
        data_file: rows of `evaluate`, where they do not come from the hub; `allow_overlap` lets
            them be in the calibration text.
        plugins: modules to import first; they register compressors of their own.
    """

    model: str | None = None
    revision: str | None = None
    mode: str | None = None
    config: Path | None = None
    dataset: str | None = None
    layers: tuple[int, ...] | None = None
    all_layers: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    out: Path | None = None
    format: str = "dense"
    dtype: str | None = None
    device: str = "auto"
    overwrite: bool = False
    dry_run: bool = False
    evaluate: str | None = None
    calibration: Path | None = None
    sequences: int = 128
    seed: int = 0
    stream: bool = False
    data_file: Path | None = None
    allow_overlap: bool = False
    plugins: Sequence[str] = ()


def recipe_of(request: CompressRequest) -> Recipe:
    """Recipe file or shipped recipe with the request's own settings put on top."""
    base = None
    if request.config is not None:
        base = read_recipe(request.config)
        if request.mode is not None and request.mode != base.mode:
            raise UserError(
                f"--mode {request.mode} contradicts {base.name}, which says {base.mode}"
            )
    model = request.model or (base.model if base else None)
    if model is None:
        raise UserError("give --model: a short name, a local folder or a hub id (or --config FILE)")
    if base is None:
        if request.mode is None:
            raise UserError("give --mode: see `tensorllm list compressors` (or --config FILE)")
        if not any(target in request.settings for target in TARGETS):  # these are for whole models
            base = default_recipe(model, request.mode, request.dataset)
    if base is None:
        base = Recipe("command line", model, request.mode or "", None, {})
    given = dict(request.settings)
    kept = {key: value for key, value in base.settings.items() if not _excluded(key, given)}
    layers = None if request.all_layers else request.layers or base.layers
    if layers is None and base.notes and not request.all_layers:
        raise UserError(
            f"the layer of {base.name} was never published; give --layers, or find the best with "
            "`tensorllm search-ranks`"
        )
    return Recipe(base.name, model, base.mode, layers, kept | given, base.dataset, base.notes)


def run(
    request: CompressRequest,
    progress: Progress = quiet,
    evaluate: Evaluate | None = None,
) -> CompressionReport | Plan:
    """Do what was asked; `evaluate(model, tokenizer, dataset)` scores a model where wanted."""
    load_plugins(request.plugins)
    recipe = recipe_of(request)
    check_name(recipe.model)
    budget = budget_of(recipe.mode, recipe.settings)
    compressor = budget.compressor() if budget else make_compressor(recipe.mode, recipe.settings)
    one_of("--format", request.format, FORMATS)
    dtype = dtype_of(request.dtype)
    if request.out is not None:
        check_target(request.out, overwrite=request.overwrite)
    source = resolve(recipe.model, request.revision)
    if request.evaluate is not None:
        from tensorllm.evaluation.evaluate import make_dataset

        make_dataset(request.evaluate, data_file=request.data_file)  # refused before any work
    dataset = request.evaluate or short_names().get(recipe.model, {}).get("evaluate")
    scorer = _scorer(evaluate, dataset)
    task = FolderTask(
        source=source.folder,
        target=request.out or Path(),
        compressor=compressor,
        layers=recipe.layers,
        format=_format(request.format),
        device=device_of(request.device),
        dtype=dtype,
        overwrite=request.overwrite,
        model=source.name,
        revision=source.revision,
    )
    if request.stream and request.calibration is None:
        raise UserError("--stream is for --calibration FILE; without data, disk is streamed always")
    if request.calibration is not None:
        from tensorllm.commands.calibrate import calibrated, clear, planned

        if request.dry_run:
            return planned(task, request.calibration, **_drawn(request))
        task = calibrated(task, request.calibration, progress=progress, **_drawn(request))
    if budget is not None:
        task = allocated(task, budget, progress)
    if request.dry_run:
        return plan_folder(task)
    if request.out is None:
        return _in_memory(task, source, progress, scorer)
    report = _to_folder(task, progress, scorer)
    if request.calibration is not None:
        clear(task)
    return report


def _drawn(request: CompressRequest) -> dict[str, Any]:
    """How the calibration text is read; it must not be what is scored afterwards."""
    from tensorllm.commands.calibrate import accept, refuse_evaluated

    scored = None if request.allow_overlap else request.evaluate
    return {
        "sequences": request.sequences,
        "seed": request.seed,
        "stream": request.stream,
        "check": refuse_evaluated(scored, request.data_file) if scored else accept,
    }


Score = Callable[[Any, Any], dict[str, Any]]


def _scorer(evaluate: Evaluate | None, dataset: str | None) -> Score | None:
    if evaluate is None or dataset is None:
        return None
    return lambda model, tokenizer: evaluate(model, tokenizer, dataset)


def _in_memory(
    task: FolderTask, source: Source, progress: Progress, score: Score | None
) -> CompressionReport:
    _, roles = open_checkpoint(task.source)  # refuses a broken one before transformers reads it
    plan_jobs(task.compressor, roles, range(roles.layers) if task.layers is None else task.layers)
    loader = Loader(task.source, task.dtype, task.device)
    model = loader()
    tokenizer = loader.tokenizer() if score else None
    before = score(model, tokenizer) if score else None
    report = compress(model, task.compressor, task.layers, progress=progress)
    report.model, report.revision = source.name, source.revision
    if score:
        report.evaluation = {"before": before, "after": score(model, tokenizer)}
    return report


def _to_folder(task: FolderTask, progress: Progress, score: Score | None) -> CompressionReport:
    original = Loader(task.source, task.dtype, task.device)
    tokenizer = original.tokenizer() if score else None
    report = compress_folder(task, progress)
    if score:
        before = score(original(), tokenizer)
        after = score(Loader(task.target, device=task.device)(), tokenizer)
        report.evaluation = {"before": before, "after": after}
        temporary = task.target / "report.json.tmp"
        temporary.write_text(json.dumps(report.to_json(), indent=2) + "\n")
        temporary.replace(task.target / "report.json")
        rewrite_card(task.target)
    return report


def _excluded(key: str, given: Mapping[str, Any]) -> bool:
    return key not in given and any(
        key in group and any(name in given for name in group) for group in EXCLUSIVE
    )


def _format(name: str) -> Format:
    return "factored" if name == "factored" else "dense"
