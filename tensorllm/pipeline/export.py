"""`tensorllm export`: a factored folder as an ordinary checkpoint, parameter by parameter."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensorllm.checkpoint.factored import STEM, dense_tensors
from tensorllm.checkpoint.manifest import MANIFEST, Manifest, check_files, read_manifest
from tensorllm.checkpoint.reader import Checkpoint, index_name
from tensorllm.checkpoint.writer import ShardWriter, check_target, exclusive
from tensorllm.compression.card import CARD, REPORT, card
from tensorllm.compression.model import Progress, quiet
from tensorllm.compression.publish import COPIED
from tensorllm.errors import UserError
from tensorllm.registry import one_of

FORMATS = ("dense",)


def export(
    source: Path,
    target: Path,
    *,
    format: str = "dense",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Progress = quiet,
) -> int:
    """Write the dense checkpoint that a factored folder stands for; every tool reads it.

    Args:
        source: a folder that `tensorllm compress --format factored` wrote.
        target: the folder to make.
        dtype: of the written weights; by default that of the original.
        progress: called with (tensors written, tensors in all, the tensor's name).

    Returns:
        Bytes of the weight files.

    Raises:
        UserError: not a factored folder, a folder that has changed, or another format.
    """
    one_of("--format", format, FORMATS)
    check_target(target, overwrite=overwrite, source=source)
    manifest = read_manifest(source)
    if manifest is None or manifest.format != "factored":
        what = "is not one that tensorllm wrote" if manifest is None else "is dense already"
        raise UserError(f"{source} {what}; export takes a factored folder")
    check_files(source, manifest)
    fingerprint = {"export": str(source.resolve()), "files": manifest.files, "dtype": str(dtype)}
    with exclusive(target):
        writer = ShardWriter(target, stem="model", fingerprint=fingerprint, overwrite=overwrite)
        total, finished = dense_count(source, manifest), writer.finished
        for done, (name, tensor) in enumerate(dense_tensors(source)):
            progress(done, total, name)
            if name not in finished:
                writer.add(name, {name: _cast(tensor, dtype)})
        _, files = finish_weights(writer)
        size = sum(file["bytes"] for file in files.values())
        copy_small(source, writer, MANIFEST, REPORT)
        config = _dense_config(source, dtype)
        writer.write_json("config.json", config)
        dense = replace(manifest, format="dense", sites=[], replaced={}, rest={}, files=files)
        writer.write_json(MANIFEST, dense.to_json())
        if (source / REPORT).is_file():
            _write_report(writer, source, config, size, dtype)
        writer.finish()
    return size


def finish_weights(writer: ShardWriter) -> tuple[str, dict[str, dict[str, Any]]]:
    """The file that leads to all weights, and what a manifest says of each of their files."""
    weight_map = writer.name_files()
    shards = [shard for shard in writer.shards if shard["names"]]
    files = {s["file"]: {"bytes": s["bytes"], "sha256": s["sha256"]} for s in shards}
    if len(shards) == 1:
        return shards[0]["file"], files
    size = sum(shard["bytes"] for shard in shards)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    writer.write_json(index_name(writer.stem), index)
    return index_name(writer.stem), files


def copy_small(source: Path, writer: ShardWriter, *left: str) -> None:
    """The tokenizer's files and the like; never weights, their index, or what is in `left`."""
    for path in sorted(source.iterdir()):
        ours = path.name in left or path.name.endswith(".index.json")
        if path.is_file() and path.suffix in COPIED and not ours:
            writer.copy(path)


def _dense_config(source: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    for name in ("quantization_config", "transformers_weights"):
        config.pop(name, None)
    if dtype is not None:
        config["dtype"] = str(dtype).removeprefix("torch.")
    return config


def _write_report(
    writer: ShardWriter,
    source: Path,
    config: Mapping[str, Any],
    size: int,
    dtype: torch.dtype | None,
) -> None:
    """The factored folder's report and card, as they are true of the dense one."""
    report = json.loads((source / REPORT).read_text())
    report["format"] = "dense"
    report["totals"]["bytes_after"] = size
    if before := report["totals"]["bytes_before"]:
        report["ratios"]["bytes_on_disk"] = before / size
    if dtype is not None:
        report["dtype"] = str(dtype).removeprefix("torch.")
    writer.write_json(REPORT, report)
    old = source / CARD
    previous = old.read_text(encoding="utf-8", errors="replace") if old.is_file() else ""
    writer.write_text(CARD, card(report, config=config, previous=previous))


def dense_count(source: Path, manifest: Manifest) -> int:
    """How many tensors the dense checkpoint will have."""
    special = {t for site in manifest.sites for t in site.tensors.values()}
    special |= set(manifest.rest.values())
    return len(set(Checkpoint(source, stem=STEM).entries) - special) + len(manifest.replaced)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
