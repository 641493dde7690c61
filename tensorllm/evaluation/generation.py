"""Greedy decoding that starts where the teacher-forced pass stops proving the answer.

The pass over prompt and gold answer shows the most probable token after each of their tokens. As
long as those are the gold tokens, greedy decoding would choose them too; the first different token
is known as well. Only from there, and only while the verdict is open, are tokens generated; all
models that a search runs side by side share the same steps.

Shapes: B examples, T tokens, M positions with logits of all examples, S cached columns, V
vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count, cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tensorllm.evaluation.encoding import Encoded, common_prefix
from tensorllm.evaluation.forward import ModelForward, Path, left_padded
from tensorllm.evaluation.matching import holds_answer, surely_holds_answer, token_bound, token_f1
from tensorllm.evaluation.prompts import Reading
from tensorllm.evaluation.protocol import Protocol

# Steps between checks of the text: decoding it costs as much as a step of a small model.
CHECK_EVERY = 4
# A few finished rows are carried along, as leaving them out means copying the cache.
COMPACT_BELOW = 0.85


class Generated(NamedTuple):
    """A generated answer and its verdict."""

    text: str
    correct: bool
    token_f1: float


@dataclass(slots=True)
class _Generation:
    """A generation in progress."""

    item: Encoded
    read: int  # tokens in the cache that belong to this generation
    pending: list[int]  # tokens still to be read before the next one is known
    new: list[int] = field(default_factory=list)
    takes: int = 0  # fewest tokens that the answer takes

    @property
    def path(self) -> Path:
        """All tokens up to the last one to be read."""
        return (*self.item.prompt, *self.new)

    def add(self, token: int) -> None:
        """Add the token that follows the pending ones, which have been read."""
        self.read += len(self.pending)
        self.pending = [token]
        self.new.append(token)


class Greedy:
    """Continues a batch from its teacher-forced pass until every verdict is known.

    Args:
        forward: the model.
        tokenizer: its tokenizer.
        protocol: decides which answers are right.
        max_new_tokens: the most tokens of a generated answer.
        eos: tokens that end a generation.
        stop_early: stop a generation when its verdict is certain.
        compact_below: drop finished rows from the cache once at most this share of its rows is
            still being generated.
    """

    def __init__(
        self,
        forward: ModelForward,
        tokenizer: PreTrainedTokenizerBase,
        protocol: Protocol,
        *,
        max_new_tokens: int,
        eos: frozenset[int] = frozenset(),
        stop_early: bool = True,
        compact_below: float = COMPACT_BELOW,
    ) -> None:
        self.forward = forward
        self.tokenizer = tokenizer
        self.protocol = protocol
        self.max_new_tokens = max_new_tokens
        self.eos = eos
        self.stop_early = stop_early
        self.compact_below = compact_below
        bounded = stop_early and max_new_tokens > 0 and not protocol.substring
        self.bound = token_bound(tokenizer) if bounded else None

    def __call__(
        self,
        items: Sequence[Encoded],
        sequences: Sequence[Sequence[int]],
        keep: Sequence[int],
        readings: Mapping[int, Reading],
    ) -> dict[int, list[Generated]]:
        """The verdicts of a batch in every lane.

        Args:
            items: the batch's examples.
            sequences: what was read of each: its prompt and gold answer, or its prompt alone.
            keep: how many of its last columns have logits.
            readings: the results of reading them, by lane.
        """
        proved = [self._proved(items, sequences, keep, r.logits) for r in readings.values()]
        rows = [row for of_lane in proved for row in of_lane]
        if self.bound is not None:
            for row in rows:
                row.takes = self.bound.missing("", row.item.example.answer)
        cache = self.forward.merged([r.cache for r in readings.values()], list(readings))
        mask_BT = next(iter(readings.values())).padded.mask_BT
        self._continue(rows, [len(ids) for ids in sequences], mask_BT, cache)
        verdicts = ([self._verdict(row) for row in of_lane] for of_lane in proved)
        return dict(zip(readings, verdicts, strict=True))

    def _proved(
        self,
        items: Sequence[Encoded],
        sequences: Sequence[Sequence[int]],
        keep: Sequence[int],
        logits_MV: Tensor,
    ) -> list[_Generation]:
        after = [len(ids) - len(e.prompt) for e, ids in zip(items, sequences, strict=True)]
        ends = list(accumulate(keep))
        first = [end - n - 1 for end, n in zip(ends, after, strict=True)]
        best = self._best(logits_MV, [at for at, n in zip(first, after, strict=True) if n >= 0])
        rows = []
        for e, ids, at, end in zip(items, sequences, first, ends, strict=True):
            if ids[: len(e.prompt)] != e.prompt:  # its last token may include the answer's space
                same = min(common_prefix((e.prompt, ids)), len(e.prompt) - 1)
                rows.append(_Generation(e, same, e.prompt[same:]))
                continue
            predicted = best[at:end]
            same = common_prefix((ids[len(e.prompt) :], predicted))
            new = self._ended(predicted[: same + 1])[: self.max_new_tokens]
            rows.append(_Generation(e, len(e.prompt) + len(new) - 1, new[-1:], new))
        return rows

    def _best(self, logits_MV: Tensor, first: Sequence[int]) -> list[int]:
        """The most probable tokens; a generation's first token is never an end token.

        Args:
            first: the positions of first tokens.
        """
        best: list[int] = logits_MV.argmax(-1).tolist()
        ends = sorted(self.eos)
        for at in first:
            if best[at] in self.eos:
                logits_V = logits_MV[at].clone()
                logits_V[ends] = float("-inf")
                best[at] = int(logits_V.argmax())
        return best

    def _ended(self, tokens: list[int]) -> list[int]:
        """The tokens up to and including the first end token."""
        for place, token in enumerate(tokens):
            if token in self.eos:
                return tokens[: place + 1]
        return tokens

    def _continue(
        self, rows: list[_Generation], lengths: Sequence[int], mask_BT: Tensor, cache: Any
    ) -> None:
        """Generate until every verdict is known.

        Args:
            rows: the generations of all lanes, lane after lane.
            lengths: how many tokens were read of each example.
            mask_BT: mask of what was read, the same in every lane.
            cache: of what was read, in all lanes.
        """
        device, width = mask_BT.device, mask_BT.shape[1]
        # Gold answer columns beyond what greedy decoding would choose must not be seen.
        ends = [row.read + width - n for row, n in zip(rows, cycle(lengths), strict=False)]
        mask_BS = torch.arange(width, device=device) < torch.tensor(ends, device=device)[:, None]
        mask_BS &= mask_BT.repeat(len(rows) // len(lengths), 1)
        live = list(range(len(rows)))  # indices into `rows`, in the order of the cache's rows
        going = set(live)
        for step in count():
            going = self._unfinished(rows, going, look=step % CHECK_EVERY == 0)
            if not going:
                return
            if len(going) <= self.compact_below * len(live):
                keep = [at for at, i in enumerate(live) if i in going]
                kept = torch.tensor(keep, device=device)
                cache, mask_BS = self.forward.select(cache, kept), mask_BS[kept]
                live = [live[at] for at in keep]
            active = [rows[i] for i in live]
            ended = [i not in going for i in live]  # they read on, but their output is unused
            new = left_padded([r.pending for r in active], device, [r.read for r in active])
            mask_BS = torch.cat([mask_BS, new.mask_BT], 1)
            begun = all(row.new for row in active)
            found, cache = self.forward(
                new,
                keep=[1] * len(live),
                best=begun,
                mask_BS=mask_BS,
                cache=cache,
                grow=True,
                paths=[None if e else row.path for e, row in zip(ended, active, strict=True)],
            )
            first = [] if begun else [at for at, row in enumerate(active) if not row.new]
            best = found.tolist() if begun else self._best(found, first)
            for end, row, token in zip(ended, active, best, strict=True):
                if not end:
                    row.add(token)

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
        """As many new tokens as the answer has: the text that token F1 is computed on."""
        return min(self.max_new_tokens, len(row.item.full[0]) - row.item.start)

    def _texts(self, rows: list[_Generation]) -> list[str]:
        """The texts that are searched for the answer."""
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
