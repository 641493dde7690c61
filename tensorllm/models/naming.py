"""What a file calls a model's parameters: names changed between versions of transformers.

transformers knows how, and reads all of them; its own renaming says here where a parameter lies.
"""

from collections.abc import Iterable
from typing import Any


def stored_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The parameters of a model and what these names call them, as far as they lie one to one.

    Args:
        model: of a transformers class; its weights are not looked at.
        names: of stored tensors.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    there = model.state_dict()
    prefix = model.base_model_prefix
    out: dict[str, str] = {}
    for name in names:
        known, converter = rename_source_key(name, renamings, converters, prefix, there)
        if converter is None and known in there:
            out[known] = name
    return out
