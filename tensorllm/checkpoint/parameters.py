"""Which of the stored tensors are the model's parameters, found without reading one of them.

Files hold more than that: causal masks, the head of another task, a tied matrix under both of its
names. Sizes, dtype and the search for NaN are over parameters, each once.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tensorllm.checkpoint.fitting import BUFFERS, Findings, findings_of, judge
from tensorllm.checkpoint.whole import refuse_adapter, without_bar
from tensorllm.errors import UserError, first_line
from tensorllm.models.task import base_class, saved_class
from tensorllm.progress import silenced


@dataclass(frozen=True, slots=True)
class Parameters:
    """How stored tensors stand to a model.

    Attributes:
        unused: stored, but nothing that the model reads.
        tied: pairs of stored names that the model may hold as one parameter.
    """

    unused: frozenset[str]
    tied: tuple[tuple[str, str], ...]


def parameters_in(folder: Path, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Parameters:
    """Put tensors without numbers into a model without numbers, and see what becomes of them.

    Args:
        folder: what messages name.
        shapes: of all stored tensors.

    Raises:
        UserError: a parameter is missing, unexpected, or of another shape.
    """
    refuse_adapter(folder)
    kind = saved_class(config)
    model, found = _tried(kind, folder, config, shapes)
    if not config.architectures and found.missing and not _within_base(model, found):
        # Saved without a head, and without a word about it: then it is the base model.
        kind = base_class(config) or kind
        model, found = _tried(kind, folder, config, shapes)
    judge(model, found, folder)
    unused = frozenset(_unused(shapes, found, model))
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    pairs = tuple((_stored(a, shapes, model), _stored(b, shapes, model)) for a, b in ties.items())
    return Parameters(unused, tuple((a, b) for a, b in pairs if a and b))


def _tried(
    kind: Any, folder: Path, config: Any, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Any, Findings]:
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        with silenced("transformers"), without_bar():
            model, info = kind.from_pretrained(
                None,
                config=config,
                state_dict=state,
                device_map={"": "meta"},
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # a config that contradicts itself fails in many ways in there
        raise UserError(
            f"{folder}: config.json describes no {kind.__name__}: {first_line(error)}"
        ) from None
    return model, findings_of(info)


def _within_base(model: Any, found: Findings) -> bool:
    """Whether something is missing that is not the head's."""
    return any(name.startswith(f"{model.base_model_prefix}.") for name in found.missing)


def _unused(names: Iterable[str], found: Findings, model: Any) -> Iterator[str]:
    """The stored names that become nothing in the model; findings lack what its class ignores."""
    prefix = f"{model.base_model_prefix}."
    known, unexpected = set(model.state_dict()), set(found.unexpected)
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    for name in names:
        ways = {name, name.removeprefix(prefix), f"{prefix}{name}"}
        constant = BUFFERS.search(name) or any(p.search(name) for p in ignored)
        if ways & unexpected or (constant and not ways & known):
            yield name


def _stored(name: str, shapes: Mapping[str, Any], model: Any) -> str:
    """What the file calls a parameter: with the base model's prefix or without; nothing if not."""
    prefix = f"{model.base_model_prefix}."
    for known in (name, name.removeprefix(prefix), f"{prefix}{name}"):
        if known in shapes:
            return known
    return ""
