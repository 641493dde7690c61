"""Map the names of stored tensors to those of parameters, for transformers to load and save.

transformers tries every rule's pattern on every name. A factored model has a rule for each tensor,
so this would take quadratic time; here a single table covers all of them.
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

NO_NAME = "(?!)"  # a pattern that matches nothing: the tables are used instead
Orders = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> the new name, and the order of modes


class Renaming(WeightRenaming):
    """Renames tensors by a table."""

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
    """Renames tensors and permutes their modes, by the table of a `Permute`."""

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
        orders: by a tensor's name before renaming.
    """

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self._by_new_name = dict(orders.values())

    def __deepcopy__(self, memo: object) -> Self:
        return self  # transformers copies a rule for every tensor; this one is immutable

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
    """transformers' rules for turning stored tensors into parameters.

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
