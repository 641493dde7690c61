"""A search's worker processes on one machine: one per GPU, or each with a share of the cores."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from tensorllm.errors import Incomplete, UserError
from tensorllm.registry import load_plugins
from tensorllm.requests.search import SearchRequest
from tensorllm.search.study import Study

LOG = logging.getLogger(__name__)

WAIT = 1.0  # seconds between checks on other processes


def check_workers(workers: int) -> None:
    """Refuse more workers than there are devices for them."""
    gpus = torch.cuda.device_count()
    places = gpus or torch.multiprocessing.cpu_count()
    if not 1 <= workers <= places:
        what = f"GPU{'s' * (gpus > 1)}" if gpus else "cores"
        raise UserError(
            f"--workers must be 1..{places}, as this machine has {places} {what}; got {workers}"
        )


def run_workers(study: Study, folder: Path, report: Callable[[], None]) -> None:
    """Start the workers and wait for them; the caller finishes what a dead worker leaves."""
    context = torch.multiprocessing.get_context("spawn")
    request, deadline = replace(study.request, study=folder), study.deadline
    processes = [
        context.Process(target=_work, args=(request, n, study.request.study, deadline), daemon=True)
        for n in range(request.workers)
    ]
    with _interrupts_ignored():
        for process in processes:
            process.start()
    try:
        while any(process.is_alive() for process in processes):
            report()
            time.sleep(WAIT)
    finally:
        for process in processes:
            process.terminate()
            process.join()
    failed = [process.exitcode for process in processes if process.exitcode]
    if len(failed) == len(processes):
        raise Incomplete(f"all workers ended with exit codes {failed}; their errors are above")
    if failed:
        LOG.warning("%d of %d workers died; going on without", len(failed), len(processes))


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started within the block ignore Ctrl-C: this process gets it and ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(request: SearchRequest, number: int, folder: Path | None, deadline: float | None) -> None:
    """Body of a worker process."""
    assert request.study is not None
    load_plugins(request.plugins)
    device = f"cuda:{number}" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(max(1, torch.multiprocessing.cpu_count() // request.workers))
    study = Study(replace(request, device=device, study=folder), deadline)
    with closing(study.queue(request.study)) as queue:
        study.work(queue)
