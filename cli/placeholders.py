"""What stands for an option's value in the help: nothing where it takes none."""

from typing import Any

from typer.core import TyperCommand, TyperGroup, TyperOption

VALUES = {"<str>": "TEXT", "<list[str]>": "TEXT", "<int>": "N", "<float>": "X", "<path>": "PATH"}


class Command(TyperCommand):
    """A command whose options stand in the help as they are typed."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _named(super().get_params(ctx), ctx)


class Group(TyperGroup):
    """The same for the program's own options."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _named(super().get_params(ctx), ctx)


def _named(params: list[Any], ctx: Any) -> list[Any]:
    for param in params:
        if isinstance(param, TyperOption) and param.metavar is None:
            if not hasattr(param, "display_type"):  # before Typer 0.29, which has words of its own
                return params
            shown = param.display_type(ctx)
            param.metavar = "" if param.is_flag else VALUES.get(shown, shown)
    return params
