"""Lightning's Trainer for an evaluation, on one device or several, and how its failures end."""

import gc
import inspect
import logging
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
from tensorllm.evaluation.predictions import metrics_of
from tensorllm.evaluation.results import Scored
from tensorllm.lightning.callbacks import PredictionJournal, ProgressReport
from tensorllm.lightning.module import ReasoningModule
from tensorllm.progress import Progress, silenced
from tensorllm.registry import did_you_mean

AGAIN = "run the same command again: it goes on from the last finished batch"
# Options of the Trainer that have one of their own, or that an evaluation cannot change.
TAKEN = {
    **{name: f"--{name.replace('_', '-')}" for name in ("accelerator", "devices", "num_nodes")},
    **{name: f"--{name}" for name in ("strategy", "precision", "logger")},
}
FIXED = ("use_distributed_sampler",)  # the data module shares examples out, each once


@dataclass(frozen=True, kw_only=True, slots=True)
class Devices:
    """Where it runs; names and values are the Trainer's.

    Attributes:
        accelerator: cpu, gpu, auto, ...
        devices: how many, or which (`0,1`), per node; on a CPU, processes.
        num_nodes: machines; each starts the same command (torchrun or SLURM).
        strategy: auto starts this machine's processes itself.
        precision: 32-true, bf16-true, 16-mixed, ...; None: as the weights are.
    """

    accelerator: str = "auto"
    devices: str = "1"
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str | None = None

    @property
    def kind(self) -> str:
        """What it runs on: `cpu`, or a kind of accelerator."""
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
        """Whether the other processes are children of this one: when one dies, it can say so."""
        return self.several and self.strategy == "auto" and self.num_nodes == 1

    def trainer(
        self,
        options: Mapping[str, Any] | None = None,
        *,
        logger: Any = False,
        callbacks: Sequence[Callback] = (),
    ) -> Trainer:
        """The Trainer.

        Args:
            options: further arguments of Lightning's Trainer; `callbacks` may be names of classes,
                such as `my_package.MyCallback`.
            logger: of Lightning; False: none.
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
            "enable_progress_bar": self.several and sys.stderr.isatty(),  # else ours
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
        except Exception as error:  # Lightning has kinds of its own for what it refuses
            raise UserError(f"cannot run on {what}: {first_line(error)}") from None


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse what is no option of the Trainer, or is given another way."""
    known = list(inspect.signature(Trainer.__init__).parameters)[1:]
    known = [name for name in known if name not in {*TAKEN, *FIXED}]
    for name in options:
        if name in TAKEN:
            raise UserError(f"--trainer {name}: give it as {TAKEN[name]}")
        if name in FIXED:
            raise UserError(f"--trainer {name} is fixed: every example is scored once")
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
    except Exception as error:  # a class of the user's own may raise anything
        raise UserError(
            f"--trainer callbacks takes the name of a class, such as my_package.MyCallback; "
            f"{given!r} gives {type(error).__name__}: {first_line(error)}"
        ) from None
    if not isinstance(made, Callback):
        raise UserError(f"--trainer callbacks: {given} is no Callback of Lightning")
    return made


def run(
    trainer: Trainer, module: LightningModule, data: ReasoningDataModule
) -> dict[str, float] | None:
    """`trainer.test`, or `trainer.validate` where the data is the validation part.

    Returns:
        What the module logged.

    Raises:
        Incomplete: a worker died.
        UserError: what the model or dataset refused, in whichever process.
    """
    stage = trainer.validate if data.split == "val" else trainer.test
    several = trainer.world_size > 1
    with _quiet():
        try:
            logged = stage(module, datamodule=data, verbose=False)
            trainer.strategy.barrier()  # where all processes go on: their predictions are kept
        except ProcessRaisedException as error:
            last = str(error).strip().splitlines()[-1]
            name, _, message = last.partition(": ")
            if name.endswith("UserError"):
                raise UserError(message) from None
            raise Incomplete(f"worker {error.error_index} failed: {last}; {AGAIN}") from None
        except SystemExit:  # what the Trainer makes of Ctrl-C
            raise KeyboardInterrupt from None
        except ProcessExitedException as error:
            how = error.signal_name or f"exit code {error.exit_code}"
            raise Incomplete(f"worker {error.error_index} died ({how}); {AGAIN}") from None
        except MisconfigurationException as error:  # options that do not fit this dataset
            raise UserError(f"the Trainer cannot run so: {first_line(error)}") from None
        except RuntimeError as error:  # a collective whose other end is gone
            if isinstance(error, Incomplete) or not several:
                raise
            raise Incomplete(f"a process failed: {first_line(error)}; {AGAIN}") from None
        finally:  # Lightning calls no teardown after an error
            data.teardown("")
    return dict(logged[0]) if logged else None


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
    **settings: Any,
) -> Scored:
    """Score a model by the Trainer; what an earlier, interrupted run kept in `folder` counts.

    Args:
        options: further ones of the Trainer.
        logger: of Lightning, or None.
        progress: called after each batch where there is one process; several have the Trainer's
            bar.
        prefix: of the names of logged metrics.
        settings: further ones of `ReasoningModule`.

    Raises:
        Incomplete: not all examples were scored.
    """
    kept = PredictionJournal(folder).predictions()
    metrics = None
    if any(e.index not in kept for e in data.examples):
        gc.collect()  # the model before this one: Trainers and models are cycles
        tokenizer = data.tokenizer or loader.tokenizer()
        module = ReasoningModule(loader, tokenizer, prefix=prefix, **settings)
        callbacks: list[Callback] = [PredictionJournal(folder)]
        if not devices.several:
            callbacks.append(ProgressReport(progress, f"scoring {loader.folder.name}"))
        trainer = devices.trainer(options, logger=logger or False, callbacks=callbacks)
        metrics = run(trainer, module, data)
        kept = PredictionJournal(folder).predictions()
    missing = [e.index for e in data.examples if e.index not in kept]
    if missing:
        raise Incomplete(
            f"{len(missing)} of {len(data.examples)} examples were not scored, the first of them "
            f"number {missing[0]}; run the same command again to go on"
        )
    predictions = [kept[e.index] for e in data.examples]
    if metrics is None:  # the earlier run was interrupted after its last batch
        return Scored(predictions, metrics_of(predictions))
    return Scored(predictions, {k.removeprefix(prefix): v for k, v in metrics.items()})


def is_first() -> bool:
    """Whether this process writes the results: one of those that torchrun, SLURM or ddp started."""
    return getattr(rank_zero_only, "rank", 0) == 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advice about loggers and data-loading workers, but with what a profiler
    found, which was asked for.
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
