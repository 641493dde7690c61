"""Predict from one backward pass how each point changes the loss, to choose which are tried.

To first order, replacing matrices changes the loss by the inner product of its gradient with their
difference. For the rank-k truncation of W = sum of s_i u_i v_i^T that is the sum over i > k of
-s_i g_i, where g_i = u_i^T G v_i; so every strategy is predicted in its own factors. Source:
Compress to Impress, arXiv 2510.20800, which ranks matrices so.

Shapes: M columns of a batch with logits, V vocabulary, (I, D) a role matrix.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tensorllm.errors import UserError
from tensorllm.evaluation.batching import fill
from tensorllm.evaluation.causal import CausalBatch
from tensorllm.evaluation.encoding import Encoded
from tensorllm.evaluation.forward import left_padded
from tensorllm.search.decompositions import SiteEdit
from tensorllm.search.examiner import Examiner
from tensorllm.search.forwards import PrefixForward
from tensorllm.search.selection import finished
from tensorllm.search.space import Matrices, Point
from tensorllm.search.staged import StagedExamples
from tensorllm.search.trial import TrialResult

EXAMPLES = 100
TOKENS = 1024  # per batch: each adds to all gradients, at the cost of reading some of these tokens
LEAST = 8  # examples: a gradient of fewer is too noisy
ALIKE = 0.05  # predicted changes closer than this, relatively, are taken for about the same edit
SHARE = 20  # a guided search makes this many times fewer trials than its grid has points


Gradient = dict[tuple[int, str], Tensor]  # (layer, role) -> (I, D), float32


class Guided(NamedTuple):
    """The predicted change of the loss (nats) by a point's key, and how many examples it rests on.

    Over several datasets: the worst change, and the examples of all of them.
    """

    change: dict[str, float]
    examples: int


def guided(examiner: Examiner, points: Sequence[Point]) -> Guided:
    """Predict the change of the loss at every point.

    Raises:
        UserError: a masked model, running text, too few examples, a strategy that is fitted to a
            text, or a gradient that is not finite.
    """
    if examiner.calibration is not None:
        raise UserError("--guide predicts strategies that see weights only: give no --calibration")
    matrices = frozenset(
        matrix for p in points for job in examiner.jobs(p) for matrix in job.site.matrices
    )
    change: dict[str, float] = {}
    examples = 0
    for part in examiner.parts:  # one gradient at a time: it is as large as the model
        gradient, count = loss_gradient(examiner, matrices, part=part)
        examples += count
        for point in points:
            sites = examiner.decompositions.edit(examiner.jobs(point)).sites
            found = predicted(sites, gradient, examiner)
            change[point.key] = max(found, change.get(point.key, found))
    return Guided(change, examples)


def predicted(sites: Sequence[SiteEdit], gradient: Gradient, examiner: Examiner) -> float:
    """The first-order change of the loss, in nats: the gradient's inner product with the edit."""
    total = 0.0
    for site in sites:
        for matrix, new_ID in zip(site.site.matrices, site.matrices, strict=True):
            old_ID = examiner.roles.read(examiner.weights, *matrix)
            total += float((gradient[matrix] * (new_ID.float() - old_ID.float())).sum())
    return total


def loss_gradient(
    examiner: Examiner,
    matrices: Matrices,
    count: int = EXAMPLES,
    part: StagedExamples | None = None,
) -> tuple[Gradient, int]:
    """The gradient of the mean loss of a dataset's first `count` validation examples.

    Shape: (I, D), float32, for each matrix. The dataset is by default the examiner's first; its
    examples are taken in the order of examination. The loss of a question with choices is the
    cross-entropy of the right choice among them: what shifts all choices alike changes no answer.
    Of other questions it is in nats per token of the answer.

    Raises:
        UserError: too few questions with answers, or the gradient is not finite.
    """
    asked = items_of(part or examiner.parts[0])
    items = [item for item in asked if not item.example.tokens][:count]
    if len(items) < LEAST:
        raise UserError(f"--guide needs {LEAST} questions with answers or more, got {len(items)}")
    names = {examiner.roles.name(*matrix) for matrix in matrices}
    parameters = {
        name: p
        for name, p in examiner.model.named_parameters(remove_duplicate=False)
        if name in names
    }
    wanted = {name: p.requires_grad for name, p in parameters.items()}
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    try:
        for p in parameters.values():
            p.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            for batch in fill(items, cost_of, TOKENS):
                loss = loss_of(examiner, batch) / len(items)
                found = torch.autograd.grad(loss, list(parameters.values()))
                for name, new in zip(parameters, found, strict=True):
                    sums[name] += new.float()
    finally:
        for name, p in parameters.items():
            p.requires_grad_(wanted[name])
    if not all(bool(g.isfinite().all()) for g in sums.values()):
        raise UserError("--guide: the gradient of the loss is not finite; try --dtype float32")
    return {matrix: examiner.roles.read(sums, *matrix) for matrix in matrices}, len(items)


def items_of(part: StagedExamples) -> list[Encoded]:
    """The encoded examples of a dataset in the order of examination."""
    batches = [batch for stage in part.stages for batch in stage]
    if not all(isinstance(batch, CausalBatch) for batch in batches):
        raise UserError("--guide is for causal models; this one predicts masked tokens")
    place = {example.index: n for n, example in enumerate(part.order)}
    items = [item for batch in batches for item in batch.items]
    return sorted(items, key=lambda item: place[item.example.index])


def cost_of(item: Encoded) -> tuple[int, int]:
    """Tokens to read, and columns whose logits are needed."""
    rows = _inputs(item)
    return len(rows) * item.length, len(rows) * (item.length - _start(item))


def _start(item: Encoded) -> int:
    """The position at which the scored tokens begin."""
    return item.shared if item.example.choices else item.start


def _inputs(item: Encoded) -> list[tuple[int, ...]]:
    """The token rows to read for an example: its answers, each without its last token.

    No score depends on what follows the last token, so answers that differ only there share a row.
    """
    return list(dict.fromkeys(tuple(ids[:-1]) for ids in item.full))


def loss_of(examiner: Examiner, items: Sequence[Encoded]) -> Tensor:
    """The sum of the examples' losses, with its autograd graph."""
    inputs = [_inputs(item) for item in items]
    rows = [ids for of_one in inputs for ids in of_one]
    starts = [_start(item) for item, of_one in zip(items, inputs, strict=True) for _ in of_one]
    keep = [len(ids) - start + 1 for ids, start in zip(rows, starts, strict=True)]
    forward = examiner.forward
    assert isinstance(forward, PrefixForward), "others have no items"
    logits_MV, _ = forward(left_padded(rows, forward.device), keep=keep)
    of_rows = iter(logits_MV.float().log_softmax(-1).split(keep))
    losses = []
    for item, of_one in zip(items, inputs, strict=True):
        log_p = {ids: next(of_rows) for ids in of_one}
        sums = []
        for ids in item.full:
            answer = torch.tensor(ids[_start(item) :], device=logits_MV.device)
            of_tokens = log_p[tuple(ids[:-1])][: len(answer)]
            sums.append(of_tokens.gather(-1, answer[:, None]).sum())
        if item.example.choices:
            gold = item.example.choices.index(item.example.answer)
            losses.append(-torch.stack(sums).log_softmax(0)[gold])
        else:
            losses.append(-sums[0] / (len(item.full[0]) - _start(item)))
    return torch.stack(losses).sum()


def in_order(changes: Sequence[float], layers: Sequence[int]) -> list[int]:
    """The order in which points are tried, as indices: the largest predicted decrease first.

    Points that are within `ALIKE` of an earlier point of their layer come after all others: ranks
    that change next to nothing would otherwise fill a short search with one edit.
    """
    first: list[int] = []
    alike: list[int] = []
    for n in sorted(range(len(changes)), key=lambda n: changes[n]):
        close = any(
            layers[n] == layers[m] and changes[n] - changes[m] <= ALIKE * abs(changes[m])
            for m in first
        )
        (alike if close else first).append(n)
    return first + alike


def trials_for(points: int) -> int:
    """The default number of trials of a guided search over this many points."""
    return min(points, max(10, math.ceil(points / SHARE)))


def agreement(
    guide: Guided, trials: Sequence[Any], key_of: Any, original: TrialResult | None = None
) -> dict[str, Any]:
    """How well the predicted changes rank the trials that were examined in full.

    Spearman's correlation with the trials' loss (a good guide: near 1) and accuracy (near -1).
    None where fewer than three trials were examined, or all have the same value.

    Args:
        original: over several datasets, the result from which the trials' worst changes count.
    """
    from scipy.stats import spearmanr

    found = [(guide.change[key_of(trial)], result) for trial, result in finished(trials)]
    out: dict[str, Any] = {"examples": guide.examples, "points": len(guide.change)}
    for name in ("loss", "accuracy"):
        pairs = [(change, _figure(r, name, original)) for change, r in found]
        values = [pair for pair in pairs if pair[1] is not None]
        varied = len({v for _, v in values}) > 1 and len({c for c, _ in values}) > 1
        rho = (
            spearmanr(*zip(*values, strict=True)).statistic if len(values) > 2 and varied else None
        )
        out[f"spearman_{name}"] = None if rho is None else float(rho)
    return out


def _figure(result: TrialResult, name: str, original: TrialResult | None) -> float | None:
    """A trial's loss or accuracy; over several datasets its worst change."""
    if original is None or not original.parts:
        return None if getattr(result, name) is None else float(getattr(result, name))
    pairs = [(a, b) for a, b in zip(result.parts, original.parts, strict=True) if a and b]
    known = [(getattr(a, name), getattr(b, name)) for a, b in pairs]
    changes = [a - b for a, b in known if a is not None and b is not None]
    worst = max if name == "loss" else min
    return worst(changes) if changes else None
