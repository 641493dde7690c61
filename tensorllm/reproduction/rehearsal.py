"""`tensorllm reproduce --dry-run`: run each cell on a tiny model, predict the real run's cost.

The tiny model has the real one's architecture and number of layers, and random weights.
"""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tensorllm.data.base import DATASETS, VALIDATION
from tensorllm.data.demo import MODEL_DIR
from tensorllm.errors import UserError
from tensorllm.evaluation.evaluate import make_dataset
from tensorllm.model_names import short_names
from tensorllm.reproduction.forecast import (
    CellForecast,
    measure_machine,
    model_of_sizes,
    real_model,
)
from tensorllm.reproduction.inputs import data_file, weights_of
from tensorllm.reproduction.published import Cell

WIDTH, HEADS = 128, 2  # head_dim 64: GPT-J rotates that many channels by default
NAMES = ("Ada", "Ben", "Cy", "Dee", "Eli", "Fay", "Gus", "Hal", "Ida", "Jo")


def rows() -> list[dict[str, str]]:
    """Rows for every dataset: each reads the fields that it knows."""
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
        searched: whether its layer is searched.
        examples: in its test part: counted in local data, otherwise as in the papers.
        counted: whether they were counted.
        seconds: at this machine's speed; `tensorllm.reproduction.forecast` lists the assumptions.
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
class ReproductionPlan:
    """What a reproduction costs.

    Attributes:
        missing: what to fetch and where to put it.
        float32_seconds: of all cells with weights in float32, if that is faster.
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


class Tiny(NamedTuple):
    """The inputs of a rehearsal: cells scaled to the tiny model, its folder, its layers."""

    cells: list[Cell]
    folder: Path
    layers: tuple[int, int]  # the first and the last


@contextmanager
def tiny_inputs(model: str, wanted: Sequence[Cell]) -> Iterator[Tiny]:
    """A tiny random model of the architecture and rows of each dataset, within the block only."""
    facts = short_names()[model]
    with tempfile.TemporaryDirectory() as scratch, _no_warnings():
        folder = Path(scratch)
        text = "".join(json.dumps(row) + "\n" for row in rows())
        for cell in wanted:
            (folder / f"{cell.dataset}.jsonl").write_text(text)
        save_tiny(facts, {cell.dataset for cell in wanted}, folder)
        scaled = [_scaled(cell, facts["sizes"]) for cell in wanted]
        yield Tiny(scaled, folder, (0, facts["sizes"]["layers"] - 1))


def predict(
    wanted: Sequence[Cell],
    counts: Mapping[str, tuple[int, bool]],
    searched: Sequence[bool],
    *,
    dtype: torch.dtype,
    device: str,
) -> list[Rehearsal]:
    """Predict the cost of each cell on the real model.

    Args:
        wanted: the cells.
        counts: for each dataset its test examples, and whether they were counted.
        searched: whether the layer of each cell is searched.
        dtype: of the weights.
        device: what the real run uses.
    """
    model = real_model(short_names()[wanted[0].model])
    machine = measure_machine(device, dtype)
    forecast = CellForecast(model, machine, dtype, accelerated=device != "cpu")
    out = []
    for cell, search in zip(wanted, searched, strict=True):
        examples, counted = counts[cell.dataset]
        cost = forecast.cell(cell, examples, searched=search)
        out.append(Rehearsal(cell, search, examples, counted, cost.seconds, cost.peak_bytes))
    return out


def save_tiny(facts: dict[str, Any], datasets: set[str], folder: Path) -> None:
    """Save a random model of the architecture, as deep as the real one, and a tokenizer for it."""
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
    """The cell with its ranks scaled to the tiny model."""
    if cell.recipe is None or "ranks" not in cell.recipe.settings:
        return cell
    real, small = (sizes["hidden"], sizes["head_dim"], 4), (WIDTH, WIDTH // HEADS, 4)
    ranks = zip(cell.recipe.settings["ranks"], real, small, strict=False)
    shrunk = [max(1, rank * new // old) for rank, old, new in ranks]
    settings = {**cell.recipe.settings, "ranks": shrunk}
    return replace(cell, recipe=replace(cell.recipe, settings=settings))


def count_examples(
    model: str, dataset: str, weights: str | None, data: Path | None, limit: int | None
) -> tuple[int, bool]:
    """The number of test examples, and whether they were counted in local data."""
    from transformers import AutoTokenizer

    load = DATASETS[dataset].workload
    assert load is not None, f"{dataset} says no workload"
    known = round(load.examples * (1 - VALIDATION))
    try:
        rows = make_dataset(dataset, data_file=data_file(dataset, data), limit=limit)
        if rows.data_file is not None:
            if weights is not None:
                rows.connect(AutoTokenizer.from_pretrained(weights_of(model, weights).folder))
            return len(rows.examples), True
    except (UserError, OSError):  # what is missing is reported separately
        pass
    return min(known, limit or known), False


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Hide the search's warning about how few examples there are."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
