"""Check that a checkpoint's tensors are those its model class needs.

transformers fills missing parameters with random numbers and ignores unknown tensors, with a
warning at most; a score of such a model is meaningless. So names are checked here, for every
command that reads a model, by one rule.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensorllm.errors import UserError

log = logging.getLogger(__name__)

# Constants that older transformers stored beside the weights; the model makes its own.
# (`attn.bias` is a causal mask: attention's real biases belong to its projections.)
BUFFERS = re.compile(
    r"(^|\.)(inv_freq|position_ids|token_type_ids|masked_bias|causal_mask"
    r"|(self_)?(attn|attention|crossattention)\.bias)$"
)
# Prefixes added by wrappers around a model that was trained or compiled.
WRAPPERS = ("_orig_mod.", "module.", "_forward_module.", "_fsdp_wrapped_module.", "base_model.")
SHOWN = 3


@dataclass(frozen=True, slots=True)
class Findings:
    """What transformers reported when it loaded tensors into a model.

    Attributes:
        missing: parameters without a stored tensor, except tied ones.
        unexpected: stored tensors that the model has no parameter for.
        mismatched: name, stored shape and the model's shape.
        errors: messages from converting stored tensors to parameters.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    errors: tuple[str, ...] = field(default=())


def findings_of(info: Mapping[str, Any]) -> Findings:
    """Read the info that `from_pretrained(..., output_loading_info=True)` returns."""
    return Findings(
        tuple(sorted(info["missing_keys"])),
        tuple(sorted(info["unexpected_keys"])),
        tuple((name, tuple(a), tuple(b)) for name, a, b in sorted(info["mismatched_keys"])),
        tuple(str(error) for error in info.get("error_msgs") or ()),
    )


def judge(model: Any, found: Findings, folder: Path | str) -> None:
    """Refuse an incomplete model; warn of stored tensors that it does not use.

    Args:
        model: of the class that the tensors were loaded into; its weights are not read.
        found: what transformers reported.
        folder: its name in messages.

    Raises:
        UserError: a parameter without a tensor, a tensor without a parameter, or a wrong shape.
    """
    kind = type(model).__name__
    if found.mismatched:
        name, stored, wanted = found.mismatched[0]
        raise UserError(
            f"{folder}: {name} has shape {stored}, but {kind} with this config.json needs {wanted}"
            f"{_more(len(found.mismatched) - 1)}"
        )
    if found.errors:
        raise UserError(f"{folder}: {found.errors[0].strip().splitlines()[0]}")
    odd = [n for n in found.unexpected if not _is_buffer(n)]
    if found.missing:
        raise UserError(
            f"{folder} lacks {_some(found.missing)}, which {kind} needs{_hint(odd)}; "
            "transformers would fill in random numbers"
        )
    extra = [name for name in odd if not _is_part_of_another_head(name, model)]
    if extra:
        raise UserError(
            f"{folder} holds {_some(extra)}, for which {kind} with this config.json has no place; "
            "without it the model is another one"
        )
    if odd:
        log.warning("%s holds %s, which %s does not use", folder, _some(odd), kind)


def _is_buffer(name: str) -> bool:
    """Whether a stored tensor is a constant, such as a causal mask, and not a weight."""
    return BUFFERS.search(name) is not None


def _is_part_of_another_head(name: str, model: Any) -> bool:
    """Whether a tensor belongs to a head beside the base model that this class lacks.

    Such as the classifier of another task, or a sentence encoder's pooler. Whatever lies inside the
    base model takes part in every prediction.
    """
    below = name.removeprefix(f"{model.base_model_prefix}.")
    top, owner = below.split(".")[0], name.rpartition(".")[0]
    if top == "pooler":
        return True
    inside = below != name or top in dict(model.base_model.named_children())
    return bool(owner) and not inside and owner not in dict(model.named_modules())


def _hint(unexpected: Iterable[str]) -> str:
    """Why names may not fit: they all begin with a wrapper's prefix."""
    names = list(unexpected)
    for wrapper in WRAPPERS:
        if names and all(name.startswith(wrapper) for name in names):
            return f"; its names begin with {wrapper!r}: save the model that was wrapped"
    return f" (it has {_some(names)} instead)" if names else ""


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:SHOWN]) + _more(len(names) - SHOWN)


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
