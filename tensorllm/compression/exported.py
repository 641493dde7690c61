"""Manifest and report of what `export` makes of a folder, tensorllm's or an ordinary one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tensorllm.checkpoint.manifest import Manifest, read_manifest
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.compression.card import REPORT
from tensorllm.compression.origin import origin
from tensorllm.compression.report import CompressionReport, Totals
from tensorllm.environment import environment, versions
from tensorllm.models import RoleMatrices


def exported_report(
    source: Path, format: str, size: int, dtype: torch.dtype | None
) -> dict[str, Any] | None:
    """A folder's report, updated for what was exported from it; None if it has no report.

    Args:
        source: the folder that was exported.
        format: of the new folder.
        size: bytes of the new weight files.
        dtype: of the new weights; None: unchanged.
    """
    if not (source / REPORT).is_file():
        return None
    report: dict[str, Any] = json.loads((source / REPORT).read_text())
    report["format"] = format
    report["totals"]["bytes_after"] = size
    if before := report["totals"]["bytes_before"]:
        report["ratios"]["bytes_on_disk"] = before / size
    if dtype is not None:
        report["dtype"] = str(dtype).removeprefix("torch.")
    return report


def exported_manifest(manifest: Manifest, files: dict[str, dict[str, Any]]) -> Manifest:
    """The manifest of an ordinary checkpoint that was exported from a folder of ours."""
    return replace(manifest, format="dense", sites=[], replaced={}, rest={}, files=files)


@dataclass(frozen=True, slots=True)
class Narrowed:
    """A model whose FFN channels were cut, and the new weight files.

    Attributes:
        source: folder of the original model.
        roles: of the source.
        width: of an FFN, before and after.
        removed: how many numbers were cut.
        files: facts of the new weight files, by name.
        dtype: of the new weights; None: unchanged.
    """

    source: Path
    roles: RoleMatrices
    width: tuple[int, int]
    removed: int
    files: Mapping[str, Mapping[str, Any]]
    dtype: torch.dtype | None

    @property
    def size(self) -> int:
        """Bytes of the new weight files."""
        return sum(facts["bytes"] for facts in self.files.values())

    @property
    def held(self) -> dict[str, dict[str, Any]]:
        """The files, as a manifest lists them."""
        return {name: dict(facts) for name, facts in self.files.items()}


def beside_narrow(new: Narrowed) -> dict[str, Any]:
    """What `complete` writes beside narrow weights; of a folder of ours its updated records."""
    manifest = read_manifest(new.source)
    if manifest is None:
        return _of_an_ordinary_one(new)
    report = exported_report(new.source, "narrow", new.size, new.dtype)
    return {
        "manifest": exported_manifest(manifest, new.held),
        "report": None if report is None else _narrower(report, new),
    }


def _narrower(report: Mapping[str, Any], new: Narrowed) -> dict[str, Any]:
    """A folder's report, updated for the narrower model."""
    wide, narrow = new.width
    before = report["totals"]["parameters_before"]
    after = before - new.removed
    return {
        **report,
        "ffn_width": {"before": wide, "after": narrow},
        "totals": {**report["totals"], "parameters_after": after},
        "ratios": {**report["ratios"], "whole_model": before / after},
    }


def _of_an_ordinary_one(new: Narrowed) -> dict[str, Any]:
    """Records for an ordinary folder, of which nothing but FFN channels was removed."""
    checkpoint, known = Checkpoint(new.source), origin(new.source)
    spec, parameters = new.roles.spec, checkpoint.parameters
    report = CompressionReport(
        model=known.get("base_model", new.source.absolute().name),
        revision=None,
        mode="narrow",
        settings={},
        layers=tuple(range(spec.layers)),
        dtype=str(new.dtype or checkpoint.dtype).removeprefix("torch."),
        format="narrow",
        sites=[],
        spec=spec,
        totals=Totals(parameters, parameters - new.removed, checkpoint.bytes, new.size),
        seconds=0.0,
        environment=environment(),
        ffn_width=new.width,
    ).to_json()
    report["ratios"].pop("matrices_compressed")  # there are none
    manifest = Manifest(
        format="dense",
        source={
            "model": report["model"],
            "revision": None,
            "layers": list(range(spec.layers)),
            "identity": checkpoint.identity,
        },
        mode="narrow",
        settings={},
        versions=versions(),
        files=new.held,
    )
    return {"manifest": manifest, "report": report, "origin": known}
