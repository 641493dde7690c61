"""Options are said once, in the requests; command line, recipes and Python agree; flags stay."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tensorllm import options
from tensorllm.errors import UserError
from tensorllm.options import OptionField, option_fields
from tensorllm.recipes import RUN, completed, parse_recipe, recipe_of
from tensorllm.requests import shared
from tensorllm.requests.compress import SETTINGS, CompressRequest
from tensorllm.requests.evaluate import EvaluateRequest
from tensorllm.requests.others import (
    BenchRequest,
    ExportRequest,
    GenerateRequest,
    InspectRequest,
    ListRequest,
    PushRequest,
    ReportRequest,
    SampleRequest,
    ServeRequest,
)
from tensorllm.requests.reproduce import ReproduceRequest
from tensorllm.requests.search import SearchRequest
from tensorllm_cli.app import COMMANDS, app
from tensorllm_cli.signature import takes

FROZEN = Path(__file__).with_name("command_flags.json")
REQUESTS: dict[str, Any] = {
    "compress": CompressRequest,
    "evaluate": EvaluateRequest,
    "search-ranks": SearchRequest,
    "reproduce": ReproduceRequest,
    "inspect": InspectRequest,
    "generate": GenerateRequest,
    "sample": SampleRequest,
    "serve": ServeRequest,
    "export": ExportRequest,
    "push": PushRequest,
    "bench": BenchRequest,
    "report": ReportRequest,
    "list": ListRequest,
}
# What is typed for a parser, and what is meant.
PARSED: dict[Any, tuple[list[str], Any]] = {
    shared.MODEL.parse: (["demo"], "demo"),
    options.layers: (["0,3-5"], (0, 3, 4, 5)),
    options.candidates: (["0,3-5"], (0, 3, 4, 5)),
    options.whole_numbers: (["304,19,2"], (304, 19, 2)),
    options.names: (["in,out"], ("in", "out")),
    options.numbers: (["1.2,2"], (1.2, 2.0)),
    options.shares: (["0.5,0.9"], (0.5, 0.9)),
    options.values: (["8,0.5,in+out"], (8, 0.5, "in+out")),
    options.seconds: (["2m"], 120.0),
    options.size: (["2KiB"], 2048),
    options.assignments: (["a=1", "b=[x, y]"], {"a": 1, "b": ["x", "y"]}),
    options.named_values: (["rank=4,8"], {"rank": (4, 8)}),
}
PLAIN: dict[Any, tuple[str, Any]] = {
    int: ("7", 7),
    float: ("0.25", 0.25),
    Path: ("p/q", Path("p/q")),
}


def flags_of(command: str) -> list[str]:
    group: Any = typer.main.get_command(app)
    return sorted(name for p in group.commands[command].params for name in p.opts)


def typed(field: OptionField) -> tuple[list[str], Any]:
    """Words for one option, and the value that they stand for."""
    if field.kind is bool:
        return [field.flag], True
    if field.option.parse:
        texts, value = PARSED[field.option.parse]
    else:
        kinds = {field.kind, *get_args(field.kind)}
        text, one = next((PLAIN[kind] for kind in kinds if kind in PLAIN), ("word", "word"))
        if field.option.reads is not None:  # refused if it is not there
            text, one = __file__, Path(__file__)
        texts, value = [text], one
        if field.option.repeated:
            texts, value = [text, text], (one, one)
    if field.option.argument:
        return texts, value
    return [word for text in texts for word in (field.flag, text)], value


def test_no_flag_goes_and_none_comes_unseen() -> None:
    """Scripts depend on them: a new flag is added to the file, an old one is never taken away."""
    assert {name: flags_of(name) for name in COMMANDS} == json.loads(FROZEN.read_text())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_a_field_with_a_help_text(name: str) -> None:
    fields = option_fields(REQUESTS[name])
    assert all(field.option.help.endswith((".", "...")) for field in fields)
    known = {field.name if field.option.argument else field.flag for field in fields}
    assert set(flags_of(name)) - known <= {"--json", "--verbose", "--quiet", "--compare"}
    assert known <= set(flags_of(name))


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_typed_arrives_in_the_request(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request, fields = REQUESTS[name], option_fields(REQUESTS[name])
    seen: list[Any] = []

    @takes(request)
    def command(request: Any, *, json: bool) -> None:
        seen.append((request, json))

    one = typer.Typer()
    one.command()(command)
    monkeypatch.setattr(
        request, "__post_init__", lambda self: None, raising=False
    )  # values are made up
    for wanted in (fields, [field for field in fields if field.required]):
        given = {field.name: typed(field) for field in wanted}
        words = [word for words, _ in given.values() for word in words]
        CliRunner().invoke(one, words, catch_exceptions=False)
        want = request(**{key: value for key, (_, value) in given.items()})
        assert seen.pop() == (want, False)


def test_a_recipe_may_say_what_is_of_the_run(tmp_path: Path) -> None:
    recipe = tmp_path / "run.yaml"
    recipe.write_text(
        "model: demo\nmode: shared-tucker\nlayers: [3]\nranks: [8, 4, 2]\n"
        "format: factored\nout: small\nevaluate: demo\nlimit: 20\nsequences: 4\nseed: 9\n"
    )
    request = CompressRequest(config=recipe, limit=7)
    done = completed(request, recipe_of(request))
    assert (done.format, done.out, done.evaluate) == ("factored", Path("small"), "demo")
    assert (done.sequences, done.seed) == (4, 9)
    assert done.limit == 7  # what was given comes first
    assert recipe_of(request).settings == {"ranks": [8, 4, 2]}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("sequences: many", "sequences must be a whole number, got 'many'"),
        ("overwrite: 1", "overwrite must be true or false, got 1"),
        ("fromat: dense", "unknown key 'fromat'. Did you mean 'format'?"),
        ("rho: [1]", "rho must be a number, got [1]"),
        ("matrices: in", "matrices must be a list such as [in], got 'in'"),
    ],
)
def test_a_recipe_is_checked(line: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(f"model: demo\nmode: laser\n{line}\n", "run.yaml")
    assert said in str(caught.value)


def test_a_field_of_the_mode_comes_before_one_of_the_run() -> None:
    recipe = parse_recipe("model: demo\nmode: laser\nseed: 3\nrho: 0.1\n", "run.yaml")
    assert (recipe.settings["seed"], recipe.run) == (3, {})


def test_settings_are_no_options_of_the_run() -> None:
    assert not set(SETTINGS) & set(RUN)
    asked = CompressRequest(rho=0.5, settings={"seed": 3})
    assert asked.given == {"rho": 0.5, "seed": 3}


@given(st.lists(st.integers(0, 500), min_size=1))
def test_layers_are_read_as_they_are_written(layers: list[int]) -> None:
    assert options.layers("--layers", ",".join(map(str, layers))) == tuple(layers)
    first = layers[0]
    assert options.layers("--layers", f"{first}-{first + 3}") == tuple(range(first, first + 4))


@pytest.mark.parametrize(
    ("request_type", "given", "needed"),
    [
        (EvaluateRequest, {"overwrite": True}, {"out": Path("o")}),
        (SearchRequest, {"model": "m", "allow_overlap": True}, {"calibration": Path("c.txt")}),
        (GenerateRequest, {"model": "m", "prompts": ("a",), "seed": 3}, {"temperature": 0.5}),
        (ReproduceRequest, {"trials": 9}, {"study": "claims"}),
        (ReproduceRequest, {"validation": 9}, {"study": "claims"}),
        (ReproduceRequest, {"draws": 9}, {"study": "claims"}),
        (CompressRequest, {"format": "dense"}, {"dry_run": True}),
        (CompressRequest, {"format": "dense"}, {"out": Path("o")}),
    ],
)
def test_an_option_without_what_it_is_for_is_refused(
    request_type: Any, given: dict[str, Any], needed: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=f"does nothing without .*--{next(iter(needed))[:3]}"):
        options.refuse_idle(request_type(**given))
    options.refuse_idle(request_type(**given, **needed))


@pytest.mark.parametrize("name", COMMANDS)
def test_what_an_option_needs_is_another_one(name: str) -> None:
    fields = option_fields(REQUESTS[name])
    known = {field.name for field in fields}
    needs = {need.partition("=")[0] for field in fields for need in field.option.needs}
    assert needs <= known


@pytest.mark.parametrize(
    ("text", "bytes_"), [("1", 1), ("2kB", 2000), ("1.5TB", 15 * 10**11), ("1tib", 2**40)]
)
def test_sizes(text: str, bytes_: int) -> None:
    assert options.size("--target-bytes", text) == bytes_


def test_a_size_may_have_any_number_of_digits() -> None:
    assert options.size("--target-bytes", "9" * 400 + "kB") == int("9" * 400) * 1000


def test_the_home_folder_stands_for_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves it in `--out=~/folder`; a folder named ~ is a danger."""
    monkeypatch.setenv("HOME", "/home/me")
    seen: list[Any] = []

    @takes(ReportRequest)
    def command(request: Any, *, json: bool) -> None:
        seen.append(request)

    one = typer.Typer()
    one.command()(command)
    CliRunner().invoke(one, ["~/a", "~nobody-here/b", "--out=~/c.html"], catch_exceptions=False)
    assert seen[0].runs == (Path("/home/me/a"), Path("~nobody-here/b"))
    assert seen[0].out == Path("/home/me/c.html")
