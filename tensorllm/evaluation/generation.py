"""Greedy answers that begin where the teacher-forced pass has already proved them.

The pass over prompt and gold answer shows the most probable token after each of their tokens. As
long as those are the gold tokens, greedy decoding would have said them too; the first other one is
known as well. Only from there, and only while the verdict is open, is anything generated.

Shapes: B examples, T tokens, N positions with logits, S cached columns, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tensorllm.evaluation.encoding import Encoded, common_prefix
from tensorllm.evaluation.forward import Forward, Padded, left_padded
from tensorllm.evaluation.matching import holds_answer, surely_holds_answer, token_bound, token_f1
from tensorllm.evaluation.protocol import Protocol

# Steps between looks at the text: decoding it costs as much as a step of a small model.
CHECK_EVERY = 4
# Finished rows are carried along while they are few: to leave them out, the cache must be copied.
CROWD = 0.5


class Generated(NamedTuple):
    """A generated answer and its verdict."""

    text: str
    correct: bool
    token_f1: float


@dataclass(slots=True)
class _Generation:
    """One generation under way."""

    item: Encoded
    read: int  # tokens in the cache that belong to this generation
    pending: list[int]  # tokens still to be read before the next one is known
    new: list[int] = field(default_factory=list)
    takes: int = 0  # tokens that the answer takes at least

    def add(self, token: int) -> None:
        """All pending tokens were read, and this one follows."""
        self.read += len(self.pending)
        self.pending = [token]
        self.new.append(token)


class Greedy:
    """Continues a batch from its teacher-forced pass until every verdict is known."""

    def __init__(
        self,
        forward: Forward,
        tokenizer: PreTrainedTokenizerBase,
        protocol: Protocol,
        max_new_tokens: int,
        eos: frozenset[int],
        stop_early: bool,
    ) -> None:
        self.forward = forward
        self.tokenizer = tokenizer
        self.protocol = protocol
        self.max_new_tokens = max_new_tokens
        self.eos = eos
        self.stop_early = stop_early
        bounded = stop_early and max_new_tokens > 0 and not protocol.substring
        self.bound = token_bound(tokenizer) if bounded else None

    def __call__(
        self, items: Sequence[Encoded], logits_BNV: Tensor, padded: Padded, cache: Any
    ) -> list[Generated]:
        """Verdicts of a batch.

        Args:
            items: the batch's examples.
            logits_BNV: of the last columns of `padded`.
            padded: each item's gold sequence, as it was read.
            cache: what reading it left.
        """
        rows = self._proved(items, logits_BNV)
        if self.bound is not None:
            for row in rows:
                row.takes = self.bound.missing("", row.item.example.answer)
        self._continue(rows, padded, cache)
        return [self._verdict(row) for row in rows]

    def _proved(self, items: Sequence[Encoded], logits_BNV: Tensor) -> list[_Generation]:
        best_BN = self._best(logits_BNV, [len(e.full[0]) - len(e.prompt) for e in items]).tolist()
        rows = []
        for e, best in zip(items, best_BN, strict=True):
            if not e.continues:
                same = min(common_prefix((e.prompt, e.full[0])), len(e.prompt) - 1)
                rows.append(_Generation(e, same, e.prompt[same:]))
                continue
            gold = e.full[0][len(e.prompt) :]
            predicted = best[len(best) - len(gold) - 1 :]
            same = common_prefix((gold, predicted))
            new = self._ended(predicted[: same + 1])[: self.max_new_tokens]
            rows.append(_Generation(e, len(e.prompt) + len(new) - 1, new[-1:], new))
        return rows

    def _best(self, logits_BNV: Tensor, answers: list[int]) -> Tensor:
        """The most probable tokens (B, N); a generation does not begin with its end."""
        best_BN = logits_BNV.argmax(-1)
        if not self.eos:
            return best_BN
        ends = torch.tensor(sorted(self.eos), device=best_BN.device)
        first = [best_BN.shape[1] - answer - 1 for answer in answers]
        for row, column in enumerate(first):
            if 0 <= column < best_BN.shape[1] and int(best_BN[row, column]) in self.eos:
                logits_V = logits_BNV[row, column].clone()
                logits_V[ends] = float("-inf")
                best_BN[row, column] = logits_V.argmax()
        return best_BN

    def _ended(self, tokens: list[int]) -> list[int]:
        """Tokens up to and including the first end."""
        for place, token in enumerate(tokens):
            if token in self.eos:
                return tokens[: place + 1]
        return tokens

    def _continue(self, rows: list[_Generation], padded: Padded, cache: Any) -> None:
        device = padded.ids_BT.device
        width = padded.ids_BT.shape[1]
        mask_BS = padded.mask_BT
        # Columns of the gold answer that greedy decoding did not say are hidden from what follows.
        seen = torch.tensor([r.read + width - len(r.item.full[0]) for r in rows], device=device)
        mask_BS = mask_BS & (torch.arange(width, device=device)[None] < seen[:, None])
        live = list(range(len(rows)))  # of `rows`, in the order of the cache's rows
        going = set(live)
        for step in count():
            going = self._unfinished(rows, going, look=step % CHECK_EVERY == 0)
            if not going:
                return
            if len(going) <= CROWD * len(live):
                keep = torch.tensor([at for at, i in enumerate(live) if i in going], device=device)
                cache, mask_BS = self.forward.select(cache, keep), mask_BS[keep]
                live = [i for i in live if i in going]
            active = [rows[i] for i in live]
            new = left_padded([r.pending for r in active], device, [r.read for r in active])
            mask_BS = torch.cat([mask_BS, new.mask_BT], 1)
            logits_BNV, cache = self.forward(new, keep=1, mask_BS=mask_BS, cache=cache, grow=True)
            answers = [0 if not r.new else -1 for r in active]
            best = self._best(logits_BNV, answers)[:, -1].tolist()
            for i, token in zip(live, best, strict=True):
                if i in going:
                    rows[i].add(token)

    def _unfinished(self, rows: list[_Generation], candidates: set[int], *, look: bool) -> set[int]:
        going, due = set(), []
        for i in candidates:
            new = rows[i].new
            if not new or (len(new) < self.max_new_tokens and new[-1] not in self.eos):
                going.add(i)
                short = self.max_new_tokens - len(new) < rows[i].takes
                if self.stop_early and (look or short) and len(new) >= self._window(rows[i]):
                    due.append(i)
        texts = self._texts([rows[i] for i in due])
        certain = {i for i, text in zip(due, texts, strict=True) if self._certain(rows[i], text)}
        return going - certain

    def _certain(self, row: _Generation, text: str) -> bool:
        answer = row.item.example.answer
        if surely_holds_answer(text, answer, self.protocol):
            return True
        left = self.max_new_tokens - len(row.new)
        return self.bound is not None and self.bound.missing(text, answer) > left

    def _window(self, row: _Generation) -> int:
        """As many new tokens as the answer has: what token F1 looks at."""
        return min(self.max_new_tokens, len(row.item.full[0]) - row.item.start)

    def _texts(self, rows: list[_Generation]) -> list[str]:
        """What is searched for the answer."""
        if not rows:
            return []
        before = [r.item.prompt if self.protocol.search_prompt else [] for r in rows]
        return self.tokenizer.batch_decode(
            [b + r.new for b, r in zip(before, rows, strict=True)],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )

    def _verdict(self, row: _Generation) -> Generated:
        answer = row.item.example.answer
        text = self._text(row.new)
        searched = self._texts([row])[0] if self.protocol.search_prompt else text
        window = self._text(row.new[: self._window(row)])
        return Generated(
            text, holds_answer(searched, answer, self.protocol), token_f1(window, answer)
        )

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.batch_decode(
            [tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )[0]
