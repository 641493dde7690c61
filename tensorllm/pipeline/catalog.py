"""`tensorllm list`: what there is, as rows of text."""

from collections.abc import Callable, Sequence

from tensorllm.pipeline.plugins import load_plugins
from tensorllm.registry import one_of

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
            "settings": ", ".join(fields_of(name)),
            "what it does": _first_line(COMPRESSORS[name].__doc__),
            "source": COMPRESSORS[name].source,
        }
        for name in COMPRESSORS
    ]


def _architectures() -> list[Row]:
    from tensorllm.architectures import ARCHITECTURES

    return [
        {
            "model_type": name,
            "task": ARCHITECTURES[name].task,
            "attention": ", ".join(_stored(s.roles) for s in ARCHITECTURES[name].attention),
            "FFN": ", ".join(_stored(s.roles) for s in ARCHITECTURES[name].ffn),
        }
        for name in ARCHITECTURES
    ]


def _models() -> list[Row]:
    from tensorllm.recipes import short_names

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
            "layers": "not published" if recipe.layers is None else str(list(recipe.layers)),
            "settings": ", ".join(f"{k}={v}" for k, v in recipe.settings.items()),
        }
        for name, recipe in shipped().items()
    ]


def _stored(roles: Sequence[str]) -> str:
    return "+".join(roles)


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().splitlines()[0] if doc else ""


_KINDS: dict[str, Callable[[], list[Row]]] = {
    "compressors": _compressors,
    "architectures": _architectures,
    "models": _models,
    "datasets": _datasets,
    "recipes": _recipes,
}
