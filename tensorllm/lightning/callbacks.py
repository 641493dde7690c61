"""Callbacks of the Trainer: keep predictions so that a killed run resumes, report progress."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from tensorllm.environment import printable
from tensorllm.errors import UserError
from tensorllm.evaluation.predictions import Prediction, prediction_of
from tensorllm.evaluation.results import disk_full
from tensorllm.io import Journal, write_json
from tensorllm.progress import Progress


class PerBatch(Callback):
    """A callback that gets the predictions of each batch, of validation and test alike."""

    def on_predictions(self, trainer: Any, predictions: list[Prediction]) -> None:
        """Called in each process with the predictions of its batch."""
        raise NotImplementedError

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.on_predictions(trainer, outputs["predictions"])

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.on_predictions(trainer, outputs["predictions"])


class PredictionJournal(PerBatch):
    """Keeps the predictions of each finished batch in a folder, one file per process.

    A later run with the same folder scores only what is missing; its metrics count everything. Use
    one folder per model and compressor: it is refused if the module's hyperparameters differ, but
    weights are not compared.

    Args:
        folder: created if needed; several processes share it.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    @property
    def journal(self) -> Journal:
        return Journal(self.folder, "predictions")

    def predictions(self) -> dict[int, Prediction]:
        """All predictions in the journal, by the index of their example."""
        found = {}
        for record in self.journal.records():
            try:
                prediction = prediction_of(record)
            except (KeyError, TypeError):  # cut short by a crash, yet valid JSON
                continue
            found[prediction.index] = prediction
        return found

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Read what an earlier run kept: in one process, before any other adds to it."""
        kept: dict[int, Prediction] = {}
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check(trainer.datamodule, pl_module)
            kept = self.predictions()
        trainer.datamodule.done = trainer.strategy.broadcast(frozenset(kept))
        self._kept = kept  # only the first process counts them

    def _check(self, data: Any, module: Any) -> None:
        """Refuse predictions of another run."""
        note = self.folder / "run.json"
        file = None if data.data_file is None else printable(str(data.data_file))
        run = {"dataset": data.name, "data_file": file, **module.hparams}
        run = json.loads(json.dumps(run, default=str))
        if not note.is_file():
            write_json(note, run)
            return
        was = json.loads(note.read_text())
        for name in sorted({*run, *was}):
            if run.get(name) != was.get(name):
                raise UserError(
                    f"{self.folder} has predictions of another run: {name} was {was.get(name)} "
                    f"and is {run.get(name)}; give another folder"
                )

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._count_kept(trainer, pl_module)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._count_kept(trainer, pl_module)

    def _count_kept(self, trainer: Any, module: Any) -> None:
        of_part = (self._kept.get(e.index) for e in trainer.datamodule.examples)
        module.add_predictions([p for p in of_part if p is not None])
        self._kept = {}

    def on_predictions(self, trainer: Any, predictions: list[Prediction]) -> None:
        try:
            self.journal.append(map(asdict, predictions))
        except OSError as error:
            raise disk_full(self.folder, error) from None


class ProgressReport(PerBatch):
    """Calls `progress` with (examples scored, examples in all, `what`) after each batch."""

    def __init__(self, progress: Progress, what: str) -> None:
        self.progress, self.what = progress, what

    def on_predictions(self, trainer: Any, predictions: list[Prediction]) -> None:
        self.done += len(predictions)
        self.progress(self.done, self.total, self.what)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(trainer.datamodule)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin(trainer.datamodule)

    def _begin(self, data: Any) -> None:
        self.total = len(data.examples)
        self.done = sum(e.index in data.done for e in data.examples)
