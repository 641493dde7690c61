"""Recipes: YAML files that say which model, layers and settings, and where these come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from tensorllm.compressors import COMPRESSORS, Compressor
from tensorllm.compressors.settings import (
    checked,
    fields_of,
    make_compressor,
    problem,
    setting_problems,
)
from tensorllm.errors import UserError
from tensorllm.options import option_fields
from tensorllm.registry import did_you_mean
from tensorllm.requests.compress import ONLY_TYPED, SETTINGS, CompressRequest

# What a recipe says beside the compressor's own settings.
NOTES = ("origin", "source", "published", "alternatives")
KEYS = ("model", "dataset", "mode", "layers", *NOTES)
# What it may say of the run: fields of the request that are no field of the mode.
RUN = {
    field.name: field.kind
    for field in option_fields(CompressRequest)
    if field.name not in (*KEYS, *SETTINGS, *ONLY_TYPED)
}


@dataclass(frozen=True)
class Recipe:
    """One parsed recipe.

    Attributes:
        settings: the compressor's fields.
        run: what it says of the run: fields of `CompressRequest` such as `calibration` and `out`.
        notes: where it comes from.
    """

    name: str
    model: str
    mode: str
    layers: tuple[int, ...] | None
    settings: dict[str, Any]
    dataset: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)

    def compressor(self, **override: Any) -> Compressor:
        """The strategy, with fields of the recipe replaced where given."""
        return make_compressor(self.mode, self.settings | override)


def read_recipe(path: Path) -> Recipe:
    """A recipe from a YAML file, or a shipped one by name; all its errors are told at once."""
    if not path.exists() and path.as_posix() in shipped():
        return shipped()[path.as_posix()]
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"the recipe {path} is not text in UTF-8") from None
    except OSError as error:
        name = (path.parent / path.stem).as_posix().removeprefix("configs/")
        hint = did_you_mean(name, list(shipped()))
        raise UserError(f"cannot read the recipe {path}: {error.strerror}.{hint}") from None
    return parse_recipe(text, str(path))


def parse_recipe(text: str, name: str) -> Recipe:
    """A recipe from YAML text; `name` is what errors call it."""
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{name} must be a mapping of settings, got {type(values).__name__}")
    try:
        problems = _problems(values)
    except UserError as error:
        problems = [str(error)]
    if problems:
        raise UserError(f"{name}: {'; '.join(problems)}")
    of_run = _of_run(values)
    settings = {k: v for k, v in values.items() if k not in KEYS and k not in of_run}
    layers = values.get("layers")
    recipe = Recipe(
        name=name,
        model=values["model"],
        mode=values["mode"],
        layers=None if layers is None else tuple(layers),
        settings=settings,
        dataset=values.get("dataset"),
        notes={key: values[key] for key in NOTES if key in values},
        run={key: checked(RUN[key], values[key]) for key in of_run},
    )
    try:
        recipe.compressor()
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return recipe


def per_layer_recipe(edits: Sequence[Mapping[str, Any]], *, model: str, **notes: Any) -> str:
    """YAML of a recipe with settings per layer.

    Args:
        edits: each with `layers`, `mode` and its settings.
        notes: what else a recipe says, such as `origin`.
    """
    import yaml

    layers = sorted({layer for edit in edits for layer in edit["layers"]})
    recipe = {"model": model, "mode": "per-layer", "layers": layers}
    recipe |= {"edits": [dict(edit) for edit in edits]} | notes
    return yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=76)


def _of_run(values: dict[str, Any]) -> list[str]:
    """Keys that say something of the run; a field of the mode that is called so comes first."""
    own = fields_of(values["mode"])
    return [key for key in values if key in RUN and key not in own]


def _problems(values: dict[str, Any]) -> list[str]:
    out = [f"{key} is missing" for key in ("model", "mode") if not isinstance(values.get(key), str)]
    mode = values.get("mode")
    if isinstance(mode, str):
        try:
            of_run = _of_run(values)
        except UserError as error:
            return [*out, str(error)]
        known = [*KEYS, *fields_of(mode), *RUN]
        out += [
            f"unknown key {key!r}.{did_you_mean(str(key), known)}"
            for key in values
            if key not in known
        ]
        out += [found for key in of_run if (found := problem(key, values[key], RUN[key]))]
        rest = {k: v for k, v in values.items() if k in known and k not in (*KEYS, *of_run)}
        out += setting_problems(mode, rest)
    layers = values.get("layers")
    whole = isinstance(layers, list) and all(type(layer) is int for layer in layers)
    if layers is not None and not whole:
        out.append(f"layers must be a list of whole numbers, got {layers!r}")
    return out


@cache
def shipped() -> dict[str, Recipe]:
    """The recipes of the package by name, such as `gptj/fever/hybrid`."""
    root = files("tensorllm.configs")
    out = {}
    for path in sorted(Path(str(root)).glob("*/**/*.yaml")):
        name = path.relative_to(str(root)).with_suffix("").as_posix()
        out[name] = parse_recipe(path.read_text(), name)
    return out


@cache
def short_names() -> dict[str, dict[str, Any]]:
    """What is known of the models that have a short name."""
    import yaml

    return dict(yaml.safe_load((files("tensorllm.configs") / "models.yaml").read_text()))


def default_recipe(model: str, mode: str, dataset: str | None = None) -> Recipe | None:
    """The shipped recipe of a model and mode, for its default dataset unless one is named."""
    wanted = dataset or short_names().get(model, {}).get("default_dataset")
    canonical = COMPRESSORS.name_of(COMPRESSORS[mode])
    for recipe in shipped().values():
        if (recipe.model, recipe.mode, recipe.dataset) == (model, canonical, wanted):
            return recipe
    if dataset is not None:
        known = sorted({str(r.dataset) for r in shipped().values() if r.model == model})
        raise UserError(
            f"no recipe for {model} on {dataset!r}.{did_you_mean(dataset, known)} "
            f"Known for {model}: {', '.join(known) or 'none; leave --dataset out'}"
        )
    return None
