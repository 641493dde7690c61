"""The pages' programs run, their examples print what they say, and the site's own parts work."""

import csv
import doctest
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from docs_blocks import PAGES, ROOT, blocks, commands

from tensorllm.data import DATASETS
from tensorllm_cli.app import app, main

DOCS = ROOT / "docs"
DOCTESTED = [page for page in PAGES if "```pycon" in page.read_text()]


def hook(name: str) -> ModuleType:
    """A module of scripts/site."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / "site" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", DOCTESTED, ids=lambda path: path.stem)
def test_examples_print_what_the_page_says(page: Path) -> None:
    text = "\n".join(block.text for block in blocks(page.read_text(), "pycon"))
    test = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    assert test.examples
    found = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
    assert found.failed == 0


def test_the_program_of_your_model_runs() -> None:
    program = "\n".join(
        block.text for block in blocks((DOCS / "your_model.md").read_text(), "python")
    )
    exec(compile(program, "your_model.md", "exec"), {})


@pytest.mark.filterwarnings("ignore:::lightning", "ignore:.*treespec.*")
def test_the_script_of_the_lightning_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (program,) = blocks((DOCS / "lightning.md").read_text(), "python")
    found: dict[str, Any] = {}
    exec(compile(program.text, "lightning.md", "exec"), found)
    validation, test = (found[name]["accuracy"] for name in ("validation", "test"))
    assert f"{validation:.1f} % on validation, {test:.1f} % on test" in capsys.readouterr().out
    kept = found["callbacks"][0].predictions().values()
    right = sum(p.correct for p in kept if p.index in {e.index for e in found["data"].part("test")})
    assert len(kept) == 200  # of both parts
    assert test == right
    with (tmp_path / "logs" / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        assert [float(row["accuracy"]) for row in csv.DictReader(file)][-1] == pytest.approx(test)


@pytest.fixture
def dataset_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """docs/add_a_dataset.md, its files beside each other in a folder of their own."""
    text = (DOCS / "add_a_dataset.md").read_text()
    for language in ("yaml", "python"):
        for _, code in blocks(text, language):
            if named := re.match(r"# (\w+\.\w+)\n", code):
                (tmp_path / named[1]).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(DATASETS, "_entries", {name: DATASETS[name] for name in DATASETS})
    yield text
    sys.modules.pop("colours", None)


@pytest.mark.slow
def test_the_datasets_of_the_page_are_scored(
    dataset_page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sums = [{"question": "one and one", "prompt": "1 + 1 =", "answer": "two", "gold": "two"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums * 5))
    (tmp_path / "colours.csv").write_text("thing,colour\n" + "grass,green\n" * 5)
    shown = [c for b in blocks(dataset_page, "", "console") for c in commands(b.text)]
    assert len(shown) >= 3
    for arguments in shown:
        with pytest.raises(SystemExit) as end:
            main([*arguments, "--json"])
        printed = capsys.readouterr()
        assert end.value.code == 0, printed.err
        assert json.loads(printed.out)["examples"] > 0


def test_every_option_is_in_the_reference() -> None:
    page = hook("cli_page").page()
    group = typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for parameter in command.params:
            words = parameter.opts if parameter.param_type_name == "option" else [parameter.help]
            assert all(word in section for word in words), (name, parameter.name)


def test_formulas_become_mathml() -> None:
    convert = hook("maths").on_page_content
    inline = convert(r'<p><span class="arithmatex">\(a &lt; b\)</span></p>')
    block = convert('<div class="arithmatex">\n\\[\nU^{\\top} U = I\n\\]\n</div>')
    assert re.search(r"<p><math[^>]*><mrow><mi>a</mi><mo>&#x0003C;</mo><mi>b</mi>", inline)
    assert 'display="block"' in block
    assert "arithmatex" not in inline + block


@pytest.mark.parametrize(
    "text",
    [
        '<script defer src="https://cdn.example/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/css">',
        '<img alt="a" src="http://badges.example/b.svg">',
        "@font-face { src: url(https://fonts.example/f.woff2) }",
        '@import "https://fonts.example/css";',
    ],
)
def test_a_page_that_fetches_from_elsewhere_is_found(text: str) -> None:
    assert len(hook("offline").fetched(text)) == 1


def test_links_and_own_files_are_no_fetches() -> None:
    text = '<a href="https://arxiv.org">x</a><img src="a.svg"><link href="assets/main.css">'
    assert hook("offline").fetched(text) == []
    assert hook("offline").fetched('<svg xmlns="http://www.w3.org/2000/svg">') == []


def test_a_notebook_becomes_a_page() -> None:
    pictures: dict[str, str | bytes] = {}
    output = {
        "output_type": "display_data",
        "data": {"text/plain": "F", "image/svg+xml": ["<svg/>"]},
    }
    cell = {"cell_type": "code", "source": ["a = 1\n", "a"], "outputs": [output]}
    parts = list(hook("notebook_page").parts(cell, "notebooks/x", pictures))
    assert parts == ["```python\na = 1\na\n```", "![](x-1.svg)"]
    assert pictures == {"notebooks/x-1.svg": "<svg/>"}


def test_links_of_the_readme_lead_somewhere() -> None:
    """mkdocs checks those of the pages."""
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(([^)#\s]+)|(?:src|srcset|href)=\"([^\"#]+)", text)
    local = [link for pair in links for link in pair if link and "://" not in link]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []
