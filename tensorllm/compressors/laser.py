"""LASER: single matrices replaced by their best low-rank approximation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

from torch import Tensor

from tensorllm.compressors.base import COMPRESSORS, Dimension, ErrorCurve, Job, Leaf
from tensorllm.compressors.checks import check_roles, check_seed
from tensorllm.compressors.layer import MatrixStatistics, Site, Size
from tensorllm.errors import UserError
from tensorllm.models.spec import ModelSpec
from tensorllm.options import Value
from tensorllm.registry import one_of
from tensorllm.tensors.energy import matrix_energy
from tensorllm.tensors.factors import Factors, LowRank, low_rank_outline
from tensorllm.tensors.ranks import laser_rank, low_rank_parameters
from tensorllm.tensors.stacking import FEED_FORWARD, MATRICES, family
from tensorllm.tensors.svd import METHODS, truncated_svd

RHOS = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


@COMPRESSORS.register("laser", aliases=("laser-svd",))
@dataclass(frozen=True, kw_only=True)
class LaserSVD(Leaf):
    """Rank-r truncation of each chosen matrix.

    Source: LASER, section 3.

    Attributes:
        rho: share of the full rank kept, in (0, 1]: r = floor(rho * min(shape)), at least 1.
        rank: r itself, instead of rho.
        matrices: which of in, gate, out, q, k, v, o; in mixtures also shared.in, experts.in, ...
        method: `exact`, `randomized` (oversampled), or `official` as in LASER's code.
        seed: of the randomised method.
    """

    rho: float | None = None
    rank: int | None = None
    matrices: tuple[str, ...] = ("in",)
    method: Literal["exact", "randomized", "official"] = "exact"
    seed: int = 0

    source: ClassVar[str] = "https://arxiv.org/abs/2312.13558"

    def __post_init__(self) -> None:
        if (self.rho is None) == (self.rank is None):
            raise UserError(f"give one of rho and rank, got rho={self.rho}, rank={self.rank}")
        if self.rho is not None and not 0 < self.rho <= 1:
            raise UserError(f"rho must be in (0, 1], got {self.rho}")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank must be 1 or more, got {self.rank}")
        one_of("method", self.method, tuple(METHODS))
        check_seed(self.seed)
        object.__setattr__(self, "matrices", check_roles(self.matrices, MATRICES))

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> list[Job]:
        missing = [role for role in self.matrices if family(role) not in spec.roles]
        if missing:
            raise UserError(
                f"matrix {missing[0]!r} does not exist in this architecture; "
                f"it has {', '.join(spec.roles)}"
            )
        return [
            Job(Site((layer,), (role,), "matrix"), self)
            for layer in layers
            for name in self.matrices
            for role in spec.geometry(layer).members(name) or (name,)
        ]

    @classmethod
    def search_space(cls, spec: ModelSpec, settings: Mapping[str, Any]) -> dict[str, Dimension]:
        """`rho`, and `matrices`: each FFN matrix alone, or each one where there is no FFN."""
        out = {}
        if not {"rho", "rank"} & settings.keys():
            out["rho"] = Dimension(RHOS, (0, 1))
        if "matrices" not in settings:
            ffn = tuple(role for role in spec.roles if role in FEED_FORWARD)
            out["matrices"] = Dimension(ffn or spec.roles, names=spec.roles)
        return out

    @classmethod
    def settings_at(cls, spec: ModelSpec, point: Mapping[str, Value]) -> dict[str, Any] | None:
        out: dict[str, Any] = {}
        if "rho" in point:
            out["rho"] = float(f"{point['rho']:.6g}")  # samplers give all sixteen digits
        if "matrices" in point:
            out["matrices"] = str(point["matrices"]).split("+")
        return out

    @classmethod
    def budget_settings(cls, spec: ModelSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"rank": 1, "matrices": spec.roles} | dict(settings)

    def check(self, shape: tuple[int, ...]) -> None:
        if self.rank is not None and self.rank > min(shape):
            raise UserError(f"rank must be in 1..{min(shape)}, got {self.rank}")

    def stored_parameters(self, shape: tuple[int, ...]) -> int:
        return low_rank_parameters(shape, self._rank(shape))

    def decompose(self, w: Tensor, statistics: Sequence[MatrixStatistics] | None = None) -> LowRank:
        """Factors of a role matrix (I, D)."""
        self.check(tuple(w.shape))
        return truncated_svd(w, self._rank(tuple(w.shape)), method=self.method, seed=self.seed)

    def curve(
        self, site: Site, w: Tensor, statistics: Sequence[MatrixStatistics] | None = None
    ) -> ErrorCurve:
        (u, v) = w.shape
        curve, sizes_NC = matrix_energy(w).curve(lambda ranks_NC: ranks_NC[:, 0] * (u + v))
        return ErrorCurve(*curve, sizes_NC)

    def outline(self, shape: tuple[int, ...], size: Size) -> Factors:
        return low_rank_outline(shape, size[0])

    def at_size(self, site: Site, size: Size) -> "LaserSVD":
        return replace(self, rho=None, rank=size[0], matrices=site.roles)

    def covering(self, others: Sequence[Leaf], shape: tuple[int, ...]) -> "LaserSVD | None":
        """The largest rank: the leading columns of an exact SVD are those of every smaller one."""
        same = [self, *(leaf for leaf in others if isinstance(leaf, LaserSVD))]
        if len(same) <= len(others) or any(leaf.method != "exact" for leaf in same):
            return None
        return replace(self, rho=None, rank=max(leaf._rank(shape) for leaf in same))

    def sliced(self, covering: Factors, shape: tuple[int, ...]) -> LowRank:
        """The leading columns."""
        largest, rank = cast(LowRank, covering), self._rank(shape)
        return LowRank(largest.u_IR[:, :rank], largest.v_RO[:rank])

    def _rank(self, shape: tuple[int, ...]) -> int:
        if self.rank is not None:
            return self.rank
        assert self.rho is not None
        return laser_rank(self.rho, shape)
