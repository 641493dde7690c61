"""The signature of a command, generated from the fields of its request."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from tensorllm.options import OptionField, option_fields
from tensorllm_cli import names
from tensorllm_cli.show import results_alone

JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def takes(request: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: the command gets a request built from its options, and `json`.

    Further parameters of the command are Typer options as declared. Options that were not given are
    left out, so that the request's defaults apply.
    """
    declared = option_fields(request)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**given: Any) -> None:
            read = {field.name: _read(field, given.pop(field.name)) for field in declared}
            with results_alone():
                command(request(**{k: v for k, v in read.items() if v is not None}), **given)

        own = inspect.signature(command).parameters
        parameters = [_parameter(field) for field in declared]
        parameters += [own[name] for name in own if name not in ("request", "json")]
        parameters.append(_keyword("json", JSON, default=False))
        required = [p for p in parameters if p.default is inspect.Parameter.empty]
        optional = [p for p in parameters if p.default is not inspect.Parameter.empty]
        run.__signature__ = inspect.Signature([*required, *optional])  # type: ignore[attr-defined]
        return run

    return decorate


def _parameter(field: OptionField) -> inspect.Parameter:
    option = field.option
    if option.argument:
        shown = typer.Argument(
            metavar=option.metavar, help=option.help, autocompletion=names.COMPLETE.get(field.name)
        )
    else:
        shown = typer.Option(
            field.flag,
            metavar=option.metavar or (None if option.minimum is None else "N"),
            help=option.help,
            min=option.minimum,
            max=option.maximum,
            autocompletion=names.COMPLETE.get(field.name),
        )
    default = None if option.parse or option.repeated else field.default
    if field.required:
        default = inspect.Parameter.empty
    return _keyword(field.name, Annotated[_typed(field), shown], default)


def _keyword(name: str, kind: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _typed(field: OptionField) -> Any:
    """The type that Typer reads: text if the field's own parser or a later check follows."""
    option, kind = field.option, field.kind
    if option.repeated:
        inner = str if option.parse else next(iter(get_args(kind)))
        return list[inner] if field.required else list[inner] | None  # type: ignore[valid-type]
    if option.parse or kind is Any or get_origin(kind) is Literal:
        return str | None
    return kind


def _read(field: OptionField, given: Any) -> Any:
    if given is None:
        return None
    if field.option.parse is not None:
        return field.option.parse(field.flag, given)
    if field.option.repeated:
        return tuple(field.there(each) for each in given)
    return field.there(given)
