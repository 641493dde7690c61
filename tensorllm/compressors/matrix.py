"""What strategies share that truncate single matrices, possibly with weighted inputs.

A matrix is treated as its map W (Y outputs, X inputs): role matrices of output projections are
stored transposed. With a root S of the weights of its inputs, W S is truncated and S divided out
again, so that errors along important inputs are the smallest.

Shapes: Y outputs, X inputs, R rank, N sizes of a curve, I and D of a role matrix.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from tensorllm.compressors.allocation import with_whole
from tensorllm.compressors.base import (
    Dimension,
    ErrorCurve,
    Job,
    LayerFit,
    Leaf,
    name_of,
)
from tensorllm.compressors.checks import check_exist, check_roles
from tensorllm.compressors.layer import LayerContext, MatrixStatistics, Site, Size
from tensorllm.errors import UserError
from tensorllm.models.spec import ModelSpec
from tensorllm.options import Value
from tensorllm.tensors.eigen import eigenvalues, leading_eigenvectors
from tensorllm.tensors.factors import Factors, LowRank, low_rank_outline
from tensorllm.tensors.stacking import MATRICES, ROUTED, Geometry, is_output_projection
from tensorllm.tensors.triangular import lower_inverse, raised_cholesky

KEPT = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # default values of a search


class Root(NamedTuple):
    """A root S of the weights of a map's inputs, and its inverse.

    Attributes:
        root_XX: a matrix, or a vector (X) if S is diagonal.
        inverse_XX: its inverse, in the same form.
    """

    root_XX: Tensor
    inverse_XX: Tensor

    def scale(self, w_YX: Tensor) -> Tensor:
        """W S."""
        return w_YX * self.root_XX if self.root_XX.ndim == 1 else w_YX @ self.root_XX

    def unscale(self, v_RX: Tensor) -> Tensor:
        """V S^-1."""
        return v_RX * self.inverse_XX if self.inverse_XX.ndim == 1 else v_RX @ self.inverse_XX


@dataclass(frozen=True, kw_only=True)
class KeptSettings:
    """Settings of how much of each matrix is kept, the same share of all.

    Attributes:
        kept: numbers that the factors store over those of the matrix, in (0, 1).
        rank: the rank itself, instead of kept.
        matrices: which of in, gate, out, q, k, v, o, in mixtures shared.in, experts.in, ...; by
            default all that a layer has.
    """

    kept: float | None = None
    rank: int | None = None
    matrices: tuple[str, ...] | None = None

    size_settings: ClassVar[tuple[tuple[str, ...], ...]] = (("kept", "rank"),)

    def __post_init__(self) -> None:
        if (self.kept is None) == (self.rank is None):
            raise UserError(f"give one of kept and rank, got kept={self.kept}, rank={self.rank}")
        if self.kept is not None and not 0 < self.kept < 1:
            raise UserError(f"kept must be in (0, 1), got {self.kept}")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank must be 1 or more, got {self.rank}")
        if self.matrices is not None:
            object.__setattr__(self, "matrices", check_roles(self.matrices, MATRICES))

    @classmethod
    def search_space(cls, spec: ModelSpec, settings: Mapping[str, Any]) -> dict[str, Dimension]:
        out = {"kept": Dimension(KEPT, (0.0, 1.0), log=False)}
        if "matrices" not in settings:
            out["matrices"] = Dimension(spec.roles)
        return out

    @classmethod
    def settings_at(cls, spec: ModelSpec, point: Mapping[str, Value]) -> dict[str, Any]:
        return kept_settings(point)

    @classmethod
    def budget_settings(cls, spec: ModelSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"rank": 1} | dict(settings)

    def rank_of(self, shape: Sequence[int]) -> int:
        """The rank of a matrix of this shape."""
        if self.rank is not None:
            return self.rank
        assert self.kept is not None
        return max(1, int(self.kept * shape[0] * shape[1] / sum(shape)))

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise a UserError for a rank that a matrix of this shape cannot have."""
        if self.rank is not None and self.rank > min(shape):
            raise UserError(f"rank must be in 1..{min(shape)}, got {self.rank}")

    def stored_parameters(self, shape: tuple[int, ...]) -> int:
        return self.rank_of(shape) * sum(shape)

    def sites(self, spec: ModelSpec, layers: Sequence[int]) -> list[Site]:
        """Every matrix alone, in layers that have it."""
        return matrix_sites(spec, layers, self.matrices)


@dataclass(frozen=True, kw_only=True)
class MatrixSVD(KeptSettings, Leaf):
    """A truncated SVD of each matrix, its inputs weighted by a root that subclasses provide."""

    @abstractmethod
    def root(self, w_YX: Tensor, statistics: MatrixStatistics | None) -> Root:
        """The root of the input weights, float64."""

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> list[Job]:
        return [Job(site, self) for site in self.sites(spec, layers)]

    def decompose(self, w: Tensor, statistics: Sequence[MatrixStatistics] | None = None) -> LowRank:
        w_YX, transposed = as_map(w, statistics)
        root = self.root(w_YX, statistics[0] if statistics else None)
        u_YR, v_RX = truncated(w_YX, root, self.rank_of(w.shape))
        return low_rank(u_YR, v_RX, transposed=transposed, like=w)

    def curve(
        self, site: Site, w: Tensor, statistics: Sequence[MatrixStatistics] | None = None
    ) -> ErrorCurve:
        """Squared error of the weighted map at every rank, relative to its mean square."""
        w_YX, _ = as_map(w, statistics)
        return weighted_curve(w_YX, self.root(w_YX, statistics[0] if statistics else None))

    def outline(self, shape: tuple[int, ...], size: Size) -> Factors:
        return low_rank_outline(shape, size[0])

    def error_of(
        self, w: Tensor, near: Tensor, statistics: Sequence[MatrixStatistics] | None = None
    ) -> float:
        w_YX, _ = as_map(w, statistics)
        lost_YX, _ = as_map(w.double() - near.double(), statistics)
        root = self.root(w_YX, statistics[0] if statistics else None)
        return weighted_error(w_YX, lost_YX, root)

    def at_size(self, site: Site, size: Size) -> Self:
        return replace(self, kept=None, rank=size[0], matrices=site.roles)


@dataclass(frozen=True, kw_only=True)
class MatrixFit(KeptSettings, LayerFit):
    """Base of strategies that fit each matrix of a layer alone, one after the other."""

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> list[Job]:
        """The jobs of the matrices that every token passes through.

        Routed experts are left out: once lower layers are compressed, other tokens reach them.

        Raises:
            UserError: `matrices` names a routed expert's matrix.
        """
        sites = self.sites(spec, sorted(layers))
        routed = [site for site in sites if site.families[0] in ROUTED]
        if routed and self.matrices is not None:
            raise UserError(
                f"{name_of(type(self))} cannot be fitted to {routed[0].families[0]}: experts are "
                "given other tokens once the layers below are compressed; use svd, svd-llm, "
                "expert-tucker or activation-expert-tucker for them"
            )
        return [Job(site, self) for site in sites if site not in routed]

    def rank_at(self, context: LayerContext, site: Site) -> int:
        """The rank that a budget chose for a site, otherwise that of the settings."""
        size = context.sites[site]
        return size[0] if size else self.rank_of(site.shape(context.geometry))

    def curves(self, sites: Sequence[Site], context: LayerContext) -> dict[Site, ErrorCurve]:
        """Squared error at every rank after whitening the original model's inputs.

        The fit itself may use the compressed model's inputs.
        """
        return {
            site: weighted_curve(
                map_of(context.weight(site.roles[0]), site.roles[0]),
                _whitening_of(context, site.roles[0]),
            )
            for site in sites
        }

    def outline(self, site: Site, geometry: Geometry, size: Size) -> Factors:
        rows, columns = site.shape(geometry)
        return low_rank_outline((rows, columns), size[0])

    def rounding_metric(self, context: LayerContext, role: str) -> Tensor:
        width = context.weight(role).shape[1]
        if is_output_projection(role):  # there is no covariance at its outputs
            return torch.eye(width, dtype=torch.float64, device=context.device)
        return context.input_covariance(role)

    def error_of(self, context: LayerContext, role: str, lost_ID: Tensor) -> float:
        w_YX, lost_YX = map_of(context.weight(role), role), map_of(lost_ID, role)
        return weighted_error(w_YX, lost_YX, _whitening_of(context, role))


def _whitening_of(context: LayerContext, role: str) -> Root:
    return whitening(context.input_covariance(role).to(context.device))


def weighted_curve(w_YX: Tensor, root: Root) -> ErrorCurve:
    """Squared error of the weighted map at every rank that saves numbers; size 0 is the matrix.

    Relative to the map's mean square.
    """
    scaled_YX = root.scale(w_YX)
    wide = len(scaled_YX) <= scaled_YX.shape[1]
    gram = scaled_YX @ scaled_YX.mT if wide else scaled_YX.mT @ scaled_YX
    squares = eigenvalues(gram).clamp(min=0).cpu()
    ranks = torch.arange(1, len(squares) + 1)
    whole = float(squares.sum()) or 1.0  # a matrix of zeros has no error at any rank
    error_N = (squares.sum() - squares.cumsum(0)).clamp(min=0) * w_YX.numel() / whole
    curve = ErrorCurve(ranks * sum(w_YX.shape), error_N, ranks[:, None])
    return with_whole(curve, w_YX.numel())


def weighted_error(w_YX: Tensor, lost_YX: Tensor, root: Root) -> float:
    """The cost of an error of a map, in the unit of `weighted_curve`."""
    whole = float(root.scale(w_YX).square().sum())
    return float(root.scale(lost_YX).square().sum()) * w_YX.numel() / whole if whole else 0.0


def whitening(covariance_XX: Tensor, ridge: float = 0.0) -> Root:
    """The Cholesky factor of a covariance, and its inverse.

    If the covariance is not positive definite, its diagonal is raised until it is, as in the
    authors' code.

    Args:
        covariance_XX: of the inputs.
        ridge: always added to the diagonal, relative to the mean variance.

    Raises:
        UserError: the covariance has NaN or Inf.
    """
    mean = float(covariance_XX.diagonal().mean())
    raised_XX = covariance_XX.clone()
    raised_XX.diagonal().add_(ridge * mean)
    root_XX = raised_cholesky(raised_XX, 1e-8 * (mean or 1.0), 2)
    return Root(root_XX, lower_inverse(root_XX))


def matrix_sites(
    spec: ModelSpec, layers: Sequence[int], matrices: Sequence[str] | None
) -> list[Site]:
    """Every matrix alone, in layers that have it; None: all that a layer has."""
    check_exist(matrices or (), spec)
    return [
        Site((layer,), (role,), "matrix")
        for layer in layers
        for name in matrices or spec.roles
        for role in spec.geometry(layer).members(name)
    ]


def kept_settings(point: Mapping[str, Value]) -> dict[str, Any]:
    """The `KeptSettings` of a point of the search space; several matrices are joined by `+`."""
    out: dict[str, Any] = {"kept": float(f"{point['kept']:.6g}")}
    if "matrices" in point:
        out["matrices"] = tuple(str(point["matrices"]).split("+"))
    return out


def as_map(
    w_ID: Tensor, statistics: Sequence[MatrixStatistics] | None = None
) -> tuple[Tensor, bool]:
    """The map (Y, X) of a role matrix, float64, and whether it is transposed."""
    transposed = bool(statistics and statistics[0].reads_rows)
    w_ID = w_ID.double()
    return (w_ID.mT if transposed else w_ID), transposed


def map_of(w_ID: Tensor, role: str) -> Tensor:
    """The map (Y, X) of a role's matrix, float64."""
    return w_ID.double().mT if is_output_projection(role) else w_ID.double()


def truncated(w_YX: Tensor, root: Root, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (Y, R) and (R, X) of the best map of this rank under weighted inputs."""
    scaled_YX = root.scale(w_YX)
    if len(scaled_YX) <= scaled_YX.shape[1]:  # on the smaller side, the root cancels
        u_YR = leading_eigenvectors(scaled_YX @ scaled_YX.mT, rank).to(w_YX)
        return u_YR, u_YR.mT @ w_YX
    v_XR = leading_eigenvectors(scaled_YX.mT @ scaled_YX, rank).to(w_YX)
    return scaled_YX @ v_XR, root.unscale(v_XR.mT)


def low_rank(u_YR: Tensor, v_RX: Tensor, *, transposed: bool, like: Tensor) -> LowRank:
    """The factors of the role matrix, in float32 or wider, with balanced singular values.

    Dividing by the root leaves factors badly scaled along inputs that hardly vary, which would harm
    rounding and training.
    """
    q_YR, left_RR = torch.linalg.qr(u_YR)
    q_XR, right_RR = torch.linalg.qr(v_RX.mT)
    u, s, v = torch.linalg.svd(left_RR @ right_RR.mT)
    u_YR, v_RX = q_YR @ (u * s.sqrt()), (s.sqrt()[:, None] * v) @ q_XR.mT
    left, right = (v_RX.mT, u_YR.mT) if transposed else (u_YR, v_RX)
    dtype = torch.promote_types(like.dtype, torch.float32)
    return LowRank(left.to(dtype).contiguous(), right.to(dtype).contiguous())
