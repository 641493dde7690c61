"""`tensorllm.json`: what a folder's weights are, how they were made, and their checksums."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tensorllm.compressors import Site
from tensorllm.errors import UserError
from tensorllm.io import from_json, sha256s
from tensorllm.tensors.factors import Factors
from tensorllm.tensors.quantised import kind_named

MANIFEST = "tensorllm.json"
VERSION = 1


@dataclass(frozen=True, slots=True)
class StoredSite:
    """A site stored as factors; `tensors` maps the factors' names to names in the files."""

    name: str
    layers: tuple[int, ...]
    roles: tuple[str, ...]
    stacking: str
    kind: str
    tensors: dict[str, str]

    @property
    def site(self) -> Site:
        return Site(self.layers, self.roles, self.stacking)

    def factors(self, stored: Mapping[str, Any]) -> Factors:
        """The factors, from the tensors of the folder."""
        named = {short: stored[full] for short, full in self.tensors.items()}
        return kind_named(self.kind).from_tensors(named)


@dataclass(slots=True)
class Manifest:
    """The content of `tensorllm.json`.

    Attributes:
        format: `dense` (an ordinary checkpoint) or `factored`.
        source: model, revision and folder that were compressed.
        mode: the compressor's name.
        settings: the compressor's fields.
        versions: of the packages that were used.
        sites: those stored as factors.
        replaced: stored parameter -> shape and dtype, of those stored as factors.
        rest: `layer.role` -> tensor, of dense matrices that belong to a fused, replaced parameter.
        files: file -> bytes and SHA-256.
    """

    format: str
    source: dict[str, Any]
    mode: str
    settings: dict[str, Any]
    versions: dict[str, str]
    sites: list[StoredSite] = field(default_factory=list)
    replaced: dict[str, dict[str, Any]] = field(default_factory=dict)
    rest: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format_version: int = VERSION

    @property
    def compressor(self) -> dict[str, Any]:
        """The compression, as results of this folder describe it."""
        return {"mode": self.mode, **self.settings, "layers": self.source.get("layers")}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest; None if tensorllm did not write the folder.

    Raises:
        UserError: there is no such folder, or the manifest cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if not folder.is_dir():
            raise UserError(f"no such folder: {folder}")
        return None
    try:
        values = from_json(path.read_text())
        version = values["format_version"]
        if version > VERSION:
            raise UserError(
                f"{path} has format version {version}, newer than {VERSION}, the newest that this "
                "tensorllm reads; update tensorllm"
            )
        sites = [
            StoredSite(**site | {key: tuple(site[key]) for key in ("layers", "roles")})
            for site in values.pop("sites")
        ]
        return Manifest(**values, sites=sites)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a tensorllm manifest: {error}") from None


def factored_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder that holds factors; None for any other folder."""
    manifest = read_manifest(folder)
    return manifest if manifest is not None and manifest.format == "factored" else None


def check_files(folder: Path, manifest: Manifest, *, verify: bool) -> None:
    """Refuse files that are missing, truncated or changed since they were written.

    Args:
        verify: compare checksums as well as sizes, which takes longer than loading the files.
    """
    for name, facts in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{folder} lacks {name}, which {MANIFEST} names")
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise UserError(
                f"{path} is truncated or damaged: {facts['bytes']} bytes expected, {size} found"
            )
    if not verify:
        return
    found = sha256s(folder / name for name in manifest.files)
    for (name, facts), digest in zip(manifest.files.items(), found, strict=True):
        if digest != facts["sha256"]:
            raise UserError(
                f"{folder / name} has changed: its checksum is not the one in {MANIFEST}"
            )
