"""One dataset as trials are asked it: examples in random order, in stages of batches."""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from tensorllm.data.example import Example
from tensorllm.evaluation.causal import CausalBatch
from tensorllm.evaluation.predictions import Prediction
from tensorllm.evaluation.protocol import Protocol
from tensorllm.evaluation.scorer import CausalModelScorer, Scorer

# A losing trial may be pruned after each of these shares of the validation set. More stages
# would make batches small, which costs more than it saves.
STAGES = (1 / 8, 1 / 4, 1 / 2, 1)
LEAST = 32  # examples in a stage


class DatasetExamples(NamedTuple):
    """A dataset's examples, and the most tokens of a generated answer."""

    examples: Sequence[Example]
    max_new_tokens: int


class StagedExamples:
    """The examples of one dataset, shuffled and batched in stages.

    Args:
        examples: in the order of the dataset.
        scorer: scores them.
        max_new_tokens: the most tokens of a generated answer.
        protocol: decides how many neighbouring examples must stay together.
        keys: numbers for the batches, under which activations are kept: unique in a search.
        seed: of the order of examination.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        scorer: Scorer,
        max_new_tokens: int,
        protocol: Protocol,
        keys: Iterator[int],
        seed: int,
    ) -> None:
        self.scorer = scorer
        self.max_new_tokens = max_new_tokens
        self.order, sizes = shuffled(examples, seed, max(1, protocol.unmasked_padding))
        self.sequential = protocol.unmasked_padding <= 1  # groups are not a sample of examples
        self._place = {example.index: n for n, example in enumerate(self.order)}
        self.stages: list[list[Any]] = []
        start = 0
        for size in sizes:
            planned = scorer.plan(self.order[start : start + size])
            self.stages.append([_numbered(batch, keys) for batch in planned])
            start += size

    def in_order(self, rows: Sequence[Prediction]) -> list[Prediction]:
        """Sort rows into the order of examination."""
        return sorted(rows, key=lambda row: self._place[row.index])


Lanes = list[list[Prediction]]  # rows by lane; empty for lanes that have ended


class PerDatasetScorer:
    """Scores a batch with its dataset's scorer, for all edits that have not been pruned.

    Args:
        lanes: the edits' numbers; the caller removes pruned ones while scoring goes on.
    """

    def __init__(self, lanes: Mapping[int, Any]) -> None:
        self.lanes = lanes
        self.count = len(lanes)

    def score(self, batch: tuple[StagedExamples, Any]) -> Lanes:
        part, own = batch
        if self.count == 1:
            return [part.scorer.score(own)]
        assert isinstance(part.scorer, CausalModelScorer), "others run one at a time"
        lanes = sorted(self.lanes)
        found = part.scorer.side_by_side(own, lanes) if lanes else {}
        return [found.get(lane, []) for lane in range(self.count)]


def _numbered(batch: Any, keys: Iterator[int]) -> Any:
    key = next(keys)
    return batch._replace(key=key) if isinstance(batch, CausalBatch) else batch


def shuffled(
    examples: Sequence[Example], seed: int, together: int
) -> tuple[list[Example], list[int]]:
    """Shuffle the examples in groups of `together` neighbours; also returns the stages' sizes."""
    groups = [list(g) for _, g in groupby(examples, key=lambda e: e.index // together)]
    random.Random(seed).shuffle(groups)
    ends = [share * len(examples) for share in STAGES]
    sizes, done = [0], 0
    for group in groups:
        if sizes[-1] >= LEAST and done >= next(end for end in ends if end >= done - sizes[-1] + 1):
            sizes.append(0)
        sizes[-1] += len(group)
        done += len(group)
    return [example for group in groups for example in group], sizes
