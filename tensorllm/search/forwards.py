"""A search's forward passes: unedited layers run once, and several edits are decoded together.

Shapes: B rows, T tokens.
"""

import copy
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from tensorllm.evaluation.forward import ModelForward, Padded, Path, selected
from tensorllm.evaluation.masked import MaskedForward
from tensorllm.search.decoding import Decoder, Decoding
from tensorllm.search.lanes import LaneWeights
from tensorllm.search.prefix import Prefix


class PrefixForward(ModelForward):
    """A causal model that skips unedited layers."""

    def __init__(self, model: PreTrainedModel, prefix: Prefix) -> None:
        super().__init__(model)
        self.prefix = prefix
        self.weights = LaneWeights(model)
        self.decoder = Decoder(prefix, self.weights)

    def __call__(
        self,
        batch: Padded,
        *,
        grow: bool = False,
        key: Hashable = None,
        cache: Any = None,
        paths: Sequence[Path | None] = (),
        **how: Any,
    ) -> tuple[Tensor, Any]:
        run = super().__call__
        if isinstance(cache, Decoding):
            return self.decoder(batch, cache, paths, run, **how)
        forward = partial(run, batch, grow=grow, cache=cache, **how)
        return self.prefix.run(key, forward, grow=grow)

    @contextmanager
    def lane(self, number: int) -> Iterator[None]:
        with self.prefix.at(number), self.weights.rows([(number, None)]):
            yield

    def merged(self, caches: Sequence[Any], lanes: Sequence[int]) -> Any:
        return self.decoder.begin(caches, lanes)

    def select(self, cache: Any, rows: Tensor) -> Any:
        """Keep these rows; of layers that are skipped only the length is asked, so they stay."""
        if isinstance(cache, Decoding):
            return cache.select(rows)
        narrowed = copy.copy(cache)
        skip = self.prefix.skip
        narrowed.layers = [copy.copy(entry) for entry in cache.layers[:skip]]
        narrowed.layers += [selected(entry, rows) for entry in cache.layers[skip:]]
        return narrowed


class PrefixMaskedForward(MaskedForward):
    """A masked model that skips unedited layers."""

    def __init__(self, model: PreTrainedModel, prefix: Prefix) -> None:
        super().__init__(model)
        self.prefix = prefix

    def __call__(self, ids_BT: Tensor, seen_BT: Tensor, key: Hashable = None) -> Tensor:
        def forward() -> tuple[Tensor, Any]:
            return super(PrefixMaskedForward, self).__call__(ids_BT, seen_BT), None

        return self.prefix.run(key, forward, grow=False)[0]
