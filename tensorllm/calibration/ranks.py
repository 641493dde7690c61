"""A fit in several processes with torch.distributed; each gets some of the sequences."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorllm.errors import Incomplete


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those of a fit.

    Sums over tokens are added up over all processes, so everything computed from them is the same
    in each.
    """

    rank: int = 0
    size: int = 1

    def rows(self, x: Tensor) -> Tensor:
        """This process's rows of a batch: every `size`-th."""
        return x[self.rank :: self.size]

    def sum(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the processes, in place.

        Raises:
            Incomplete: another process has ended; finished layers are kept.
        """
        if self.size == 1:
            return
        for t in tensors:
            try:
                torch.distributed.all_reduce(t)
            except RuntimeError as error:
                raise Incomplete(
                    f"process {self.rank} of {self.size} ends, as another one has ended; the same "
                    "command goes on from the layers that are finished"
                ) from error


ALONE = Ranks()


def all_ranks() -> Ranks:
    """The processes of torch.distributed; only this one if it is not initialised."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ALONE
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())


@contextmanager
def joined() -> Iterator[Ranks]:
    """Within the block, the processes that `torchrun` started; otherwise only this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    torch.distributed.init_process_group()  # gloo on a CPU, NCCL on a GPU
    try:
        yield all_ranks()
    finally:
        torch.distributed.destroy_process_group()
