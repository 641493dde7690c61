"""Manifest and report of what `export` makes of a folder, ours or an ordinary one."""

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
    """The report of a folder, as it is true of what was made of it; None where it has none.

    Args:
        size: bytes of the new weight files.
        dtype: of the new weights; None: as they were.
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
    """The manifest of an ordinary checkpoint that was made of a folder of ours."""
    return replace(manifest, format="dense", sites=[], replaced={}, rest={}, files=files)


@dataclass(frozen=True, slots=True)
class Cut:
    """FFN width before and after, and how many numbers went."""

    before: int
    after: int
    removed: int


def beside_narrow(
    source: Path,
    roles: RoleMatrices,
    cut: Cut,
    files: Mapping[str, Mapping[str, Any]],
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """What `complete` puts beside narrow weights: of a folder of ours as it was, but narrower.

    Args:
        roles: of the source.
        files: of the new weights.
        dtype: they were cast to; None: as they were.
    """
    held = {name: dict(facts) for name, facts in files.items()}
    manifest, size = read_manifest(source), sum(facts["bytes"] for facts in held.values())
    if manifest is None:
        return _of_an_ordinary_one(source, roles, cut, held, dtype)
    report = exported_report(source, "narrow", size, dtype)
    return {
        "manifest": exported_manifest(manifest, held),
        "report": None if report is None else _narrower(report, cut),
    }


def _narrower(report: Mapping[str, Any], cut: Cut) -> dict[str, Any]:
    """A report of a folder as it is true of the narrower one."""
    before = report["totals"]["parameters_before"]
    return {
        **report,
        "ffn_width": {"before": cut.before, "after": cut.after},
        "totals": {**report["totals"], "parameters_after": before - cut.removed},
        "ratios": {**report["ratios"], "whole_model": before / (before - cut.removed)},
    }


def _of_an_ordinary_one(
    source: Path,
    roles: RoleMatrices,
    cut: Cut,
    files: dict[str, dict[str, Any]],
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Nothing was decomposed: the channels are all that went."""
    checkpoint, known = Checkpoint(source), origin(source)
    spec, parameters = roles.spec, checkpoint.parameters
    size = sum(facts["bytes"] for facts in files.values())
    report = CompressionReport(
        model=known.get("base_model", source.absolute().name),
        revision=None,
        mode="narrow",
        settings={},
        layers=tuple(range(spec.layers)),
        dtype=str(dtype or checkpoint.dtype).removeprefix("torch."),
        format="narrow",
        sites=[],
        spec=spec,
        totals=Totals(parameters, parameters - cut.removed, checkpoint.bytes, size),
        seconds=0.0,
        environment=environment(),
        ffn_width=(cut.before, cut.after),
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
        files=files,
    )
    return {"manifest": manifest, "report": report, "origin": known}
