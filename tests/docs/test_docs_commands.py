"""What README, documentation and --help show can be typed: commands parse, code compiles."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import typer
import yaml
from docs_blocks import PAGES, ROOT, blocks, commands
from tiny_models import tiny_model

from tensorllm.compressors import COMPRESSORS
from tensorllm.data.base import DATASETS
from tensorllm.data.catalog import Questions  # noqa: F401  registers all datasets
from tensorllm.model_names import short_names
from tensorllm.models import RoleMatrices, parameters_of
from tensorllm.search.space import searchable
from tensorllm_cli.app import WRONG_USE, app

GROUP = typer.main.get_command(app)
HELP = [(name, command.help) for name, command in GROUP.commands.items()]  # type: ignore[attr-defined]
CONSOLE = ("", "console", "bash", "sh")


def parse(arguments: list[str]) -> dict[str, object]:
    """The options of a command line, by the command's own parser; nothing is run."""
    root = GROUP.make_context("tensorllm", list(arguments))
    name, command, rest = GROUP.resolve_command(root, arguments)  # type: ignore[attr-defined]
    return command.make_context(name, rest, parent=root).params


def check(arguments: list[str], page: str) -> None:
    """Options parse, and modes, datasets and short names exist or are made on the page."""
    given = parse(arguments)
    mode, dataset, model = (given.get(key) for key in ("mode", "dataset", "model"))
    assert mode is None or mode in COMPRESSORS or f'register("{mode}")' in page, arguments
    for name in [] if dataset is None else str(dataset).split(","):
        known = name in DATASETS or name.endswith(".yaml")
        assert known or f'register("{name}"' in page, arguments
    if isinstance(model, str) and "/" not in model and not model.isupper():  # MODEL: any
        assert model in short_names(), arguments


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_on_the_page_parse(page: Path) -> None:
    text = page.read_text()
    for block in blocks(text, *CONSOLE):
        for arguments in commands(block.text):
            check(arguments, text)


@pytest.mark.parametrize(("name", "text"), HELP)
def test_commands_in_help_parse(name: str, text: str) -> None:
    shown = commands(text)
    assert shown, f"tensorllm {name} --help shows no example"
    for arguments in shown:
        check(arguments, text)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_on_the_page_can_be_read(page: Path) -> None:
    readers = {"json": json.loads, "yaml": yaml.safe_load, "toml": tomllib.loads}
    for language, text in blocks(page.read_text()):
        if language == "python":
            compile(text, str(page), "exec")
        elif language in readers:
            readers[language](text)


def test_the_search_page_names_every_mode_that_has_something_to_search() -> None:
    model = tiny_model("llama")
    there = searchable(RoleMatrices(model.config, parameters_of(model)).spec)
    page = (ROOT / "docs" / "search.md").read_text()
    named = page.split("`--mode` is any compressor")[1].split(";")[0]
    assert sorted(re.findall("`([a-z-]+)`", named)) == sorted(there.split(", "))


def test_a_wrong_command_would_be_found() -> None:
    page = "```console\n$ tensorllm compress --model demo \\\n    --mode hybrid  # why\n```"
    (good,) = commands(blocks(page, "console")[0].text)
    assert good == ["compress", "--model", "demo", "--mode", "hybrid"]
    check(good, "")
    for wrong in ("--mode hibrid", "--dataset fevr", "--model gpt"):
        with pytest.raises(AssertionError):
            check([*good, *wrong.split()], "")
    for wrong in ("--mod x", "--rank many", "surplus"):
        with pytest.raises(WRONG_USE):
            check([*good, *wrong.split()], "")
