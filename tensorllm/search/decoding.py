"""Greedy decoding under several edits at once; unedited layers read each new text only once.

Trials mostly generate the same answers as the original and as each other. What unedited layers
compute for a token depends only on the tokens before it. So it is cached under these
(`TokenCache`), and one pass through the unedited layers serves all rows with the same text,
whatever their edit. The layers from the lowest edited one up then run on all rows; lanes with the
same lowest edited layer run together.

Shapes: B rows, U rows that unedited layers read, C kept columns, D model width.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from tensorllm.evaluation.forward import ORDINARY, Padded, Path, selected
from tensorllm.search.activation_cache import LayerInput
from tensorllm.search.lanes import LaneWeights
from tensorllm.search.prefix import ForwardPass, Prefix

Run = Callable[..., tuple[Tensor, Any]]


@dataclass(slots=True)
class RowGroup:
    """Rows of neighbouring lanes whose lowest edited layer is the same.

    Attributes:
        lowest: the lowest edited layer. `cache` holds only placeholders for the layers below it.
        lanes: the lane of each row.
        cache: the rows' key-value cache.
    """

    lowest: int
    lanes: list[int]
    cache: Any


@dataclass(slots=True)
class Decoding:
    """The state of rows that are decoded under several edits, ordered by lane.

    Attributes:
        groups: of the rows, in order.
        below: the unedited layers' key-value cache entries of the prompts.
        origin_B: for each row, its prompt's row in `below`.
        columns: for each column decoded since, every row's position in the `TokenCache`.
    """

    groups: list[RowGroup]
    below: Sequence[Any]
    origin_B: Tensor
    columns: list[Tensor]

    def parts(self) -> Iterator[tuple[RowGroup, slice]]:
        """Each group with the slice of rows it covers."""
        at = 0
        for group in self.groups:
            yield group, slice(at, at + len(group.lanes))
            at += len(group.lanes)

    def select(self, rows: Tensor) -> "Decoding":
        """Keep these rows, in their order."""
        groups = []
        for group, part in self.parts():
            own = rows[(rows >= part.start) & (rows < part.stop)] - part.start
            if len(own):
                lanes = [group.lanes[at] for at in own.tolist()]
                groups.append(
                    RowGroup(group.lowest, lanes, _selected(group.cache, own, group.lowest))
                )
        columns = [places_B[rows] for places_B in self.columns]
        return Decoding(groups, self.below, self.origin_B[rows], columns)


class Decoder:
    """Decodes one more token of every row.

    Args:
        prefix: the edits, and the cached activations.
        weights: the weights of the lanes.
    """

    def __init__(self, prefix: Prefix, weights: LaneWeights) -> None:
        self.prefix = prefix
        self.weights = weights

    def begin(self, caches: Sequence[Any], lanes: Sequence[int]) -> Decoding:
        """Merge the caches of a batch's prompts, one per lane, into one decoding state."""
        rows = len(caches[0].layers[0].keys)
        groups = []
        for lowest, of_group in groupby(zip(lanes, caches, strict=True), lambda z: self._from(*z)):
            own_lanes, own = zip(*of_group, strict=True)
            cache = copy.copy(own[0])
            cache.layers = [
                _placeholder(entries[0], 0, rows * len(own)) if at < lowest else _joined(entries)
                for at, entries in enumerate(zip(*(one.layers for one in own), strict=True))
            ]
            groups.append(
                RowGroup(lowest, [lane for lane in own_lanes for _ in range(rows)], cache)
            )
        deepest, cache = max(
            ((self._from(lane, cache), cache) for lane, cache in zip(lanes, caches, strict=True)),
            key=lambda pair: pair[0],
        )
        origin_B = torch.arange(rows, device=self.prefix.device).repeat(len(lanes))
        return Decoding(groups, cache.layers[:deepest], origin_B, [])

    def _from(self, lane: int, cache: Any) -> int:
        """The lowest layer that must be run separately for this lane; 0: nothing can be shared."""
        if not self.prefix.active_at(lane) or len(cache.layers) != len(self.prefix.layers):
            return 0
        lowest = self.prefix.lowest_at(lane)
        at = max((layer for layer in self.prefix.candidates if layer <= lowest), default=0)
        ordinary = (type(e) in ORDINARY and e.is_initialized for e in cache.layers[:at])
        return at if all(ordinary) else 0

    def __call__(
        self,
        batch: Padded,
        rows: Decoding,
        paths: Sequence[Path | None],
        run: Run,
        *,
        keep: Sequence[int],
        mask_BS: Tensor,
        best: bool = False,
    ) -> tuple[Tensor, Decoding]:
        """Return the logits or most probable tokens of every row, and the extended cache.

        Args:
            paths, keep, mask_BS, best: as in `ModelForward`.
            run: runs the model, as `ModelForward` does.
        """
        rows, entered = self._below(batch, rows, paths, mask_BS, run)
        found, groups = [], []
        for group, part in rows.parts():
            new = Padded(*(t[part] for t in batch))
            kept = LayerInput(entered[group.lowest][part], self.prefix.tokens.in_tuple)
            call = ForwardPass(group.lowest, kept if group.lowest else None, {})
            how = {"keep": keep[part], "mask_BS": mask_BS[part], "best": best}
            forward = partial(run, new, cache=group.cache, grow=True, **how)
            with self.weights.rows(_counted(group.lanes)):
                of_group, cache = self.prefix.run_pass(call, forward)
            cache.layers[: group.lowest] = [
                _placeholder(entry, new.ids_BT.shape[1]) for entry in cache.layers[: group.lowest]
            ]
            found.append(of_group)
            groups.append(replace(group, cache=cache))
        return torch.cat(found), replace(rows, groups=groups)

    def _below(
        self, batch: Padded, rows: Decoding, paths: Sequence[Path | None], mask_BS: Tensor, run: Run
    ) -> tuple[Decoding, dict[int, Tensor]]:
        """The updated rows, and the hidden states that enter the groups' lowest layers."""
        depth = len(rows.below)
        wanted = {group.lowest for group in rows.groups} - {0}
        nothing = {0: batch.ids_BT}
        if not wanted:
            return rows, nothing
        known = self.prefix.tokens
        places = self._places(batch, rows, paths, mask_BS, run)
        if places is not None:
            places_B = torch.tensor(places, device=self.prefix.device)
            entered = {layer: known.hidden(layer, places_B) for layer in wanted}
            return replace(rows, columns=[*rows.columns, places_B]), nothing | entered
        everyone = torch.arange(len(batch.ids_BT), device=self.prefix.device)
        recorded, cache = self._read(batch, rows, everyone, mask_BS, {depth, *wanted}, run)
        rows = replace(rows, below=cache.layers[:depth], origin_B=everyone, columns=[])
        return rows, nothing | recorded

    def _places(
        self, batch: Padded, rows: Decoding, paths: Sequence[Path | None], mask_BS: Tensor, run: Run
    ) -> list[int] | None:
        """Each row's position in the token cache, after reading the tokens it lacked.

        None if not all of them can be kept.
        """
        if batch.ids_BT.shape[1] != 1:
            return None
        depth, known = max(group.lowest for group in rows.groups), self.prefix.tokens
        needed = [group.lowest for group in rows.groups for _ in group.lanes]

        def found() -> list[int | None]:
            """Positions of the rows' tokens; rows without a path are ignored later and get 0."""
            both = zip(paths, needed, strict=True)
            return [0 if path is None else known.index_of(path, layer) for path, layer in both]

        places = found()
        new = {
            path: row
            for row, (path, place) in enumerate(zip(paths, places, strict=True))
            if path is not None and place is None
        }
        if new and not known.full:
            read_U = torch.tensor(list(new.values()), device=self.prefix.device)
            layers = {layer for layer in self.prefix.candidates if layer <= depth}
            recorded, cache = self._read(batch, rows, read_U, mask_BS, layers, run)
            known.add(list(new), depth, recorded, cache.layers[:depth])
            places = found()
        there = [place for place in places if place is not None]
        return there if len(there) == len(places) else None

    def _read(
        self,
        batch: Padded,
        rows: Decoding,
        read_U: Tensor,
        mask_BS: Tensor,
        layers: set[int],
        run: Run,
    ) -> tuple[dict[int, Tensor], Any]:
        """Run unedited layers only; returns the inputs of `layers`, and the extended cache."""
        depth = max(layers)
        cache = copy.copy(rows.groups[0].cache)
        origin_U = rows.origin_B[read_U]
        below = [selected(entry, origin_U) for entry in rows.below[:depth]]
        if rows.columns:
            places_UC = torch.stack([places_B[read_U] for places_B in rows.columns], 1)
            known = self.prefix.tokens
            below = [known.with_tokens(entry, at, places_UC) for at, entry in enumerate(below)]
        above = [_placeholder(entry, 0, len(read_U)) for entry in cache.layers[depth:]]
        cache.layers = [*below, *above]
        call = ForwardPass(0, None, dict.fromkeys(layers), stop=depth)
        new = Padded(*(t[read_U] for t in batch))
        keep = [1] + [0] * (len(read_U) - 1)  # no logits are needed, but the model must return some
        how = {"keep": keep, "mask_BS": mask_BS[read_U], "best": True}
        forward = partial(run, new, cache=cache, grow=True, **how)
        _, cache = self.prefix.run_pass(call, forward)
        self.prefix.tokens.in_tuple = call.in_tuple
        return {layer: x for layer, x in call.recorded.items() if x is not None}, cache


def _counted(lanes: Sequence[int]) -> list[tuple[int, int]]:
    return [(lane, len(list(same))) for lane, same in groupby(lanes)]


def _selected(cache: Any, rows: Tensor, lowest: int) -> Any:
    new = copy.copy(cache)
    new.layers = [_placeholder(entry, 0, len(rows)) for entry in cache.layers[:lowest]]
    new.layers += [selected(entry, rows) for entry in cache.layers[lowest:]]
    return new


def _joined(entries: Sequence[Any]) -> Any:
    """One cache entry with the rows of all of these."""
    new = copy.copy(entries[0])
    if len(entries) > 1:
        new.keys = torch.cat([entry.keys for entry in entries])
        new.values = torch.cat([entry.values for entry in entries])
    return new


def _placeholder(entry: Any, more: int, rows: int | None = None) -> Any:
    """An entry of the right length without data: of skipped layers only the length is asked."""
    new = copy.copy(entry)
    batch, heads, columns, _ = entry.keys.shape
    size = (batch if rows is None else rows, heads, columns + more)
    new.keys = entry.keys[:1, :1, :1, :1].expand(*size, entry.keys.shape[3])
    new.values = entry.values[:1, :1, :1, :1].expand(*size, entry.values.shape[3])
    if hasattr(new, "cumulative_length"):  # a sliding-window layer
        new.cumulative_length = entry.cumulative_length + more
    return new
