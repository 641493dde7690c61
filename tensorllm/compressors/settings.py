"""A compressor from plain values (YAML, JSON, command line) and back."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tensorllm.compressors.base import COMPRESSORS, Compressor
from tensorllm.errors import UserError


def settings_of(compressor: Compressor) -> tuple[str, dict[str, Any]]:
    """The mode's name and the fields that differ from their defaults."""
    mode = COMPRESSORS.name_of(type(compressor))
    if not is_dataclass(compressor):
        return mode, {}
    changed = {
        field.name: getattr(compressor, field.name)
        for field in fields(compressor)
        if getattr(compressor, field.name) != field.default
    }
    return mode, {name: _plain(value) for name, value in changed.items()}


def make_compressor(mode: str, settings: Mapping[str, Any]) -> Compressor:
    """The strategy registered as `mode`, with these fields; all errors at once."""
    kind = COMPRESSORS[mode]
    problems = setting_problems(mode, settings)
    if problems:
        known = ", ".join(fields_of(mode))
        raise UserError(f"mode {mode!r}: {'; '.join(problems)}. Settings: {known}")
    hints = _hints(kind)
    try:
        return kind(**{name: _value(value, hints.get(name)) for name, value in settings.items()})
    except TypeError as error:  # a field without a default is missing
        raise UserError(f"mode {mode!r}: {error}") from None


def setting_problems(mode: str, settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with the names and the types of settings, a line each."""
    known, hints, out = fields_of(mode), _hints(COMPRESSORS[mode]), []
    for name, value in settings.items():
        if name not in known:
            out.append(f"unknown setting {name!r}{_suggest(str(name), known)}")
        elif isinstance(value, Mapping) and "mode" in value:
            inner = {key: v for key, v in value.items() if key != "mode"}
            out += [f"{name}: {problem}" for problem in setting_problems(str(value["mode"]), inner)]
        elif not _fits(_value(value, hints.get(name)), hints.get(name)):
            words = [word for word in get_args(hints[name]) if isinstance(word, str)]
            close = _suggest(str(value), words)
            out.append(f"{name} must be {_describe(hints[name])}, got {value!r}{close}")
    return out


def fields_of(mode: str) -> list[str]:
    """The names of a mode's settings."""
    kind = COMPRESSORS[mode]
    return [field.name for field in fields(kind) if field.init] if is_dataclass(kind) else []


def _value(value: Any, hint: Any) -> Any:
    """Lists become tuples, and a mapping with a mode becomes that compressor."""
    if isinstance(value, Mapping) and "mode" in value:
        return make_compressor(str(value["mode"]), {k: v for k, v in value.items() if k != "mode"})
    if isinstance(value, str) and float in (hint, *get_args(hint)):
        try:
            return float(value)  # YAML reads 1e-5 as text
        except ValueError:
            return value
    return tuple(value) if isinstance(value, list) else value


def _hints(kind: type[Compressor]) -> dict[str, Any]:
    """Field -> annotated type; none where a plugin's annotations cannot be resolved."""
    try:
        return get_type_hints(kind)
    except NameError:
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; an unknown kind of annotation fits everything."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(part, inner[0]) for part in value)
    if hint is float:
        return type(value) in (int, float)
    if hint in (int, str, bool, NoneType):
        return type(value) is hint
    return isinstance(value, hint) if isinstance(hint, type) else True


def _describe(hint: Any) -> str:
    """An annotated type in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_describe(one) for one in inner if one is not NoneType)
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if origin is tuple:
        return f"a list, each {_describe(inner[0])}"
    words = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}
    return words.get(hint, "a compressor: its mode and settings")


def _plain(value: Any) -> Any:
    if isinstance(value, Compressor):
        mode, settings = settings_of(value)
        return {"mode": mode} | settings
    return list(value) if isinstance(value, tuple) else value


def _suggest(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
