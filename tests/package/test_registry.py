"""Names: canonical ones, aliases, plugins, suggestions."""

from functools import partial
from importlib.metadata import EntryPoint

import pytest

from tensorllm.errors import UserError
from tensorllm.registry import Registry, raised_by


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


def test_where_a_plugin_may_bring_a_name_that_is_said() -> None:
    advice = r"import its module first \(--plugin MODULE\)"
    with pytest.raises(UserError, match=advice):
        Registry("shape", group="tests.shapes")["zzz"]
    with pytest.raises(UserError) as caught:
        Registry("shape")["zzz"]
    assert "plugin" not in str(caught.value)


class Broken:
    def area(self) -> float:
        return helper(0)

    @classmethod
    def made(cls) -> float:
        return helper(0)


def helper(x: int) -> float:
    return 1 / x


@pytest.mark.parametrize("fails", [Broken().area, Broken.made, partial(helper, 0)])
def test_an_error_out_of_an_entrys_code_is_the_entrys(fails, monkeypatch):
    monkeypatch.setattr(Registry, "every", [])
    shapes = Registry("shape")
    with pytest.raises(ZeroDivisionError) as caught:
        fails()
    assert raised_by(caught.value) is None
    shapes.register("round")(helper if isinstance(fails, partial) else Broken)
    said = raised_by(caught.value)
    assert said is not None
    assert said.startswith("shape 'round' (" + __file__)
    monkeypatch.setitem(globals(), "__name__", "tensorllm.shapes")  # as if it were of the package
    assert raised_by(caught.value) is None
