"""`tensorllm reproduce --study claims`: the paper's claim on any causal model, cell by cell."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tensorllm.checkpoint.loader import Loader, device_of, dtype_of
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.checkpoint.source import Source, resolve
from tensorllm.data.base import DATASETS
from tensorllm.environment import environment
from tensorllm.errors import Incomplete, UserError
from tensorllm.evaluation.evaluate import make_dataset
from tensorllm.evaluation.predictions import Prediction, prediction_of
from tensorllm.evaluation.scorer import context_of
from tensorllm.io import check_writable, locked, write_json
from tensorllm.model_names import short_names
from tensorllm.progress import Progress, quiet
from tensorllm.reproduction.claims import METHODS, PROTOCOL, Method, StudyDataset, StudyModel
from tensorllm.reproduction.claims_summary import (
    NOT_RUN,
    REFUSED,
    corrected,
    counts,
    result_of,
    scores,
)
from tensorllm.reproduction.inputs import check_data, data_file
from tensorllm.reproduction.published import CellFile
from tensorllm.requests.reproduce import ReproduceRequest
from tensorllm.search.fingerprints import examples_fingerprint
from tensorllm.search.space import Point

DATASETS_OF_THE_PAPER = ("wikidata_qa", "fever", "hotpotqa", "bios_profession")
RESULTS = "claims.json"


@dataclass(frozen=True, slots=True)
class StudyCell:
    """One search of the study: a dataset, a draw of its rows, and a method."""

    dataset: str
    draw: int
    method: Method

    @property
    def name(self) -> str:
        return f"{self.dataset}, {self.method.name}, draw {self.draw}"


def claims(
    request: ReproduceRequest, progress: Progress = quiet, methods: Sequence[Method] = METHODS
) -> dict[str, Any]:
    """Run the cells that are not finished yet, and return the results of all.

    The results of all models studied in the same folder are in its `claims.json`.

    Raises:
        UserError: the model is masked, data are missing, or the folder holds another run's cells.
    """
    check_writable(request.out)
    study = ClaimStudy(request, methods)
    try:
        study.run(progress)
    except (KeyboardInterrupt, Incomplete):  # finished cells are reported, too
        study.keep(study.results())
        raise
    found = study.results()
    study.keep(found)
    return found


class ClaimStudy:
    """The cells of one model, their files, and the model, loaded when it is needed."""

    def __init__(self, request: ReproduceRequest, methods: Sequence[Method] = METHODS) -> None:
        self.request = request
        self.methods = methods
        self.source: Source = resolve(request.model)
        device, dtype = device_of(request.device, decomposes=True), dtype_of(request.dtype)
        self.loader = Loader(self.source.folder, dtype, device).quickest()
        if self.loader.masked:
            raise UserError(f"{request.model} fills masks in: the study's guide needs a causal one")
        own = short_names().get(request.model, {}).get("evaluate")
        self.datasets = list(request.datasets or ([own] if own else DATASETS_OF_THE_PAPER))
        remote = [name for name in self.datasets if DATASETS[name].source is not None]
        check_data(remote, request.data)
        self.name = Path(self.source.name).name
        self.folder = request.out / self.name
        self.identity = Checkpoint(self.source.folder).identity
        self.questions = {name: self._questions(name) for name in self.datasets}

    @property
    def cells(self) -> list[StudyCell]:
        """Draw by draw, so that an unfinished study has results for every dataset."""
        return [
            StudyCell(dataset, draw, method)
            for draw in range(self.request.draws)
            for dataset in self.datasets
            for method in self.methods
        ]

    def _questions(self, name: str) -> StudyDataset:
        root = None if DATASETS[name].source is None else self.request.data
        data = make_dataset(name, data_file=data_file(name, root), split="all")
        tokenizer = self.loader.tokenizer()
        data.connect(tokenizer, context=context_of(self.loader.config(), tokenizer))
        return StudyDataset(data, self.request.limit)

    @cached_property
    def subject(self) -> StudyModel:
        return StudyModel(self.loader, self.methods, examiners=len(self.datasets) + 1)

    def run(self, progress: Progress) -> None:
        """Run every unfinished cell: choose an edit, then score it."""
        to_do = [cell for cell in self.cells if not self._finished(cell)]
        for done, cell in enumerate(to_do):
            progress(done, len(to_do), cell.name)
            chosen = self._choice(cell).read()
            if chosen is None:
                questions = self.questions[cell.dataset]
                draw = self.subject.draw(questions, cell.draw, self.request.validation)
                chosen = self.subject.choose(draw, cell.method, self.request.trials)
                self._choice(cell).write(chosen)
            if "point" in chosen:
                self._tell(cell.dataset, None)
                self._tell(cell.dataset, Point(**chosen["point"]))
        progress(len(to_do), len(to_do), "done")

    def _tell(self, dataset: str, point: Point | None) -> None:
        file = self._test(dataset, point)
        if file.read() is None:
            file.write(self.subject.on_test(self.questions[dataset], point))

    def results(self) -> dict[str, Any]:
        """The results of all cells of this model; cells that were not run are marked."""
        cells = corrected([self._result(cell) for cell in self.cells])
        return {
            "model": self.name,
            "dtype": str(self.loader.dtype).removeprefix("torch."),
            "protocol": PROTOCOL,
            "settings": {
                name: getattr(self.request, name) for name in ("validation", "trials", "draws")
            },
            "datasets": {name: self._original(name) for name in self.datasets},
            "cells": cells,
            "counts": counts(cells),
            "environment": environment(),
        }

    def keep(self, found: dict[str, Any]) -> None:
        """Save the results beside those of other models."""
        path = self.request.out / RESULTS
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{RESULTS}.lock")):  # several models may be studied at once
            known = json.loads(path.read_text()) if path.is_file() else {}
            write_json(path, {**known, self.name: found})

    def _original(self, dataset: str) -> dict[str, Any]:
        questions = self.questions[dataset]
        rows = self._predictions(dataset, None)
        return {
            "examples": len(questions.test),
            "pool": len(questions.pool),
            "original": None if rows is None else scores(rows),
        }

    def _result(self, cell: StudyCell) -> dict[str, Any]:
        about = {"dataset": cell.dataset, "method": cell.method.name, "draw": cell.draw}
        return {**about, **(self._cell(cell) or {"found": NOT_RUN})}

    def _finished(self, cell: StudyCell) -> bool:
        chosen = self._choice(cell).read()
        if chosen is None or "point" not in chosen:
            return chosen is not None
        points = None, Point(**chosen["point"])
        return all(self._test(cell.dataset, point).read() is not None for point in points)

    def _cell(self, cell: StudyCell) -> dict[str, Any] | None:
        """The result of a finished cell; None: it is not finished."""
        chosen = self._choice(cell).read()
        if chosen is None:
            return None
        if "refused" in chosen:
            return {"found": REFUSED, "sentence": chosen["refused"]}
        before = self._predictions(cell.dataset, None)
        after = self._predictions(cell.dataset, Point(**chosen["point"]))
        if before is None or after is None:  # interrupted between the choice and the test
            return None
        return result_of(chosen, before, after, self.questions[cell.dataset].frequency())

    def _predictions(self, dataset: str, point: Point | None) -> Sequence[Prediction] | None:
        kept = self._test(dataset, point).read()
        return None if kept is None else [prediction_of(row) for row in kept["predictions"]]

    def _test(self, dataset: str, point: Point | None) -> CellFile:
        """The file of the predictions on the test rows, shared by cells with the same edit."""
        key = "" if point is None else "-" + hashlib.sha256(point.key.encode()).hexdigest()[:12]
        name = "original" if point is None else f"{point.mode}{key}"
        test_rows = examples_fingerprint(self.questions[dataset].test)
        return CellFile(
            self.folder / dataset / "test" / f"{name}.json", self._facts | {"test": test_rows}
        )

    def _choice(self, cell: StudyCell) -> CellFile:
        questions = self.questions[cell.dataset]
        facts = {
            "validation": examples_fingerprint(questions.drawn(cell.draw, self.request.validation)),
            "trials": self.request.trials,
            "method": asdict(cell.method),
        }
        name = cell.method.name.replace(", ", "-")
        path = self.folder / cell.dataset / f"draw-{cell.draw}" / f"{name}.json"
        return CellFile(path, self._facts | facts)

    @property
    def _facts(self) -> dict[str, Any]:
        dtype = str(self.loader.dtype).removeprefix("torch.")
        return {"model": self.identity, "dtype": dtype, "protocol": PROTOCOL}
