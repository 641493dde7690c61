"""Wrappers of strategies: what they leave to the strategy inside is that one's."""

from tensorllm.compressors import Leaf
from tensorllm.compressors.base import LayerFit
from tensorllm.compressors.rounded import RoundedLeaf
from tensorllm.compressors.settings import make_compressor
from tensorllm.compressors.wrapped import Wrapped, WrappedFit, delegated


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
        (RoundedLeaf(leaf, most=2**20), leaf),
    ):
        names = left_to_inner(type(wrapper))
        assert names
        assert {n: getattr(wrapper, n) for n in names} == {n: getattr(inner, n) for n in names}
    assert Wrapped(fit, lambda one: one).training_steps == 3
    assert WrappedFit(fit).width_only
