"""Read config.json as a transformers config, after refusing impossible sizes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorllm.errors import UserError, first_line
from tensorllm.io import from_json
from tensorllm.options import MOST_LAYERS

# Under every name used by the supported configs; transformers divides by some unchecked.
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "n_embd",
    "n_head",
    "n_inner",
    "n_layer",
    "n_positions",
    "dim",
    "hidden_dim",
    "n_heads",
    "n_layers",
    "ffn_dim",
    "ffn_hidden_size",
    "word_embed_proj_dim",
    "num_local_experts",
)
LAYERS = ("num_hidden_layers", "n_layer", "n_layers")  # each makes modules, without any weights
MOST = 2**31 - 1  # of any other size: what torch's indices hold


def read_config(folder: Path) -> Any:
    """The transformers config of a folder; the folder's own code is never run.

    Raises:
        UserError: it is no JSON object, has impossible sizes, or transformers rejects it.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    path = folder / "config.json"
    try:
        values = from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder} holds no model: no config.json ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold names and values, got {type(values).__name__}")
    if "text_config" in values and not isinstance(values["text_config"], dict):
        raise UserError(
            f"{path}: text_config must hold the sizes of the text model, got "
            f"{values['text_config']!r}; its defaults would be another model"
        )
    for part in (values, *(v for k, v in values.items() if k.endswith("_config"))):
        if isinstance(part, dict):
            check_sizes(path, part)
            check_dtype(path, part)
    names = values.get("architectures") or []
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: architectures must be names of classes, got {names!r}")
    if not values.get("return_dict", True):
        raise UserError(f"{path}: return_dict must be true: models of transformers rely on it")
    kind = values.get("model_type")
    if values.get("auto_map") and kind not in CONFIG_MAPPING:
        raise UserError(
            f"{path}: the code of a {kind!r} model is remote (auto_map) and is not run here: "
            "transformers would download and run it with trust_remote_code=True. Take a version "
            f"of transformers that has {kind!r} itself"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a wrong config fails in many ways inside transformers
        raise UserError(f"{path}: {first_line(error)}") from None


def check_sizes(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse a size that is no whole number from 1 to what a model can have; null: a default."""
    for name in SIZES:
        value = values.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{path}: {name} must be a whole number of 1 or more, got {value!r}")
        if value > (most := MOST_LAYERS if name in LAYERS else MOST):
            raise UserError(f"{path}: {name} must be at most {most}, got {value}")


def check_dtype(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse a dtype that no model can be computed in; null is a default."""
    import torch

    for name in ("dtype", "torch_dtype"):
        value = values.get(name)
        if value is None or isinstance(value, dict):  # of parts, each its own
            continue
        found = getattr(torch, value, None) if isinstance(value, str) else None
        if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
            raise UserError(
                f"{path}: {name} must be the name of a floating point type of 16 bits or more, "
                f"such as float32 or bfloat16, got {value!r}"
            )
