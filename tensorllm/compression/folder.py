"""Compressing a checkpoint on disk unit by unit, so that the model is never whole in memory."""

import json
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tensorllm.architectures import RoleMatrices
from tensorllm.checkpoint.factored import (
    STEM,
    mark_config,
    rest_of,
    store_site,
    write_readme,
)
from tensorllm.checkpoint.manifest import MANIFEST, Manifest, StoredSite, read_manifest
from tensorllm.checkpoint.reader import Checkpoint, index_name
from tensorllm.checkpoint.writer import ShardWriter, check_target
from tensorllm.compression.jobs import Compressed, plan_jobs, run_job, write_dense
from tensorllm.compression.model import Progress, quiet
from tensorllm.compression.report import CompressionReport, Totals, saved_parameters, site_report
from tensorllm.compressors import Compressor, Job
from tensorllm.compressors.settings import settings_of
from tensorllm.environment import environment, versions
from tensorllm.errors import UserError
from tensorllm.tensors.unfold import all_finite

Format = Literal["dense", "factored"]
FORMATS = ("dense", "factored")
COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")


@dataclass(frozen=True, kw_only=True)
class FolderTask:
    """What is to be made of a checkpoint.

    Attributes:
        dtype: of the written weights; that of each stored tensor by default.
        model: the name that reports give the model; the folder by default.
        done: factors that are there already, by the site's name.
        shard_bytes: a file of weights is ended as soon as it holds so many.
    """

    source: Path
    target: Path
    compressor: Compressor
    layers: Sequence[int] | None = None
    format: Format = "dense"
    dtype: torch.dtype | None = None
    overwrite: bool = False
    model: str | None = None
    revision: str | None = None
    done: Mapping[str, Compressed] = field(default_factory=dict)
    shard_bytes: int = 2**29


@dataclass(frozen=True)
class Unit:
    """Jobs that share stored parameters, with all the parameters that they touch."""

    name: str
    names: list[str]
    jobs: list[Job]


def open_checkpoint(folder: Path) -> tuple[Checkpoint, RoleMatrices]:
    """A checkpoint that can be compressed, its shapes checked against its config."""
    manifest = read_manifest(folder)
    if manifest is not None and manifest.format == "factored":
        raise UserError(f"{folder} is factored already; give the model it was made from")
    checkpoint = Checkpoint(folder)
    roles = RoleMatrices(checkpoint.config, checkpoint.entries)
    roles.check_shapes({name: entry.shape for name, entry in checkpoint.entries.items()})
    return checkpoint, roles


def units(checkpoint: Checkpoint, roles: RoleMatrices, jobs: Iterable[Job]) -> list[Unit]:
    """All of the checkpoint as units of work: the jobs first, then what is only copied."""
    groups: list[tuple[set[str], list[Job]]] = []
    for job in jobs:
        names, together = {roles.name(*matrix) for matrix in job.site.matrices}, [job]
        for group in [g for g in groups if g[0] & names]:
            groups.remove(group)
            names, together = names | group[0], group[1] + together
        groups.append((names, together))
    out = [Unit(together[0].site.name, sorted(names), together) for names, together in groups]
    touched = {name for unit in out for name in unit.names}
    out += [Unit(name, [name], []) for name in checkpoint.entries if name not in touched]
    return out


def compress_folder(task: FolderTask, progress: Progress = quiet) -> CompressionReport:
    """Compress a local checkpoint into a new folder; killed and run again, it resumes.

    Raises:
        UserError: what was asked does not fit the checkpoint; nothing is written.
        Incomplete: the disk is full; the finished part is kept for the next run.
    """
    started = time.perf_counter()
    check_target(task.target, overwrite=task.overwrite, source=task.source)
    checkpoint, roles = open_checkpoint(task.source)
    layers = tuple(range(roles.layers)) if task.layers is None else tuple(task.layers)
    work = units(checkpoint, roles, plan_jobs(task.compressor, roles, layers))
    factored = task.format == "factored"
    writer = ShardWriter(
        task.target,
        stem=STEM if factored else "model",
        fingerprint=_fingerprint(task, checkpoint, layers),
        shard_bytes=task.shard_bytes,
        overwrite=task.overwrite,
    )
    total = sum(_bytes(checkpoint, unit) for unit in work)
    done = 0
    finished = writer.finished
    try:
        for unit in work:
            progress(done, total, unit.name)
            if unit.name not in finished:
                writer.add(unit.name, *_run_unit(unit, task, checkpoint, roles))
            done += _bytes(checkpoint, unit)
        progress(total, total, "finishing")
        return _finish(task, checkpoint, roles, layers, writer, started)
    except UserError:  # wrong weights, met on the way: nothing to go on with
        writer.discard()
        raise


def _run_unit(
    unit: Unit, task: FolderTask, checkpoint: Checkpoint, roles: RoleMatrices
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors to write for a unit, and a note for the manifest and the report."""
    weights = checkpoint.read(unit.names)
    note: dict[str, Any] = {"sites": [], "reports": [], "replaced": {}, "rest": {}}
    dtype = task.dtype if unit.jobs else None
    done = [
        task.done.get(job.site.name) or run_job(job, roles, weights, dtype) for job in unit.jobs
    ]
    note["reports"] = [asdict(compressed.report) for compressed in done]
    out: dict[str, Tensor] = {}
    if task.format == "factored" and done:
        for compressed in done:
            stored, tensors = store_site(compressed.site, compressed.factors)
            note["sites"].append(asdict(stored))
            out |= tensors
        matrices = [matrix for job in unit.jobs for matrix in job.site.matrices]
        for key, w_ID in rest_of(roles, weights, matrices).items():
            out[f"rest.{key}"] = w_ID
            note["rest"][key] = f"rest.{key}"
        for name, w in weights.items():
            kept = str(task.dtype or w.dtype).removeprefix("torch.")
            note["replaced"][name] = {"shape": list(w.shape), "dtype": kept}
    else:
        for compressed in done:
            write_dense(compressed, roles, weights)
        out = weights
    for name, w in weights.items():  # what a job reads it checks itself
        if not unit.jobs and w.is_floating_point() and not all_finite(w):
            raise UserError(f"{name} has NaN or infinite values")
    return {name: _cast(t, task.dtype) for name, t in out.items()}, note


def _finish(
    task: FolderTask,
    checkpoint: Checkpoint,
    roles: RoleMatrices,
    layers: tuple[int, ...],
    writer: ShardWriter,
    started: float,
) -> CompressionReport:
    weight_map = writer.name_files()
    files = {shard["file"]: shard for shard in writer.shards if shard["names"]}
    notes = [note for note in writer.finished.values() if note]
    mode, settings = settings_of(task.compressor)
    model = task.model or str(task.source)
    manifest = Manifest(
        format=task.format,
        source={"model": model, "revision": task.revision, "layers": list(layers)},
        mode=mode,
        settings=settings,
        versions=versions(),
        sites=[StoredSite(**site) for note in notes for site in note["sites"]],
        replaced={name: facts for note in notes for name, facts in note["replaced"].items()},
        rest={key: name for note in notes for key, name in note["rest"].items()},
        files={f: {"bytes": s["bytes"], "sha256": s["sha256"]} for f, s in files.items()},
    )
    sites = [site_report(record) for note in notes for record in note["reports"]]
    size = sum(shard["bytes"] for shard in files.values())
    parameters = checkpoint.parameters
    report = CompressionReport(
        model=model,
        revision=task.revision,
        mode=mode,
        settings=settings,
        layers=layers,
        dtype=str(task.dtype or checkpoint.dtype).removeprefix("torch."),
        format=task.format,
        sites=sites,
        geometry=roles.geometry,
        model_layers=roles.layers,
        totals=Totals(parameters, parameters - saved_parameters(sites), checkpoint.bytes, size),
        seconds=time.perf_counter() - started,
        peak_resident_bytes=peak_resident_bytes(),
        environment=environment(),
    )
    single = len(files) == 1
    weights = f"{writer.stem}.safetensors" if single else index_name(writer.stem)
    _copy_small_files(task, writer, weights)
    if not single:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        writer.write_json(index_name(writer.stem), index)
    writer.write_json(MANIFEST, manifest.to_json())
    writer.write_json("report.json", report.to_json())
    writer.finish()
    return report


def _copy_small_files(task: FolderTask, writer: ShardWriter, weights: str) -> None:
    """Config, tokenizer and generation config; never code or weights."""
    ours = {MANIFEST, "report.json"}
    for path in sorted(task.source.iterdir()):
        left = path.name.endswith(".index.json") or path.name in ours
        if path.is_file() and path.suffix in COPIED and not left:
            writer.copy(path)
    config = json.loads((task.source / "config.json").read_text())
    if task.dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(task.dtype).removeprefix("torch.")
    if task.format == "factored":
        config = mark_config(config, weights)
        write_readme(writer.folder)
    if task.dtype is not None or task.format == "factored":
        writer.write_json("config.json", config)


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cast(t: Tensor, dtype: torch.dtype | None) -> Tensor:
    return t.to(dtype) if dtype is not None and t.is_floating_point() else t


def _bytes(checkpoint: Checkpoint, unit: Unit) -> int:
    return sum(checkpoint.entries[name].bytes for name in unit.names)


def _fingerprint(
    task: FolderTask, checkpoint: Checkpoint, layers: tuple[int, ...]
) -> dict[str, Any]:
    """What must be the same for an interrupted run to be continued."""
    stats = {
        file: (task.source / file).stat()
        for file in sorted({entry.file for entry in checkpoint.entries.values()})
    }
    return {
        "source": str(task.source.resolve()),
        "files": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()},
        "compressor": list(settings_of(task.compressor)),
        "layers": list(layers),
        "format": task.format,
        "dtype": str(task.dtype),
        "shard_bytes": task.shard_bytes,
        "versions": versions(),
    }
