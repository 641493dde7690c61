"""Names: canonical ones, aliases, plugins, suggestions."""

from importlib.metadata import EntryPoint

import pytest

from tensorllm.errors import UserError
from tensorllm.registry import Registry


@pytest.fixture
def shapes() -> Registry[type]:
    registry: Registry[type] = Registry("shape")
    registry.register("square", aliases=("box",))(int)
    registry.register("circle")(str)
    return registry


def test_names_and_aliases_lead_to_the_entry(shapes):
    assert shapes["square"] is shapes["box"] is int
    assert "box" in shapes
    assert list(shapes) == ["circle", "square"]
    assert shapes.name_of(str) == "circle"


@pytest.mark.parametrize("name", ["square", "box"])
def test_a_taken_name_is_refused(shapes, name):
    with pytest.raises(UserError, match=f"shape '{name}' is already registered"):
        shapes.register("other", aliases=(name,))(float)
    with pytest.raises(UserError, match="already registered"):
        shapes.register(name)(float)


def test_an_unknown_name_is_answered_with_the_closest(shapes):
    with pytest.raises(UserError, match=r"Unknown shape 'sqare'. Did you mean 'square'\?"):
        shapes["sqare"]
    with pytest.raises(UserError, match=r"Unknown shape 'zzz'. Known: circle, square"):
        shapes["zzz"]


def test_what_is_not_registered_has_no_name(shapes):
    with pytest.raises(UserError, match="is not a registered shape"):
        shapes.name_of(dict)


def test_a_plugin_that_cannot_be_imported_is_told_every_time(monkeypatch):
    point = EntryPoint("round", "not_there.anywhere", "tests.shapes")
    monkeypatch.setattr("tensorllm.registry.entry_points", lambda group: [point])
    shapes = Registry("shape", group="tests.shapes")
    shapes.register("square")(int)
    for _ in range(2):
        with pytest.raises(UserError, match=r"'not_there\.anywhere' .* cannot be imported"):
            list(shapes)
