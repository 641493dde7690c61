"""`tensorllm export --quantize`: a factored folder with its factors in 8 or 4 bits."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from tensorllm.checkpoint.beside import small_files
from tensorllm.checkpoint.factored import STEM, mark_config, store_site
from tensorllm.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    StoredSite,
    check_files,
    read_manifest,
)
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.checkpoint.target import check_target, exclusive
from tensorllm.checkpoint.writer import ShardWriter
from tensorllm.compression.card import CARD, REPORT
from tensorllm.errors import UserError
from tensorllm.progress import Progress, quiet
from tensorllm.registry import one_of
from tensorllm.tensors.factors import Factors
from tensorllm.tensors.quantised import BITS, Quantised, quantise


@dataclass(frozen=True, slots=True)
class Narrowed:
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
) -> list[Narrowed]:
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
) -> tuple[list[StoredSite], list[Narrowed]]:
    """Narrow factors of every site, and the other tensors as they are."""
    stored = Checkpoint(source, stem=STEM)
    sites: list[StoredSite] = []
    found: list[Narrowed] = []
    for done, entry in enumerate(manifest.sites):
        progress(done, len(manifest.sites), entry.name)
        factors = entry.factors(stored.read(entry.tensors.values()))
        if isinstance(factors, Quantised):
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


def _narrowed(name: str, factors: Factors, narrow: Factors) -> Narrowed:
    before, after = (sum(t.nbytes for t in f.tensors().values()) for f in (factors, narrow))
    want = factors.dense()
    error = float((narrow.dense() - want).norm() / want.norm())
    return Narrowed(name, before, after, error)
