"""Running a search: one process or several, then its end."""

import logging
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from tensorllm.commands.search import SearchRequest, folder_of
from tensorllm.commands.search_compose import Step, best_of, composed, on_top
from tensorllm.commands.search_files import write_files, write_trials
from tensorllm.commands.search_result import SearchResult, conclude
from tensorllm.commands.search_run import SearchRun, Watch
from tensorllm.errors import Incomplete, UserError
from tensorllm.progress import Progress, quiet
from tensorllm.search.queue import TrialQueue
from tensorllm.search.selection import half_width, ranked
from tensorllm.search.storage import storage_errors

log = logging.getLogger(__name__)

WAIT = 1.0  # seconds between looks at what other processes are doing
FEW = 100  # validation examples; fewer cannot tell ten points apart


def run(
    request: SearchRequest, progress: Progress = quiet, watch: Watch | None = None
) -> SearchResult:
    """Search, and score the winner on the test part.

    Args:
        progress: called with (trials done, trials in all, the best so far).
        watch: called with all trials, again and again while the (first) search goes on.

    Raises:
        UserError: the request does not fit the model, the data or the study.
        Incomplete: the study cannot be written, or no trial came to its end.
    """
    check_workers(request.workers)
    with ExitStack() as stack:
        folder = folder_of(request, stack)
        search = SearchRun(request, watch)
        _warn(search)
        queue = stack.enter_context(closing(search.queue(folder)))
        with storage_errors("searching"):
            _explore(search, queue, folder, progress)
            steps = [best_of(search, queue)]
            while len(steps) < request.compose and (
                step := _next(request, folder, steps, progress)
            ):
                steps.append(step)
            result = conclude(search, queue, steps)
            if request.study is not None:
                write_trials(folder, search, steps[0].trials)
                write_files(folder, search, composed(steps), result.results, result.recipe)
        return result


def _explore(search: SearchRun, queue: TrialQueue, folder: Path, progress: Progress) -> None:
    """Examine every trial of a study, with as many workers as were asked for."""
    search.fill(queue)
    search.original(queue)
    if search.request.workers > 1:
        _workers(replace(search.request, study=folder), queue, search, progress)
    _drain(search, queue, progress)


def _next(
    request: SearchRequest, folder: Path, steps: Sequence[Step], progress: Progress
) -> Step | None:
    """The best edit on top of these; None where nothing is left to edit, or nothing gains."""
    wanted = on_top(request, folder, steps)
    search = SearchRun(wanted)
    if not search.points:
        return None

    def told(done: int, total: int, what: str) -> None:
        progress(done, total, f"edit {len(steps) + 1}: {what}")

    assert wanted.study is not None
    with closing(search.queue(wanted.study)) as queue:
        _explore(search, queue, wanted.study, told)
        step = best_of(search, queue)
    write_trials(wanted.study, search, step.trials)
    return step if step.gains(request.rules.objective) else None


def check_workers(workers: int) -> None:
    """Refuse more workers than there are devices for them."""
    gpus = torch.cuda.device_count()
    places = gpus or torch.multiprocessing.cpu_count()
    if not 1 <= workers <= places:
        what = f"GPU{'s' * (gpus > 1)}" if gpus else "cores"
        raise UserError(
            f"--workers must be 1..{places}, as this machine has {places} {what}; got {workers}"
        )


def _drain(search: SearchRun, queue: TrialQueue, progress: Progress) -> None:
    """Work until every trial has ended, those of other machines and dead workers included."""
    while True:
        search.work(queue, lambda run, q: _tell(run, q, progress))
        search.fill(queue)  # infeasible trials made room, or a worker died between two steps
        if queue.waiting():
            continue
        if not queue.running():
            return
        _tell(search, queue, progress)
        time.sleep(WAIT)


def _tell(search: SearchRun, queue: TrialQueue, progress: Progress) -> None:
    trials = queue.trials()
    if search.watch is not None:
        search.watch(trials)
    done = sum(t.state.is_finished() for t in trials)
    best = ranked(trials, search.request.rules.objective)[:1]
    what = "no result yet"
    if best:
        found = best[0][1]
        what = f"best {found.loss:.4f}"
        if found.accuracy is not None and search.request.rules.objective != "loss":
            what = f"best {found.accuracy:.2f} %"
    progress(done, len(trials), what)


def _workers(
    request: SearchRequest, queue: TrialQueue, search: SearchRun, progress: Progress
) -> None:
    """Start the workers and wait for them; what a dead one leaves is done afterwards."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_work, args=(request, n, search.request.study), daemon=True)
        for n in range(request.workers)
    ]
    with _deaf():
        for process in processes:
            process.start()
    try:
        while any(process.is_alive() for process in processes):
            _tell(search, queue, progress)
            time.sleep(WAIT)
    finally:
        for process in processes:
            process.terminate()
            process.join()
    failed = [process.exitcode for process in processes if process.exitcode]
    if len(failed) == len(processes):
        raise Incomplete(f"all workers ended with exit codes {failed}; their errors are above")
    if failed:
        log.warning("%d of %d workers died; going on without", len(failed), len(processes))


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes started meanwhile do not hear Ctrl-C: this one does, and ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(request: SearchRequest, number: int, study: Path | None) -> None:
    """The body of a worker process."""
    assert request.study is not None
    device = f"cuda:{number}" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(max(1, torch.multiprocessing.cpu_count() // request.workers))
    search = SearchRun(replace(request, device=device, study=study))
    with closing(search.queue(request.study, worker=number)) as queue:
        search.work(queue)


def _warn(search: SearchRun) -> None:
    count = len(search.validation.examples)
    if count < FEW:
        log.warning(
            "%d validation examples: an accuracy is known to ±%.0f points only",
            count,
            half_width(count),
        )
