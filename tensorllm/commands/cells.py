"""The cells of the published tables: which model, dataset, strategy and layout each of them is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tensorllm.compressors.settings import fields_of
from tensorllm.errors import UserError
from tensorllm.recipes import Recipe, shipped
from tensorllm.registry import did_you_mean

ORIGINAL = "original"
LAYOUTS = ("official", "paper")


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of the tables: a dataset scored by a model as it is, or after one recipe.

    Attributes:
        name: `original`, or the recipe's last part, with its layout where it has one.
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
        raise UserError(f"nothing was published for {model!r}.{hint} Known: {', '.join(known)}")
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
