"""Map the names of stored tensors to those of parameters, for transformers to load and save.

transformers tries every rule's pattern on every name. A factored model has a rule for each tensor,
so this would take quadratic time; here a single table covers all of them. For a tensor that no
converter takes, it compiles a pattern, which takes longer than all else that it does with a small
tensor; so ours takes every tensor.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
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
# Name -> the new name, and the order of modes; None: as they are.
Orders = Mapping[str, tuple[str, tuple[int, ...] | None]]


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
    """Renames tensors and permutes their modes, by the table of a `Permute`.

    transformers copies a converter for every tensor. This one is its own copy, and collects tensors
    by their new names.
    """

    __slots__ = ()

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def add_tensor(
        self, target_key: str, source_key: str, source_pattern: str, future: Any
    ) -> None:
        self.collected_tensors[target_key].append(future)

    def convert(self, layer_name: str, **given: Any) -> dict[str, Any]:  # type: ignore[override]
        (held,) = self.collected_tensors.pop(layer_name)
        if isinstance(held, Future):  # it is read by another thread
            held = held.result()
        elif not isinstance(held, Tensor):  # it is read on request
            held = held()
        permute: Any = self.operations[0]
        made: dict[str, Any] = permute.convert({layer_name: [held]}, [], [], layer_name)
        return made

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        permute: Any = self.operations[0]
        if source_key not in permute.orders:
            return source_key, None
        self._was_used = True
        return permute.orders[source_key][0], NO_NAME


class Taking(Reordering):
    """A `Reordering` that also takes every tensor that is not in its table, and leaves it as it is.

    Only to load: transformers tries a model's own converters before those of a quantisation method,
    but saves in reverse.
    """

    __slots__ = ()

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return super().rename_source_key(source_key)[0], NO_NAME

    def reverse_transform(self) -> WeightTransform:
        permute: Any = self.operations[0]
        return Reordering(NO_NAME, NO_NAME, [permute.reverse_op])


class Permute(ConversionOps):
    """Permutes the modes of the tensors that have an order.

    Args:
        orders: by a tensor's name before renaming.
    """

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self._by_new_name = {new: order for new, order in orders.values() if order is not None}

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, list[Tensor]]:
        ((tensor,),) = input_dict.values()
        order = self._by_new_name.get(full_layer_name)
        made = tensor if order is None else tensor.permute(order).contiguous()
        return {full_layer_name: [made]}

    @property
    def reverse_op(self) -> "Permute":
        return Permute({new: (old, _inverse(order)) for old, (new, order) in self.orders.items()})


def _inverse(order: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return None if order is None else tuple(sorted(range(len(order)), key=order.__getitem__))


def conversions(named: Iterable[tuple[str, Placement]], *, take_all: bool = False) -> list[Any]:
    """transformers' rules for turning stored tensors into parameters.

    Args:
        named: each placement, with the name of its tensor in the folder.
        take_all: whether a converter may take those that are only renamed, and all others:
            this loads faster, but transformers writes what a converter took, and is to stay on the
            disk, there once more.
    """
    table = {name: (place.parameter, place.order) for name, place in named}
    if take_all:
        return [Taking(NO_NAME, NO_NAME, [Permute(table)])]
    names = {name: new for name, (new, order) in table.items() if order is None}
    orders = {name: each for name, each in table.items() if name not in names}
    return [Renaming(names), Reordering(NO_NAME, NO_NAME, [Permute(orders)])]
