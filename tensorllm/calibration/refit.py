"""All factors of a layer refitted together, until the layer's own output is nearest.

Each group was fitted alone, by prices in which the rest of its layer stands still. Here they move
together: L-BFGS on the factors, between the roots of the same prices, where all directions cost
about the same. Nothing but this one layer runs, forward and backward once a step.
Shapes: B sequences, T positions, D model width, M outputs of a map, X its inputs, R rank.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from tensorllm.calibration.blocks import Call
from tensorllm.calibration.groups import Group
from tensorllm.calibration.layer import Layer
from tensorllm.calibration.sequences import Batch
from tensorllm.tensors.pivoted import PivotedLowRank
from tensorllm.tensors.weighted import Metric, weighted_svd

DAMPING = 1e-2  # of the mean eigenvalue: steps along directions that cost nothing would be wild
SMALLEST = 1e-3  # of the largest singular value, for the same reason


class Between:
    """A map of rank R between the inverse roots of its prices: `left diag(1/size) right`.

    With the sizes of its singular values once in each parameter and once taken out between them, a
    small step of either costs the square of its length, whichever component it moves.
    """

    def __init__(self, w_MX: Tensor, felt: Metric, seen: Metric, rank: int) -> None:
        felt, seen = Metric(felt.moment_NN, DAMPING), Metric(seen.moment_NN, DAMPING)
        (root_MM, self.inverse_MM), (root_XX, self.inverse_XX) = felt.roots, seen.roots
        left_MR, right_RX = weighted_svd(w_MX, felt, seen).truncate(rank)
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


class Refit:
    """One layer's factors and how far the layer's output is from where it should be.

    Args:
        smaller: the compressed layer; whatever is tried is put into it.
        inputs: states (B, T, D) that the compressed layers below give it, one per batch; read again
            in every step, like `targets`, the original's states after the layer.
    """

    def __init__(
        self,
        smaller: Layer,
        calls: Sequence[Call],
        batches: Sequence[Batch],
        inputs: Iterable[Tensor],
        targets: Iterable[Tensor],
    ) -> None:
        self.layer, self.calls, self.batches = smaller, calls, batches
        self.inputs, self.targets = inputs, targets
        self.tokens = sum(int(batch.mask_BT.sum()) for batch in batches)

    def run(
        self, maps: Mapping[Group, Between], fitted: Mapping[Group, PivotedLowRank], steps: int
    ) -> dict[Group, PivotedLowRank]:
        """The best factors of some steps, in the layer too; those that were there if none better.

        Args:
            steps: forward and backward passes in all.
        """
        best, kept = float("inf"), dict(fitted)
        parameters = [p for each in maps.values() for p in (each.left_MR, each.right_RX)]

        def loss() -> float:
            nonlocal best, kept
            now = {group: self.layer.pivoted(*b.factors(), group) for group, b in maps.items()}
            for group, factors in now.items():
                self.layer.put(group, factors)
            error, gradients = self.error([role for group in maps for role in group])
            for group, between in maps.items():
                between.pass_on(self.layer.stacked(gradients, group))
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
        for group, factors in kept.items():
            self.layer.put(group, factors)
        return kept

    def error(self, roles: Sequence[str]) -> tuple[float, dict[str, Tensor]]:
        """The squared distance from the targets per token, relative to their size.

        Returns:
            It, and its gradients by the parameters that hold the roles' matrices, by name.
        """
        names = {self.layer.roles.name(self.layer.number, role) for role in roles}
        leaves = {name: w for name, w in self.layer.parameters.items() if name in names}
        gradients = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in leaves.items()}
        total = 0.0
        every = zip(self.batches, self.calls, self.inputs, self.targets, strict=True)
        for batch, call, hidden_BTD, target_BTD in every:
            wanted_BTD = target_BTD.float()
            size_BT1 = wanted_BTD.norm(dim=-1, keepdim=True).clamp(min=1e-20)
            weight_BT1 = batch.mask_BT.to(size_BT1.device)[..., None] / size_BT1
            with torch.enable_grad():
                for w in leaves.values():
                    w.requires_grad_()
                out_BTD = call.run(self.layer.block, hidden_BTD).float()
                error = ((out_BTD - wanted_BTD) * weight_BT1).square().sum() / self.tokens
                found = torch.autograd.grad(error, list(leaves.values()))
            for name, g in zip(leaves, found, strict=True):
                leaves[name].requires_grad_(False)
                gradients[name] += g
            total += error.item()
        return total, gradients
