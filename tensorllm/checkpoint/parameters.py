"""Which stored tensors are the model's parameters, found without reading any tensor.

Files also hold causal masks, the head of another task, or a tied matrix under both of its names.
Sizes, dtype and the search for NaN count each parameter once.
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
    """How stored tensors relate to a model's parameters.

    Attributes:
        unused: stored tensors that the model does not read.
        tied: pairs of stored names that the model may hold as one parameter.
    """

    unused: frozenset[str]
    tied: tuple[tuple[str, str], ...]


def parameters_in(folder: Path, config: Any, shapes: Mapping[str, tuple[int, ...]]) -> Parameters:
    """Load tensors on the meta device into a model on the meta device, and see where they go.

    Args:
        folder: its name in messages.
        config: of the model.
        shapes: of all stored tensors.

    Raises:
        UserError: a parameter is missing, unexpected, or of another shape.
    """
    refuse_adapter(folder)
    kind = saved_class(config)
    model, found = _tried(kind, folder, config, shapes)
    if not config.architectures and found.missing and not _within_base(model, found):
        # Saved without a head, and config.json names no class: then it is the base model.
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
    """Whether a parameter outside the head is missing."""
    return any(name.startswith(f"{model.base_model_prefix}.") for name in found.missing)


def _unused(names: Iterable[str], found: Findings, model: Any) -> Iterator[str]:
    """Stored names that no parameter uses; findings lack those that the model's class ignores."""
    prefix = f"{model.base_model_prefix}."
    known, unexpected = set(model.state_dict()), set(found.unexpected)
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_unexpected or ()]
    for name in names:
        ways = {name, name.removeprefix(prefix), f"{prefix}{name}"}
        constant = BUFFERS.search(name) or any(p.search(name) for p in ignored)
        if ways & unexpected or (constant and not ways & known):
            yield name


def _stored(name: str, shapes: Mapping[str, Any], model: Any) -> str:
    """A parameter's stored name, with or without the base model's prefix; empty if not stored."""
    prefix = f"{model.base_model_prefix}."
    for known in (name, name.removeprefix(prefix), f"{prefix}{name}"):
        if known in shapes:
            return known
    return ""
