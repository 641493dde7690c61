"""Lightning's Trainer for an evaluation, on one device or several, and its failures."""

import gc
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from tensorllm.checkpoint.loader import Loader
from tensorllm.data.base import ReasoningDataModule
from tensorllm.errors import Incomplete, UserError, first_line
from tensorllm.evaluation.results import Scored
from tensorllm.evaluation.totals import metrics_of
from tensorllm.lightning.callbacks import PredictionJournal, ProgressReport
from tensorllm.lightning.module import ReasoningModule
from tensorllm.progress import Progress, silenced
from tensorllm.registry import did_you_mean

# What a run that stopped is to be followed by; the predictions are kept, or gone with the run.
AGAIN = "run the same command again: it goes on from the last finished batch"
ANEW = "with --out FOLDER the same command, run again, goes on from the last finished batch"
# The Trainer's options that have a flag of their own.
TAKEN = {
    **{name: f"--{name.replace('_', '-')}" for name in ("accelerator", "devices", "num_nodes")},
    **{name: f"--{name}" for name in ("strategy", "precision", "logger")},
}
COMPUTED = {  # by the Trainer's precision; with the others weights are computed with as they are
    "16-true": torch.float16,
    "16-mixed": torch.float16,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.bfloat16,
    "64-true": torch.float64,
}
LIMITS = ("limit_test_batches", "limit_val_batches")  # 0: no batch
DIGITS = 9  # of a number of devices; Python reads no more than thousands of them
FIXED = ("use_distributed_sampler",)  # the data module distributes examples, each once


@dataclass(frozen=True, kw_only=True, slots=True)
class Devices:
    """Where an evaluation runs; names and values are the Trainer's.

    Attributes:
        accelerator: cpu, gpu, auto, ...
        devices: how many, or which (`0,1`), per node; on a CPU, processes.
        num_nodes: machines; each starts the same command (torchrun or SLURM).
        strategy: auto starts this machine's processes itself.
        precision: 32-true, bf16-true, 16-mixed, ...; None: that of the weights.
    """

    accelerator: str = "auto"
    devices: str = "1"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str | None = None

    def __post_init__(self) -> None:
        """Refuse more processes than the machine has places for, before any is started."""
        gpus = torch.cuda.device_count()
        most = {"cpu": os.cpu_count(), "cuda": gpus, "gpu": gpus}.get(self.kind)
        asked = self.devices.strip()
        if most and asked.isdecimal() and (len(asked) > DIGITS or int(asked) > most):
            raise UserError(
                f"--devices must be at most {most}, as this machine has {most} "
                f"{'cores' if self.kind == 'cpu' else 'GPUs'}; got {asked:.40}"
            )

    @property
    def kind(self) -> str:
        """The kind of device it runs on: `cpu`, or a kind of accelerator."""
        if self.accelerator == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.accelerator

    @property
    def several(self) -> bool:
        alone = self.devices == "1"
        if self.devices == "auto":  # the Trainer takes all GPUs, but one process on a CPU
            alone = self.accelerator == "cpu" or torch.cuda.device_count() <= 1
        return not alone or self.num_nodes > 1

    @property
    def spawned(self) -> bool:
        """Whether the other processes are children of this one, so that it notices their death."""
        return self.several and self.strategy == "auto" and self.num_nodes == 1

    def dtype(self, weights: torch.dtype) -> torch.dtype:
        """What products are computed in: as the Trainer reads `precision`, or else the weights'."""
        return (
            weights if self.precision is None else COMPUTED.get(self.trainer().precision, weights)
        )

    def trainer(
        self,
        options: Mapping[str, Any] | None = None,
        *,
        logger: Any = False,
        callbacks: Sequence[Callback] = (),
    ) -> Trainer:
        """Make the Trainer.

        Args:
            options: further arguments of Lightning's Trainer; `callbacks` may be names of classes,
                such as `my_package.MyCallback`.
            logger: one of Lightning's; False: none.
            callbacks: called before those of the options.

        Raises:
            UserError: an option is unknown, or the Trainer refuses a value.
        """
        chosen = dict(options or {})
        check_options(chosen)
        own = chosen.pop("callbacks", [])
        named = own if isinstance(own, list) else [own]
        defaults = {
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": self.several and sys.stderr.isatty(),  # otherwise ours is shown
        }
        own_flags = ((name, getattr(self, name)) for name in self.__slots__)
        what = " ".join(f"{TAKEN[name]} {value}" for name, value in own_flags if value is not None)
        what += "".join(f" --trainer {name}={value}" for name, value in (options or {}).items())
        every = [*callbacks, *map(_callback, named)]
        try:
            with _quiet():
                return Trainer(
                    accelerator=self.accelerator,
                    devices=int(self.devices) if self.devices.isdigit() else self.devices,
                    num_nodes=self.num_nodes,
                    strategy="ddp_spawn" if self.spawned else self.strategy,
                    precision=self.precision,  # type: ignore[arg-type]
                    logger=logger,
                    callbacks=every,
                    use_distributed_sampler=False,
                    **{**defaults, **chosen},
                )
        except Exception as error:  # Lightning refuses values with errors of its own
            raise UserError(f"cannot run on {what}: {first_line(error)}") from None


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse what is no option of the Trainer, is given another way, or leaves nothing scored."""
    known = list(inspect.signature(Trainer.__init__).parameters)[1:]
    known = [name for name in known if name not in {*TAKEN, *FIXED}]
    for name, value in options.items():
        if name in TAKEN:
            raise UserError(f"--trainer {name}: give it as {TAKEN[name]}")
        if name in FIXED:
            raise UserError(f"--trainer {name} is fixed: every example is scored once")
        if name in LIMITS and value == 0:
            raise UserError(f"--trainer {name} must be above 0, got {value}: nothing is scored")
        if name == "fast_dev_run" and value:
            raise UserError(
                f"--trainer {name} scores the first batches only and keeps no log; give --limit N"
            )
        if name not in known:
            raise UserError(
                f"--trainer takes options of Lightning's Trainer, not {name!r}."
                f"{did_you_mean(name, known)} Known: {', '.join(known)}"
            )


def _callback(given: Any) -> Callback:
    """A callback, or one made from the dotted name of its class."""
    if isinstance(given, Callback):
        return given
    module, _, name = str(given).rpartition(".")
    try:
        made = getattr(import_module(module), name)()
    except Exception as error:  # a user's class may raise anything
        raise UserError(
            f"--trainer callbacks takes the name of a class, such as my_package.MyCallback; "
            f"{given!r} gives {type(error).__name__}: {first_line(error)}"
        ) from None
    if not isinstance(made, Callback):
        raise UserError(f"--trainer callbacks: {given} is no Callback of Lightning")
    return made


def run(
    trainer: Trainer, module: LightningModule, data: ReasoningDataModule, then: str = AGAIN
) -> dict[str, float] | None:
    """Run `trainer.test`, or `trainer.validate` if the data is the validation part.

    Args:
        trainer: as `Devices.trainer` makes it.
        module: scores the examples.
        data: the dataset.
        then: what to do after a run that did not end, for its error.

    Returns:
        What the module logged.

    Raises:
        Incomplete: a worker died.
        UserError: the model or dataset refused something, in any process.
    """
    stage = trainer.validate if data.split == "val" else trainer.test
    several = trainer.world_size > 1
    with _quiet():
        try:
            logged = stage(module, datamodule=data, verbose=False)
            trainer.strategy.barrier()  # every process has kept its predictions by then
        except ProcessRaisedException as error:
            last = str(error).strip().splitlines()[-1]
            name, _, message = last.partition(": ")
            if name.endswith("UserError"):
                raise UserError(message) from None
            raise Incomplete(f"worker {error.error_index} failed: {last}; {then}") from None
        except SystemExit:  # what the Trainer makes of Ctrl-C
            raise KeyboardInterrupt from None
        except ProcessExitedException as error:
            how = error.signal_name or f"exit code {error.exit_code}"
            raise Incomplete(f"worker {error.error_index} died ({how}); {then}") from None
        except MisconfigurationException as error:  # options that do not fit this dataset
            raise UserError(f"the Trainer cannot run so: {first_line(error)}") from None
        except RuntimeError as error:  # a collective operation whose peer is gone
            if isinstance(error, Incomplete) or not several:
                raise
            raise Incomplete(f"a process failed: {first_line(error)}; {then}") from None
        finally:  # Lightning calls no teardown after an error
            data.teardown("")
    return dict(logged[0]) if logged and logged[0] else None  # `barebones` logs nothing


def score_model(
    loader: Loader,
    data: ReasoningDataModule,
    folder: Path,
    *,
    devices: Devices,
    options: Mapping[str, Any],
    logger: Any,
    progress: Progress,
    prefix: str = "",
    kept: bool = True,
    **settings: Any,
) -> Scored:
    """Score a model with the Trainer; includes what an interrupted run kept in `folder`.

    Args:
        loader: loads the model and its tokenizer.
        data: the dataset.
        folder: of the journal.
        devices: where to run.
        options: further ones of the Trainer.
        logger: one of Lightning's, or None.
        progress: called after each batch if there is one process; several show the Trainer's bar.
        prefix: of the names of logged metrics.
        kept: whether the folder stays, so that another run can go on from it.
        settings: further ones of `ReasoningModule`.

    Raises:
        Incomplete: not all examples were scored.
    """
    known, then = PredictionJournal(folder).predictions(), AGAIN if kept else ANEW
    metrics = None
    if any(e.index not in known for e in data.examples):
        gc.collect()  # free the previous model: Trainers and models form reference cycles
        tokenizer = data.tokenizer or loader.tokenizer()
        module = ReasoningModule(loader, tokenizer, prefix=prefix, **settings)
        callbacks: list[Callback] = [PredictionJournal(folder)]
        if not devices.several:
            callbacks.append(ProgressReport(progress, f"scoring {loader.folder.name}"))
        trainer = devices.trainer(options, logger=logger or False, callbacks=callbacks)
        metrics = run(trainer, module, data, then)
        known = PredictionJournal(folder).predictions()
    missing = [e.index for e in data.examples if e.index not in known]
    if missing:
        left_out = [f"--trainer {name}" for name in LIMITS if name in options]
        why = f" ({' and '.join(left_out)}: to score fewer, give --limit N)" if left_out else ""
        raise Incomplete(
            f"{len(missing)} of {len(data.examples)} examples were not scored, the first of them "
            f"number {missing[0]}{why}; {then}"
        )
    predictions = [known[e.index] for e in data.examples]
    if metrics is None:  # the earlier run was interrupted after its last batch
        return Scored(predictions, metrics_of(predictions))
    return Scored(predictions, {k.removeprefix(prefix): v for k, v in metrics.items()})


def is_first() -> bool:
    """Whether this process, of those that torchrun, SLURM or ddp started, writes the results."""
    return getattr(rank_zero_only, "rank", 0) == 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's advice about loggers and data-loading workers.

    A profiler's findings are still logged, since they were asked for.
    """
    profilers = logging.getLogger("lightning.pytorch.profilers")
    level = profilers.level
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    with silenced(*names), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        profilers.setLevel(logging.INFO)
        try:
            yield
        finally:
            profilers.setLevel(level)
