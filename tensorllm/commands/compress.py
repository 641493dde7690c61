"""`tensorllm compress`: from a request to a compressed model and its report."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorllm.calibration.overlap import refuse_evaluated
from tensorllm.calibration.sequences import Calibration, read_calibration
from tensorllm.checkpoint.loader import Loader, device_of, dtype_of
from tensorllm.checkpoint.source import Source, check_name, resolve
from tensorllm.checkpoint.writer import check_target
from tensorllm.commands.plugins import load_plugins
from tensorllm.compression.card import rewrite_card
from tensorllm.compression.dry_run import DryRun, dry_run
from tensorllm.compression.engine import compress, compress_folder
from tensorllm.compression.plan import plan_jobs
from tensorllm.compression.report import CompressionReport
from tensorllm.compression.task import FORMATS, FolderTask
from tensorllm.compression.units import open_checkpoint
from tensorllm.compressors import COMPRESSORS, Compressor
from tensorllm.compressors.budget import TARGETS, Budget
from tensorllm.compressors.settings import fields_of, make_compressor
from tensorllm.errors import UserError
from tensorllm.progress import Progress, quiet
from tensorllm.recipes import Recipe, default_recipe, read_recipe, short_names
from tensorllm.registry import one_of

# Settings of which one excludes the others: giving one drops the recipe's.
EXCLUSIVE = (("ranks", "energy", "error", *TARGETS), ("rho", "rank", *TARGETS))
LENGTH = 512  # tokens of a calibration sequence, at most
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


def run(
    request: CompressRequest,
    progress: Progress = quiet,
    evaluate: Evaluate | None = None,
) -> CompressionReport | DryRun:
    """Do what was asked; `evaluate(model, tokenizer, dataset)` scores a model where wanted."""
    load_plugins(request.plugins)
    recipe = recipe_of(request)
    check_name(recipe.model)
    budget = budget_of(recipe.mode, recipe.settings)
    one_of("--format", request.format, FORMATS)
    dtype = dtype_of(request.dtype)
    if request.out is not None:
        check_target(request.out, overwrite=request.overwrite)
    if request.stream and request.calibration is None:
        raise UserError("--stream is for --calibration FILE; without data, disk is streamed always")
    if request.stream and request.out is None:
        raise UserError("--stream needs --out FOLDER: what is fitted is kept beside it meanwhile")
    if budget is None:  # refused before the model is fetched
        make_compressor(recipe.mode, recipe.settings)
    source = resolve(recipe.model, request.revision)
    dataset = scored_on(request, recipe.model)
    scored = request.evaluate is not None or evaluate is not None
    score = None
    if evaluate is not None and dataset is not None:
        score = lambda model, tokenizer: evaluate(model, tokenizer, dataset)  # noqa: E731
    task = FolderTask(
        source=source.folder,
        target=request.out,
        compressor=compressor_of(recipe, budget, source),
        layers=recipe.layers,
        budget=budget,
        calibration=_text(request, source, dtype, dataset if scored else None),
        stream=request.stream,
        format="factored" if request.format == "factored" else "dense",
        device=device_of(request.device),
        dtype=dtype,
        overwrite=request.overwrite,
        model=source.name,
        revision=source.revision,
    )
    if request.dry_run:
        return dry_run(task)
    if request.out is None:
        return _in_memory(task, source, progress, score)
    return _to_folder(task, progress, score)


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


def budget_of(mode: str, settings: Mapping[str, Any]) -> Budget | None:
    """The target size among the settings; None where there is none, or the mode takes it itself."""
    wanted = {name: settings[name] for name in TARGETS if name in settings}
    return None if not wanted or set(wanted) <= set(fields_of(mode)) else Budget(**wanted)


def compressor_of(recipe: Recipe, budget: Budget | None, source: Source) -> Compressor:
    """The strategy of a recipe; where a budget is to choose its sizes, at the smallest."""
    if budget is None:
        return make_compressor(recipe.mode, recipe.settings)
    rest = {key: value for key, value in recipe.settings.items() if key not in TARGETS}
    _, roles = open_checkpoint(source.folder)
    return make_compressor(recipe.mode, COMPRESSORS[recipe.mode].budget_settings(roles.spec, rest))


def scored_on(request: CompressRequest, model: str) -> str | None:
    """The dataset that the result is scored on; refused before any work where it cannot be."""
    if request.evaluate is not None:
        from tensorllm.evaluation.evaluate import make_dataset

        make_dataset(request.evaluate, data_file=request.data_file)
    return request.evaluate or short_names().get(model, {}).get("evaluate")


def _text(
    request: CompressRequest, source: Source, dtype: Any, dataset: str | None
) -> Calibration | None:
    """The calibration text; it must not be what is scored afterwards."""
    if request.calibration is None:
        return None
    loader = Loader(source.folder, dtype)
    tokenizer = loader.tokenizer()
    context = getattr(loader.config(), "max_position_embeddings", None) or LENGTH
    length = min(LENGTH, context)
    text = read_calibration(
        request.calibration,
        tokenizer,
        sequences=request.sequences,
        length=length,
        seed=request.seed,
    )
    if dataset is not None and not request.allow_overlap:
        refuse_evaluated(text, tokenizer, dataset, request.data_file)
    return text


Score = Callable[[Any, Any], dict[str, Any]]


def _in_memory(
    task: FolderTask, source: Source, progress: Progress, score: Score | None
) -> CompressionReport:
    _, roles = open_checkpoint(task.source)  # refuses a broken one before transformers reads it
    strategy = task.compressor
    assert isinstance(strategy, Compressor), "the command line fits nothing beforehand"
    plan_jobs(strategy, roles, task.layers)
    loader = Loader(task.source, task.dtype, task.device, language=score is not None)
    model = loader()
    tokenizer = loader.tokenizer() if score else None
    before = score(model, tokenizer) if score else None
    report = compress(
        model,
        strategy,
        task.layers,
        budget=task.budget,
        calibration=task.calibration,
        progress=progress,
    )
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
        after = score(Loader(task.folder, device=task.device)(), tokenizer)
        report.evaluation = {"before": before, "after": after}
        temporary = task.folder / "report.json.tmp"
        temporary.write_text(json.dumps(report.to_json(), indent=2) + "\n")
        temporary.replace(task.folder / "report.json")
        rewrite_card(task.folder)
    return report


def _excluded(key: str, given: Mapping[str, Any]) -> bool:
    return key not in given and any(
        key in group and any(name in given for name in group) for group in EXCLUSIVE
    )
