"""How a file names a model's parameters: names have changed between versions of transformers.

transformers can read all of them; its own renaming rules are used here to find a parameter.
"""

from collections.abc import Iterable, Iterator
from typing import Any


def stored_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The stored name of each parameter that corresponds to exactly one stored tensor.

    Args:
        model: of a transformers class; its weights are not read.
        names: of stored tensors.
    """
    there = model.state_dict()
    renamed = _renamed(model, names)
    return {known: name for name, known, plain in renamed if plain and known in there}


def joined_names(model: Any, names: Iterable[str], parameter: str) -> list[str]:
    """The stored tensors that transformers converts to this parameter and others while loading."""
    owner = parameter.rpartition(".")[0].rpartition(".")[0]
    renamed = _renamed(model, names)
    return [name for name, known, plain in renamed if not plain and known.startswith(owner)]


def _renamed(model: Any, names: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """(stored name, the model's name, whether it is that parameter unchanged)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    there, prefix = model.state_dict(), model.base_model_prefix
    for name in names:
        known, converter = rename_source_key(name, renamings, converters, prefix, there)
        yield name, known, converter is None
