"""Write what stands beside the weights of every folder, however the weights were made.

`compress` and all exports end with `complete`: small files, config, manifest, report, card.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tensorllm.checkpoint.factored import MARKS
from tensorllm.checkpoint.manifest import MANIFEST, Manifest
from tensorllm.checkpoint.small_files import small_files
from tensorllm.checkpoint.writer import ShardWriter
from tensorllm.compression.card import CARD, REPORT, card, text_of
from tensorllm.compression.details import DETAILS

OURS = (MANIFEST, REPORT, DETAILS, "config.json")


def complete(
    writer: ShardWriter,
    source: Path,
    *,
    config: Mapping[str, Any],
    manifest: Manifest | None,
    report: Mapping[str, Any] | None,
    details: str | None = None,
    origin: Mapping[str, Any] | None = None,
) -> None:
    """Write what goes beside the weights, and move the folder to its final name.

    Args:
        writer: has written the weights.
        source: the folder that the weights were made from: its tokenizer and other small files are
            copied, and its card is extended.
        config: config.json of the new folder.
        manifest: None: the folder is no checkpoint, such as a graph.
        report: report.json; None: what was done is not known, so there is no card either.
        details: what a report draws of each site; None: copied from the source.
        origin: what is known of the original besides its card (`origin.origin`).
    """
    for path in small_files(source):
        below = path.relative_to(source)
        if below.as_posix() not in OURS:  # a module in a subfolder has its own config.json
            writer.copy(path, below)
    writer.write_json("config.json", config)
    if manifest is not None:
        writer.write_json(MANIFEST, manifest.to_json())
    if report is not None:
        writer.write_json(REPORT, report)
        if details is not None:
            writer.write_text(DETAILS, details)
        elif (source / DETAILS).is_file():
            writer.copy(source / DETAILS)
        previous = text_of(source / CARD)
        writer.write_text(CARD, card(report, config=config, previous=previous, origin=origin))
    writer.finish()


def dense_config(source: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """The config.json of a folder's model, without the marks of the factored format."""
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    for name in MARKS:
        config.pop(name, None)
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    return config
