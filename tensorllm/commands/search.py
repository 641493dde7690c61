"""`tensorllm search-ranks`: search in one process or several, then test the winner."""

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

from optuna.trial import FrozenTrial

from tensorllm.checkpoint.writer import CONFIG
from tensorllm.errors import UserError
from tensorllm.io import check_writable
from tensorllm.lightning.loggers import metric_log
from tensorllm.progress import Progress, quiet
from tensorllm.registry import load_plugins
from tensorllm.requests.search import SearchRequest
from tensorllm.search.composition import Step, best_of, composed, on_top
from tensorllm.search.conclusion import (
    RECIPE,
    RESULTS,
    TRIALS,
    SearchResult,
    conclude,
    write_files,
    write_trials,
)
from tensorllm.search.processes import WAIT, check_workers, run_workers
from tensorllm.search.queue import TrialQueue, infeasible
from tensorllm.search.selection import half_width, ranked
from tensorllm.search.storage import JOURNAL, check_storage, storage_errors
from tensorllm.search.study import Study

LOG = logging.getLogger(__name__)

FEW = 100  # validation examples; with fewer, ten points may be chance

OnTrials = Callable[[Sequence[FrozenTrial]], None]


def run(request: SearchRequest, progress: Progress = quiet) -> SearchResult:
    """Search, and score the winner on the test part.

    Args:
        request: what is searched, and how.
        progress: called with (trials done, trials in all, the best so far), then with (test
            examples scored, examples in all, which model).

    Raises:
        UserError: the request does not fit the model, the data or the study.
        Incomplete: the study cannot be written, or no trial was examined in full.
    """
    check_workers(request.workers)
    load_plugins(request.plugins)
    with ExitStack() as stack:
        log = stack.enter_context(metric_log(request.logger, request.log_dir, "search"))
        folder = _folder(request, stack)
        if request.storage is not None:
            check_storage(request.storage)
        study = Study(request)
        _warn(study)
        queue = stack.enter_context(closing(study.queue(folder)))
        with storage_errors("searching"):
            _explore(study, queue, folder, progress, log.trials)
            steps = [best_of(study, queue)]
            while len(steps) < request.compose:
                step = _next(study, queue, folder, steps, progress)
                if step is None:
                    break
                steps.append(step)
            result = conclude(study, queue, steps, progress)
            log.search(result.results)
            if request.study is not None:
                write_trials(folder, study, steps[0].trials)
                write_files(folder, study, composed(steps), result)
        return replace(result, logged_to=log.folder)


def _folder(request: SearchRequest, stack: ExitStack) -> Path:
    """The study's folder: the given one, or a temporary one that `stack` removes."""
    if request.study is not None:
        if (request.study / CONFIG).is_file():
            raise UserError(f"--study {request.study} is a model's folder; give another folder")
        names = {path.name for path in request.study.glob("*")}
        foreign = ", ".join(sorted(names & {RECIPE, RESULTS}))
        if foreign and not names & {JOURNAL, TRIALS}:  # it would be overwritten
            raise UserError(
                f"--study {request.study} holds {foreign} that no search made; give another folder"
            )
        check_writable(request.study)
        return request.study
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tensorllm-search-")))


def _explore(
    study: Study,
    queue: TrialQueue,
    folder: Path,
    progress: Progress,
    on_trials: OnTrials | None = None,
) -> None:
    """Examine every trial of a study, with the requested number of workers."""
    study.fill(queue)
    study.original(queue)

    def report(study: Study, queue: TrialQueue) -> None:
        trials = queue.trials()
        if on_trials is not None:
            on_trials(trials)
        # Infeasible trials are replaced by the sampler and do not count as requested ones.
        counted = trials if study.grid else [t for t in trials if not infeasible(t)]
        done = sum(t.state.is_finished() for t in counted)
        goal = study.goal_of(queue)
        best = ranked(trials, goal)[:1]
        what = f"best {goal.show(best[0][1])}" if best else "no result yet"
        progress(done, max(len(counted), study.trials), what)

    if study.request.workers > 1:
        run_workers(study, folder, lambda: report(study, queue))
    while True:  # until all have ended, including those of other machines and dead workers
        study.work(queue, report)
        if study.late:
            return
        study.fill(queue)  # infeasible trials made room, or a worker died between two steps
        if queue.waiting():
            continue
        if not queue.running():
            return
        report(study, queue)
        time.sleep(WAIT)


def _next(
    study: Study, queue: TrialQueue, folder: Path, steps: Sequence[Step], progress: Progress
) -> Step | None:
    """The best edit on top of these; None if nothing is left to edit, or nothing improves."""
    wanted = on_top(study.request, folder, steps)
    above = Study(wanted, study.deadline)
    if study.late or not above.points:
        return None

    def report(done: int, total: int, what: str) -> None:
        progress(done, total, f"edit {len(steps) + 1}: {what}")

    assert wanted.study is not None
    with closing(above.queue(wanted.study)) as own:
        if len(study.datasets) > 1:
            own.study.set_user_attr("reference", study.original(queue).to_json())
        _explore(above, own, wanted.study, report)
        step = best_of(above, own)
    write_trials(wanted.study, above, step.trials)
    if step.gains(study.goal_of(queue)):
        return step
    LOG.warning(
        "edit %d of --compose %d is left out: none of %d trials on top of the one before gains",
        len(steps) + 1,
        study.request.compose,
        len(step.trials),
    )
    return None


def _warn(study: Study) -> None:
    for questions in study.datasets:
        count = len(questions.validation.examples)
        if count < FEW:
            known = f"an accuracy is known to ±{half_width(count):.0f} points only"
            LOG.warning(
                "%d validation examples%s: %s",
                count,
                f" of {questions.label}" if len(study.datasets) > 1 else "",
                known if study.goal.metric == "accuracy" else "a small change of loss may be luck",
            )
