"""A fit in several processes, by torch.distributed: each has some of the sequences."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorllm.errors import Incomplete


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that fit together.

    Sums over tokens are added up over all of them; what follows from sums is then the same in each.
    """

    rank: int = 0
    size: int = 1

    def rows(self, x: Tensor) -> Tensor:
        """This process's rows of a batch: every `size`-th."""
        return x[self.rank :: self.size]

    def sum(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the processes.

        Raises:
            Incomplete: another process has ended; what is finished is kept.
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
    """The processes that torch.distributed has been initialised with; this one where it was not."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ALONE
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that `torchrun` started, for as long as the context lasts; else this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    torch.distributed.init_process_group()  # gloo for a processor, NCCL for a GPU
    try:
        yield all_ranks()
    finally:
        torch.distributed.destroy_process_group()
