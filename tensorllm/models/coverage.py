"""Which model types of transformers can be read, and how: a committed table, and its generator.

`tests/models/test_coverage.py` generates the table and compares. Each type's default config is
shrunk, so that all of them together take a minute.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tensorllm.errors import UserError
from tensorllm.models.layout import layout_of
from tensorllm.models.shrink import shrunk
from tensorllm.tensors.stacking import ATTENTION, FFN, MLA, ROUTED, SHARED

TASKS = ("causal", "masked", "image-text")
LAYERS = 8  # of a shrunk model: enough for every kind of layer of a default config
NOT = "not read"


GROUPS = (
    ("attention", ATTENTION),
    ("latent attention", MLA),
    ("FFN", FFN),
    ("shared experts", SHARED),
    ("experts", ROUTED),
)


@dataclass(frozen=True)
class Read:
    """How a model type is read.

    Attributes:
        how: `row`, `structure`, or `not read`.
        what: which roles, or the reason for none.
    """

    how: str
    what: str


@cache
def table() -> dict[str, dict[str, Read]]:
    """task -> model type -> how it is read, as committed."""
    values = json.loads(_path().read_text(encoding="utf-8"))
    return {task: {name: Read(*entry) for name, entry in values[task].items()} for task in TASKS}


def made_with() -> str:
    """The version of transformers that the table was made with."""
    return str(json.loads(_path().read_text(encoding="utf-8"))["transformers"])


def counts() -> dict[str, tuple[int, int]]:
    """task -> how many of its model types are read, and how many there are."""
    return {
        task: (sum(entry.how != NOT for entry in types.values()), len(types))
        for task, types in table().items()
    }


def page() -> str:
    """The table as Markdown, for the documentation."""
    names = {"causal": "Causal", "masked": "Masked", "image-text": "Image and text to text"}
    out = []
    for task, types in table().items():
        found, total = counts()[task]
        out += [f"## {names[task]}: {found} of {total}", ""]
        groups: dict[str, list[str]] = {}
        for name, entry in types.items():
            if entry.how != NOT:
                groups.setdefault(f"by {entry.how}: {entry.what}", []).append(f"`{name}`")
        out += ["| read | model types |", "|---|---|"]
        out += [f"| {how} | {', '.join(of)} |" for how, of in sorted(groups.items())]
        out += ["", "| not read | why |", "|---|---|"]
        for name, entry in types.items():
            if entry.how == NOT:
                out.append(f"| `{name}` | {entry.what.replace('|', '/').split(chr(10))[0]} |")
        out.append("")
    return "\n".join(out)


def types_of(task: str) -> list[str]:
    """The model types that transformers has for a task."""
    from transformers.models.auto import modeling_auto as auto

    names: dict[str, Any] = {
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "image-text": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    return list(names[task])


def read(model_type: str, given: dict[str, Any]) -> Read:
    """Try how a model type is read.

    Args:
        model_type: as in config.json.
        given: config fields whose defaults make no model.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(model_type, **given)
        layout = layout_of(shrunk(config, LAYERS))
    except UserError as error:
        return Read(NOT, str(error).split(". To say where")[0][:200])
    except Exception as error:  # a default config that transformers itself rejects
        return Read(NOT, f"its default config makes no model: {type(error).__name__}")
    every = layout.spec.geometries
    roles = {role for geometry in every for role in geometry.families}
    parts = [name for name, group in GROUPS if roles & set(group)]
    if "latent attention" in parts:
        parts.remove("attention")
    all_layers = all(set(geometry.families) == roles for geometry in every)
    only = " only" if len(parts) == 1 else ""
    where = "" if all_layers else ", in some layers"
    named = " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
    return Read(layout.by, f"{named}{only}{where}")


def _path() -> Path:
    return Path(__file__).with_name("coverage.json")
