"""The cells of the published tables, how one is scored, and the files that keep finished ones.

A cell is a model, a dataset, a strategy and a layout.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorllm.compression.engine import compressed
from tensorllm.compressors.settings import fields_of
from tensorllm.environment import environment
from tensorllm.errors import Incomplete, UserError
from tensorllm.evaluation.evaluate import evaluate_model, make_dataset
from tensorllm.io import write_json
from tensorllm.recipes import Recipe, shipped
from tensorllm.registry import did_you_mean

ORIGINAL = "original"
LAYOUTS = ("official", "paper")
PROTOCOL = "paper"
RANKS = ("r1", "r2", "r3")


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of the tables: a dataset scored by the original model, or after one recipe.

    Attributes:
        name: `original`, or the recipe's last part, with its layout if it has one.
        published: `accuracy` (per cent) and `loss` as published.
    """

    model: str
    dataset: str
    name: str
    recipe: Recipe | None
    layout: str | None
    published: dict[str, Any]

    @property
    def searched(self) -> bool:
        """Whether the layer was never published."""
        return self.recipe is not None and self.recipe.layers is None


def cells(model: str, datasets: Sequence[str] | None = None) -> list[Cell]:
    """All published cells of a model, dataset by dataset, the original first."""
    recipes = [r for r in shipped().values() if r.model == model and "published" in r.notes]
    if not recipes:
        known = sorted({r.model for r in shipped().values() if "published" in r.notes})
        hint = did_you_mean(model, known)
        raise UserError(
            f"nothing was published for {model!r}.{hint} Known: {', '.join(known)}; --study claims "
            "takes any causal model"
        )
    known = list(dict.fromkeys(str(r.dataset) for r in recipes))
    for name in datasets or ():
        if name not in known:
            raise UserError(
                f"nothing was published for {model} on {name!r}.{did_you_mean(name, known)} "
                f"Known: {', '.join(known)}"
            )
    return [cell for name in datasets or known for cell in _of_dataset(model, name, recipes)]


def _of_dataset(model: str, dataset: str, recipes: Sequence[Recipe]) -> list[Cell]:
    own = [recipe for recipe in recipes if recipe.dataset == dataset]
    out = [Cell(model, dataset, ORIGINAL, None, None, own[0].notes["published"]["before"])]
    for recipe in own:
        short = recipe.name.rsplit("/", 1)[-1]
        published = recipe.notes["published"]["after"]
        if "layout" not in fields_of(recipe.mode):
            out.append(Cell(model, dataset, short, recipe, None, published))
            continue
        for layout in LAYOUTS:
            out.append(Cell(model, dataset, f"{short} ({layout})", recipe, layout, published))
    return out


def search_settings(cell: Cell) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe's settings for a search over layers only.

    Returns:
        The settings that stay fixed, and those the search takes as a grid, with one value each.
    """
    fixed = {} if cell.recipe is None else dict(cell.recipe.settings)
    if cell.layout is not None:
        fixed["layout"] = cell.layout
    grid: dict[str, Any] = {}
    for name, rank in zip(RANKS, fixed.pop("ranks", ()), strict=False):
        grid[name] = (rank,)
    if "rho" in fixed:
        grid["rho"] = (fixed.pop("rho"),)
    if "matrices" in fixed:
        grid["matrices"] = ("+".join(fixed.pop("matrices")),)
    return fixed, grid


@dataclass(frozen=True, slots=True)
class Outcome:
    """A cell and its metrics; `origin` is where its layer comes from."""

    cell: Cell
    metrics: dict[str, Any]
    origin: str

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.cell.model,
            "dataset": self.cell.dataset,
            "cell": self.cell.name,
            "layers": self.metrics.get("layers"),
            "layers_origin": self.origin,
            "published": self.cell.published,
            "measured": self.metrics,
        }


def score_cell(
    cell: Cell,
    model: Any,
    tokenizer: Any,
    *,
    layer: int | None,
    data_file: Path | None,
    limit: int | None,
) -> dict[str, Any]:
    """Metrics of one cell, by the papers' protocol on their test part.

    Args:
        layer: for a cell whose layer was never published.
        data_file: rows of the dataset; None: the hub's.
        limit: the most examples to use.
    """
    data = make_dataset(cell.dataset, data_file=data_file, limit=limit)
    if cell.recipe is None:
        return evaluate_model(model, tokenizer, data, PROTOCOL)
    layout = {} if cell.layout is None else {"layout": cell.layout}
    layers = cell.recipe.layers if cell.recipe.layers is not None else (layer or 0,)
    with compressed(model, cell.recipe.compressor(**layout), layers) as report:
        metrics = evaluate_model(model, tokenizer, data, PROTOCOL)
    facts = {"ratios": report.ratios(), "settings": report.settings, "layers": list(layers)}
    return metrics | facts


@dataclass(frozen=True, slots=True)
class CellFile:
    """The file of a finished cell; `facts` must be the same in another run (None: not known)."""

    path: Path
    facts: Mapping[str, Any]

    def read(self) -> dict[str, Any] | None:
        """The cell's metrics; None if it is not finished.

        Raises:
            UserError: the file is of another run, or is no result.
        """
        if not self.path.is_file():
            return None
        try:
            kept = json.loads(self.path.read_text())
            asked, metrics = dict(kept["request"]), dict(kept["metrics"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path} is not a result of reproduce; move it away") from None
        different = ", ".join(
            f"{name} was {asked.get(name)} and is {value}"
            for name, value in self.facts.items()
            if asked.get(name) != value
            # Inputs that have moved away since cannot be compared.
            and not (name.endswith("_identity") and None in (asked.get(name), value))
        )
        if different:
            raise UserError(
                f"{self.path} is of another run: {different}; give another --out, or the same "
                "settings"
            )
        return metrics

    def write(self, metrics: dict[str, Any]) -> None:
        """Save the metrics.

        Raises:
            Incomplete: they cannot be written.
        """
        found = {"request": dict(self.facts), "metrics": metrics, **environment()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, found)
        except OSError as error:
            raise Incomplete(
                f"cannot keep {self.path}: {error.strerror or error}; run the same command again "
                "to go on"
            ) from None
