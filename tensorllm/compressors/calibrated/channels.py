"""An FFN that loses channels: rows of in, gate and out go together, and the rest is fitted anew.

Source: MoDeGPT (arXiv 2408.09632, Algorithm 1) drops channels and refits `out` by Nyström's
formula. Here channels are ordered by what they do to the layer's output, all rows that stay are
fitted on what the compressed model gives the layer, and `refit` moves them with all other factors.
Shapes: F channels, R that stay, D model width, P input projections (in, gate).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from tensorllm.compressors.base import ErrorCurve
from tensorllm.compressors.calibrated.refit import DAMPING, Moving
from tensorllm.compressors.layer import LayerContext, Site
from tensorllm.tensors.kept_rows import KeptRows
from tensorllm.tensors.shared_input import NARROWED, rows_stacking
from tensorllm.tensors.stacking import Geometry
from tensorllm.tensors.weighted import FLOOR, Metric

MULTIPLE = 8  # widths that kernels like
ORDERED = 4  # one batch in so many tells the order of the channels
RIDGE = 1e-3  # of the mean square of a channel: pull of rows of `out` to what they were


def narrowed_site(layer: int, roles: Sequence[str]) -> Site | None:
    """The matrices of a layer's FFN that would become narrower; None where one is missing."""
    for together in NARROWED:
        if set(together) <= set(roles) and ("gate" in together) == ("gate" in roles):
            return Site((layer,), together, rows_stacking(together))
    return None


def is_narrowed(site: Site) -> bool:
    """Whether a site stands for channels that go."""
    return site.roles in NARROWED


def least_stored(geometry: Geometry, site: Site) -> int:
    """Numbers that the fewest channels store."""
    return len(site.roles) * (_step(geometry.F) * geometry.D + geometry.F)


def _step(channels: int) -> int:
    """Widths are multiples of it; at least one is narrower."""
    return min(MULTIPLE, max(1, channels // 2))


def curve(site: Site, context: LayerContext) -> ErrorCurve:
    """What the layer's output loses without the last channels, `out` refitted each time.

    With the covariance of the channels in their order C = L Lᵀ, the best of the first R misses the
    rows after R of Lᵀ W; a row costs by the covariance of the gradient that `out` writes into.
    """
    out_FD = context.weight("out").double()
    covariance_FF = context.input_covariance("out").to(out_FD.device)
    gradient_DD = context.width_covariance(("out",)).to(out_FD)
    order_F = _order(covariance_FF.diagonal(), out_FD, gradient_DD)
    root_FF = Metric(covariance_FF[order_F][:, order_F], FLOOR).root
    missed_FD = root_FF.mT @ out_FD[order_F]
    costs_F = ((missed_FD @ gradient_DD) * missed_FD).sum(1).clamp(min=0)
    left_F = costs_F.flip(0).cumsum(0).flip(0)
    step = _step(len(left_F))
    kept_S = torch.arange(step, len(left_F), step)
    each = len(site.roles) * context.geometry.D
    cost_S = each * kept_S + len(site.roles) * len(left_F)
    return ErrorCurve(cost_S, left_F[kept_S.to(left_F.device)], kept_S[:, None])


def _order(squares_F: Tensor, out_FD: Tensor, gradient_DD: Tensor) -> Tensor:
    """Channels by their mean square times what their row of `out` costs, the largest first."""
    scores_F = squares_F * ((out_FD @ gradient_DD) * out_FD).sum(1)
    return scores_F.argsort(descending=True)


@dataclass(frozen=True, eq=False)
class Read:
    """What the input projections read: its metric, and the correction from the compressed model's
    input to the original's; None: fitted on the original's."""

    metric: Metric
    correction_DD: Tensor | None


class Channels(Moving):
    """The rows that stay, in coordinates in which steps cost about the same in all directions."""

    def __init__(self, site: Site, rows_R: Tensor, reading_PRD: Tensor, channels: int) -> None:
        super().__init__()
        self.site, self.rows_R, self.channels = site, rows_R, channels
        self.reading_PRD = nn.Parameter(reading_PRD)
        self.out_RD = nn.Parameter(reading_PRD.new_zeros(reading_PRD.shape[1:]))
        self.from_DD = torch.eye(reading_PRD.shape[-1]).to(reading_PRD)
        self.from_RR = torch.eye(len(rows_R)).to(reading_PRD)

    @torch.no_grad()
    def write(self, out_RD: Tensor) -> None:
        """Let these rows be those of `out`."""
        self.out_RD.copy_(out_RD)

    @torch.no_grad()
    def balance(self, read: Metric, given_RR: Tensor) -> None:
        """Change coordinates: `read` is the metric of what is read, the other that of channels."""
        root_DD, root_RR = (
            Metric(covariance, DAMPING).root for covariance in (read.covariance_NN, given_RR)
        )
        self.reading_PRD.copy_(self.reading_PRD @ root_DD.to(self.reading_PRD))
        self.out_RD.copy_(root_RR.mT.to(self.out_RD) @ self.out_RD)
        for name, root in (("from_DD", root_DD), ("from_RR", root_RR)):
            eye = torch.eye(len(root)).to(root)
            inverse = torch.linalg.solve_triangular(root, eye, upper=False)
            setattr(self, name, inverse.to(self.out_RD))

    def rows(self) -> list[Tensor]:
        """(R, D) of each role of the site."""
        return [*(self.reading_PRD @ self.from_DD), self.from_RR.mT @ self.out_RD]

    def weights(self, geometry: Geometry) -> dict[str, Tensor]:
        out = {}
        for role, w_RD in zip(self.site.roles, self.rows(), strict=True):
            whole_FD = w_RD.new_zeros(self.channels, w_RD.shape[1])
            out[role] = whole_FD.index_copy(0, self.rows_R, w_RD)
        return out

    @torch.no_grad()
    def factors(self) -> KeptRows:
        each = [number * self.channels + self.rows_R for number in range(len(self.site.roles))]
        size = len(each) * self.channels
        return KeptRows.of(torch.cat(each), torch.cat(self.rows()).float(), size)


def fit_channels(context: LayerContext, site: Site, count: int, read: Read) -> Channels:
    """The channels that matter most, fitted and `put` into the compressed layer.

    Rows of in and gate make up for the input having changed as far as a linear map can; rows of
    `out` are the least squares of the original's output on what the channels give then.

    Args:
        count: of channels that stay.
    """
    corrects = read.correction_DD is not None
    given = context.compressed_inputs if corrects else context.original_inputs
    out_FD = context.weight("out")
    squares_F = torch.zeros(len(out_FD), dtype=torch.float64, device=out_FD.device)
    for x_NF in islice(given("out"), max(1, context.batches // ORDERED)):
        squares_F += x_NF.float().square().sum(0)
    context.add_up([squares_F])
    gradient_DD = context.width_covariance(("out",)).to(squares_F)
    rows_R = _order(squares_F, out_FD.double(), gradient_DD)[:count].sort().values
    reading_PRD = torch.stack([context.weight(role)[rows_R].float() for role in site.roles[:-1]])
    if read.correction_DD is not None:
        reading_PRD = reading_PRD @ read.correction_DD.to(reading_PRD)
    found = Channels(site, rows_R, reading_PRD, len(out_FD))
    found.write(out_FD[rows_R].float())
    context.put(site, found.factors())
    given_RR = torch.zeros(count, count, dtype=torch.float64, device=out_FD.device)
    wanted_RD = torch.zeros(count, out_FD.shape[1], dtype=torch.float64, device=out_FD.device)
    tokens = torch.zeros((), dtype=torch.float64, device=out_FD.device)
    for y_ND, x_NF in zip(context.original_at_width("out"), given("out"), strict=True):
        kept_NR = x_NF[:, rows_R].float()
        given_RR += kept_NR.mT @ kept_NR
        wanted_RD += kept_NR.mT @ y_ND.float()
        tokens += len(kept_NR)
    context.add_up([given_RR, wanted_RD, tokens])
    ridge = RIDGE * float(given_RR.diagonal().mean())
    given_RR.diagonal().add_(ridge)
    root_RR = Metric(given_RR, 0.0).root
    out_RD = torch.cholesky_solve(wanted_RD + ridge * out_FD[rows_R].double(), root_RR)
    found.write(out_RD.float())
    context.put(site, found.factors())
    found.balance(read.metric, given_RR / tokens)
    return found
