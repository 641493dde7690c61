"""The layers of docs/architecture.md: its table is the rule, and the code keeps to it.

A module imports from its own layer or lower ones, inside functions and for types too.
"""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from repository import ROOT

TABLE = (ROOT / "docs" / "architecture.md").read_text()
SOURCES = [*(ROOT / "tensorllm").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]
FACADE = "tensorllm"  # __init__.py and __main__.py: they show what is in all layers
PURE = {"transformers", "lightning", "safetensors", "datasets", "huggingface_hub"}


def layers() -> dict[str, int]:
    """`tensors` -> 0, `cli` -> 5: the first two columns of the table."""
    rows = re.findall(r"^\| (\d) \| ([^|]*) \|", TABLE, re.MULTILINE)
    places = {
        Path(name).stem: int(layer)
        for layer, names in rows
        for name in re.findall(r"`([^`]+)`", names)
    }
    return {**places, "configs": 0}  # data only


LAYERS = layers()


def place(path: Path) -> str:
    """The row of the table that a source file belongs to."""
    top, *inner = path.relative_to(ROOT).parts
    if top == "cli":
        return "cli"
    return FACADE if inner in (["__init__.py"], ["__main__.py"]) else Path(inner[0]).stem


def place_of_module(module: str) -> str | None:
    """The same for a dotted name; None where it is not ours."""
    top, _, rest = module.partition(".")
    if top != "tensorllm":
        return "cli" if top == "tensorllm_cli" else None
    return rest.partition(".")[0] if rest.partition(".")[0] in LAYERS else FACADE


def modules(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports."""
    package = ["tensorllm_cli" if part == "cli" else part for part in path.relative_to(ROOT).parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: -node.level] if node.level else []
            names = [*base, *(node.module.split(".") if node.module else [])]
            yield from ((node.lineno, ".".join([*names, alias.name])) for alias in node.names)


def test_every_source_has_a_layer():
    assert {place(path) for path in SOURCES} - {FACADE} <= LAYERS.keys()


def upward(path: Path) -> Iterator[str]:
    """What a source imports from a layer above its own, or through the facade."""
    here = place(path)
    if here == FACADE:
        return
    for line, module in modules(path):
        there = place_of_module(module)
        if there is None or there == here:
            continue
        where = f"{path.relative_to(ROOT)}:{line} (layer {LAYERS[here]}) imports {module}"
        if there == FACADE and here != "cli":
            yield f"{where} through the facade: name its module"
        elif there != FACADE and LAYERS[there] > LAYERS[here]:
            yield f"{where} (layer {LAYERS[there]})"


def test_imports_go_down():
    assert not [line for path in SOURCES for line in upward(path)]


def test_no_places_import_each_other():
    graph: dict[str, set[str]] = {}
    for path in SOURCES:
        needs = {place_of_module(module) for _, module in modules(path)}
        graph.setdefault(place(path), set()).update(needs & LAYERS.keys() - {place(path)})
    graph.pop(FACADE, None)
    TopologicalSorter(graph).prepare()  # raises CycleError and names the circle


def test_tensor_maths_knows_no_models_and_no_files():
    for path in SOURCES:
        if place(path) == "tensors":
            found = {module.partition(".")[0] for _, module in modules(path)} & PURE
            assert not found, f"{path.relative_to(ROOT)} imports {found}"
