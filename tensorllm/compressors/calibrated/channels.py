"""An FFN that loses channels: rows of in, gate and out are dropped together, the rest refitted.

Source: MoDeGPT (arXiv 2408.09632, Algorithm 1) drops channels and refits `out` by Nyström's
formula. Here channels are ranked by their effect on the layer's output, all kept rows are fitted to
the compressed model's inputs of the layer, and `refit` trains them with all other factors.

Shapes: F channels, R kept channels, D model width, P input projections (in, gate).
"""

from collections.abc import Sequence
from itertools import islice
from typing import Self

import torch
from torch import Tensor, nn

from tensorllm.compressors.base import ErrorCurve
from tensorllm.compressors.calibrated.error_model import ErrorModel, shrunk_gradient_covariance
from tensorllm.compressors.calibrated.held_out import SHARE, error_ratio
from tensorllm.compressors.calibrated.refit import DAMPING, TrainableSite
from tensorllm.compressors.layer import LayerContext, Site
from tensorllm.compressors.operators import LinearOperator, RowsOperator
from tensorllm.compressors.widths import multiples
from tensorllm.tensors.kept_rows import KeptRows
from tensorllm.tensors.shared_input import NARROWED, rows_stacking
from tensorllm.tensors.stacking import Geometry, is_output_projection
from tensorllm.tensors.triangular import lower_inverse, transposed_lower_times
from tensorllm.tensors.unfold import add_gram, mirror
from tensorllm.tensors.weighted import Metric, floor_of

ORDERED = 4  # the channels are ranked on one batch in so many
LEAST_FREE = 0.05  # lower bound of 1 - parameters / tokens
RIDGE = 1e-3  # pull of rows of `out` towards their old values, relative to a channel's mean square


def narrowed_site(layer: int, roles: Sequence[str]) -> Site | None:
    """The FFN matrices of a layer that lose channels together; None if one is missing."""
    for together in NARROWED:
        if set(together) <= set(roles) and ("gate" in together) == ("gate" in roles):
            return Site((layer,), together, rows_stacking(together))
    return None


def is_narrowed(site: Site) -> bool:
    """Whether a site is an FFN that loses channels."""
    return site.roles in NARROWED


def min_stored(geometry: Geometry, site: Site) -> int:
    """Numbers stored with the fewest channels."""
    return len(site.roles) * (_step(geometry.F) * geometry.D + geometry.F)


def _step(channels: int) -> int:
    """The step between widths, small enough that one is narrower than all channels."""
    return min(multiples(channels)[0], max(1, channels // 2))


def curve(site: Site, context: LayerContext, gradient_DD: Tensor) -> ErrorCurve:
    """Error of the layer's output without the last channels, with `out` refitted at each width.

    With C = L Lᵀ the covariance of the channels in their order, the residual of the best fit by the
    first R channels is the rows of Lᵀ W after R; each row is weighted by the covariance of the
    gradient at the output of `out`. As R numbers per output are fitted to N tokens, the error on
    other text is larger: generalised cross-validation (Golub, Heath and Wahba 1979) divides by (1 -
    R / N)².

    Args:
        site: the FFN.
        context: of its layer.
        gradient_DD: that covariance.
    """
    out_FD = context.weight("out").float()
    covariance_FF = context.input_covariance("out").to(out_FD.device)
    gradient_DD = gradient_DD.to(out_FD.device)
    order_F = _order(covariance_FF.diagonal(), out_FD, gradient_DD)
    floor = floor_of(len(order_F), context.tokens)
    root_FF = Metric(covariance_FF[order_F[:, None], order_F], floor).root
    residual_FD = transposed_lower_times(root_FF.to(out_FD), out_FD[order_F])
    left_F = _costs(residual_FD, gradient_DD).flip(0).cumsum(0).flip(0)
    step = _step(len(left_F))
    kept_S = torch.arange(step, len(left_F), step)
    each = len(site.roles) * context.geometry.D
    cost_S = each * kept_S + len(site.roles) * len(left_F)
    error_S = left_F[kept_S.to(left_F.device)]
    unseen_S = (1 - kept_S / context.tokens).clamp(min=LEAST_FREE).square()
    error_S = error_S / unseen_S.to(error_S)
    if context.holds_out:
        middle = len(kept_S) // SHARE
        kept_R, left_X = order_F.tensor_split([int(kept_S[middle])])
        near_FD = torch.zeros_like(out_FD)
        near_FD[kept_R] = out_FD[kept_R] + _regressed(root_FF.to(out_FD), out_FD[left_X])
        error_S = error_S * error_ratio(context, {"out": near_FD}, float(error_S[middle]))
    return ErrorCurve(cost_S, error_S, kept_S[:, None])


def _regressed(root_FF: Tensor, rest_XD: Tensor) -> Tensor:
    """What to add to the first R rows of `out` (R, D) to replace the X others by least squares.

    Args:
        root_FF: the lower Cholesky factor of the covariance of all channels, in this order.
        rest_XD: the other rows of `out`.
    """
    first = len(root_FF) - len(rest_XD)
    both_RD = root_FF[first:, :first].mT @ rest_XD
    return torch.linalg.solve_triangular(root_FF[:first, :first].mT, both_RD, upper=True)


def _order(squares_F: Tensor, out_FD: Tensor, gradient_DD: Tensor) -> Tensor:
    """Channels in order of importance: mean square times the cost of their row of `out`."""
    return (squares_F * _costs(out_FD, gradient_DD)).argsort(descending=True)


def _costs(rows_ND: Tensor, gradient_DD: Tensor) -> Tensor:
    """The cost rᵀ G r of each row r of `out`, float64, by the gradient covariance G."""
    size = float(gradient_DD.diagonal().mean()) or 1.0  # may underflow in float32
    weighted_ND = rows_ND @ (gradient_DD / size).to(rows_ND)
    return (weighted_ND * rows_ND).sum(1, dtype=torch.float64).clamp(min=0) * size


class Channels(TrainableSite):
    """The kept rows of an FFN, as parameters.

    Attributes:
        metrics: of the inputs and of the kept channels' activations, once they are known.
    """

    metrics: tuple[Metric, Metric] | None = None

    def __init__(self, site: Site, rows_R: Tensor, reading_PRD: Tensor, channels: int) -> None:
        super().__init__()
        self.site, self.rows_R, self.channels = site, rows_R, channels
        self.reading_PRD = nn.Parameter(reading_PRD)
        self.out_RD = nn.Parameter(reading_PRD.new_zeros(reading_PRD.shape[1:]))
        self.back: tuple[Tensor, Tensor] | None = None  # back from the coordinates of `balanced`

    @torch.no_grad()
    def write(self, out_RD: Tensor) -> None:
        """Set the rows of `out`."""
        self.out_RD.copy_(out_RD)

    @torch.no_grad()
    def balanced(self) -> Self:
        """Change to coordinates in which steps cost about the same in all directions."""
        assert self.metrics is not None
        read, kept = self.metrics
        root_DD, root_RR = Metric(read.covariance_NN, DAMPING).root, kept.root
        self.reading_PRD.copy_(self.reading_PRD @ root_DD.to(self.reading_PRD))
        self.out_RD.copy_(root_RR.mT.to(self.out_RD) @ self.out_RD)
        self.back = lower_inverse(root_DD).to(self.out_RD), lower_inverse(root_RR).to(self.out_RD)
        self.metrics = None
        return self

    def rows(self) -> list[Tensor]:
        """(R, D) of each role of the site."""
        if self.back is None:
            return [*self.reading_PRD, self.out_RD]
        from_DD, from_RR = self.back
        return [*(self.reading_PRD @ from_DD), from_RR.mT @ self.out_RD]

    def operators(self, geometry: Geometry) -> dict[str, LinearOperator]:
        return {
            role: RowsOperator(self.rows_R, w_RD, self.channels, is_output_projection(role))
            for role, w_RD in zip(self.site.roles, self.rows(), strict=True)
        }

    @torch.no_grad()
    def factors(self) -> KeptRows:
        each = [number * self.channels + self.rows_R for number in range(len(self.site.roles))]
        size = len(each) * self.channels
        return KeptRows.of(torch.cat(each), torch.cat(self.rows()).float(), size)


def fit_channels(context: LayerContext, site: Site, count: int, read: ErrorModel) -> Channels:
    """The most important channels, fitted; they replace those of the compressed layer.

    Rows of in and gate correct for the changed input as far as a linear map can; rows of `out` are
    then the least squares fit of the original's output by the channels' activations.

    Args:
        context: of the layer.
        site: the FFN.
        count: channels to keep.
        read: error model of the input projections.
    """
    corrects = read.correction_DD is not None
    inputs_of = context.compressed_inputs if corrects else context.original_inputs
    out_FD = context.weight("out")
    squares_F = torch.zeros(len(out_FD), dtype=torch.float64, device=out_FD.device)
    for x_NF in islice(inputs_of("out"), max(1, context.batches // ORDERED)):
        squares_F += x_NF.float().square().sum(0)
    context.all_reduce([squares_F])
    gradient_DD = shrunk_gradient_covariance(context, ("out",), read.plain).to(squares_F)
    rows_R = _order(squares_F, out_FD.float(), gradient_DD)[:count].sort().values
    reading_PRD = torch.stack([context.weight(role)[rows_R].float() for role in site.roles[:-1]])
    if read.correction_DD is not None:
        reading_PRD = reading_PRD @ read.correction_DD.to(reading_PRD)
    found = Channels(site, rows_R, reading_PRD, len(out_FD))
    found.write(out_FD[rows_R].float())
    context.replace(site, found.factors())
    kept_RR = torch.zeros(count, count, dtype=torch.float64, device=out_FD.device)
    target_RD = torch.zeros(count, out_FD.shape[1], dtype=torch.float64, device=out_FD.device)
    tokens = torch.zeros((), dtype=torch.float64, device=out_FD.device)
    for y_ND, x_NF in zip(context.original_width_activations("out"), inputs_of("out"), strict=True):
        kept_NR = x_NF[:, rows_R].float()
        add_gram(kept_RR, kept_NR)
        target_RD += kept_NR.mT @ y_ND.float()
        tokens += len(kept_NR)
    context.all_reduce([kept_RR, target_RD, tokens])
    mirror(kept_RR)
    ridge = RIDGE * float(kept_RR.diagonal().mean())
    kept_RR.diagonal().add_(ridge)
    root_RR = Metric(kept_RR, 0.0).root
    target_RD += ridge * out_FD[rows_R]
    out_RD = torch.cholesky_solve(target_RD.to(root_RR), root_RR)
    found.write(out_RD.float())
    context.replace(site, found.factors())
    found.metrics = read.metric, Metric(kept_RR / tokens, DAMPING)
    return found
