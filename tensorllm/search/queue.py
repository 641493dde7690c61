"""A study as a queue: every trial is taken by one worker, none is lost, none is done twice.

All trials are queued beforehand (a grid's with their values, other samplers' without), because
taking a queued trial is atomic in every storage and counting to a limit is not. With the embedded
file, a worker also holds a lock for its trial; when the worker dies the lock opens, and the next
worker adopts the trial under its old number. A database uses heartbeats instead: the trial fails
without a reason, is ignored from then on, and is queued again.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from tensorllm.errors import UserError
from tensorllm.io import locked
from tensorllm.search import storage
from tensorllm.search.space import Values
from tensorllm.search.storage import Claims, open_storage, stable

CLAIMS, FILLING = "claims.lock", "filling.lock"
RESULT, REASON = "result", "reason"


class TrialQueue:
    """One study, as one process sees it.

    Args:
        folder: of the study.
        url: a database to use instead of the folder's own file.
        name: of the study.
        directions: `maximize` or `minimize`, for each value.
        sampler: chooses values that are not queued.
    """

    def __init__(
        self,
        folder: Path,
        url: str | None,
        name: str,
        directions: Sequence[Literal["minimize", "maximize"]],
        sampler: optuna.samplers.BaseSampler,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        opened = open_storage(folder, url)
        self.heart = opened if isinstance(opened, RDBStorage) else None
        self.claims = None if url else Claims(folder / CLAIMS)
        options: dict[str, Any] = {"storage": opened, "sampler": sampler, "study_name": name}
        try:
            self.study = optuna.load_study(**options)
        except KeyError:
            options |= {"directions": list(directions), "load_if_exists": True}
            self.study = optuna.create_study(**options)
        self.storage: BaseStorage = self.study._storage  # Optuna wraps a database in a cache
        self._id = self.storage.get_study_id_from_name(name)
        self._beating: dict[int, threading.Event] = {}

    def close(self) -> None:
        """Close the database's connections."""
        if self.heart is not None:
            self.heart.remove_session()
            self.heart.engine.dispose()

    def identify(self, identity: Mapping[str, Any]) -> None:
        """Refuse a study that was begun with other settings, and name those that differ."""
        known = self.study.user_attrs.get("identity")
        if known is None:
            self.study.set_user_attr("identity", dict(identity))
            return
        if differs := list(_differences(known, identity)):
            raise UserError(
                f"the study {self.study.study_name!r} was begun with something else: "
                f"{'; '.join(differs)}. Choose another --study"
            )

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials in these states (by default all), without those of lost workers."""
        found = self.storage.get_all_trials(self._id, deepcopy=False, states=states or None)
        return [t for t in found if t.state != TrialState.FAIL or REASON in t.user_attrs]

    def fill_grid(self, points: Sequence[Values]) -> None:
        """Queue the points that have no trial yet."""
        with locked(self.folder / FILLING):
            known = {_key(_values(trial)) for trial in self.trials()}
            for values in points:
                if _key(values) not in known:
                    self.study.enqueue_trial(dict(values))

    def fill(self, count: int, first: Sequence[Values] = ()) -> None:
        """Queue trials without values until there are `count`, not counting infeasible ones.

        Args:
            first: values set in advance for the first trials, possibly not of all dimensions.
        """
        with locked(self.folder / FILLING):
            trials = self.trials()
            free = sum(infeasible(t) for t in trials)
            there = len(trials) - min(free, 10 * count)  # every point may be infeasible
            for number in range(len(trials), len(trials) + count - there):
                self.study.enqueue_trial(dict(first[number]) if number < len(first) else {})

    def take(self) -> optuna.Trial | None:
        """Take a trial that a dead worker left, else the next one queued; None if there is none.

        Left trials come first: samplers learn from the results of all trials before their own.
        """
        if self.claims is None:
            with stable():
                optuna.storages.fail_stale_trials(self.study)
        for trial in self.trials(TrialState.RUNNING) if self.claims else []:
            if self._claim(trial):
                if self.storage.get_trial(trial._trial_id).state == TrialState.RUNNING:
                    return optuna.Trial(self.study, trial._trial_id)
                self.release(trial.number)
        for trial in self.trials(TrialState.WAITING):
            if self._claim(trial) and self._start(trial) and not self._doubled(trial):
                return optuna.Trial(self.study, trial._trial_id)
        return None

    def _doubled(self, trial: FrozenTrial) -> bool:
        """Drop a trial whose point another machine queued at the same moment."""
        values = _key(_values(trial))
        if self.claims is not None or not values:
            return False
        if values not in {_key(_values(t)) for t in self.trials() if t.number < trial.number}:
            return False
        self.study.tell(trial.number, state=TrialState.FAIL)
        self.release(trial.number)
        return True

    def running(self) -> int:
        """Number of trials that a worker is examining."""
        return len(self.trials(TrialState.RUNNING))

    def waiting(self) -> int:
        """Number of trials that no worker has taken."""
        return len(self.trials(TrialState.WAITING))

    def left(self) -> int:
        """Number of trials that a dead worker of this machine left and nobody has taken over."""
        found = [t for t in self.trials(TrialState.RUNNING) if self.claims and self._claim(t)]
        for trial in found:
            self.release(trial.number)
        return len(found)

    def finish(
        self,
        trial: optuna.Trial,
        state: TrialState,
        values: Sequence[float] | None = None,
        **notes: Any,
    ) -> None:
        """Record a trial's end, with its notes as user attributes."""
        for name, note in notes.items():
            trial.set_user_attr(name, note)
        self.study.tell(trial, values, state)
        self.release(trial.number)

    def report(self, trial: optuna.Trial, value: float, step: int) -> None:
        """Report an intermediate value, unless a dead worker already has."""
        if step not in self.storage.get_trial(trial._trial_id).intermediate_values:
            trial.report(value, step)

    def release(self, number: int) -> None:
        """Give up the claim on a trial."""
        if self.claims is not None:
            self.claims.free(number)
        if number in self._beating:
            self._beating.pop(number).set()

    def _claim(self, trial: FrozenTrial) -> bool:
        if self.claims is not None:
            return self.claims.take(trial.number)
        assert self.heart is not None
        self.heart.record_heartbeat(trial._trial_id)  # before it runs: never without a heartbeat
        return True

    def _start(self, trial: FrozenTrial) -> bool:
        try:
            mine = self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
        except optuna.exceptions.UpdateFinishedTrialError:
            mine = False
        if not mine:
            self.release(trial.number)
        elif self.claims is None:
            self._beat(trial)
        return mine

    def _beat(self, trial: FrozenTrial) -> None:
        over = self._beating[trial.number] = threading.Event()
        heart = self.heart
        assert heart is not None

        def beat() -> None:
            while not over.wait(storage.HEARTBEAT):
                with suppress(SQLAlchemyError):  # the worker itself will meet the same error
                    heart.record_heartbeat(trial._trial_id)

        threading.Thread(target=beat, daemon=True).start()


def infeasible(trial: FrozenTrial) -> bool:
    """Whether a trial ended without being examined because its values give no feasible edit."""
    return trial.state == TrialState.PRUNED and REASON in trial.user_attrs


def _values(trial: FrozenTrial) -> dict[str, Any]:
    return trial.system_attrs.get("fixed_params") or trial.params


def _key(values: Values) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(values.items()))


def _differences(was: Any, now: Any, name: str = "") -> Iterator[str]:
    """What differs between two nested mappings, each difference with its path of keys."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in sorted({*was, *now}):
            yield from _differences(was.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif was != now:
        yield f"{name} was {_short(was)} and is {_short(now)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
