"""Running an evaluation through Lightning's Trainer, on one device or several."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from tensorllm.data.base import ReasoningDataModule, one_per_batch
from tensorllm.errors import Incomplete, UserError
from tensorllm.lightning.reasoner import Reasoner

AGAIN = "run the same command again: it goes on from the last finished batch"


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
    def several(self) -> bool:
        alone = self.devices == "1"
        if self.devices == "auto":  # the Trainer takes all GPUs, but one process on a CPU
            alone = self.accelerator == "cpu" or torch.cuda.device_count() <= 1
        return not alone or self.num_nodes > 1

    @property
    def spawned(self) -> bool:
        """Whether the other processes are children of this one: when one dies, it can say so."""
        return self.several and self.strategy == "auto" and self.num_nodes == 1

    def trainer(self) -> Trainer:
        """Raises UserError for what the Trainer refuses."""
        strategy = "ddp_spawn" if self.spawned else self.strategy
        devices: int | str = int(self.devices) if self.devices.isdigit() else self.devices
        try:
            return Trainer(
                accelerator=self.accelerator,
                devices=devices,
                num_nodes=self.num_nodes,
                strategy=strategy,
                precision=self.precision,  # type: ignore[arg-type]
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=self.several and sys.stderr.isatty(),  # else ours
                use_distributed_sampler=False,
            )
        except (ValueError, RuntimeError, ImportError, TypeError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise UserError(
                f"cannot run on --devices {self.devices} --strategy {self.strategy} --precision "
                f"{self.precision}: {reason}"
            ) from None


def validate(devices: Devices, module: Reasoner, data: ReasoningDataModule) -> None:
    """Validate; the rows go where the module's `on_rows` puts them.

    Raises:
        Incomplete: a worker died.
        UserError: what the model or dataset refused, in whichever process.
    """
    with _quiet():
        try:
            trainer = devices.trainer()
            trainer.validate(module, data, verbose=False)
            trainer.strategy.barrier()  # where all processes go on from here: their rows are kept
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
        except RuntimeError as error:  # a collective whose other end is gone
            if isinstance(error, Incomplete) or not devices.several:
                raise
            reason = str(error).strip().splitlines()[0][:200]
            raise Incomplete(f"a process failed: {reason}; {AGAIN}") from None
        finally:  # else the model would live as long as the data
            data.trainer = None
            data.plan_with(one_per_batch)


def is_first() -> bool:
    """Whether this process tells the results: of those that torchrun, SLURM or ddp started, one."""
    return getattr(rank_zero_only, "rank", 0) == 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advice about loggers and data-loading workers."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)
