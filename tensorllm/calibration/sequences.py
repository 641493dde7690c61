"""The text that a compression is fitted to, as token sequences.

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
from tensorllm.errors import UserError
from tensorllm.models.task import context_length

WINDOW = 64  # tokens: stories begin alike, but not for so long
LENGTH = 512  # tokens of a sequence, where the model's context is no shorter


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences padded on the right; `mask_BT` is True where there is a token.

    Attributes:
        rows, count: of the whole batch, of which this process may have a part: sequences, tokens.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    rows: int
    count: int

    def tokens(self, x: Tensor) -> Tensor:
        """The rows (N, X) of what a module saw, without padding; some modules flatten B and T."""
        mask_BT = self.mask_BT.to(x.device)
        return x.reshape(*mask_BT.shape, -1)[mask_BT]

    def first(self, tokens: int, ranks: Ranks = ALONE) -> "Batch":
        """Its first sequences: at most `tokens` padded positions, but one for each process."""
        length = self.ids_BT.shape[1]
        rows = min(self.rows, max(ranks.size, tokens // length))
        here = len(range(ranks.rank, rows, ranks.size))
        count = self.count * rows // self.rows  # about: lengths in other processes are not known
        return Batch(self.ids_BT[:here], self.mask_BT[:here], rows, count)


@dataclass(frozen=True)
class Calibration:
    """Token sequences and where they come from.

    Attributes:
        source: what they were drawn from, by `seed`.
        added: how many of them, at the end, are all of another text, and `added_from` which.
        length: tokens of a sequence, where that was asked for; None: the default.
        to_distill: what the factors are distilled on afterwards; None: this text.
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
        """This text, with another one added."""
        both = self.sequences + other.sequences
        return replace(self, sequences=both, added=len(other.sequences), added_from=other.source)

    def facts(self) -> dict[str, Any]:
        """What the manifest says of the text; hash and tokens are of all sequences."""
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
        """UserError where what is evaluated stands in this text, wherever it begins there.

        Compared are the hashes of each `WINDOW` tokens that follow each other, or of a whole
        sequence where it is shorter.
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
        """Refuse tokens and lengths that the model does not have, and text too short to fit it.

        Args:
            width: of the widest input of a matrix that is fitted.
            context: positions that the model has; None where it says nothing.
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
        """Sequences of similar length together, at most about `tokens` padded positions each.

        Of several processes each takes some rows of every batch; a batch has one for each of them,
        for which it may have to be larger.

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
    """Tokens of a calibration sequence of a model."""
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
        length: tokens of a drawn sequence; None: `usual_length`.
        to_distill: a file, of which all is for distillation.

    Raises:
        UserError: `sampled` without `file`, files that cannot be read, or a length that the
            model's context has no room for.
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
        sequences: None for all.
        length: at most the model's context.
        seed: of the draw.
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
    return Calibration(tuple(drawn), source=Path(file).name, seed=seed)


def _pad(group: Sequence[tuple[int, ...]], ranks: Ranks) -> Batch:
    longest = max(map(len, group))
    ids_BT = torch.zeros(len(group), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(group), longest, dtype=torch.bool)
    for row, sequence in enumerate(group):
        ids_BT[row, : len(sequence)] = torch.tensor(sequence)
        mask_BT[row, : len(sequence)] = True
    return Batch(ranks.rows(ids_BT), ranks.rows(mask_BT), len(group), int(mask_BT.sum()))


def _windows(sequence: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """All pieces of `size` tokens that follow each other."""
    pieces = range(len(sequence) - size + 1) if size else ()
    return [tuple(sequence[i : i + size]) for i in pieces]


def _hash(sequence: Sequence[int]) -> str:
    return hashlib.sha256(",".join(map(str, sequence)).encode()).hexdigest()
