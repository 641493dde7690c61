"""Wrappers of strategies: what they leave to the strategy inside is that one's."""

from dataclasses import dataclass

import pytest

from tensorllm.compressors import Leaf
from tensorllm.compressors.base import LayerFit
from tensorllm.compressors.budget import Budget
from tensorllm.compressors.rounded import RoundedLeaf
from tensorllm.compressors.settings import make_compressor, settings_of
from tensorllm.compressors.wrapped import Wrapped, WrappedFit, delegated
from tensorllm.errors import UserError
from tensorllm.tensors.factors import Factors


def left_to_inner(kind: type) -> list[str]:
    return [name for name, member in vars(kind).items() if type(member) is type(delegated())]


def test_what_is_not_the_wrappers_own_is_that_of_the_strategy_inside() -> None:
    fit = make_compressor("activation-hybrid", {"target_ratio": 1.5, "distill_steps": 3})
    leaf = make_compressor("svd", {"rank": 4})
    assert isinstance(fit, LayerFit)
    assert isinstance(leaf, Leaf)
    for wrapper, inner in (
        (WrappedFit(fit), fit),
        (Wrapped(fit, lambda one: one), fit),
        (RoundedLeaf(leaf, max_bytes=2**20), leaf),
    ):
        names = left_to_inner(type(wrapper))
        assert names
        assert {n: getattr(wrapper, n) for n in names} == {n: getattr(inner, n) for n in names}
    assert Wrapped(fit, lambda one: one).training_steps == 3
    assert WrappedFit(fit).width_only


def test_another_target_takes_the_place_of_the_strategys_own() -> None:
    fit = make_compressor("activation-tucker", {"target_ratio": 1.5, "refit_epochs": 2})
    small = Budget(target_params=1000)
    for strategy in (fit, Wrapped(fit, lambda one: one), Wrapped(Wrapped(fit, id), id)):
        found = strategy.with_budget(small)
        assert type(found) is type(strategy)
        assert found.budget == small
        assert settings_of(found) == (
            "activation-tucker",
            {"target_params": 1000, "refit_epochs": 2},
        )
    leaf = make_compressor("svd", {"rank": 4})  # its sizes are given
    assert leaf.with_budget(small) is leaf


def test_a_target_that_a_strategy_has_no_setting_for_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class ByRatio(Leaf):
        target_ratio: float

        @property
        def budget(self) -> Budget:
            return Budget(target_ratio=self.target_ratio)

        def decompose(self, w: object, statistics: object = None) -> Factors:
            raise NotImplementedError

    wanted = ByRatio(target_ratio=2.0).with_budget(Budget(target_ratio=3.0))
    assert wanted.budget == Budget(target_ratio=3.0)
    with pytest.raises(UserError, match="ByRatio has no setting target_bytes"):
        wanted.with_budget(Budget(target_bytes=10))
