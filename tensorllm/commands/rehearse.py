"""`tensorllm reproduce --dry-run`: each cell on a tiny model, and what the real run takes.

The tiny model has the real one's architecture and number of layers, and random weights.
"""

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tensorllm.commands.cells import Cell, cells
from tensorllm.commands.forecast import Forecast, measure_machine, model_of_sizes, real_model
from tensorllm.commands.models import Loader, dtype_of
from tensorllm.commands.places import data_file, hub_id, missing, weights_of
from tensorllm.commands.reproduce import ReproduceRequest, reproduce_cells
from tensorllm.data.base import DATASETS, VALIDATION
from tensorllm.data.demo import MODEL_DIR
from tensorllm.errors import UserError
from tensorllm.evaluation.evaluate import make_dataset
from tensorllm.recipes import short_names

WIDTH, HEADS = 128, 2  # head_dim 64: GPT-J rotates that many channels unless told otherwise
NAMES = ("Ada", "Ben", "Cy", "Dee", "Eli", "Fay", "Gus", "Hal", "Ida", "Jo")


def rows() -> list[dict[str, str]]:
    """Rows that every dataset can read: each takes the fields that it knows."""
    return [
        {
            "claim": f"{name} plays banjo.",
            "label": ("SUPPORTS", "REFUTES")[number % 2],
            "question": f"Which city does {name} live in?",
            "answer": "Paris",
            "bio": f"{name} writes about banjos.",
            "profession": ("teacher", "painter")[number % 2],
            "input": f"The city of {name} is",
            "target": "Paris",
        }
        for number, name in enumerate(NAMES)
    ]


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """A cell whose code ran on the tiny model, and the predicted cost of the real one.

    Attributes:
        examples: of its test part: counted in local data, otherwise as the papers have them.
        counted: they were counted.
        seconds: at this machine's speed; see `tensorllm.commands.forecast` for what is assumed.
        peak_bytes: of memory.
    """

    cell: Cell
    searched: bool
    examples: int
    counted: bool
    seconds: float
    peak_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.cell.model,
            "dataset": self.cell.dataset,
            "cell": self.cell.name,
            "searched": self.searched,
            "examples": self.examples,
            "counted": self.counted,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """What a reproduction takes.

    Attributes:
        missing: what to fetch and where to put it.
        float32_seconds: of all cells with weights in float32, where that is the faster way.
    """

    model: str
    hub: str
    rehearsals: list[Rehearsal]
    missing: list[str]
    float32_seconds: float | None

    def to_json(self) -> dict[str, Any]:
        rehearsed = [rehearsal.to_json() for rehearsal in self.rehearsals]
        return {
            "model": self.model,
            "hub": self.hub,
            "cells": rehearsed,
            "seconds": sum(r.seconds for r in self.rehearsals),
            "float32_seconds": self.float32_seconds,
            "missing": self.missing,
        }


def rehearse(request: ReproduceRequest) -> Plan:
    """Run every cell on a tiny random model of the architecture; nothing of it is kept."""
    wanted = cells(request.model, request.datasets)
    facts = short_names()[request.model]
    datasets = list(dict.fromkeys(cell.dataset for cell in wanted))
    lacking = missing(request.model, datasets, request.weights, request.data)
    _run_tiny(wanted, request, facts)
    dtype = dtype_of(request.dtype) or getattr(torch, facts["dtype"])
    counts = {name: _examples(request, name) for name in datasets}
    model = real_model(facts)
    out = _predicted(wanted, counts, model, dtype, request)
    plain = _predicted(wanted, counts, model, torch.float32, request)
    seconds, other = (sum(r.seconds for r in predicted) for predicted in (out, plain))
    faster = other if other < seconds / 2 else None
    return Plan(request.model, hub_id(request.model), out, lacking, faster)


def _predicted(
    wanted: list[Cell],
    counts: dict[str, tuple[int, bool]],
    model: Any,
    dtype: torch.dtype,
    request: ReproduceRequest,
) -> list[Rehearsal]:
    machine = measure_machine(request.device, dtype)
    forecast = Forecast(model, machine, dtype, accelerated=request.device != "cpu")
    out = []
    for cell in wanted:
        examples, counted = counts[cell.dataset]
        searched = request.searches(cell)
        cost = forecast.cell(cell, examples, searched=searched)
        out.append(Rehearsal(cell, searched, examples, counted, cost.seconds, cost.peak_bytes))
    return out


def _run_tiny(wanted: list[Cell], request: ReproduceRequest, facts: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as scratch, _no_warnings():
        folder = Path(scratch)
        text = "".join(json.dumps(row) + "\n" for row in rows())
        for cell in wanted:
            (folder / f"{cell.dataset}.jsonl").write_text(text)
        save_tiny(facts, {cell.dataset for cell in wanted}, folder)
        first_and_last = (0, facts["sizes"]["layers"] - 1)
        layer = None if request.layer is None else 0
        tiny = replace(
            request,
            weights=scratch,
            data=folder,
            out=folder / "out",
            limit=None,
            dtype=None,
            layer=layer,
            candidates=first_and_last,
        )
        reproduce_cells([_scaled(cell, facts["sizes"]) for cell in wanted], tiny)


def save_tiny(facts: dict[str, Any], datasets: set[str], folder: Path) -> None:
    """A random model of the architecture, as deep as the real one, and a tokenizer for it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    for name in sorted(datasets):  # the papers' choices are one token each
        data = make_dataset(name, data_file=folder / f"{name}.jsonl", split="all")
        data.connect(tokenizer)
        tokenizer.add_tokens([f" {c}" for e in data.examples for c in e.choices])
    torch.manual_seed(0)
    model = model_of_sizes(
        facts["model_type"],
        width=WIDTH,
        heads=HEADS,
        layers=facts["sizes"]["layers"],
        ffn=2 * WIDTH,
        vocabulary=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _scaled(cell: Cell, sizes: dict[str, int]) -> Cell:
    """The cell with ranks that fit the tiny model."""
    if cell.recipe is None or "ranks" not in cell.recipe.settings:
        return cell
    real, small = (sizes["hidden"], sizes["head_dim"], 4), (WIDTH, WIDTH // HEADS, 4)
    ranks = zip(cell.recipe.settings["ranks"], real, small, strict=False)
    shrunk = [max(1, rank * new // old) for rank, old, new in ranks]
    settings = {**cell.recipe.settings, "ranks": shrunk}
    return replace(cell, recipe=replace(cell.recipe, settings=settings))


def _examples(request: ReproduceRequest, dataset: str) -> tuple[int, bool]:
    """How many test examples there are, and whether they were counted in local data."""
    load = DATASETS[dataset].workload
    assert load is not None, f"{dataset} says no workload"
    known = round(load.examples * (1 - VALIDATION))
    try:
        data = make_dataset(
            dataset, data_file=data_file(dataset, request.data), limit=request.limit
        )
        if data.data_file is not None:
            if request.weights is not None:
                folder = weights_of(request.model, request.weights).folder
                data.connect(Loader(folder).tokenizer())
            return len(data.examples), True
    except UserError:  # what is missing is told beside
        pass
    return min(known, request.limit or known), False


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Without the search's word on how few examples these are."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
