"""Writing a factored folder anew: as an ordinary checkpoint, or with its factors in few bits.

Both go tensor by tensor, so that the model is never whole in memory.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensorllm.checkpoint.beside import small_files
from tensorllm.checkpoint.factored import STEM, dense_tensors, mark_config, store_site
from tensorllm.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    StoredSite,
    check_files,
    read_manifest,
)
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.checkpoint.writer import ShardWriter, check_target, exclusive
from tensorllm.compression.card import CARD, REPORT, card, text_of
from tensorllm.errors import UserError
from tensorllm.progress import Progress, quiet
from tensorllm.registry import one_of
from tensorllm.tensors.factors import Factors
from tensorllm.tensors.quantised import BITS, quantise


def export(
    source: Path,
    target: Path,
    *,
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
        UserError: not a factored folder, or a folder that has changed.
    """
    check_target(target, overwrite=overwrite, source=source)
    manifest = read_manifest(source)
    if manifest is None or manifest.format != "factored":
        what = "is not one that tensorllm wrote" if manifest is None else "is dense already"
        raise UserError(f"{source} {what}; export takes a factored folder")
    check_files(source, manifest, verify=True)
    fingerprint = {"export": "dense", "files": manifest.files, "dtype": str(dtype)}
    with exclusive(target):
        writer = ShardWriter(target, stem="model", fingerprint=fingerprint, overwrite=overwrite)
        total = _dense_count(source, manifest)
        for done, (name, tensor) in enumerate(dense_tensors(source)):
            progress(done, total, name)
            writer.add(name, {name: _cast(tensor, dtype)})
        writer.name_files()
        files = writer.files
        size = sum(facts["bytes"] for facts in files.values())
        for path in small_files(source):
            if path.name not in (MANIFEST, REPORT):
                writer.copy(path, path.relative_to(source))
        config = dense_config(source, dtype)
        writer.write_json("config.json", config)
        dense = replace(manifest, format="dense", sites=[], replaced={}, rest={}, files=files)
        writer.write_json(MANIFEST, dense.to_json())
        if (source / REPORT).is_file():
            _write_report(writer, source, config, size, dtype)
        writer.finish()
    return size


def dense_config(source: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """The config.json of a factored folder's model, without what says that it is factored."""
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
    writer.write_text(CARD, card(report, config=config, previous=text_of(source / CARD)))


def _dense_count(source: Path, manifest: Manifest) -> int:
    """How many tensors the dense checkpoint will have."""
    special = {t for site in manifest.sites for t in site.tensors.values()}
    special |= set(manifest.rest.values())
    return len(set(Checkpoint(source, stem=STEM).entries) - special) + len(manifest.replaced)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


@dataclass(frozen=True, slots=True)
class QuantisedSite:
    """What quantising did to one site.

    Attributes:
        bytes_before, bytes_after: of its factors.
        relative_error: ||factors - quantised|| / ||factors||, of the weights that they stand for.
    """

    site: str
    bytes_before: int
    bytes_after: int
    relative_error: float


def quantise_folder(
    source: Path, target: Path, how: str, *, overwrite: bool = False, progress: Progress = quiet
) -> list[QuantisedSite]:
    """Write a factored folder whose factors are `int8` or `int4`; all else is copied.

    Raises:
        UserError: not a factored folder, one that is quantised already, or another `how`.
    """
    one_of("--quantize", how, tuple(BITS))
    check_target(target, overwrite=overwrite, source=source)
    manifest = read_manifest(source)
    if manifest is None or manifest.format != "factored":
        raise UserError(f"{source} is not factored; --quantize takes a factored folder")
    check_files(source, manifest, verify=True)
    fingerprint = {"quantise": how, "files": manifest.files}
    with exclusive(target):
        writer = ShardWriter(target, stem=STEM, fingerprint=fingerprint, overwrite=overwrite)
        try:
            sites, found = _write_weights(source, manifest, how, writer, progress)
        except UserError:  # quantised already, or numbers that cannot be
            writer.discard()
            raise
        finally:
            writer.rest()
        weights = writer.name_files()
        for path in small_files(source):
            if path.name not in (MANIFEST, REPORT, "config.json"):
                writer.copy(path, path.relative_to(source))
        config = json.loads((source / "config.json").read_text())
        writer.write_json("config.json", mark_config(config, weights))
        about = {**manifest.source, "quantised": how}
        made = replace(manifest, sites=sites, files=writer.files, source=about)
        writer.write_json(MANIFEST, made.to_json())
        if (source / CARD).is_file():
            text = (source / CARD).read_text(encoding="utf-8")
            writer.write_text(CARD, f"{text}\nThe factors are held as {how}.\n")
        writer.finish()
    return found


def _write_weights(
    source: Path, manifest: Manifest, how: str, writer: ShardWriter, progress: Progress
) -> tuple[list[StoredSite], list[QuantisedSite]]:
    """Narrow factors of every site, and the other tensors as they are."""
    stored = Checkpoint(source, stem=STEM)
    sites: list[StoredSite] = []
    found: list[QuantisedSite] = []
    for done, entry in enumerate(manifest.sites):
        progress(done, len(manifest.sites), entry.name)
        factors = entry.factors(stored.read(entry.tensors.values()))
        if factors.plain() is not factors:
            raise UserError(f"{source} is quantised already; quantise the folder it was made from")
        narrow = quantise(factors, how)
        site, tensors = store_site(entry.site, narrow)
        writer.add(entry.name, tensors)
        sites.append(site)
        found.append(_narrowed(entry.name, factors, narrow))
    special = {t for entry in manifest.sites for t in entry.tensors.values()}
    for name in stored.entries:
        if name not in special:
            writer.add(name, stored.read([name]))
    return sites, found


def _narrowed(name: str, factors: Factors, narrow: Factors) -> QuantisedSite:
    before, after = (sum(t.nbytes for t in f.tensors().values()) for f in (factors, narrow))
    want = factors.dense()
    error = float((narrow.dense() - want).norm() / want.norm())
    return QuantisedSite(name, before, after, error)
