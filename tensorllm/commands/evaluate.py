"""`tensorllm evaluate`: score a checkpoint, alone or beside the original it was made from.

Lightning's Trainer scores it, into a folder of results.
"""

import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from tensorllm.checkpoint.loader import Loader, dtype_of
from tensorllm.checkpoint.source import Source, resolve
from tensorllm.data.base import ReasoningDataModule
from tensorllm.environment import environment
from tensorllm.errors import UserError
from tensorllm.evaluation.evaluate import make_dataset
from tensorllm.evaluation.predictions import Prediction
from tensorllm.evaluation.prior import shared_choices, without_prior
from tensorllm.evaluation.protocol import PROTOCOLS, Protocol
from tensorllm.evaluation.results import (
    BEFORE,
    PREDICTIONS,
    ResultsFolder,
    Scored,
    check_free,
    results_of,
)
from tensorllm.evaluation.scorer import context_of
from tensorllm.evaluation.totals import metrics_of
from tensorllm.lightning.loggers import folder_of, make_logger
from tensorllm.lightning.trainer import Devices, check_options, is_first, score_model
from tensorllm.progress import Progress, quiet
from tensorllm.registry import load_plugins, one_of
from tensorllm.requests.evaluate import EvaluateRequest
from tensorllm.runtime.cost import Cache

PREFIX = {"model": "evaluate/", "before": "evaluate/before/"}  # of logged metrics


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The content of results.json, the model's predictions, and the original's if there is one.

    Attributes:
        logged_to: the folder that a logger wrote to.
    """

    results: dict[str, Any]
    predictions: list[Prediction]
    before: list[Prediction] | None = None
    logged_to: Path | None = None

    def files(self) -> dict[str, list[Prediction]]:
        """The predictions by the names of their files."""
        files = {PREDICTIONS: self.predictions}
        return files if self.before is None else {**files, BEFORE: self.before}


def evaluate(request: EvaluateRequest, progress: Progress = quiet) -> Evaluation:
    """Score the model on the dataset; with `compressed`, the original and the compressed one.

    Args:
        request: the models, the dataset, and how they are scored.
        progress: called with (examples scored, examples in all, which model) if there is one
            process; several show the Trainer's bar.

    Raises:
        UserError: wrong input.
        Incomplete: the run was interrupted; the same request resumes it.
    """
    devices = _check(request)
    protocol = PROTOCOLS[request.protocol]
    if request.model is None or request.dataset is None:
        raise UserError("give a model and a dataset")
    data = _dataset(request.dataset, request)
    choices = shared_choices(data.examples) if request.calibrate_prior else ()
    source = resolve(request.model, request.revision)
    loaders = _loaders(request, devices, source)
    loader = loaders["model"]
    tokenizer = loader.tokenizer()
    data.connect(tokenizer, masked=loader.masked, context=context_of(loader.config(), tokenizer))
    logger = _logger(request)
    fingerprint = _fingerprint(request, protocol, data, loaders)
    with tempfile.TemporaryDirectory() as scratch:
        target = request.out or Path(scratch) / "results"
        folder = ResultsFolder(target, fingerprint, overwrite=request.overwrite)
        started = time.perf_counter()
        scored = {
            name: score_model(
                loader,
                data,
                folder.journal(name),
                devices=devices,
                options=request.trainer,
                logger=logger,
                progress=progress,
                prefix=PREFIX[name],
                kept=request.out is not None,
                protocol=protocol,
                batch_tokens=request.batch_tokens,
            )
            for name, loader in loaders.items()
        }
        if not is_first():
            sys.exit(0)
        if request.calibrate_prior:
            scored = {name: _calibrated(found, choices) for name, found in scored.items()}
        model, before = scored["model"], scored.get("before")
        results = results_of(data, protocol, model, before, seed=request.seed)
        results["calibrated_prior"] = request.calibrate_prior
        results |= _made_with(request, devices, source, loader)
        results["seconds"] = time.perf_counter() - started
        rows = None if before is None else before.predictions
        done = Evaluation(results, model.predictions, rows, folder_of(logger))
        if request.out is not None:
            folder.finish(results, done.files())
    return done


def _dataset(name: str, request: EvaluateRequest) -> ReasoningDataModule:
    return make_dataset(name, data_file=request.data_file, split=request.split, limit=request.limit)


def _logger(request: EvaluateRequest) -> Any:
    """Lightning's logger that was named or given."""
    if request.logger is None or isinstance(request.logger, str):
        return make_logger(request.logger, request.log_dir, "evaluate")
    return request.logger


def _calibrated(scored: Scored, choices: Sequence[str]) -> Scored:
    rows = without_prior(scored.predictions, choices)
    return Scored(rows, metrics_of(rows))


def _check(request: EvaluateRequest) -> Devices:
    """Refuse what can be refused without the model; returns where to run."""
    load_plugins(request.plugins)
    check_options(request.trainer)
    one_of("--cache", request.cache, get_args(Cache))
    devices = Devices(**{field.name: getattr(request, field.name) for field in fields(Devices)})
    if request.batch_tokens is not None and request.batch_tokens < 1:
        raise UserError(f"--batch-tokens must be at least 1, got {request.batch_tokens}")
    if request.out is None and devices.several and not devices.spawned:
        raise UserError(
            "give --out: its folder is where the processes of --strategy put their predictions"
        )
    if request.out is not None:
        check_free(request.out, request.overwrite)
    return devices


def _loaders(request: EvaluateRequest, devices: Devices, source: Source) -> dict[str, Loader]:
    original = Loader(
        source.folder, dtype_of(request.dtype), verify=request.verify, cache=request.cache
    )
    if devices.precision is None:
        original = original.quickest(devices.kind)
    if request.compressed is None:
        return {"model": original}
    if not request.compressed.is_dir():
        raise UserError(
            f"--compressed must be a folder that tensorllm wrote, got {request.compressed}"
        )
    compressed = replace(original, folder=request.compressed)
    manifest = compressed.manifest()
    if manifest is None:
        raise UserError(
            f"--compressed: {request.compressed} has no tensorllm.json, so tensorllm did not make "
            "it from --model; score it by itself with --model"
        )
    if not compressed.made_from(source):
        raise UserError(
            f"{request.compressed} was made from {manifest.source.get('model')!r}, not from "
            f"{source.name!r}: give the model it belongs to"
        )
    return {"before": original, "model": compressed}


def _made_with(
    request: EvaluateRequest, devices: Devices, source: Source, loader: Loader
) -> dict[str, Any]:
    """What identifies the model and the machine in results.json."""
    manifest = loader.manifest()
    stored = loader.config().dtype
    return {
        "model": source.name,
        "revision": source.revision,
        "compressed": None if request.compressed is None else str(request.compressed),
        "compressor": None if manifest is None else manifest.compressor,
        "dtype": str(devices.dtype(loader.dtype or stored)).removeprefix("torch."),
        "stored_dtype": str(stored).removeprefix("torch."),
        "devices": asdict(devices),
        "trainer": {name: str(value) for name, value in request.trainer.items()},
        **environment(),
    }


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
        "precision": request.precision,
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
