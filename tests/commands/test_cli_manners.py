"""The command line's manners: 80 columns, quiet when piped, JSON alone, names suggested."""

import ast
import inspect
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
from cli_runs import CONTROL, in_terminal, lines_of, piped, piped_anew, without_progress

from tensorllm.commands.catalog import catalog
from tensorllm_cli.app import COMMANDS, main
from tensorllm_cli.show import Timer

Capture = pytest.CaptureFixture[str]
SMALL = ("--model", "demo", "--limit", "60")


def run(capsys: Capture, *arguments: Any) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a call in this process."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    code = caught.value.code
    assert isinstance(code, int)
    return code, *capsys.readouterr()


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_and_tells_all(
    name: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run(capsys, *filter(None, [name]), "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    for word in ("Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted", "--verbose"):
        assert word in out
    if name:
        assert f"tensorllm {name} " in out  # an example beside the usage line
        assert "Example" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_is_silent_while_it_imports_what_it_needs(name: str) -> None:
    """The libraries take seconds: what brings them is imported behind a bar."""
    module = inspect.getmodule(inspect.unwrap(COMMANDS[name]))
    assert module is not None
    tree = ast.parse(inspect.getsource(module))
    bars = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and "progress_bar" in ast.unparse(node.items[0])
    ]
    behind = {id(node) for bar in bars for node in ast.walk(bar)}
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    heavy = [
        node
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tensorllm.commands")
    ]
    assert heavy
    assert [ast.unparse(node) for node in heavy if id(node) not in behind] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_no_line_of_the_help_is_broken_in_80_columns(name: str) -> None:
    """Behind the first one lines are printed as they stand, within a margin of one column."""
    _, *lines = (inspect.getdoc(COMMANDS[name]) or "").splitlines()
    assert [line for line in lines if len(line) > 78] == []


def test_no_word_of_the_compressors_is_broken_in_80_columns(capsys: Capture) -> None:
    code, out, err = run(capsys, "list", "compressors")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    for row in catalog("compressors"):
        for text in row.values():
            assert all(word in out for word in text.split())


def options_of(name: str) -> list[str]:
    return list(inspect.signature(COMMANDS[name]).parameters)


def test_every_command_can_print_json() -> None:
    assert all("json" in options_of(name) for name in COMMANDS)


@pytest.mark.parametrize(
    ("typed", "suggested"),
    [
        ("compres", "'compress'"),
        ("list modls", "'models'"),
        ("compress --mdel demo", "--model"),
        ("compress --model demo --mode hybird", "'hybrid'"),
        ("compress --model gptjj --mode hybrid", "'gptj'"),
        ("compress --model GPTJ --mode hybrid", "'gptj'"),
        ("compress --model gptj --mode hybrid --dataset fevr", "'fever'"),
        ("compress --config gptj/fevr/hybrid", "'gptj/fever/hybrid'"),
        ("compress --model demo --mode laser --rho 1 --matrices gat", "'gate'"),
        ("compress --model demo --mode shared-tucker --energy 1 --layout papr", "'paper'"),
        ("compress --model demo --mode laser --rho 1 --format factord", "'factored'"),
        ("compress --model demo --mode laser --rho 1 --dtype fp23", "'fp32'"),
        ("compress --model demo --mode laser --rho 1 --set sed=1", "'seed'"),
        ("compress --model demo --mode laser --rho 1 --logger tensorbord", "'tensorboard'"),
        ("evaluate --model demo --dataset demmo", "'demo'"),
        ("evaluate --model demo --dataset demo --protocol papr", "'paper'"),
        ("evaluate --model demo --dataset demo --split tst", "'test'"),
        ("search-ranks --model demo --mode lazer", "'laser'"),
        ("search-ranks --model demo --objective acuracy", "'accuracy'"),
        ("search-ranks --model demo --sampler gird", "'grid'"),
        ("search-ranks --model demo --mode laser --sampler gird", "'grid'"),
        ("reproduce --model gptjj --dry-run", "'gptj'"),
        ("reproduce --model gptj --dataset fevr --dry-run", "'fever'"),
        ("generate --model demoo --prompt x", "'demo'"),
        ("generate --model demo --prompt x --policy alwys", "'always'"),
        ("export nothing out --format dens", "'dense'"),
        ("export nothing out --format gguf", "convert_hf_to_gguf.py"),
        ("compress --model demo --mode laser --rho 1 --format GGUF", "convert_hf_to_gguf.py"),
        ("bench --model nothing --policy atuo", "'auto'"),
        ("generate --model demo --prompt x --cache latnt", "'latent'"),
        ("bench --model nothing --cache dens", "'dense'"),
    ],
)
def test_mistyped_names_are_suggested(typed: str, suggested: str, capsys: Capture) -> None:
    code, out, err = run(capsys, *typed.split())
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert suggested in err


@pytest.mark.parametrize(
    ("way", "arguments"),
    [
        (piped, ("compress", "--mode", "hybrid")),  # anew: test_packaging.py, from the wheel
        pytest.param(piped_anew, ("evaluate", "--dataset", "demo"), marks=pytest.mark.slow),
    ],
)
def test_piped_it_is_quiet_and_json_alone(way: Any, arguments: tuple[str, ...]) -> None:
    done = way(*arguments, *SMALL, "--json", PYTHONWARNINGS="default")
    assert done.returncode == 0, done.stderr
    assert without_progress(done.stderr) == ""
    assert "\x1b" not in done.stdout
    assert json.loads(done.stdout)


@pytest.mark.parametrize("more", [("--json",), ()], ids=["json", "table"])
def test_what_a_plugin_or_its_processes_print_is_no_result(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    (tmp_path / "chatty.py").write_text("import os\nprint('hello')\nos.system('echo there')\n")
    arguments = ("list", "models", *more)
    done = piped(*arguments, "--plugin", "chatty", PYTHONPATH=f"{tmp_path}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == piped(*arguments).stdout != ""
    assert sorted(done.stderr.split()) == ["hello", "there"]


def test_a_terminal_gets_a_bar_with_the_time_left_and_80_columns() -> None:
    code, sent = in_terminal("compress", "--mode", "laser", *SMALL)
    assert code == 0
    assert "scoring demo" in sent
    assert re.search(r"\d:\d\d:\d\d, \d:\d\d:\d\d left", CONTROL.sub("", sent))
    assert not re.search(
        r"loading [^\r]* left", CONTROL.sub("", sent)
    )  # nothing can be counted yet
    assert max(map(len, lines_of(sent))) <= 80
    assert "accuracy" in sent


def test_time_left_is_told_of_steps_longer_than_half_a_minute() -> None:
    now = 0.0
    timer = Timer(lambda: now)
    assert str(timer) == "0:00:00"
    assert timer.update(4, 10)  # an earlier run had done four
    now = 100.0
    assert str(timer) == "0:01:40"  # none done here, nothing to tell from
    assert not timer.update(5, 10)
    assert str(timer) == "0:01:40, 0:08:20 left"
    now = 130.0  # within a step it counts down
    assert str(timer) == "0:02:10, 0:07:50 left"
    now = 900.0  # never below nothing
    assert str(timer) == "0:15:00, 0:00:00 left"
    assert timer.update(0, 10)  # another stage
    assert str(timer) == "0:00:00"


def test_quiet_means_no_bar_and_no_colour_means_no_colour() -> None:
    code, sent = in_terminal("inspect", "--model", "demo", "--layers", "0", "--quiet")
    assert code == 0
    assert "reading" not in sent
    code, sent = in_terminal("--help", extra={"NO_COLOR": "1"})
    assert code == 0
    codes = [int(n) for found in CONTROL.findall(sent) if found[-1] == "m" for n in _numbers(found)]
    assert not [n for n in codes if 30 <= n <= 49 or 90 <= n <= 107]


def _numbers(sequence: str) -> list[str]:
    return [n for n in sequence[2:-1].split(";") if n]


def test_long_errors_are_broken_between_words() -> None:
    code, sent = in_terminal("compress", "--model", "gptjj", "--mode", "hybrid")
    assert code == 2
    assert max(map(len, lines_of(sent))) <= 80
    assert "Did you mean" in " ".join(sent.split())


def test_tracebacks_only_when_asked_for(capsys: Capture) -> None:
    wrong = ("evaluate", "--model", "demo", "--dataset", "demmo")
    assert "Traceback" not in run(capsys, *wrong)[2]
    code, _, err = run(capsys, *wrong, "--verbose")
    assert code == 2
    assert "Traceback" in err
    assert "UserError" in err


def test_what_should_not_happen_is_one_line(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("tensorllm.commands.catalog.catalog", broken)
    code, out, err = run(capsys, "list", "models")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "ZeroDivisionError: division by zero" in err
    assert "--verbose" in err


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("compress --model ", "gptj"),
        ("compress --mode ", "shared-tucker"),
        ("evaluate --dataset ", "hotpotqa"),
        ("list ", "recipes"),
        ("", "search-ranks"),
    ],
)
def test_completion_knows_the_names(typed: str, completed: str) -> None:
    """What a shell asks of Typer: the words so far, in its own variables."""
    variables = {
        "_TENSORLLM_COMPLETE": "complete_bash",
        "COMP_WORDS": f"tensorllm {typed}",
        "COMP_CWORD": str(len(typed.split()) + 1),
    }
    script = "import sys; sys.argv[0] = 'tensorllm'; from tensorllm_cli.app import main; main()"
    done = forked.run(["-c", script], env={**os.environ, **variables})
    assert completed in done.stdout.split(), done.stderr


Metrics = Callable[[Path], set[str]]


def test_metrics_go_to_a_logger(tmp_path: Path, capsys: Capture) -> None:
    where = ("--logger", "csv", "--log-dir", tmp_path)
    space = ("--layers", "3", "--r1", "32", "--r2", "8,16", "--r3", "2")
    said = {
        "compress": run(capsys, "compress", "--mode", "laser", *SMALL, *where),
        "evaluate": run(capsys, "evaluate", "--dataset", "demo", *SMALL, *where),
        "search": run(capsys, "search-ranks", *SMALL, *space, *where),
    }
    for name, (code, out, _) in said.items():
        assert code == 0
        assert out.splitlines()[-1] == f"logged to {tmp_path / name / 'version_0'}"
    found = {
        name: (tmp_path / name / "version_0" / "metrics.csv").read_text()
        for name in ("compress", "evaluate", "search")
    }
    assert {"compress/ratio/whole_model", "compress/site/relative_error"} <= _columns(
        found, "compress"
    )
    assert {"compress/before/accuracy", "compress/after/loss"} <= _columns(found, "compress")
    assert {"evaluate/accuracy", "evaluate/loss"} <= _columns(found, "evaluate")
    assert {"search/accuracy", "search/best_accuracy", "search/winner/accuracy"} <= _columns(
        found, "search"
    )
    assert len(found["search"].splitlines()) >= 3  # a line per trial


def _columns(found: dict[str, str], name: str) -> set[str]:
    return set(found[name].splitlines()[0].split(","))


def test_loggers_that_are_not_here(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ("compress", "--mode", "laser", *SMALL)
    code, _, err = run(capsys, *base, "--log-dir", "logs")
    assert code == 2
    assert "--logger" in err
    code, _, err = run(capsys, *base, "--logger", "wandb")
    assert code == 2
    assert "wandb" in err
    assert "not here" in err
