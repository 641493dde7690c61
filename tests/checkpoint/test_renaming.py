"""Names in a folder and names in a model: tables in place of a pattern for each."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.core_model_loading import WeightRenaming, WeightTransform, rename_source_key

from tensorllm.checkpoint.renaming import (
    NO_NAME,
    Permute,
    Renaming,
    Reordering,
    Taking,
    conversions,
)
from tensorllm.runtime import Placement

NAMES = {"a.b": "x.y", "a.b.c": "x", "a+b.(c)[0]": "z*", "x": "q"}
ORDERS = {"t": ("model.t", (2, 0, 1)), "u": ("model.u", (1, 0))}


@pytest.mark.parametrize("name", [*NAMES, "a", "a.b.", "b.a.b", ".", ""])
def test_a_name_is_looked_up_whole(name: str) -> None:
    assert Renaming(NAMES).rename_source_key(name)[0] == NAMES.get(name, name)


@given(names=st.dictionaries(st.text(), st.text(), max_size=8), asked=st.text())
def test_what_is_renamed_comes_back(names: dict[str, str], asked: str) -> None:
    there = {old: new for new, old in {new: old for old, new in names.items()}.items()}
    rule, back = Renaming(there), Renaming(there).reverse_transform()
    for name in there:
        assert back.rename_source_key(rule.rename_source_key(name)[0])[0] == name
    if asked not in there:
        assert rule.rename_source_key(asked) == (asked, None)


@pytest.mark.parametrize("name", ORDERS)
def test_modes_are_permuted_and_permuted_back(name: str) -> None:
    tensor = torch.randn(*range(2, 2 + len(ORDERS[name][1])))
    rule: WeightTransform = Reordering(NO_NAME, NO_NAME, [Permute(ORDERS)])
    wanted = {ORDERS[name][0]: tensor.permute(ORDERS[name][1]), name: tensor}
    for target, expected in wanted.items():
        key, pattern = rule.rename_source_key(name if target != name else ORDERS[name][0])
        assert key == target
        assert pattern is not None
        rule.add_tensor(key, name, pattern, tensor)  # type: ignore[arg-type]
        made = rule.convert(key)  # type: ignore[attr-defined]
        assert list(made) == [target]
        (tensor,) = made[target]
        assert torch.equal(tensor, expected)
        assert tensor.is_contiguous()
        rule = rule.reverse_transform()


def test_one_rule_of_each_kind_serves_any_number_of_tensors() -> None:
    """A rule for each made loading take time that grew with the square of a model's sites."""
    named = [(f"n{i}", Placement("s", "t", f"p{i}", (1, 0) if i % 2 else None)) for i in range(500)]
    renamings, converters = conversions(named)
    assert isinstance(renamings, WeightRenaming)
    for stored, place in named:
        found, _ = rename_source_key(stored, [renamings], [converters])
        assert found == place.parameter


def test_a_converter_that_takes_all_leaves_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch):
    (rule,) = conversions([("n", Placement("s", "t", "p", (1, 0)))], take_all=True)
    tensor = torch.randn(2, 3)
    wanted = {"n": ("p", tensor.mT), "a.weight": ("a.weight", tensor)}
    monkeypatch.setattr("re.compile", lambda *_: pytest.fail("patterns take long to compile"))
    for name, (new, expected) in wanted.items():
        found, pattern = rename_source_key(name, [], [rule])
        assert found == new
        mine = deepcopy(rule)  # as transformers does for every tensor
        mine.add_tensor(found, name, pattern, lambda: tensor)
        assert torch.equal(mine.convert(found)[new][0], expected)
        assert not rule.collected_tensors
    monkeypatch.undo()
    assert rule.was_used()


def test_saving_takes_only_what_is_in_the_table():
    """A model's own converters, such as those of experts, come after ours then."""
    back = Taking(NO_NAME, NO_NAME, [Permute({"n": ("p", None)})]).reverse_transform()
    assert back.rename_source_key("p") == ("n", NO_NAME)
    assert back.rename_source_key("a.weight") == ("a.weight", None)
