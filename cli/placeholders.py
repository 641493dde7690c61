"""Placeholders for option values in the help, and a check that no value is another option."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

VALUES = {"<str>": "TEXT", "<list[str]>": "TEXT", "<int>": "N", "<float>": "X", "<path>": "PATH"}


class Command(TyperCommand):
    """A command whose help shows option values by `VALUES`."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _named(super().get_params(ctx), ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _refuse_options_as_values(self.get_params(ctx), args)
        return super().parse_args(ctx, args)


class Group(TyperGroup):
    """The same for the program's own options."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _named(super().get_params(ctx), ctx)


def _named(params: list[Any], ctx: Any) -> list[Any]:
    for param in params:
        if isinstance(param, TyperOption) and param.metavar is None:
            if not hasattr(param, "display_type"):  # before Typer 0.29: it has its own
                return params
            shown = param.display_type(ctx)
            param.metavar = "" if param.is_flag else VALUES.get(shown, shown)
    return params


def _refuse_options_as_values(params: Sequence[Any], args: Sequence[str]) -> None:
    """Refuse an option in the place of another option's missing value.

    Raises:
        typer.BadParameter: names both; a value that looks like an option is given as
            --option=value.
    """
    options = {
        word: param
        for param in params
        if isinstance(param, TyperOption)
        for word in (*param.opts, *param.secondary_opts)
    }
    for word, following in pairwise(args):
        if word == "--":
            return
        if word in options and not options[word].is_flag and following in options:
            raise typer.BadParameter(f"{word} needs a value, got the option {following}")
