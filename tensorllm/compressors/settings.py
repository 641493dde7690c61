"""A compressor from plain values (YAML, JSON, command line) and back."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import (
    ConfigDict,
    PydanticSchemaGenerationError,
    PydanticUndefinedAnnotation,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import ErrorDetails

from tensorllm.compressors.base import COMPRESSORS, Compressor
from tensorllm.errors import UserError
from tensorllm.io import at_home
from tensorllm.registry import did_you_mean

WANTED = {  # by pydantic's error types
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "is_instance_of": "a compressor: its mode and settings",
    "dataclass_type": "a compressor: its mode and settings",
}


def settings_of(compressor: Compressor) -> tuple[str, dict[str, Any]]:
    """The mode's name and the fields that differ from their defaults."""
    compressor = compressor.named
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
    """The strategy registered as `mode`, with these settings.

    Raises:
        UserError: unknown, missing or wrong settings; the message lists all problems.
    """
    kind = COMPRESSORS[mode]
    problems = setting_problems(mode, settings)
    if problems:
        known = ", ".join(fields_of(mode))
        raise UserError(f"mode {mode!r}: {'; '.join(problems)}. Settings: {known}")
    if missing := [name for name in _required(kind) if name not in settings]:
        raise UserError(f"mode {mode!r} needs {', '.join(missing)}")
    hints = _hints(kind)
    return kind(**{name: checked(hints.get(name, Any), v) for name, v in settings.items()})


def setting_problems(mode: str, settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with the names and types of settings, one line each."""
    known, hints, out = fields_of(mode), _hints(COMPRESSORS[mode]), []
    for name, value in settings.items():
        if name not in known:
            out.append(f"unknown setting {name!r}{_suggest(str(name), known)}")
        elif isinstance(value, Mapping) and "mode" in value:
            inner = {key: v for key, v in value.items() if key != "mode"}
            out += [f"{name}: {problem}" for problem in setting_problems(str(value["mode"]), inner)]
        elif found := problem(name, value, hints.get(name, Any)):
            out.append(found)
    return out


def fields_of(mode: str) -> list[str]:
    """The names of a mode's settings."""
    kind = COMPRESSORS[mode]
    return [field.name for field in fields(kind) if field.init] if is_dataclass(kind) else []


def _required(kind: type[Compressor]) -> list[str]:
    """The names of the settings without a default."""
    of_kind: tuple[Field[Any], ...] = fields(kind) if is_dataclass(kind) else ()
    return [f.name for f in of_kind if f.init and f.default is f.default_factory is MISSING]


def problem(name: str, value: Any, hint: Any) -> str | None:
    """What is wrong with a value for an annotated type; None if nothing is."""
    try:
        checked(hint, value)
    except ValidationError as error:
        wanted = " or ".join(dict.fromkeys(_words(each) for each in error.errors()))
        known = [word for word in get_args(hint) if isinstance(word, str)]
        return f"{name} must be {wanted}, got {value!r}{_suggest(str(value), known)}"
    return None


def _suggest(name: str, known: list[str]) -> str:
    """Such as ` (did you mean 'paper'?)`."""
    return did_you_mean(name, known).replace("Did", "(did").replace("?", "?)")


def _words(error: ErrorDetails) -> str:
    """What was expected, in words, from pydantic's error."""
    if error["type"] == "tuple_type" and isinstance(error["input"], str):
        return f"a list such as [{error['input']}]"
    if error["type"] == "literal_error":
        words = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
        return f"one of {words}"
    wanted = WANTED.get(error["type"], error["msg"].removeprefix("Input should be "))
    return f"a list, each {wanted}" if any(type(key) is int for key in error["loc"]) else wanted


def checked(hint: Any, value: Any) -> Any:
    """A plain value (from YAML, JSON or the command line) converted to an annotated type.

    Lists become tuples, text becomes a path or a number (YAML reads 1e-5 as text) if the type is
    one, and a mapping with a mode becomes that compressor; nothing else is converted.

    Raises:
        ValidationError: it is of another type.
    """
    if isinstance(value, Mapping) and "mode" in value:
        return make_compressor(str(value["mode"]), {k: v for k, v in value.items() if k != "mode"})
    if isinstance(value, list):
        value = tuple(value)
    wanted = (hint, *get_args(hint))
    if isinstance(value, str) and float in wanted:
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, str) and Path in wanted:
        value = at_home(Path(value))
    return _adapter(hint).validate_python(value, strict=True)


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation):
        return TypeAdapter(Any)  # a plugin's own type, which pydantic cannot check


def _hints(kind: type[Compressor]) -> dict[str, Any]:
    """Field -> annotated type; empty if a plugin's annotations cannot be resolved."""
    try:
        return get_type_hints(kind)
    except NameError:
        return {}


def _plain(value: Any) -> Any:
    if isinstance(value, Compressor):
        mode, settings = settings_of(value)
        return {"mode": mode} | settings
    return list(value) if isinstance(value, tuple) else value
