"""The last step of a compression on disk: manifest, report and small files beside the weights."""

import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorllm.checkpoint.beside import small_files
from tensorllm.checkpoint.factored import mark_config
from tensorllm.checkpoint.manifest import MANIFEST, Manifest, StoredSite
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.checkpoint.writer import ShardWriter
from tensorllm.compression.card import CARD, REPORT, card, text_of
from tensorllm.compression.details import DETAILS
from tensorllm.compression.origin import origin
from tensorllm.compression.plan import Plan
from tensorllm.compression.report import CompressionReport, Totals, saved_parameters, site_report
from tensorllm.compression.task import FolderTask
from tensorllm.environment import environment, versions
from tensorllm.models import RoleMatrices


def publish(
    task: FolderTask,
    plan: Plan,
    checkpoint: Checkpoint,
    roles: RoleMatrices,
    writer: ShardWriter,
    started: float,
) -> CompressionReport:
    """Write what goes beside the shards, and let the folder appear under its name."""
    weights, files = writer.name_files(), writer.files
    notes = [note for note in writer.finished.values() if note]
    mode, settings = plan.settings
    sites = [site_report(record) for note in notes for record in note["reports"]]
    size = sum(facts["bytes"] for facts in files.values())
    parameters = checkpoint.parameters
    report = CompressionReport(
        model=task.name,
        revision=task.revision,
        mode=mode,
        settings=settings,
        layers=plan.layers,
        dtype=str(task.dtype or checkpoint.dtype).removeprefix("torch."),
        format=task.format,
        sites=sites,
        spec=roles.spec,
        totals=Totals(parameters, parameters - saved_parameters(sites), checkpoint.bytes, size),
        seconds=time.perf_counter() - started,
        peak_resident_bytes=peak_resident_bytes(),
        environment=environment(),
        structure=roles.layout.describe(),
        passed_over=plan.passed_over,
    )
    _copy_small_files(task, writer, weights)
    made_from = checkpoint.identity if task.original else None
    writer.write_json(MANIFEST, _manifest(task, plan, notes, files, made_from).to_json())
    values = report.to_json()
    writer.write_json(REPORT, values)
    details = [record for note in notes for record in note["details"]]
    writer.write_text(DETAILS, json.dumps(details) + "\n")
    config, previous = checkpoint.config.to_dict(), text_of(task.source / CARD)
    known = origin(task.source)
    writer.write_text(CARD, card(values, config=config, previous=previous, origin=known))
    writer.finish()
    return report


def _manifest(
    task: FolderTask,
    plan: Plan,
    notes: Sequence[Mapping[str, Any]],
    files: dict[str, dict[str, Any]],
    made_from: str | None,
) -> Manifest:
    mode, settings = plan.settings
    return Manifest(
        format=task.format,
        source={
            "model": task.name,
            "revision": task.revision,
            "layers": list(plan.layers),
            "identity": made_from,
        },
        mode=mode,
        settings=settings,
        versions=versions(),
        sites=[StoredSite(**site) for note in notes for site in note["sites"]],
        replaced={name: facts for note in notes for name, facts in note["replaced"].items()},
        rest={key: name for note in notes for key, name in note["rest"].items()},
        files=files,
    )


def _copy_small_files(task: FolderTask, writer: ShardWriter, weights: str) -> None:
    """Config, tokenizer and generation config; never code or weights."""
    for path in small_files(task.source):
        if path.name not in (MANIFEST, REPORT, DETAILS):
            writer.copy(path, path.relative_to(task.source))
    config = json.loads((task.source / "config.json").read_text())
    if task.dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(task.dtype).removeprefix("torch.")
    if task.format == "factored":
        config = mark_config(config, weights)
    if task.dtype is not None or task.format == "factored":
        writer.write_json("config.json", config)


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident so far.

    On Linux not from getrusage: there a child process begins with its parent's peak.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
