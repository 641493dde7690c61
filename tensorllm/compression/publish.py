"""The last step of a compression on disk: manifest, report and small files beside the weights."""

import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorllm.checkpoint.factored import mark_config
from tensorllm.checkpoint.manifest import Manifest, StoredSite
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.checkpoint.writer import ShardWriter
from tensorllm.compression.complete import complete, dense_config
from tensorllm.compression.narrow import Narrowing
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
    narrowing: Narrowing | None = None,
) -> CompressionReport:
    """Write what goes beside the shards, and move the folder to its final name.

    Args:
        narrowing: what was cut from the weights.
    """
    weights, files = writer.name_files(), writer.files
    notes = [note for note in writer.finished.values() if note]
    mode, settings = plan.settings
    sites = [site_report(record) for note in notes for record in note["reports"]]
    before = checkpoint.parameters
    if narrowing is not None:
        after = before - narrowing.removed(checkpoint.weights)
    else:
        after = before - saved_parameters(sites)
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
        totals=Totals(before, after, checkpoint.bytes, writer.bytes),
        seconds=time.perf_counter() - started,
        peak_resident_bytes=peak_resident_bytes(),
        environment=environment(),
        structure=roles.layout.describe(),
        missing_roles=dict(plan.missing_roles),
    )
    config = dense_config(task.source, task.dtype)
    if narrowing is not None:
        report.ffn_width = (narrowing.before, narrowing.after)
        config = dict(narrowing.config)
    if task.format == "factored":
        config = mark_config(config, weights)
    made_from = checkpoint.identity if task.original else None
    complete(
        writer,
        task.source,
        config=config,
        manifest=_manifest(task, plan, notes, files, made_from),
        report=report.to_json(),
        details=json.dumps([record for note in notes for record in note["details"]]) + "\n",
        origin=origin(task.source),
    )
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
        format="factored" if task.format == "factored" else "dense",
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


def peak_resident_bytes() -> int:
    """The peak resident memory of this process so far.

    On Linux not from getrusage: there a child process begins with its parent's peak.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
