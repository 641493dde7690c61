"""`tensorllm compress`: from a request to a compressed model and its report."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from tensorllm.calibration.fit import fit_sizes
from tensorllm.calibration.overlap import refuse_evaluated
from tensorllm.calibration.ranks import joined
from tensorllm.calibration.sequences import Calibration, text_asked_for
from tensorllm.checkpoint.loader import Loader, device_of, dtype_of
from tensorllm.checkpoint.source import Source, resolve
from tensorllm.checkpoint.writer import check_target
from tensorllm.compression.card import REPORT, rewrite_card
from tensorllm.compression.dry_run import DryRun, dry_run
from tensorllm.compression.engine import compress, compress_folder
from tensorllm.compression.formats import COMPRESSED, Format, chosen_format
from tensorllm.compression.plan import plan_jobs
from tensorllm.compression.prepare import help_to_fit
from tensorllm.compression.report import CompressionReport
from tensorllm.compression.task import FolderTask
from tensorllm.compression.units import open_checkpoint
from tensorllm.compressors import COMPRESSORS, Compressor
from tensorllm.compressors.budget import TARGETS, Budget
from tensorllm.compressors.settings import make_compressor
from tensorllm.errors import UserError
from tensorllm.io import write_json
from tensorllm.lightning.loggers import metric_log
from tensorllm.model_names import check_name
from tensorllm.options import refuse_idle
from tensorllm.progress import Progress, quiet
from tensorllm.recipes import Recipe, budget_of, completed, recipe_of
from tensorllm.registry import load_plugins
from tensorllm.requests.compress import SEQUENCES, CompressRequest


def run(request: CompressRequest, progress: Progress = quiet) -> CompressionReport | DryRun | None:
    """Compress as requested, and score the model before and after if asked to.

    Started by `torchrun`, all processes take part in the fit and the first one does the rest; the
    others return None.

    Raises:
        UserError: the request contradicts itself, the recipe, the model or the folder.
        Incomplete: the folder could not be finished; the same request resumes it.
    """
    load_plugins(request.plugins)
    recipe = recipe_of(request)
    request = completed(request, recipe)
    with joined() as ranks, metric_log(request.logger, request.log_dir, "compress") as log:
        task, source = _task(request, recipe)
        if ranks.size > 1 and (task.calibration is None or task.target is None):
            raise UserError(
                "several processes (torchrun) are for --calibration FILE and --out FOLDER"
            )
        if ranks.rank and not request.dry_run:
            help_to_fit(task)
            return None
        if request.dry_run:
            return dry_run(task)
        score = None
        if (dataset := request.evaluate) is not None:
            from tensorllm.evaluation.evaluate import dataset_scorer

            scorer = dataset_scorer(request.data_file, request.limit, progress)
            score = lambda model, tokenizer: scorer(model, tokenizer, dataset)  # noqa: E731
        if request.out is None:
            report = _in_memory(task, source, progress, score)
        else:
            report = _to_folder(task, progress, score)
        log.compression(report.to_json())
        report.logged_to = log.folder
    return report


def run_sizes(request: CompressRequest, progress: Progress = quiet) -> list[CompressionReport]:
    """Write a folder for each of several ratios, all from one measurement of the calibration text.

    Raises:
        UserError: as `run`; also without `calibration` and `out`, or if sizes must be searched for.
        Incomplete: a folder could not be finished; earlier ones are complete.
    """
    ratios = request.target_ratio
    assert isinstance(ratios, tuple), "asked only for several"
    if request.calibration is None or request.out is None or request.stream or request.dry_run:
        raise UserError(
            "several ratios need --calibration FILE and --out FOLDER, and no --stream or --dry-run"
        )
    load_plugins(request.plugins)
    made = []
    for ratio in ratios:
        one = replace(request, target_ratio=ratio, out=request.out / f"{ratio:g}")
        made.append(_task(completed(one, recipe_of(one)), recipe_of(one))[0])
    first = made[0]
    assert first.calibration is not None
    for task in made:
        dry_run(task)  # refuses what can be refused before the fit
    targets = [Budget(target_ratio=ratio) for ratio in ratios]
    loader = Loader(first.source, first.dtype, first.device, language=False)
    model = loader.quickest(overflows=False)()
    fits = fit_sizes(
        first.strategy, model, first.calibration, targets, first.layers, progress=progress
    )
    del model
    reports = []
    for task, fitted in zip(made, fits, strict=True):
        final = replace(task, compressor=fitted, budget=None, calibration=None)
        with metric_log(request.logger, request.log_dir, "compress") as log:
            reports.append(compress_folder(final, progress))
            log.compression(reports[-1].to_json())
            reports[-1].logged_to = log.folder
    return reports


def _task(request: CompressRequest, recipe: Recipe) -> tuple[FolderTask, Source]:
    """The task of a completed request, and its model.

    Whatever can be refused without the model is refused before it is downloaded.
    """
    check_name(recipe.model)
    budget = budget_of(recipe.mode, recipe.settings)
    usual = "factored" if "target_bytes" in recipe.settings else "dense"
    format = cast(Format, chosen_format(request.format or usual, COMPRESSED))
    dtype = dtype_of(request.dtype)
    if request.out is not None:
        check_target(request.out, overwrite=request.overwrite)
    if request.stream and request.calibration is None:
        raise UserError("--stream is for --calibration FILE; without data, disk is streamed always")
    if request.stream and request.out is None:
        raise UserError("--stream needs --out FOLDER: what is fitted is kept beside it meanwhile")
    refuse_idle(request)
    if budget is None:
        make_compressor(recipe.mode, recipe.settings)
    source = resolve(recipe.model, request.revision)
    if request.evaluate is not None:
        from tensorllm.evaluation.evaluate import make_dataset

        make_dataset(request.evaluate, data_file=request.data_file)
    compressor = compressor_of(recipe, budget, source)
    if request.distill_text is not None and not compressor.training_steps:
        raise UserError("--distill-text does nothing without --distill-steps")
    task = FolderTask(
        source=source.folder,
        target=request.out,
        compressor=compressor,
        layers=recipe.layers,
        budget=budget,
        calibration=_text(request, source, dtype),
        stream=request.stream,
        format=format,
        device=device_of(request.device or "auto", decomposes=True),
        dtype=dtype,
        overwrite=request.overwrite,
        model=source.name,
        revision=source.revision,
    )
    return task, source


def compressor_of(recipe: Recipe, budget: Budget | None, source: Source) -> Compressor:
    """The strategy of a recipe; at its smallest sizes if a budget will choose them."""
    if budget is None:
        return make_compressor(recipe.mode, recipe.settings)
    rest = {key: value for key, value in recipe.settings.items() if key not in TARGETS}
    _, roles = open_checkpoint(source.folder)
    return make_compressor(recipe.mode, COMPRESSORS[recipe.mode].budget_settings(roles.spec, rest))


def _text(request: CompressRequest, source: Source, dtype: Any) -> Calibration | None:
    """The calibration text; it must not be what is scored afterwards."""
    if not (request.calibration or request.sampled):
        return None
    loader = Loader(source.folder, dtype)
    tokenizer = loader.tokenizer()
    text = text_asked_for(
        request.calibration,
        request.sampled,
        tokenizer,
        loader.config(),
        request.sequences or SEQUENCES,
        request.seed or 0,
        request.length,
        request.distill_text,
    )
    if text is not None and request.evaluate is not None and not request.allow_overlap:
        refuse_evaluated(text, tokenizer, request.evaluate, request.data_file)
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
    in_bytes = task.aim is not None and task.aim.target_bytes is not None
    if (score or task.calibration) and not in_bytes:  # bytes count the model as held
        loader = loader.quickest(overflows=score is not None)
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
    original = Loader(task.source, task.dtype, task.device).quickest()
    tokenizer = original.tokenizer() if score else None
    report = compress_folder(task, progress)
    if score:
        before = score(original(), tokenizer)
        after = score(Loader(task.folder, original.dtype, task.device)(), tokenizer)
        report.evaluation = {"before": before, "after": after}
        write_json(task.folder / REPORT, report.to_json())
        rewrite_card(task.folder)
    return report
