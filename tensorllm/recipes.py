"""Recipes: YAML files with a model, layers and settings, and their sources."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints

from tensorllm.compressors import COMPRESSORS, Compressor
from tensorllm.compressors.budget import TARGETS, Budget
from tensorllm.compressors.settings import (
    checked,
    fields_of,
    make_compressor,
    problem,
    setting_problems,
)
from tensorllm.errors import UserError
from tensorllm.io import from_yaml
from tensorllm.model_names import short_names
from tensorllm.options import OptionField, option_fields
from tensorllm.registry import did_you_mean
from tensorllm.requests.compress import ONLY_TYPED, SETTINGS, CompressRequest

# What a recipe holds besides the compressor's own settings.
NOTES = ("origin", "source", "published", "alternatives")
KEYS = ("model", "dataset", "mode", "layers", *NOTES)
# What it may set of the run: fields of the request that are not fields of the mode.
RUN = {
    field.name: field
    for field in option_fields(CompressRequest)
    if field.name not in (*KEYS, *SETTINGS, *ONLY_TYPED)
}

_TARGET_TYPES = get_type_hints(Budget)


@dataclass(frozen=True)
class Recipe:
    """One parsed recipe.

    Attributes:
        settings: the compressor's fields.
        run: settings of the run: fields of `CompressRequest` such as `calibration` and `out`.
        notes: its origin, source and published results.
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
        """The strategy, with the recipe's fields replaced by those given."""
        return make_compressor(self.mode, self.settings | override)


def read_recipe(path: Path) -> Recipe:
    """A recipe from a YAML file, or a shipped one by name; all its errors are reported at once."""
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
    """A recipe from YAML text; `name` is its name in errors."""
    import yaml

    try:
        values = from_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{name} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        raise UserError(f"{name} is empty; it must be a mapping of settings")
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
        run={key: RUN[key].placed(checked(RUN[key].kind, values[key])) for key in of_run},
    )
    try:
        if budget_of(recipe.mode, settings) is None:  # otherwise sizes are still to be chosen
            recipe.compressor()
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return recipe


def budget_of(mode: str, settings: Mapping[str, Any]) -> Budget | None:
    """The target size among the settings; None if there is none, or the mode handles it itself."""
    wanted = {name: settings[name] for name in TARGETS if name in settings}
    if not wanted or set(wanted) <= set(fields_of(mode)):
        return None
    if problems := _target_problems(wanted):
        raise UserError("; ".join(problems))
    return Budget(**{name: checked(_TARGET_TYPES[name], x) for name, x in wanted.items()})


def _target_problems(wanted: Mapping[str, Any]) -> list[str]:
    return [found for key, x in wanted.items() if (found := problem(key, x, _TARGET_TYPES[key]))]


def as_yaml(recipe: Mapping[str, Any]) -> str:
    """The text of a recipe file, keys in their order, in lines of at most 80 columns."""
    import yaml

    # YAML ends a line after the word that exceeds the width.
    return yaml.safe_dump(dict(recipe), sort_keys=False, default_flow_style=None, width=68)


def _of_run(values: dict[str, Any]) -> list[str]:
    """Keys that set something of the run; a field of the mode with the same name goes first."""
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
        own = fields_of(mode)
        targets = [key for key in values if key in TARGETS and key not in own]
        known = [*KEYS, *own, *RUN, *TARGETS]
        out += [
            f"unknown key {key!r}.{did_you_mean(str(key), known)}"
            for key in values
            if key not in known
        ]
        out += [found for key in of_run if (found := _run_problem(RUN[key], values[key]))]
        out += _target_problems({key: values[key] for key in targets})
        said = (*KEYS, *of_run, *targets)
        rest = {k: v for k, v in values.items() if k in known and k not in said}
        out += setting_problems(mode, rest)
    layers = values.get("layers")
    whole = isinstance(layers, list) and all(type(layer) is int for layer in layers)
    if layers is not None and not whole:
        out.append(f"layers must be a list of whole numbers, got {layers!r}")
    return out


def _run_problem(field: OptionField, value: Any) -> str | None:
    return problem(field.name, value, field.kind) or field.out_of_range(value)


@cache
def shipped() -> dict[str, Recipe]:
    """The recipes of the package by name, such as `gptj/fever/hybrid`."""
    root = files("tensorllm.configs")
    out = {}
    for path in sorted(Path(str(root)).glob("*/**/*.yaml")):
        name = path.relative_to(str(root)).with_suffix("").as_posix()
        out[name] = parse_recipe(path.read_text(), name)
    return out


def default_recipe(model: str, mode: str, dataset: str | None = None) -> Recipe | None:
    """The shipped recipe of a model and mode, for its default dataset unless one is named."""
    wanted = dataset or short_names().get(model, {}).get("default_dataset")
    canonical = COMPRESSORS.name_of(COMPRESSORS[mode])
    for recipe in shipped().values():
        if (recipe.model, recipe.mode, recipe.dataset) == (model, canonical, wanted):
            return recipe
    if dataset is not None:
        of_model = [recipe for recipe in shipped().values() if recipe.model == model]
        known = sorted({str(r.dataset) for r in of_model if r.mode == canonical})
        if not known:
            modes = ", ".join(sorted({r.mode for r in of_model}))
            raise UserError(
                f"no recipe of mode {mode!r} for {model}: leave --dataset out"
                + (f", or take one of the modes {modes}" if modes else "")
            )
        raise UserError(
            f"no recipe of mode {mode!r} for {model} on {dataset!r}."
            f"{did_you_mean(dataset, known)} Known: {', '.join(known)}"
        )
    return None


def recipe_of(request: CompressRequest) -> Recipe:
    """The recipe file or shipped recipe, overridden by the request's own settings."""
    given, base = request.given, None
    if request.config is not None:
        base = read_recipe(request.config)
        if request.mode is not None and request.mode != base.mode:
            raise UserError(
                f"--mode {request.mode} contradicts {base.name}, which says {base.mode}"
            )
    model = request.model or (base.model if base else None)
    if model is None:
        raise UserError("give --model: a short name, a local folder or a hub id (or --config FILE)")
    if base is None:
        if request.mode is None:
            raise UserError("give --mode: see `tensorllm list compressors` (or --config FILE)")
        if not any(target in given for target in TARGETS):  # these are for whole models
            base = default_recipe(model, request.mode, request.dataset)
    if base is None:
        base = Recipe("command line", model, request.mode or "", None, {})
    kept = {
        key: value for key, value in base.settings.items() if not _excluded(key, given, base.mode)
    }
    wanted = request.layers or base.layers
    layers = wanted if isinstance(wanted, tuple) else None
    if wanted is None and base.notes:
        raise UserError(
            f"the layer of {base.name} was never published; give --layers, or find the best with "
            "`tensorllm search-ranks`"
        )
    settings = kept | given
    target = next((name for name in TARGETS if name in settings), None)
    sizes = [
        name for row in COMPRESSORS[base.mode].size_settings for name in row if name in settings
    ]
    if target is not None and sizes:
        raise UserError(
            f"{target} chooses the sizes itself: give it or {' and '.join(sizes)}, not both"
        )
    return replace(base, model=model, layers=layers, settings=settings)


def completed(request: CompressRequest, recipe: Recipe) -> CompressRequest:
    """The request, completed by what its recipe, or its model's short name, sets for the run."""
    own = {field.name: field.default for field in fields(request)}
    said = {"evaluate": short_names().get(recipe.model, {}).get("evaluate"), **recipe.run}
    return replace(request, **{k: v for k, v in said.items() if getattr(request, k) == own[k]})


def _excluded(key: str, given: Mapping[str, Any], mode: str) -> bool:
    """Whether a recipe's setting is dropped for one that is given and takes its place."""
    groups = [(*row, *TARGETS) for row in COMPRESSORS[mode].size_settings] or [TARGETS]
    return key not in given and any(
        key in group and any(name in given for name in group) for group in groups
    )
