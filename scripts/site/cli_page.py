"""The command line's reference, made from the commands themselves whenever the site is built."""

import inspect
from collections.abc import Iterator
from textwrap import dedent
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from tensorllm_cli.app import app

BRACKET = "\\["  # else `[required]` could be a link


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add `cli.md`."""
    files.append(File.generated(config, "cli.md", content=page()))
    return files


def page() -> str:
    """Every command with its usage, its options and its examples, as Markdown."""
    group = typer.main.get_command(app)
    commands: dict[str, Any] = group.commands  # type: ignore[attr-defined]
    head = (
        "# Command line\n\n"
        "Made from the commands. Exit codes, output, Ctrl-C and loggers: "
        "[a page of its own](command_line.md).\n"
    )
    return "\n".join([head, *(line for name in commands for line in section(name, commands[name]))])


def section(name: str, command: Any) -> Iterator[str]:
    """One command."""
    context = typer.Context(command, info_name=f"tensorllm {name}")
    yield f"## {name}\n"
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"```text\n{context.command_path} {usage}\n```\n"
    yield f"{described(command.help or '')}\n"
    yield "| option | |\n|---|---|"
    for parameter in command.params:
        declared, text = (part.replace("|", "\\|") for part in parameter.get_help_record(context))
        yield f"| `{declared}` | {text.replace('[', BRACKET)} |"
    yield ""


def described(text: str) -> str:
    """The help text; its indented examples become a block of commands."""
    out, examples = [], []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith(" "):
            examples.append(dedent(paragraph))
        elif paragraph not in ("Example:", "Examples:"):
            out.append(paragraph.replace("\n", " "))
    if examples:
        out.append("```console\n" + "\n".join(f"$ {example}" for example in examples) + "\n```")
    return "\n\n".join(out)
