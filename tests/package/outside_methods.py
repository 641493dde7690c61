"""Three compressors as a researcher would bring them: one file outside the package.

`centred` sees weights only and has a kind of factors and a module of its own; `two-sided` sees the
covariances of inputs and of output gradients; `chasing` fits layer after layer itself.
Shapes: I and D of a role matrix, R rank, Y outputs, X inputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tensorllm import COMPRESSORS, UserError
from tensorllm.compressors import Job, LayerFit, Leaf, Site
from tensorllm.compressors.base import Dimension, ErrorCurve
from tensorllm.compressors.layer import LayerContext, LayerResult
from tensorllm.models import ModelSpec
from tensorllm.runtime import SiteModule, runs
from tensorllm.tensors.factors import FACTORS, Factors, LowRank


@FACTORS.register("centred")
@dataclass(frozen=True, eq=False)
class Centred(Factors):
    """The mean row, and what each row adds to it at low rank."""

    mean_D: Tensor
    rest: LowRank

    def dense(self) -> Tensor:
        return self.mean_D.float() + self.rest.dense()

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean_D, **self.rest.tensors()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Centred":
        return cls(tensors["mean"], LowRank.from_tensors(tensors))

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.rest.ranks


@runs(Centred, "matrix")
class CentredModule(SiteModule):
    def input_projection(self, x: Tensor, index: int) -> Tensor:
        return (x @ self.mean)[..., None] + x @ self.v.mT @ self.u.mT

    def output_projection(self, x: Tensor, index: int) -> Tensor:
        return x.sum(-1, keepdim=True) * self.mean + x @ self.u @ self.v


@dataclass(frozen=True, kw_only=True)
class OneRank:
    """A rank for every matrix, and what is asked of all three: jobs, counts, a search space."""

    rank: int
    matrices: tuple[str, ...] = ("q", "out")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank must be 1 or more, got {self.rank}")

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> list[Job]:
        return [Job(Site((i,), (r,), "matrix"), self) for i in layers for r in self.matrices]

    @classmethod
    def search_space(cls, spec: ModelSpec, settings: Mapping[str, Any]) -> dict[str, Dimension]:
        return {"rank": Dimension((2, 8, 24), (1, min(spec.geometry(0).D, spec.geometry(0).F)))}

    @classmethod
    def budget_settings(cls, spec: ModelSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"rank": 1} | dict(settings)

    def at_size(self, site: Site, size: tuple[int, ...]) -> Any:
        return replace(self, rank=size[0], matrices=site.roles)


def curve_of(singular: Tensor, shape: Sequence[int], extra: int = 0) -> ErrorCurve:
    squares = singular.double().square().cpu()
    ranks = torch.arange(1, len(squares) + 1)
    error = (squares.sum() - squares.cumsum(0)).clamp(min=0) / squares.sum()
    return ErrorCurve(ranks * sum(shape) + extra, error, ranks[:, None])


def halves(w: Tensor, rank: int) -> LowRank:
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    return LowRank((u[:, :rank] * s[:rank]).float(), v[:rank].float())


@COMPRESSORS.register("centred")
@dataclass(frozen=True, kw_only=True)
class CentredSVD(OneRank, Leaf):
    """Weights only."""

    source: ClassVar[str] = "https://example.org/centred"

    def decompose(self, w: Tensor, statistics: Any = None) -> Centred:
        mean_D = w.float().mean(0)
        return Centred(mean_D, halves(w.float() - mean_D, self.rank))

    def stored_parameters(self, shape: tuple[int, ...]) -> int:
        return self.rank * sum(shape) + shape[1]

    def curve(self, site: Site, w: Tensor, statistics: Any = None) -> ErrorCurve:
        singular = torch.linalg.svdvals(w.float() - w.float().mean(0))
        return curve_of(singular, w.shape, w.shape[1])


@COMPRESSORS.register("two-sided")
@dataclass(frozen=True, kw_only=True)
class TwoSided(OneRank, Leaf):
    """Sees what its matrices read, and the gradients at their outputs."""

    needs: ClassVar[str] = "gradients"
    source: ClassVar[str] = "https://example.org/two-sided"

    def _roots(self, statistics: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (seen,) = statistics
        out = []
        for covariance in (seen.row_covariance, seen.column_covariance):
            assert covariance is not None, "both were asked for"
            eye = torch.eye(len(covariance), dtype=torch.float64)
            root = torch.linalg.cholesky(covariance + 1e-6 * covariance.diagonal().mean() * eye)
            out += [root, torch.linalg.inv(root)]
        return tuple(out)

    def decompose(self, w: Tensor, statistics: Any = None) -> LowRank:
        rows, rows_inverse, columns, columns_inverse = self._roots(statistics)
        found = halves(rows.mT @ w.double() @ columns, self.rank)
        u, v = rows_inverse.mT @ found.u_IR.double(), found.v_RO.double() @ columns_inverse
        return LowRank(u.float(), v.float())

    def curve(self, site: Site, w: Tensor, statistics: Any = None) -> ErrorCurve:
        rows, _, columns, _ = self._roots(statistics)
        return curve_of(torch.linalg.svdvals(rows.mT @ w.double() @ columns), w.shape)


@COMPRESSORS.register("chasing")
@dataclass(frozen=True, kw_only=True)
class Chasing(OneRank, LayerFit):
    """Fits each matrix to the original's outputs on the inputs that the compressed model gives."""

    source: ClassVar[str] = "https://example.org/chasing"

    def curves(self, sites: Sequence[Site], context: LayerContext) -> dict[Site, ErrorCurve]:
        weights = {site: context.weight(site.roles[0]) for site in sites}
        return {s: curve_of(torch.linalg.svdvals(w.float()), w.shape) for s, w in weights.items()}

    def fit_layer(self, context: LayerContext) -> LayerResult:
        out = {}
        for site, size in context.sites.items():
            (role,) = site.roles
            w_ID = context.weight(role).double()
            backwards = role in ("o", "out")
            w_YX = w_ID.mT if backwards else w_ID
            cross_XX, own_XX = context.shifted_covariances(role)
            eye_XX = torch.eye(len(own_XX), dtype=torch.float64)
            ridge_XX = 1e-4 * own_XX.diagonal().mean() * eye_XX
            map_YX = torch.linalg.solve(own_XX + ridge_XX, (w_YX @ cross_XX + w_YX @ ridge_XX).mT)
            map_YX = map_YX.mT
            out[site] = halves(map_YX.mT if backwards else map_YX, size[0] if size else self.rank)
            context.replace(site, out[site])
        return LayerResult(out)
