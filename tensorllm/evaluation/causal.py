"""Score a batch with a causal model: each prompt is read only once.

Shapes: B examples, T tokens, V vocabulary, M columns with logits of all examples.
"""

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from tensorllm.evaluation.encoding import Encoded, common_prefix
from tensorllm.evaluation.forward import Padded, left_padded
from tensorllm.evaluation.generation import Generated, Greedy
from tensorllm.evaluation.predictions import Prediction, chosen_prediction
from tensorllm.evaluation.prompts import Reading, choice_scores, read


class CausalBatch(NamedTuple):
    """Examples that are scored together.

    Attributes:
        key: the batch's number in its plan; None: a part of a batch.
        items: its examples: all with choices, all without, or all running text.
    """

    key: int | None
    items: tuple[Encoded, ...]


class CausalScorer:
    """Turns batches into predictions.

    Args:
        greedy: generates answers; also holds the model, tokenizer and protocol.
    """

    def __init__(self, greedy: Greedy) -> None:
        self.greedy = greedy
        self.forward = greedy.forward
        self.tokenizer = greedy.tokenizer
        self.protocol = greedy.protocol

    def __call__(self, batch: CausalBatch) -> list[Prediction]:
        """The batch's predictions by the model as it is."""
        return self.side_by_side(batch, [0])[0]

    @torch.inference_mode()
    def side_by_side(self, batch: CausalBatch, lanes: Sequence[int]) -> dict[int, list[Prediction]]:
        """The predictions of every lane (see `ModelForward.lane`)."""
        first = batch.items[0].example
        if not first.tokens and not first.choices:
            return self._generated(batch, lanes)
        rows = {}
        for lane in lanes:
            with self.forward.lane(lane):
                rows[lane] = self._running_text(batch) if first.tokens else self._choices(batch)
        return rows

    def _answers(
        self, batch: CausalBatch, keep: Sequence[int], *, grow: bool
    ) -> tuple[Reading, list[tuple[float, int]]]:
        """Read prompts and gold answers; also return answers' log-probabilities and first ranks."""
        found = read(
            self.forward,
            [e.full[0] for e in batch.items],
            keep=keep,
            apart=min(common_prefix((e.full[0], e.prompt)) for e in batch.items),
            grow=grow,
            key=batch.key,
        )
        lengths = [len(e.full[0]) - e.start for e in batch.items]
        return found, answer_scores(found.logits, [e.full[0] for e in batch.items], keep, lengths)

    def _running_text(self, batch: CausalBatch) -> list[Prediction]:
        keep = [e.length - e.start + 1 for e in batch.items]
        _, scores = self._answers(batch, keep, grow=False)
        return [
            Prediction(
                e.example.index,
                "",
                e.example.answer,
                "",
                None,
                score,
                e.length - e.start,
                rank,
                0.0,
            )
            for e, (score, rank) in zip(batch.items, scores, strict=True)
        ]

    def _generated(self, batch: CausalBatch, lanes: Sequence[int]) -> dict[int, list[Prediction]]:
        keep = [e.length - min(e.start, len(e.prompt)) + 1 for e in batch.items]
        sequences = [e.full[0] for e in batch.items]
        columns = max(map(len, sequences)) + self.greedy.max_new_tokens
        together = self.forward.may_hide(columns)
        readings, scores = {}, {}
        for lane in lanes:
            with self.forward.lane(lane):
                readings[lane], scores[lane] = self._answers(batch, keep, grow=together)
                if self.protocol.unmasked_padding:
                    scores[lane] = self._unmasked(batch, scores[lane])
                if not together:
                    readings[lane] = self._prompts(batch)
        if not together:
            sequences, keep = [e.prompt for e in batch.items], [1] * len(batch.items)
        generated = self.greedy(batch.items, sequences, keep, readings)
        return {lane: self._rows(batch, scores[lane], generated[lane]) for lane in lanes}

    def _prompts(self, batch: CausalBatch) -> Reading:
        """Read the prompts without their answers."""
        sequences = [e.prompt for e in batch.items]
        key = None if batch.key is None else (batch.key, "prompts")
        apart = min(map(len, sequences)) - 1
        keep = [1] * len(sequences)
        return read(self.forward, sequences, keep=keep, apart=apart, grow=True, key=key)

    def _rows(
        self, batch: CausalBatch, scores: list[tuple[float, int]], generated: list[Generated]
    ) -> list[Prediction]:
        return [
            Prediction(
                index=e.example.index,
                prompt=e.example.prompt,
                answer=e.example.answer,
                generation=new.text,
                correct=new.correct,
                log_probability=score,
                answer_tokens=len(e.full[0]) - e.start,
                rank=rank,
                token_f1=new.token_f1,
                truncated=e.truncated,
            )
            for e, (score, rank), new in zip(batch.items, scores, generated, strict=True)
        ]

    def _unmasked(
        self, batch: CausalBatch, scores: list[tuple[float, int]]
    ) -> list[tuple[float, int]]:
        """The papers' batched loss: pads are read as tokens, and positions count from the first."""
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        found = []
        size = self.protocol.unmasked_padding
        groups = groupby(enumerate(batch.items), key=lambda item: item[1].example.index // size)
        for _, group in groups:
            rows, items = zip(*group, strict=True)
            padded = left_padded([e.full[0] for e in items], self.forward.device)
            ids_BT = padded.ids_BT.where(padded.mask_BT, torch.as_tensor(pad or 0))
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
            blind = Padded(ids_BT, torch.ones_like(padded.mask_BT), positions_BT)
            lengths = [len(e.full[0]) - e.start for e in items]
            keep = [length + 1 for length in lengths]
            logits_MV, _ = self.forward(blind, keep=keep)
            losses = answer_scores(logits_MV, [e.full[0] for e in items], keep, lengths)
            found += [(loss, scores[row][1]) for row, (loss, _) in zip(rows, losses, strict=True)]
        return found

    def _choices(self, batch: CausalBatch) -> list[Prediction]:
        totals = choice_scores(self.forward, batch.items, batch.key)
        rows = []
        for e, (sums, rank) in zip(batch.items, totals, strict=True):
            gold = e.full[e.example.choices.index(e.example.answer)]
            tokens = len(gold) - e.start
            rows.append(
                chosen_prediction(
                    e.example, sums, answer_tokens=tokens, rank=rank, truncated=e.truncated
                )
            )
        return rows


def answer_scores(
    logits_MV: Tensor, sequences: Sequence[Sequence[int]], keep: Sequence[int], lengths: list[int]
) -> list[tuple[float, int]]:
    """Each row's log-probability of its last `lengths` tokens, and the rank of the first of them.

    Args:
        logits_MV: logits of the last columns of each row, `keep` of them.
        sequences: tokens of each row.
        keep: at least one more than `lengths`.
        lengths: tokens of each row's answer.
    """
    device = logits_MV.device
    # Nothing follows a row's last column, so any token stands in for the next one.
    following = [[*ids[len(ids) - n + 1 :], 0] for ids, n in zip(sequences, keep, strict=True)]
    next_M = torch.tensor([token for of_row in following for token in of_row], device=device)
    values_MV = logits_MV.float()
    picked_M = values_MV.gather(1, next_M[:, None])[:, 0]
    gains = (picked_M - values_MV.logsumexp(-1)).double().tolist()
    ends = list(accumulate(keep))
    first_B = torch.tensor([e - 1 - n for e, n in zip(ends, lengths, strict=True)], device=device)
    ranks = (values_MV[first_B] > picked_M[first_B, None]).sum(-1) + 1
    sums = [sum(gains[e - 1 - n : e - 1]) for e, n in zip(ends, lengths, strict=True)]
    return list(zip(sums, ranks.tolist(), strict=True))
