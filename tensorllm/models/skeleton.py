"""A model on the meta device, without weights: its structure, from its own modules.

Shapes of weights, which layer has what, and where it lies are what transformers would build for a
config, so that no rule of ours can contradict it.
"""

import copy
import functools
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tensorllm.errors import UserError, first_line
from tensorllm.models.task import base_class, language_model_class, text_class, text_config_of
from tensorllm.progress import silenced

# Config fields that do not affect the modules.
NOTES = ("quantization_config", "dtype", "_name_or_path", "transformers_version")


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device and the layers in it.

    Attributes:
        model: of the language-model class of its config.
        path: of the list of layers, such as `model.layers`.
    """

    model: Any
    path: str

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.get_submodule(self.path))

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all parameters, tied ones under each name."""
        named = self.model.named_parameters(remove_duplicate=False)
        return {name: tuple(p.shape) for name, p in named}

    def block_path(self, layer: int) -> str:
        return f"{self.path}.{layer}"


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by one stored matrix: `nn.Linear`, GPT-2's `Conv1D`."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """The modules of a layer that multiply by one matrix, by their paths below it."""
    return {path: module for path, module in block.named_modules() if is_linear(module)}


def skeleton(config: Any) -> Skeleton:
    """The model of a config on the meta device; cached for equal configs.

    Raises:
        UserError: transformers cannot build it, or it has no layers beside its token embeddings.
    """
    return _made(Keyed(config))


class Keyed:
    """A config that can be hashed and compared by its content."""

    def __init__(self, config: Any) -> None:
        self.config = config
        values = json.loads(config.to_json_string(use_diff=False))
        kept = {name: value for name, value in values.items() if name not in NOTES}
        self.key = f"{type(config).__name__} {json.dumps(kept, sort_keys=True)}"

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keyed) and other.key == self.key


@functools.lru_cache(maxsize=8)
def _made(key: Keyed) -> Skeleton:
    model = instance(key.config, "meta")
    return Skeleton(model, layers_path(model, key.config))


def instance(config: Any, device: str, *, text_only: bool = False) -> Any:
    """A model of the config's language-model class, with random weights, or none on `meta`.

    Args:
        text_only: build only the text model of a wrapper, without a head, if it has its own class.
    """
    kind = language_model_class(config)
    text = text_config_of(config)
    alone = base_class(text) or text_class(text)
    if text_only and text is not config and alone is not None:
        kind, config = alone, text
    config = copy.deepcopy(config)
    for part in (config, text_config_of(config)):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    try:
        with silenced("transformers"), torch.device(device):
            model = kind._from_config(config, attn_implementation="eager", dtype=torch.float32)
    except Exception as error:  # wrong sizes fail in many ways in there
        raise UserError(
            f"transformers cannot make a {config.model_type!r} model of this config: "
            f"{first_line(error)}"
        ) from None
    return model.eval()


def layers_path(model: Any, config: Any) -> str:
    """Path of the list of layers nearest to the token embeddings.

    A wrapper has other towers with layers of their own; only the text model lies beside the token
    embeddings.

    Raises:
        UserError: there is none.
    """
    embeddings = _embeddings(model)
    names = {module: name for name, module in model.named_modules()}
    path = names.get(embeddings, "")
    wanted = depth(config)
    while path:
        path = path.rpartition(".")[0]
        owner = model.get_submodule(path)
        found = [
            f"{path}.{name}".lstrip(".")
            for name, module in owner.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == wanted and len(module)
        ]
        outer = [one for one in found if not any(one.startswith(f"{o}.") for o in found)]
        if outer:
            return outer[0]
    raise UserError(
        f"a {config.model_type!r} model has no list of {wanted} layers beside its token embeddings"
    )


def depth(config: Any) -> int:
    """Number of layers of the text model."""
    text = text_config_of(config)
    for name in ("decoder_layers", "num_hidden_layers", "n_layer", "num_layers"):
        found = getattr(text, name, None)
        if isinstance(found, int):
            return found
    raise UserError(f"the config of {config.model_type!r} does not say how many layers it has")


def _embeddings(model: Any) -> Any:
    try:
        found = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        found = None
    if found is None:
        raise UserError(f"{type(model).__name__} has no token embeddings")
    return found
