"""Nothing asks which method or which kind of factors it holds: both are open to plugins."""

import ast
from collections.abc import Iterator

from repository import ROOT

import tensorllm.compressors
import tensorllm.runtime  # noqa: F401
from tensorllm.compressors.base import COMPRESSORS
from tensorllm.runtime.sites import SiteModule
from tensorllm.tensors.factors import FACTORS
from tensorllm.tensors.quantised import Quantised

SOURCES = sorted([*(ROOT / "tensorllm").rglob("*.py"), *(ROOT / "cli").rglob("*.py")])
# Files that still ask, each with how often: the list only gets shorter.
ASKING: dict[str, int] = {}
COMPARING: dict[str, int] = {}  # the same for the names of modes and kinds
OWN = ("tensorllm/compressors/", "tensorllm/tensors/")  # files of methods and kinds themselves


def below(kind: type) -> set[type]:
    return {kind, *(deeper for each in kind.__subclasses__() for deeper in below(each))}


def concrete() -> set[str]:
    """Names of the shipped classes, and of what several of them share."""
    shipped = {*(COMPRESSORS[n] for n in COMPRESSORS), *(FACTORS[n] for n in FACTORS), Quantised}
    shipped |= below(SiteModule) - {SiteModule}
    contract = {"tensorllm.compressors.base", "tensorllm.tensors.factors"}
    shared = {
        base
        for kind in shipped
        for base in kind.__mro__
        if base.__module__.startswith("tensorllm.") and base.__module__ not in contract
    }
    return {kind.__name__ for kind in (shipped | shared) - {SiteModule}}


CONCRETE = concrete()


def names(node: ast.AST) -> Iterator[str]:
    """Of the classes that an expression names: `Tucker`, `factors.Tucker`, `(Tucker, CP)`."""
    for each in ast.walk(node):
        if isinstance(each, ast.Name):
            yield each.id
        elif isinstance(each, ast.Attribute):
            yield each.attr


def asked(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and class of every question which of the concrete classes something is."""
    for node in ast.walk(tree):
        found: list[ast.AST] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("isinstance", "issubclass"):
                found = [node.args[1]]
        elif isinstance(node, ast.Compare):  # type(x) is Tucker, x.kind == "tucker"
            found = [node.left, *node.comparators] if _is_type(node) else []
        elif isinstance(node, ast.match_case):
            found = [p.cls for p in ast.walk(node.pattern) if isinstance(p, ast.MatchClass)]
        for each in found:
            yield from ((node_line(node), name) for name in names(each) if name in CONCRETE)


def node_line(node: ast.AST) -> int:
    return getattr(node, "lineno", 0)


def _is_type(node: ast.Compare) -> bool:
    sides = [node.left, *node.comparators]
    return any(
        isinstance(s, ast.Call) and isinstance(s.func, ast.Name) and s.func.id == "type"
        for s in sides
    )


def kinds_compared(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of comparisons with the name of a shipped kind or mode."""
    shipped = set(FACTORS) | set(COMPRESSORS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                texts = side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side]
                yield from (
                    (node.lineno, text.value)
                    for text in texts
                    if isinstance(text, ast.Constant) and text.value in shipped
                )


def defined(tree: ast.AST) -> set[str]:
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def test_the_walk_sees_what_it_should() -> None:
    assert {"Tucker", "CP", "LaserSVD", "TuckerSettings", "HeadsSite", "Quantised"} <= CONCRETE
    assert not {"Leaf", "Composite", "LayerFit", "Factors", "SiteModule"} & CONCRETE
    lines = (
        "isinstance(x, Tucker)\n"
        "isinstance(x, (int, factors.CP))\n"
        "isinstance(x, Leaf)\n"
        "type(x) is LowRank\n"
        "match x:\n    case Tucker(): pass\n"
    )
    assert [name for _, name in asked(ast.parse(lines))] == ["Tucker", "CP", "LowRank", "Tucker"]
    assert list(kinds_compared(ast.parse('kind in ("cp", "x")\nkind == "laser"'))) == [
        (1, "cp"),
        (2, "laser"),
    ]


def test_nothing_branches_on_a_concrete_method_or_kind() -> None:
    found: dict[str, list[str]] = {}
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        own = defined(tree)
        wrong = [f"line {line}: {name}" for line, name in asked(tree) if name not in own]
        if wrong:
            found[path.relative_to(ROOT).as_posix()] = wrong
    more = {path: lines for path, lines in found.items() if len(lines) > ASKING.get(path, 0)}
    assert not more
    fewer = {path: most for path, most in ASKING.items() if len(found.get(path, [])) < most}
    assert not fewer, "these ask less often by now: shorten ASKING"


def test_nothing_compares_the_names_of_methods_or_kinds() -> None:
    found: dict[str, list[tuple[int, str]]] = {}
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(OWN) and (
            wrong := list(kinds_compared(ast.parse(path.read_text())))
        ):
            found[name] = wrong
    assert {name: len(lines) for name, lines in found.items()} == COMPARING, found
