"""Rewrite a factored folder: as an ordinary checkpoint, or with its factors in few bits.

Both go tensor by tensor, so that the whole model is never in memory.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tensorllm.checkpoint.factored import STEM, dense_tensors, mark_config, store_site
from tensorllm.checkpoint.manifest import (
    Manifest,
    StoredSite,
    check_files,
    factored_manifest,
    read_manifest,
)
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.checkpoint.writer import ShardWriter, as_written, check_target, exclusive
from tensorllm.compression.complete import complete, dense_config
from tensorllm.compression.exported import exported_manifest, exported_report
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
    """Write the dense checkpoint that a factored folder represents, which every tool reads.

    Args:
        source: a folder that `tensorllm compress --format factored` wrote.
        target: the folder to make.
        dtype: of the written weights; by default that of the original.
        overwrite: replace an existing folder.
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
    with (
        exclusive(target),
        ShardWriter(target, stem="model", fingerprint=fingerprint, overwrite=overwrite) as writer,
    ):
        total = _dense_count(source, manifest)
        for done, (name, tensor) in enumerate(dense_tensors(source)):
            progress(done, total, name)
            writer.add(name, {name: as_written(tensor, dtype)})
        writer.name_files()
        complete(
            writer,
            source,
            config=dense_config(source, dtype),
            manifest=exported_manifest(manifest, writer.files),
            report=exported_report(source, "dense", writer.bytes, dtype),
        )
    return writer.bytes


def _dense_count(source: Path, manifest: Manifest) -> int:
    """Number of tensors that the dense checkpoint will have."""
    special = {t for site in manifest.sites for t in site.tensors.values()}
    special |= set(manifest.rest.values())
    return len(set(Checkpoint(source, stem=STEM).entries) - special) + len(manifest.replaced)


@dataclass(frozen=True, slots=True)
class QuantisedSite:
    """The effect of quantisation on one site.

    Attributes:
        bytes_before, bytes_after: of its factors.
        relative_error: ||factors - quantised|| / ||factors||, both multiplied out to dense weights.
    """

    site: str
    bytes_before: int
    bytes_after: int
    relative_error: float


def quantise_folder(
    source: Path, target: Path, how: str, *, overwrite: bool = False, progress: Progress = quiet
) -> list[QuantisedSite]:
    """Write a factored folder with its factors in `int8` or `int4`; everything else is copied.

    Raises:
        UserError: not a factored folder, one that is quantised already, or an unknown `how`.
    """
    one_of("--quantize", how, tuple(BITS))
    check_target(target, overwrite=overwrite, source=source)
    manifest = factored_manifest(source)
    if manifest is None:
        raise UserError(f"{source} is not factored; --quantize takes a factored folder")
    check_files(source, manifest, verify=True)
    fingerprint = {"quantise": how, "files": manifest.files}
    with (
        exclusive(target),
        ShardWriter(target, stem=STEM, fingerprint=fingerprint, overwrite=overwrite) as writer,
    ):
        sites, found = _write_weights(source, manifest, how, writer, progress)
        weights = writer.name_files()
        config = json.loads((source / "config.json").read_text())
        about = {**manifest.source, "quantised": how}
        made = replace(manifest, sites=sites, files=writer.files, source=about)
        report = exported_report(source, "factored", writer.bytes, None)
        complete(
            writer,
            source,
            config=mark_config(config, weights),
            manifest=made,
            report=_quantised_report(report, made, found) if report else None,
        )
    return found


def _write_weights(
    source: Path, manifest: Manifest, how: str, writer: ShardWriter, progress: Progress
) -> tuple[list[StoredSite], list[QuantisedSite]]:
    """Write every site's factors in few bits, and the other tensors unchanged."""
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


def _quantised_report(
    report: dict[str, Any], manifest: Manifest, found: list[QuantisedSite]
) -> dict[str, Any]:
    """The report with the quantised kinds, and with rounding errors added to the relative errors.

    The rounding error counts as orthogonal to what the decomposition lost.
    """
    kinds = {site.name: site.kind for site in manifest.sites}
    rounding = {site.site: site.relative_error for site in found}

    def held(site: dict[str, Any]) -> dict[str, Any]:
        lost, name = site["relative_error"], site["name"]
        left = max(0.0, 1 - lost**2) ** 0.5  # the factors' share of the norm
        error = math.hypot(lost, left * rounding[name])
        return {**site, "kind": kinds[name], "relative_error": error}

    return {**report, "sites": [held(site) for site in report["sites"]]}


def _narrowed(name: str, factors: Factors, narrow: Factors) -> QuantisedSite:
    before, after = (sum(t.nbytes for t in f.tensors().values()) for f in (factors, narrow))
    want = factors.dense()
    error = float((narrow.dense() - want).norm() / want.norm())
    return QuantisedSite(name, before, after, error)
