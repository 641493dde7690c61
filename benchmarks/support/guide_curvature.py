"""A guide with a second-order term, to be held beside the first-order one of `search-ranks`.

The Fisher matrix of a linear layer as a Kronecker product (K-FAC, arXiv 1503.05671, with the
observed labels): of inputs a and gradients g of each example's loss with respect to outputs, over
all N tokens of n examples, F = 1 / (n N) * sum(a a^T) x sum(g g^T).

Shapes: O outputs, I inputs of a linear module.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tensorllm.evaluation.batching import fill
from tensorllm.search.guide import EXAMPLES, TOKENS, cost_of, items_of, loss_of
from tensorllm.search.lanes import changed_by
from tensorllm.search.space import Point
from tensorllm.search.study import Study


def curvatures(study: Study, points: Sequence[Point]) -> dict[str, tuple[Tensor, Tensor, float]]:
    """By the name of each parameter that the points change: sum(a a^T), sum(g g^T), 1 / (n N)."""
    examiner = study.examiner
    names = {
        examiner.roles.name(*matrix)
        for point in points
        for job in examiner.jobs(point)
        for matrix in job.site.matrices
    }
    items = items_of(examiner.parts[0])[:EXAMPLES]
    sums: dict[str, list[Any]] = {}
    handles = []

    def watch(name: str) -> None:
        module = examiner.model.get_submodule(name.removesuffix(".weight"))
        outputs, inputs = module.weight.shape
        sums[name] = [torch.zeros(inputs, inputs), torch.zeros(outputs, outputs), 0]

        def hook(_: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
            a_NI = args[0].detach().flatten(0, -2)
            sums[name][0] += a_NI.T @ a_NI
            sums[name][2] += len(a_NI)

            def back(g: Tensor) -> None:
                g_NO = g.flatten(0, -2)
                sums[name][1] += g_NO.T @ g_NO

            y.register_hook(back)

        handles.append(module.register_forward_hook(hook))

    with torch.inference_mode(False), torch.enable_grad():
        for name in sorted(names):
            watch(name)
        first = next(examiner.model.parameters())
        first.requires_grad_(True)
        embedding = examiner.model.get_input_embeddings().weight
        embedding.requires_grad_(True)
        for batch in fill(items, cost_of, TOKENS):
            torch.autograd.grad(loss_of(examiner, batch), [embedding])
        embedding.requires_grad_(False)
        first.requires_grad_(False)
    for handle in handles:
        handle.remove()
    return {name: (a, g, 1 / (len(items) * n)) for name, (a, g, n) in sums.items()}


def second_order(study: Study, points: Sequence[Point]) -> dict[str, float]:
    """Half of the change's square in the Fisher metric, in nats, by key."""
    examiner = study.examiner
    known = curvatures(study, points)
    found = {}
    for point in points:
        total = 0.0
        for name, new in changed_by(examiner.edit(point), examiner.roles, examiner.weights).items():
            a_II, g_OO, scale = known[name]
            change_OI = new - examiner.weights[name]
            total += scale / 2 * float(((g_OO @ change_OI) * (change_OI @ a_II)).sum())
        found[point.key] = total
    return found
