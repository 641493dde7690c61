"""docs/add_an_architecture.md holds: its row, from outside, works like the shipped ones."""

import importlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
import torch
from naive_layer import (
    TOKENS,
    Layer,
    assert_ffn_is_the_modules,
    assert_heads_are_the_modules,
)
from repository import ROOT
from tiny_models import TINY, Tiny, tiny_model

from tensorllm.errors import UserError
from tensorllm.models import ARCHITECTURES

PAGE = (ROOT / "docs" / "add_an_architecture.md").read_text()


def block(language: str, number: int = 0) -> str:
    """A code block of the page, without the indentation of a list it may stand in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", PAGE, re.MULTILINE | re.DOTALL)
    indent, code = found[number]
    return re.sub(rf"^{indent}", "", code, flags=re.MULTILINE)


@pytest.fixture
def plugin_folder(tmp_path: Path) -> Path:
    (tmp_path / "starcoder2_row.py").write_text(block("python"))
    return tmp_path


@pytest.fixture
def plugged_in(plugin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's row and its tiny model, until the end of the test."""
    known = {name: ARCHITECTURES[name] for name in ARCHITECTURES}
    monkeypatch.setattr(ARCHITECTURES, "_entries", known)
    monkeypatch.syspath_prepend(str(plugin_folder))
    rows: dict[str, Tiny] = {}
    exec(block("python", 1), {"Tiny": Tiny, "TINY": rows})
    for name, row in rows.items():
        monkeypatch.setitem(TINY, name, row)
    importlib.import_module("starcoder2_row")
    yield
    del sys.modules["starcoder2_row"]


@pytest.mark.usefixtures("plugged_in")
def test_the_pages_row_reads_and_writes_like_the_shipped_ones() -> None:
    layer = Layer(tiny_model("starcoder2"))
    assert (layer.geo.H, layer.geo.G, layer.geo.F) == (4, 2, 56)
    assert_heads_are_the_modules(layer)
    assert_ffn_is_the_modules(layer)
    with torch.no_grad():
        want = layer.model(TOKENS).logits
        for role in layer.geo.roles:
            layer.roles.write(layer.weights, 0, role, layer.read(role).clone())
        assert torch.equal(layer.model(TOKENS).logits, want)


@pytest.mark.usefixtures("plugged_in")
def test_a_second_row_of_the_same_name_is_refused() -> None:
    with pytest.raises(UserError, match="'starcoder2' is already registered"):
        ARCHITECTURES.register("starcoder2")(ARCHITECTURES["llama"])


def test_the_example_is_not_one_that_is_shipped() -> None:
    assert "starcoder2" not in ARCHITECTURES
    assert "starcoder2" not in TINY


def test_the_pages_entry_point_is_found(plugin_folder: Path) -> None:
    """In a fresh Python that sees an installed package with the page's entry point."""
    info = plugin_folder / "starcoder2_row-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: starcoder2-row\nVersion: 1.0\n")
    group, entry = block("toml").split("\n", 1)
    name, target = re.fullmatch(r'(\w+) = "(\w+)"\s*', entry).groups()
    header = re.fullmatch(r'\[project\.entry-points\."([\w.]+)"\]', group)[1]
    (info / "entry_points.txt").write_text(f"[{header}]\n{name} = {target}\n")
    code = "from tensorllm.models import ARCHITECTURES as A; print(A['starcoder2'].block)"
    path = os.pathsep.join([str(plugin_folder), str(ROOT)])
    done = forked.run(["-c", code], env={**os.environ, "PYTHONPATH": path}, bare=True, check=True)
    assert done.stdout.strip() == "layers.{i}"
