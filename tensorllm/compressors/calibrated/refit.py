"""All factors of a layer refitted together, until the layer's own output is nearest.

Each site was fitted alone, by weights of its errors in which the rest of the layer stands still.
Here they move together: L-BFGS on the factors, between the roots of the same covariances, where all
directions cost about the same. Only this one layer runs, forward and backward once a step.
Shapes: M outputs of a map, X its inputs, R rank.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tensorllm.compressors.base import LayerContext, Site
from tensorllm.compressors.calibrated.maps import pivoted, stacked
from tensorllm.tensors.pivoted import PivotedLowRank
from tensorllm.tensors.weighted import Metric, weighted_svd

DAMPING = 1e-2  # of the mean eigenvalue: steps along directions without error would be too long
SMALLEST = 1e-3  # of the largest singular value, for the same reason


class Between:
    """A map of rank R between the inverse roots of its covariances: `left diag(1/size) right`.

    With the sizes of its singular values once in each parameter and once taken out between them, a
    small step of either costs the square of its length, whichever component it moves.
    """

    def __init__(self, w_MX: Tensor, outputs: Metric, inputs: Metric, rank: int) -> None:
        outputs = Metric(outputs.moment_NN, DAMPING)
        inputs = Metric(inputs.moment_NN, DAMPING)
        (root_MM, self.inverse_MM), (root_XX, self.inverse_XX) = outputs.roots, inputs.roots
        left_MR, right_RX = weighted_svd(w_MX, outputs, inputs).truncate(rank)
        left_MR, right_RX = root_MM @ left_MR, right_RX @ root_XX
        tall_R, wide_R = left_MR.norm(dim=0), right_RX.norm(dim=1)
        self.size_R = tall_R * wide_R
        self.size_R = self.size_R.clamp(min=SMALLEST * float(self.size_R.max()) + 1e-300)
        self.left_MR = nn.Parameter(left_MR * (self.size_R / tall_R.clamp(min=1e-300)))
        self.right_RX = nn.Parameter(right_RX * tall_R[:, None])

    def factors(self) -> tuple[Tensor, Tensor]:
        """(M, R) and (R, X), whose product is the map."""
        left_MR, right_RX = self.left_MR.detach() / self.size_R, self.right_RX.detach()
        return self.inverse_MM @ left_MR, right_RX @ self.inverse_XX

    def pass_on(self, gradient_MX: Tensor) -> None:
        """Give the parameters their gradients, by the chain rule, from that of the map."""
        g_MX = self.inverse_MM @ gradient_MX @ self.inverse_XX
        self.left_MR.grad = g_MX @ self.right_RX.detach().mT / self.size_R
        self.right_RX.grad = (self.left_MR.detach() / self.size_R).mT @ g_MX


def refit(
    context: LayerContext,
    fitted: Mapping[Site, PivotedLowRank],
    metrics: Mapping[Site, tuple[Metric, Metric]],
    steps: int,
) -> dict[Site, PivotedLowRank]:
    """The best factors of some steps, put into the layer too; `fitted` if none is better.

    Args:
        context: the compressed layer, into which whatever is tried is put.
        metrics: of each site's outputs and inputs.
        steps: forward and backward passes in all.
    """
    best, kept = float("inf"), dict(fitted)
    maps = {}
    for site, factors in fitted.items():  # from the weights as they are rounded
        w_MX = stacked({r: context.compressed_weight(r) for r in site.roles}, site.roles)
        maps[site] = Between(w_MX, *metrics[site], factors.rows_R.numel())
    parameters = [p for each in maps.values() for p in (each.left_MR, each.right_RX)]

    def loss() -> float:
        nonlocal best, kept
        now = {site: pivoted(*between.factors(), site.roles) for site, between in maps.items()}
        for site, factors in now.items():
            context.put(site, factors)
        error, gradients = context.output_error([role for site in maps for role in site.roles])
        for site, between in maps.items():
            between.pass_on(stacked(gradients, site.roles))
        if error < best:
            best, kept = error, now
        return error

    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=steps,
        max_eval=steps,
        history_size=steps,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(loss)
    for site, factors in kept.items():
        context.put(site, factors)
    return kept
