"""`tensorllm export`: a factored folder as an ordinary checkpoint, parameter by parameter."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensorllm.checkpoint.beside import small_files
from tensorllm.checkpoint.factored import STEM, dense_tensors
from tensorllm.checkpoint.manifest import MANIFEST, Manifest, check_files, read_manifest
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.checkpoint.target import check_target, exclusive
from tensorllm.checkpoint.writer import ShardWriter
from tensorllm.compression.card import CARD, REPORT, card
from tensorllm.errors import UserError
from tensorllm.progress import Progress, quiet
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
    check_files(source, manifest, verify=True)
    fingerprint = {"export": "dense", "files": manifest.files, "dtype": str(dtype)}
    with exclusive(target):
        writer = ShardWriter(target, stem="model", fingerprint=fingerprint, overwrite=overwrite)
        total = dense_count(source, manifest)
        for done, (name, tensor) in enumerate(dense_tensors(source)):
            progress(done, total, name)
            writer.add(name, {name: _cast(tensor, dtype)})
        writer.name_files()
        files = writer.files
        size = sum(facts["bytes"] for facts in files.values())
        for path in small_files(source):
            if path.name not in (MANIFEST, REPORT):
                writer.copy(path, path.relative_to(source))
        config = _dense_config(source, dtype)
        writer.write_json("config.json", config)
        dense = replace(manifest, format="dense", sites=[], replaced={}, rest={}, files=files)
        writer.write_json(MANIFEST, dense.to_json())
        if (source / REPORT).is_file():
            _write_report(writer, source, config, size, dtype)
        writer.finish()
    return size


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
