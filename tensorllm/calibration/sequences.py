"""The calibration set: the text that a compression is fitted to, as token sequences.

Shapes: B sequences of a batch, T their padded length.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensorllm.calibration.ranks import ALONE, Ranks
from tensorllm.environment import printable
from tensorllm.errors import UserError
from tensorllm.models.task import context_length

WINDOW = 64  # tokens: many stories begin alike, but not for so long
LENGTH = 512  # tokens of a sequence, unless the model's context is shorter


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences padded on the right; `mask_BT` is True for tokens.

    Attributes:
        rows, count: sequences and tokens of the whole batch, of which this process may have a part.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    rows: int
    count: int

    def tokens(self, x: Tensor) -> Tensor:
        """A module's tensor as rows (N, X) without padding; some modules flatten B and T."""
        mask_BT = self.mask_BT.to(x.device)
        return x.reshape(*mask_BT.shape, -1)[mask_BT]

    def first(self, tokens: int, ranks: Ranks = ALONE) -> "Batch":
        """Its first sequences: at most `tokens` padded positions, but at least one per process."""
        length = self.ids_BT.shape[1]
        rows = min(self.rows, max(ranks.size, tokens // length))
        here = len(range(ranks.rank, rows, ranks.size))
        count = self.count * rows // self.rows  # about: lengths in other processes are unknown
        return Batch(self.ids_BT[:here], self.mask_BT[:here], rows, count)


@dataclass(frozen=True)
class Calibration:
    """Token sequences and their source.

    Attributes:
        sequences: the sequences of the text.
        source: name of the file they were drawn from.
        seed: of the draw.
        added: how many sequences at the end are all of another text.
        added_from: the source of those.
        length: requested tokens per sequence; None: the default.
        to_distill: text on which the factors are distilled afterwards; None: this one.
    """

    sequences: tuple[tuple[int, ...], ...]
    source: str = "given"
    seed: int = 0
    added: int = 0
    added_from: str = ""
    length: int | None = None
    to_distill: "Calibration | None" = None

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))

    def with_all_of(self, other: "Calibration") -> "Calibration":
        """This text with all of another one added."""
        both = self.sequences + other.sequences
        return replace(self, sequences=both, added=len(other.sequences), added_from=other.source)

    def facts(self) -> dict[str, Any]:
        """Facts for the manifest; hash and tokens are of all sequences."""
        facts = {
            "source": self.source,
            "sha256": self.sha256,
            "sequences": len(self.sequences) - self.added,
            "tokens": self.tokens,
            "seed": self.seed,
        }
        facts |= {"length": self.length} if self.length is not None else {}
        added = {"added": {"source": self.added_from, "sequences": self.added}}
        facts |= added if self.added else {}
        return facts | ({"to_distill": self.to_distill.facts()} if self.to_distill else {})

    @property
    def sha256(self) -> str:
        hashes = {_hash(sequence) for sequence in self.sequences}
        return hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()

    def refuse_overlap(self, evaluated: Sequence[Sequence[int]]) -> None:
        """Refuse a text that contains evaluated sequences, at whatever position.

        Compares the hashes of all runs of `WINDOW` consecutive tokens, or of whole sequences if
        they are shorter.

        Raises:
            UserError: some are contained; the message says how many.
        """
        if self.to_distill is not None:
            self.to_distill.refuse_overlap(evaluated)
        longest = min(WINDOW, max(map(len, self.sequences), default=0))
        wanted = [_windows(one, min(longest, len(one))) for one in evaluated]
        sizes = {len(window) for windows in wanted for window in windows}
        here = {hash(w) for size in sizes for one in self.sequences for w in _windows(one, size)}
        both = sum(any(hash(window) in here for window in windows) for windows in wanted)
        if both:
            raise UserError(
                f"{both} of {len(wanted)} sequences that are evaluated stand in the calibration "
                f"text ({self.source}); a score on them says nothing. Use other text, or "
                "--allow-overlap"
            )

    def check(self, vocabulary: int, width: int, context: int | None) -> None:
        """Refuse a text that is not for this model or too short to fit it.

        Args:
            vocabulary: size of the model's vocabulary.
            width: of the widest input of a fitted matrix.
            context: maximum positions of the model; None if it names none.

        Raises:
            UserError: tokens outside the vocabulary, a sequence longer than the context, or fewer
                tokens than `width`.
        """
        if self.to_distill is not None:
            self.to_distill.check(vocabulary, 1, context)
        top = max((max(s) for s in self.sequences if s), default=0)
        low = min((min(s) for s in self.sequences if s), default=0)
        if top >= vocabulary or low < 0:
            raise UserError(
                f"the calibration text has token {low if low < 0 else top}, but the model knows "
                f"0..{vocabulary - 1}; was it made by another tokenizer?"
            )
        longest = max(map(len, self.sequences), default=0)
        if context is not None and longest > context:
            raise UserError(
                f"the calibration text has a sequence of {longest} tokens; the model reads at most "
                f"{context}"
            )
        if self.tokens < width:
            raise UserError(
                f"the calibration text has {self.tokens} tokens; matrices with {width} inputs need "
                f"at least {width}, and ten times as many to be fitted well"
            )

    def batches(self, tokens: int = 1024, ranks: Ranks = ALONE) -> list[Batch]:
        """Batches of sequences of similar length, of at most about `tokens` padded positions.

        With several processes, each takes some rows of every batch. A batch has at least one row
        per process, and may be larger for that.

        Raises:
            UserError: there are fewer sequences than processes.
        """
        sequences = sorted(filter(None, self.sequences), key=len)
        if len(sequences) < ranks.size:
            raise UserError(
                f"{ranks.size} processes need as many calibration sequences, got {len(sequences)}; "
                "start fewer processes"
            )
        groups: list[list[tuple[int, ...]]] = []
        for sequence in sequences:
            full = groups and len(groups[-1]) >= ranks.size
            if not groups or (full and len(sequence) * (len(groups[-1]) + 1) > tokens):
                groups.append([])
            groups[-1].append(sequence)
        if len(groups) > 1 and len(groups[-1]) < ranks.size:
            last = groups.pop()
            groups[-1] += last
        return [_pad(group, ranks) for group in groups]


def usual_length(config: Any) -> int:
    """The default number of tokens per calibration sequence for a model."""
    return min(LENGTH, context_length(config) or LENGTH)


def text_asked_for(
    file: Path | None,
    sampled: Path | None,
    tokenizer: Any,
    config: Any,
    sequences: int,
    seed: int,
    length: int | None = None,
    to_distill: Path | None = None,
) -> Calibration | None:
    """The calibration text of a request: sequences drawn from `file`, and all of `sampled`.

    Args:
        file: to draw from; None: no calibration text.
        sampled: a file of sampled text; None: none.
        tokenizer: of the model.
        config: of the model.
        sequences: how many to draw.
        seed: of the draw.
        length: tokens of a drawn sequence; None: `usual_length`.
        to_distill: a file, used completely for distillation.

    Raises:
        UserError: `sampled` without `file`, files that cannot be read, or a length beyond the
            model's context.
    """
    if file is None:
        if sampled is not None:
            raise UserError(
                "--sampled adds to --calibration FILE; to fit to it alone, give it as --calibration"
            )
        return None
    usual, context = usual_length(config), context_length(config)
    if length is not None and context is not None and length > context:
        raise UserError(f"--length must be 2..{context}, the model's context, got {length}")
    drawn = {"sequences": sequences, "seed": seed, "length": length or usual}
    text = replace(read_calibration(file, tokenizer, **drawn), length=length)
    if to_distill is not None:
        more = read_calibration(to_distill, tokenizer, sequences=None, length=usual, seed=seed)
        text = replace(text, to_distill=more)
    if sampled is None:
        return text
    return text.with_all_of(read_calibration(sampled, tokenizer, sequences=None, length=usual))


def read_calibration(
    file: Path | str,
    tokenizer: Any,
    *,
    sequences: int | None = 128,
    length: int = 512,
    seed: int = 0,
) -> Calibration:
    """Token sequences from any text file, JSON list, JSON Lines, CSV or Parquet.

    Documents are cut into blocks of at most `length` tokens, of which `sequences` are drawn.

    Args:
        file: see the dataset `text`.
        tokenizer: of the model.
        sequences: how many; None for all.
        length: tokens of a block, at most the model's context.
        seed: of the draw.

    Raises:
        UserError: numbers out of range, or a file that cannot be read.
    """
    from tensorllm.data.text import Text

    if (sequences is not None and sequences < 1) or length < 2:
        raise UserError(
            f"calibration needs 1 or more sequences of 2 or more tokens, got {sequences} × {length}"
        )
    text = Text(data_file=Path(file), split="all", block=length)
    text.connect(tokenizer)
    blocks = [tuple(example.tokens or ()) for example in text.examples]
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    drawn = [blocks[i] for i in order[:sequences].tolist()]
    return Calibration(tuple(drawn), source=printable(Path(file).name), seed=seed)


def _pad(group: Sequence[tuple[int, ...]], ranks: Ranks) -> Batch:
    longest = max(map(len, group))
    ids_BT = torch.zeros(len(group), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(group), longest, dtype=torch.bool)
    for row, sequence in enumerate(group):
        ids_BT[row, : len(sequence)] = torch.tensor(sequence)
        mask_BT[row, : len(sequence)] = True
    return Batch(ranks.rows(ids_BT), ranks.rows(mask_BT), len(group), int(mask_BT.sum()))


def _windows(sequence: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """All runs of `size` consecutive tokens."""
    pieces = range(len(sequence) - size + 1) if size else ()
    return [tuple(sequence[i : i + size]) for i in pieces]


def _hash(sequence: Sequence[int]) -> str:
    return hashlib.sha256(",".join(map(str, sequence)).encode()).hexdigest()
