"""Turn a budget in bytes into one for the compressed matrices: subtract all else in the files."""

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

SHARD = 48  # most bytes of a weight file besides tensors' numbers and header entries


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it will be written."""

    shape: tuple[int, ...]
    itemsize: int

    def bytes(self, name: str, most: int) -> int:
        """Bytes of its numbers, and of its header entry in a file of at most `most` bytes."""
        return prod(self.shape) * self.itemsize + entry_bytes(name, self.shape, self.itemsize, most)


def stored_in(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, as they will be written in a dtype (None: unchanged)."""
    _ = checkpoint.weights  # finds out which are unused
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
    """The strategy with sizes in ranks and bits, and the target with everything else subtracted.

    Args:
        compressor: with any sizes.
        budget: with a target in bytes.
        roles: of the model.
        tensors: of the model, as they will be written.
        layers: counted from 0; None: all.
        shard_bytes: size at which a weight file is ended.
        written: dtype of the written matrices, if the model runs in another.

    Raises:
        UserError: the target is no smaller than the model, or too small for what stays unchanged.
    """
    assert budget.target_bytes is not None, "asked only for bytes"
    most = budget.target_bytes
    matrices = {m for job in placed(compressor, roles, layers).jobs for m in job.site.matrices}
    fused = {name for matrix in matrices for name in roles.together(*matrix)}
    other = sum(t.bytes(name, most) for name, t in tensors.items() if name not in fused)
    other += sum(prod(tensors[name].shape) * tensors[name].itemsize for name in fused)
    for layer, role in matrices:  # what is fused with them stays
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
