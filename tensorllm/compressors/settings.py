"""A compressor from plain values (YAML, JSON, command line) and back."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any

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
    known = fields_of(mode)
    unknown = [name for name in settings if name not in known]
    if unknown:
        problems = [f"unknown setting {name!r}{_suggest(name, known)}" for name in unknown]
        raise UserError(f"mode {mode!r}: {'; '.join(problems)}. Known: {', '.join(known)}")
    try:
        return kind(**{name: _value(value) for name, value in settings.items()})
    except TypeError as error:  # a field is missing, or compared with a value of another type
        raise UserError(f"mode {mode!r}: {error}") from None


def fields_of(mode: str) -> list[str]:
    """The names of a mode's settings."""
    kind = COMPRESSORS[mode]
    return [field.name for field in fields(kind) if field.init] if is_dataclass(kind) else []


def _value(value: Any) -> Any:
    """Lists become tuples, and a mapping with a mode becomes that compressor."""
    if isinstance(value, Mapping) and "mode" in value:
        return make_compressor(value["mode"], {k: v for k, v in value.items() if k != "mode"})
    return tuple(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Compressor):
        mode, settings = settings_of(value)
        return {"mode": mode} | settings
    return list(value) if isinstance(value, tuple) else value


def _suggest(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
