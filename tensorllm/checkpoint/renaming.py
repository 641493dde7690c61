"""From the names of stored tensors to those of parameters, as transformers reads and saves.

transformers tries the pattern of every rule on every name. A factored model has a rule for each
tensor, so that this would grow with their square; here one table answers for all.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Self

from torch import Tensor
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

from tensorllm.runtime import Placement

NO_NAME = "(?!)"  # a pattern that nothing matches: the tables are asked in its place
Orders = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> the new name, the order of modes


class Renaming(WeightRenaming):
    """New names by a table."""

    __slots__ = ("names",)

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__(NO_NAME, NO_NAME)
        self.names = names

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if source_key not in self.names:
            return source_key, None
        self._was_used = True
        return self.names[source_key], NO_NAME

    def reverse_transform(self) -> WeightTransform:
        return Renaming({new: old for old, new in self.names.items()})


class Reordering(WeightConverter):
    """New names, and the modes of the tensors in another order, by the table of a `Permute`."""

    __slots__ = ()

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        permute: Any = self.operations[0]
        if source_key not in permute.orders:
            return source_key, None
        self._was_used = True
        return permute.orders[source_key][0], NO_NAME


class Permute(ConversionOps):
    """Permutes the modes of each tensor.

    Args:
        orders: by the name that a tensor has before.
    """

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self._by_new_name = dict(orders.values())

    def __deepcopy__(self, memo: object) -> Self:
        return self  # for every tensor a rule is copied, and this never changes

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        ((tensor,),) = input_dict.values()
        name = kwargs["full_layer_name"]
        return {name: [tensor.permute(self._by_new_name[name]).contiguous()]}

    @property
    def reverse_op(self) -> "Permute":
        return Permute({new: (old, _inverse(order)) for old, (new, order) in self.orders.items()})


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def conversions(named: Iterable[tuple[str, Placement]]) -> list[Any]:
    """transformers' rules from stored tensors to parameters.

    Args:
        named: each placement, with the name of its tensor in the folder.
    """
    names, orders = {}, {}
    for name, place in named:
        if place.order is None:
            names[name] = place.parameter
        else:
            orders[name] = (place.parameter, tuple(place.order))
    return [Renaming(names), Reordering(NO_NAME, NO_NAME, [Permute(orders)])]
