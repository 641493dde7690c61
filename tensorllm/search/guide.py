"""Which points are worth a trial, from one backward pass: the predicted change of the loss.

To first order, other matrices change the loss by the inner product of its gradient with their
difference. For the rank-k truncation of W = sum of s_i u_i v_i^T that is the sum over i > k of
-s_i g_i, where g_i = u_i^T G v_i; so every strategy is predicted in its own factors. Source:
Compress to Impress, arXiv 2510.20800, which ranks matrices so.

Shapes: M columns with logits of a batch, V vocabulary, I and D of a role matrix.
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
TOKENS = 1024  # of a batch; each batch adds to all gradients, which costs as much as some of these
LEAST = 8  # examples; a gradient of fewer says nothing
ALIKE = 0.05  # predicted changes that differ by less, relatively, are of about the same edit
SHARE = 20  # a guided search makes this many times fewer trials than its grid has points


Gradient = dict[tuple[int, str], Tensor]  # (layer, role) -> (I, D), float32


class Guided(NamedTuple):
    """Predicted change of the loss (nats) by a point's key, and the examples it rests on.

    Of several datasets it is the worst change, and the examples are those of all.
    """

    change: dict[str, float]
    examples: int


def guided(examiner: Examiner, points: Sequence[Point]) -> Guided:
    """The predicted change of every point.

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
    """The change of the loss, in nats, to first order: the gradient's inner product with that of
    the matrices."""
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
    """The gradient (I, D), float32, of the mean loss of the first `count` validation examples of a
    dataset (by default the first one), in the order of examination.

    The loss of a question with choices is the cross-entropy of the right one among them: what
    changes all alike changes no answer. That of others is in nats per token of the answer.
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
    """Tokens to be read, and columns whose logits count."""
    rows = _inputs(item)
    return len(rows) * item.length, len(rows) * (item.length - _start(item))


def _start(item: Encoded) -> int:
    """Where what is scored begins."""
    return item.shared if item.example.choices else item.start


def _inputs(item: Encoded) -> list[tuple[int, ...]]:
    """What is read of an example: answers that differ in their last token only are read at once,
    and nothing predicts from it.
    """
    return list(dict.fromkeys(tuple(ids[:-1]) for ids in item.full))


def loss_of(examiner: Examiner, items: Sequence[Encoded]) -> Tensor:
    """The sum of the examples' losses, with a graph."""
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
    """Numbers of the points in the order in which they are tried: the largest predicted decrease
    of the loss first, but after all others what is `ALIKE` an earlier point of its layer.

    Ranks that change next to nothing would otherwise fill a short search with one edit.
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
    """How many trials a guided search makes of so many points by default."""
    return min(points, max(10, math.ceil(points / SHARE)))


def agreement(
    guide: Guided, trials: Sequence[Any], key_of: Any, original: TrialResult | None = None
) -> dict[str, Any]:
    """How the predicted changes rank the trials examined in full: Spearman's correlation with
    their loss and with their accuracy (a good guide: near 1 and near -1).

    None where fewer than three trials were, or all have one value.

    Args:
        original: of several datasets; what the trials' worst changes count from.
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
