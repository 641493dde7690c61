"""Run a causal model on padded batches, with a key-value cache whose rows can be selected.

Three things make it cheaper without changing what it computes: columns without logits skip the wide
matrices of the last layer (`last_layer.py`), the output embedding reads only wanted columns
(`head.py`), and activations run as one kernel (`activations.py`).

Shapes: B rows, T new tokens, S cached and new tokens, V vocabulary, N wanted columns (the last
ones, whose logits are read), M wanted columns of all rows, D model width.
"""

import copy
import inspect
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from tensorllm.evaluation.activations import fuse_activations
from tensorllm.evaluation.head import Head
from tensorllm.evaluation.last_layer import LastLayer
from tensorllm.runtime.cache import GrowingLayer

PAD = 0  # any token: it is masked out

Path = tuple[int, ...]  # all tokens of a row up to one of them


class Padded(NamedTuple):
    """Token lists as one rectangle, padded on the left."""

    ids_BT: Tensor
    mask_BT: Tensor  # bool
    positions_BT: Tensor


def left_padded(
    sequences: Sequence[Sequence[int]], device: torch.device, first: Sequence[int] | None = None
) -> Padded:
    """Pad rows on the left; positions count from 0, or from each row's entry of `first`."""
    width = max(map(len, sequences))
    ids = np.full((len(sequences), width), PAD, dtype=np.int64)
    lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
    for row, sequence in zip(ids, sequences, strict=True):
        row[width - len(sequence) :] = sequence
    places = np.arange(width)[None] - (width - lengths)[:, None]
    starts = np.zeros(len(sequences), np.int64) if first is None else np.asarray(first, np.int64)
    positions = np.maximum(places, 0) + starts[:, None]
    return Padded(*(torch.from_numpy(a).to(device) for a in (ids, places >= 0, positions)))


def last_columns(counts: Sequence[int], device: torch.device) -> Tensor:
    """A mask (B, max(counts)) of each row's last `counts` columns."""
    counts_B = torch.tensor(counts, device=device)
    most = max(counts)
    return torch.arange(most, 0, -1, device=device)[None] <= counts_B[:, None]


ORDINARY = (DynamicLayer, DynamicSlidingWindowLayer)  # keys and values, and nothing else


def selected(entry: Any, rows: Tensor) -> Any:
    """A layer's cache entry with only these rows, which may repeat."""
    new = copy.copy(entry)
    if type(entry) in (*ORDINARY, GrowingLayer):
        new.reorder_cache(rows)  # on a CPU ten times faster than indexing
    else:
        new.batch_select_indices(rows)
    return new


class ModelForward:
    """Runs a transformers model for scorers; a search derives one that reuses unchanged results.

    Args:
        model: causal.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.vocabulary = model.config.get_text_config().vocab_size
        self._accepts = set(inspect.signature(model.forward).parameters)
        self._last_layer = LastLayer(model)
        self._head = Head(model)
        fuse_activations(model, self)

    @property
    def device(self) -> torch.device:
        return self.model.device  # read anew: a Trainer moves the model

    def __call__(
        self,
        batch: Padded,
        *,
        keep: int | Sequence[int],
        best: bool = False,
        mask_BS: Tensor | None = None,
        cache: Any = None,
        rows: Tensor | None = None,
        sees_BTS: Tensor | None = None,
        grow: bool = False,
        key: Hashable = None,
        paths: Sequence[Path | None] = (),
    ) -> tuple[Tensor, Any]:
        """Logits (B, keep, V) of the last `keep` columns, and the key-value cache if `grow` is set.

        Args:
            batch: the new tokens.
            keep: how many of its last columns need logits. If given per row, the logits are (M, V),
                row after row.
            best: return the most probable tokens (M) instead of logits.
            mask_BS: which cached and new columns may be seen; None: the batch's own mask.
            cache: what an earlier call returned; it may be changed in place.
            rows: the cache's rows that the batch's rows continue, which may repeat; the cache is
                then left as it is. None: all, in order.
            sees_BTS: which columns each new token sees, if not all before it; only for models that
                obey such a mask (`obeys_masks`).
            grow: return a cache that holds these tokens too.
            key: identifies the batch's tokens, so that results of unedited layers can be kept for a
                later call with the same key; None: keep nothing.
            paths: if each row has one new token, all its tokens up to this one: identifies
                generated tokens as `key` does batches. None: the row's output is not used.
        """
        del key, paths  # nothing is kept here
        columns = keep if isinstance(keep, int) else max(keep)
        wanted_BN = None if isinstance(keep, int) else last_columns(keep, self.device)
        extra: dict[str, Any] = {"logits_to_keep": columns, "position_ids": batch.positions_BT}
        with self._last_layer.keeping(columns), self._head.picking(wanted_BN, best=best):
            output = self.model(
                input_ids=batch.ids_BT,
                attention_mask=self._mask(batch, mask_BS, cache, sees_BTS),
                past_key_values=cache if rows is None else self.select(cache, rows),
                use_cache=grow or cache is not None,
                **{name: value for name, value in extra.items() if name in self._accepts},
            )
            read = self._head.best if best else self._head.logits
            found = output.logits[:, -columns:]
            found = found if wanted_BN is None else read(output.logits, wanted_BN)
        return found, output.past_key_values if grow else None

    def _mask(
        self, batch: Padded, mask_BS: Tensor | None, cache: Any, sees_BTS: Tensor | None
    ) -> Tensor | None:
        if sees_BTS is not None:
            hidden = torch.finfo(self.model.dtype).min
            return torch.zeros_like(sees_BTS, dtype=self.model.dtype).masked_fill_(
                ~sees_BTS, hidden
            )[:, None]
        seen = batch.mask_BT if mask_BS is None else mask_BS
        # Without padding no mask is needed, and attention takes its fast causal path.
        return None if cache is None and bool(seen.all()) else seen.long()

    def lane(self, number: int) -> AbstractContextManager[None]:
        """Within the block, the model is edited as lane `number` says."""
        return nullcontext()

    def merged(self, caches: Sequence[Any], lanes: Sequence[int]) -> Any:
        """One cache with the rows of all these, each read in its lane."""
        (cache,) = caches  # there is only one model
        return cache

    def may_hide(self, columns: int) -> bool:
        """Whether up to `columns` columns may be masked without any other effect."""
        # A sliding window counts masked columns, too.
        window = getattr(self.model.config.get_text_config(), "sliding_window", None)
        return window is None or columns <= window

    def obeys_masks(self, columns: int) -> bool:
        """Whether `sees_BTS` is obeyed in rows of so many columns."""
        return self._masks_work and self.may_hide(columns)

    @cached_property
    def _masks_work(self) -> bool:
        """Test on four tokens: the last must not see the third, whose position it takes.

        Some kinds of attention accept no such mask, or derive positions from what is masked.
        """
        if "position_ids" not in self._accepts:
            return False
        a, b, other, last = torch.arange(3, 7, device=self.device).remainder(self.vocabulary)
        short = left_padded([[a, b, last]], self.device)
        row = left_padded([[a, b, other, last]], self.device)
        sees_1TT = torch.ones(1, 4, 4, dtype=torch.bool, device=self.device).tril()
        sees_1TT[0, 3, 2] = False
        places = torch.tensor([[0, 1, 2, 2]], device=self.device)
        with torch.inference_mode():
            want, plain = (ModelForward.__call__(self, rows, keep=1)[0] for rows in (short, row))
            try:
                got, _ = ModelForward.__call__(
                    self, row._replace(positions_BT=places), keep=1, sees_BTS=sees_1TT
                )
            except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
                return False  # whichever way the model rejected the mask
        return bool(10 * (got - want).norm() < (plain - want).norm())

    def select(self, cache: Any, rows: Tensor) -> Any:
        """A new cache with only these rows, which may repeat."""
        narrowed = copy.copy(cache)
        narrowed.layers = [selected(entry, rows) for entry in cache.layers]
        return narrowed
