"""Evaluate a checkpoint, alone or beside the original it was made from, into a folder of
results.
"""

import gc
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tensorllm.checkpoint.manifest import Manifest
from tensorllm.checkpoint.reader import Checkpoint
from tensorllm.checkpoint.source import Source, resolve
from tensorllm.commands.devices import Devices, is_first, validate
from tensorllm.commands.models import Loader, dtype_of
from tensorllm.commands.plugins import load_plugins
from tensorllm.data.base import ReasoningDataModule, Split
from tensorllm.environment import environment
from tensorllm.errors import Incomplete, UserError
from tensorllm.evaluation.evaluate import evaluate_model, make_dataset
from tensorllm.evaluation.protocol import PROTOCOLS, Protocol
from tensorllm.evaluation.results import (
    BEFORE,
    PREDICTIONS,
    SCHEMA,
    Journal,
    ResultsFolder,
    check_free,
)
from tensorllm.evaluation.row import Row
from tensorllm.evaluation.scorer import context_of
from tensorllm.evaluation.statistics import compared, intervals
from tensorllm.evaluation.summary import metrics_of
from tensorllm.lightning.reasoner import CausalReasoner, MaskedReasoner
from tensorllm.progress import Progress, quiet

__all__ = ["EvaluateRequest", "Evaluation", "evaluate", "evaluate_model"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateRequest:
    """What is asked for; the command line's options.

    Attributes:
        model: short name, hub id or folder.
        compressed: a folder that tensorllm wrote from this model: scored beside the original.
        verify: compare checksums of what tensorllm wrote.
        out: folder of results; without one nothing is kept and nothing resumed.
    """

    model: str
    dataset: str
    data_file: Path | None = None
    compressed: Path | None = None
    revision: str | None = None
    protocol: str = "strict"
    split: Split = "test"
    limit: int | None = None
    out: Path | None = None
    overwrite: bool = False
    dtype: str | None = None
    verify: bool = False
    seed: int = 0
    batch_tokens: int | None = None
    devices: Devices = field(default_factory=Devices)
    plugins: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The content of results.json, and the rows: of the model, and of the original beside it."""

    results: dict[str, Any]
    rows: list[Row]
    before: list[Row] | None = None


def evaluate(request: EvaluateRequest, progress: Progress = quiet) -> Evaluation:
    """Score the model on the dataset; with `compressed`, original and compressed.

    Args:
        progress: called with (examples scored, examples in all, which model) where there is one
            process; several have the Trainer's bar.

    Raises:
        UserError: wrong input.
        Incomplete: the run stopped half-way; the same request goes on where it stopped.
    """
    load_plugins(request.plugins)
    protocol = PROTOCOLS[request.protocol]
    if request.batch_tokens is not None and request.batch_tokens < 1:
        raise UserError(f"--batch-tokens must be at least 1, got {request.batch_tokens}")
    if request.out is None and request.devices.several and not request.devices.spawned:
        raise UserError(
            "give --out: its folder is where the processes of --strategy put their rows"
        )
    if request.out is not None:
        check_free(request.out, request.overwrite)
    data = make_dataset(
        request.dataset, data_file=request.data_file, split=request.split, limit=request.limit
    )
    source = resolve(request.model, request.revision)
    loaders = _loaders(request, source)
    tokenizer = loaders["model"].tokenizer()
    loader = loaders["model"]
    data.connect(tokenizer, masked=loader.masked, context=context_of(loader.config(), tokenizer))
    fingerprint = _fingerprint(request, protocol, data, loaders)
    with tempfile.TemporaryDirectory() as scratch:
        target = request.out or Path(scratch) / "results"
        folder = ResultsFolder(target, fingerprint, overwrite=request.overwrite)
        started = time.perf_counter()
        rows = {
            name: _score(request, protocol, data, loader, folder.journal(name), progress)
            for name, loader in loaders.items()
        }
        if not is_first():
            sys.exit(0)
        results = _results(request, source, protocol, data, loaders, rows)
        results["seconds"] = time.perf_counter() - started
        if request.out is not None:
            files = {PREDICTIONS: rows["model"]}
            folder.finish(results, files | ({BEFORE: rows["before"]} if "before" in rows else {}))
    return Evaluation(results, rows["model"], rows.get("before"))


def _loaders(request: EvaluateRequest, source: Source) -> dict[str, Loader]:
    dtype = dtype_of(request.dtype)
    original = Loader(source.folder, dtype, verify=request.verify)
    if request.compressed is None:
        return {"model": original}
    if not request.compressed.is_dir():
        raise UserError(
            f"--compressed must be a folder that tensorllm wrote, got {request.compressed}"
        )
    compressed = Loader(request.compressed, dtype, verify=request.verify)
    manifest = compressed.manifest()
    if manifest is None:
        raise UserError(f"--compressed: {request.compressed} has no tensorllm.json")
    if not _belongs(manifest, source):
        raise UserError(
            f"{request.compressed} was made from {manifest.source.get('model')!r}, not from "
            f"{source.name!r}: give the model it belongs to"
        )
    return {"before": original, "model": compressed}


def _belongs(manifest: Manifest, source: Source) -> bool:
    """Whether a compressed folder was made from this model, whatever either is called."""
    known = manifest.source.get("identity")
    if known is not None:
        return bool(known == Checkpoint(source.folder).identity)
    # Saved from memory: the original's weights were not there any more, only its name.
    named = str(manifest.source.get("model"))
    return named == source.name or Path(named).resolve().name == source.folder.resolve().name


def _score(
    request: EvaluateRequest,
    protocol: Protocol,
    data: ReasoningDataModule,
    loader: Loader,
    journal: Journal,
    progress: Progress,
) -> list[Row]:
    """The rows of one model, those of an earlier, interrupted run included."""
    data.done = frozenset(journal.rows())
    done, total = len(data.done), len(data.examples)

    def keep(rows: list[Row]) -> None:
        nonlocal done
        journal.append(rows)
        done += len(rows)
        progress(done, total, f"scoring {loader.folder.name}")

    if len(data.done) < len(data.examples):
        gc.collect()  # the model before this one: Trainers and models are cycles
        kind = MaskedReasoner if loader.masked else CausalReasoner
        module = kind(
            loader,
            data.tokenizer or loader.tokenizer(),
            protocol=protocol,
            batch_tokens=request.batch_tokens,
            on_rows=journal.append if request.devices.several else keep,
        )
        validate(request.devices, module, data)
    found = journal.rows()
    missing = [e.index for e in data.examples if e.index not in found]
    if missing:
        raise Incomplete(
            f"{len(missing)} of {len(data.examples)} examples were not scored, the first of them "
            f"number {missing[0]}; run the same command again to go on"
        )
    return [found[e.index] for e in data.examples]


def _results(
    request: EvaluateRequest,
    source: Source,
    protocol: Protocol,
    data: ReasoningDataModule,
    loaders: dict[str, Loader],
    rows: dict[str, list[Row]],
) -> dict[str, Any]:
    manifest = loaders["model"].manifest()
    compressor = None
    if manifest is not None:
        compressor = {"mode": manifest.mode, **manifest.settings}
        compressor["layers"] = manifest.source.get("layers")
    results = {
        "schema": SCHEMA,
        "metrics": metrics_of(rows["model"]),
        "intervals": intervals(rows["model"], request.seed),
        "examples": len(rows["model"]),
        "model": source.name,
        "revision": source.revision,
        "compressed": None if request.compressed is None else str(request.compressed),
        "compressor": compressor,
        "dataset": data.name,
        "data_file": None if data.data_file is None else str(data.data_file),
        "notes": data.notes,
        "protocol": protocol.name,
        "quirks": protocol.quirks(),
        "split": data.split,
        "limit": data.limit,
        "truncated_prompts": sum(row.truncated > 0 for row in rows["model"]),
        "seed": request.seed,
        "dtype": request.dtype or str(loaders["model"].config().dtype).removeprefix("torch."),
        "devices": asdict(request.devices),
        **environment(),
    }
    if "before" in rows:
        results["before"] = {
            "metrics": metrics_of(rows["before"]),
            "intervals": intervals(rows["before"], request.seed),
        }
        results["comparison"] = compared(rows["before"], rows["model"], request.seed)
    return results


def _fingerprint(
    request: EvaluateRequest,
    protocol: Protocol,
    data: ReasoningDataModule,
    loaders: dict[str, Loader],
) -> str:
    facts = {
        "protocol": asdict(protocol),
        "examples": [asdict(e) for e in data.examples],
        "max_new_tokens": data.max_new_tokens,
        "models": {name: loader.fingerprint() for name, loader in loaders.items()},
        "precision": request.devices.precision,
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
