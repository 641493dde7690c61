"""`tensorllm list`: compressors, models, datasets and so on, as rows of text."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tensorllm.registry import load_plugins, one_of

if TYPE_CHECKING:
    from tensorllm.recipes import Recipe

Row = dict[str, str]
KINDS = ("compressors", "architectures", "models", "datasets", "recipes")


def catalog(kind: str, plugins: Sequence[str] = ()) -> list[Row]:
    """The rows of one kind: compressors, architectures, models, datasets or recipes."""
    one_of("what to list", kind, KINDS)
    load_plugins(plugins)
    return _KINDS[kind]()


def _compressors() -> list[Row]:
    from tensorllm.compressors import COMPRESSORS
    from tensorllm.compressors.settings import fields_of

    return [
        {
            "mode": name,
            "what it does": _first_line(COMPRESSORS[name].__doc__),
            "settings": ", ".join(fields_of(name)),
            "source": COMPRESSORS[name].source.replace("https://arxiv.org/abs/", "arXiv "),
        }
        for name in COMPRESSORS
    ]


def _architectures() -> list[Row]:
    from tensorllm.models import ARCHITECTURES
    from tensorllm.models.coverage import table

    out = [
        {
            "model_type": name,
            "task": ARCHITECTURES[name].task,
            "read": "row",
            "what": ", ".join("+".join(stored.roles) for stored in ARCHITECTURES[name]),
        }
        for name in ARCHITECTURES
    ]
    return out + [
        {"model_type": name, "task": task, "read": entry.how, "what": entry.what}
        for task, types in table().items()
        for name, entry in types.items()
        if name not in ARCHITECTURES
    ]


def _models() -> list[Row]:
    from tensorllm.model_names import short_names

    return [
        {
            "model": name,
            "where": facts.get("hub") or "in the package",
            "revision": str(facts.get("revision", "")),
            "architecture": facts["model_type"],
        }
        for name, facts in short_names().items()
    ]


def _datasets() -> list[Row]:
    from tensorllm.data import DATASETS

    return [
        {"dataset": name, "what it asks": _first_line(DATASETS[name].__doc__)} for name in DATASETS
    ]


def _recipes() -> list[Row]:
    from tensorllm.recipes import shipped

    return [
        {
            "recipe": name,
            "layers": _layers(recipe),
            "ranks": _plain(recipe.settings.get("ranks")),
            "rho": _plain(recipe.settings.get("rho")),
            "matrix": _plain(recipe.settings.get("matrices")),
            "layout": _plain(recipe.settings.get("layout")),
        }
        for name, recipe in shipped().items()
    ]


def _layers(recipe: "Recipe") -> str:
    """Layers such as `11`, or `11+24` if the FFN's differ; `?` if they were never published."""
    shown = [
        "?" if layers is None else _plain(layers)
        for layers in (recipe.layers, recipe.settings.get("ffn_layers", recipe.layers))
    ]
    return "+".join(dict.fromkeys(shown))


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


def _first_line(doc: str | None) -> str:
    return next(iter((doc or "").strip().splitlines()), "")


_KINDS: dict[str, Callable[[], list[Row]]] = {
    "compressors": _compressors,
    "architectures": _architectures,
    "models": _models,
    "datasets": _datasets,
    "recipes": _recipes,
}
