"""A budget in bytes for one model: what its files hold beside the matrices that are compressed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from tensorllm.checkpoint.factored import fused_with
from tensorllm.checkpoint.reader import DTYPES, Checkpoint
from tensorllm.checkpoint.writer import SHARD_BYTES
from tensorllm.compressors import Compressor
from tensorllm.compressors.budget import Budget
from tensorllm.compressors.placing import placed
from tensorllm.compressors.rounded import in_bytes
from tensorllm.compressors.wrapped import Wrapped
from tensorllm.errors import UserError
from tensorllm.io import entry_bytes
from tensorllm.models import RoleMatrices

SHARD = 48  # bytes of a weight file that are neither numbers nor names of tensors, at most


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it will be written."""

    shape: tuple[int, ...]
    itemsize: int

    def bytes(self, name: str, most: int) -> int:
        """Its numbers, and its entry in the header of a file of at most so many bytes."""
        return prod(self.shape) * self.itemsize + entry_bytes(name, self.shape, self.itemsize, most)


def stored_in(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, written in a dtype (None: as they are)."""
    _ = checkpoint.weights  # from here on it is known which are unused
    out = {}
    for name, entry in checkpoint.entries.items():
        kept = entry.dtype not in DTYPES or name in checkpoint.unused
        width = entry.bytes // max(1, entry.numel)
        out[name] = StoredTensor(entry.shape, width if kept or dtype is None else dtype.itemsize)
    return out


def with_room(
    compressor: Compressor,
    budget: Budget,
    roles: RoleMatrices,
    tensors: Mapping[str, StoredTensor],
    layers: Sequence[int] | None,
    shard_bytes: int = SHARD_BYTES,
    written: torch.dtype | None = None,
) -> tuple[Wrapped, Budget]:
    """The strategy with sizes that are ranks and bits, and the target with all else subtracted.

    Args:
        tensors: of the model, as they will be written.
        written: dtype of the matrices there, where the model runs in another.

    Raises:
        UserError: nothing is to be gained, or not even what stays as it is has room.
    """
    assert budget.target_bytes is not None, "asked only for bytes"
    most = budget.target_bytes
    matrices = {m for job in placed(compressor, roles, layers).jobs for m in job.site.matrices}
    fused = {name for matrix in matrices for name in roles.together(*matrix)}
    other = sum(t.bytes(name, most) for name, t in tensors.items() if name not in fused)
    other += sum(prod(tensors[name].shape) * tensors[name].itemsize for name in fused)
    for layer, role in matrices:  # all else that is fused with them stays
        numbers = roles.spec.geometry(layer).numel(role)
        other -= numbers * tensors[roles.name(layer, role)].itemsize
    names = (f"rest.{layer}.{role}" for layer, role in fused_with(roles, matrices))
    other += sum(entry_bytes(name, (10**6, 10**6), 2, most) for name in names)
    now = sum(t.bytes(name, most) for name, t in tensors.items())
    if most >= now:
        raise UserError(
            f"target_bytes must be less than the weight files hold now, some {now}, got {most}"
        )
    other += SHARD * (most // shard_bytes + 1)
    return in_bytes(compressor, most, written), replace(budget, other_bytes=other)
