"""Which answers an edit gains and loses, by how frequent they are.

LASER (arXiv 2312.13558, section 5) finds that the gained facts are those that are rare in the
training text: the components that are cut had replaced them by generic words. The training text of
most models is not known; the number of other rows of the dataset with the same answer stands in.

Shapes: N test rows.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tensorllm.evaluation.matching import normalised
from tensorllm.evaluation.predictions import Prediction

BINS = 4
SHOWN = 3  # rows that are shown, gained and lost each
WORDS = 5  # first words of wrong answers that are listed


def by_frequency(
    before: Sequence[Prediction], after: Sequence[Prediction], frequency_N: Sequence[int]
) -> list[dict[str, Any]]:
    """Right answers before, gained and lost, in bins of about equal size, rarest answers first.

    Rows with equally frequent answers share a bin, so there may be fewer than `BINS`.
    """
    out = []
    for low, high in edges(frequency_N):
        pairs = [
            (bool(b.correct), bool(a.correct))
            for b, a, f in zip(before, after, frequency_N, strict=True)
            if low <= f <= high
        ]
        out.append(
            {
                "least": low,
                "most": high,
                "examples": len(pairs),
                "right": sum(was for was, _ in pairs),
                "wrong_to_right": sum(not was and now for was, now in pairs),
                "right_to_wrong": sum(was and not now for was, now in pairs),
            }
        )
    return out


def edges(frequency_N: Sequence[int]) -> list[tuple[int, int]]:
    """The least and the largest frequency of each bin."""
    left = Counter(frequency_N)
    out: list[tuple[int, int]] = []
    held: list[int] = []
    rows = 0
    for value in sorted(left):
        held.append(value)
        rows += left[value]
        if rows >= (len(out) + 1) * len(frequency_N) / BINS:
            out.append((held[0], held[-1]))
            held = []
    return out


def trend(
    before: Sequence[Prediction], after: Sequence[Prediction], frequency_N: Sequence[int]
) -> dict[str, float] | None:
    """Spearman's correlation of a row's gain (1, 0 or -1) with its answer's frequency.

    Negative: rare answers gain. None if nothing changed, or all are equally frequent.
    """
    from scipy.stats import spearmanr

    gained_N = [bool(a.correct) - bool(b.correct) for b, a in zip(before, after, strict=True)]
    if len(set(gained_N)) < 2 or len(set(frequency_N)) < 2:
        return None
    found = spearmanr(frequency_N, gained_N)
    return {"spearman": float(found.statistic), "p": float(found.pvalue)}


def generic(before: Sequence[Prediction], after: Sequence[Prediction]) -> dict[str, Any]:
    """The words that the original's wrong answers most often begin with, before and after.

    Returns:
        `words`: word -> [before, after], rows whose answer begins with it; `before`, `after`: their
        sums, per cent of rows.
    """
    wrong = Counter(_first(row) for row in before if not row.correct)
    common = [word for word, _ in wrong.most_common(WORDS)]
    counts = [Counter(map(_first, rows)) for rows in (before, after)]
    words = {word: [count[word] for count in counts] for word in common}
    shares = [100 * sum(count[word] for word in common) / len(before) for count in counts]
    return {"words": words, "before": shares[0], "after": shares[1]}


def changed(before: Sequence[Prediction], after: Sequence[Prediction]) -> dict[str, Any]:
    """The first rows gained and lost: the gold answer, and the answers before and after."""
    out: dict[str, list[dict[str, str]]] = {"gained": [], "lost": []}
    for b, a in zip(before, after, strict=True):
        kind = out["gained" if a.correct else "lost"]
        if b.correct != a.correct and len(kind) < SHOWN:
            kind.append({"answer": b.answer, "before": b.generation, "after": a.generation})
    return out


def _first(row: Prediction) -> str:
    return next(iter(normalised(row.generation)), "")
