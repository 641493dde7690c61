"""LASER: single matrices replaced by their best low-rank approximation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tensorllm.compressors.base import COMPRESSORS, Dimension, ErrorCurve, Job, Leaf
from tensorllm.compressors.checks import check_exist, check_roles, check_seed
from tensorllm.compressors.layer import MatrixStatistics, Site, Size
from tensorllm.errors import UserError
from tensorllm.models.spec import ModelSpec
from tensorllm.options import Value
from tensorllm.registry import one_of
from tensorllm.tensors.blocks import BlockLowRank, block_shape, row_blocks
from tensorllm.tensors.energy import Energy, matrix_energy
from tensorllm.tensors.factors import Factors, low_rank_outline
from tensorllm.tensors.ranks import laser_rank, low_rank_parameters
from tensorllm.tensors.stacking import FEED_FORWARD, MATRICES
from tensorllm.tensors.svd import METHODS, truncated_svd

MOST_BLOCKS = 2**16
RHOS = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


@COMPRESSORS.register("laser", aliases=("laser-svd",))
@dataclass(frozen=True, kw_only=True)
class LaserSVD(Leaf):
    """Rank-r truncation of each chosen matrix, or of each of several blocks of its rows.

    Source: LASER, section 3; blocks: Compress to Impress, arXiv 2510.20800, which clusters rows
    around several subspaces. Here a block is a set of consecutive rows of the role matrix: heads,
    channels.

    Attributes:
        rho: share of the full rank kept, in (0, 1]: r = floor(rho * min(shape)), at least 1; with
            several blocks, of each block's shape.
        rank: r itself, instead of rho.
        matrices: which of in, gate, out, q, k, v, o; in mixtures also shared.in, experts.in, ...
        method: `exact`, `randomized` (oversampled), or `official` as in LASER's code.
        seed: of the randomised methods.
        blocks: how many equal blocks the rows are cut into; each has rank r and its own SVD.
    """

    rho: float | None = None
    rank: int | None = None
    matrices: tuple[str, ...] = ("in",)
    method: Literal["exact", "randomized", "official"] = "exact"
    seed: int = 0
    blocks: int = 1

    source: ClassVar[str] = "https://arxiv.org/abs/2312.13558"
    size_settings: ClassVar[tuple[tuple[str, ...], ...]] = (("rho", "rank"),)

    def __post_init__(self) -> None:
        if (self.rho is None) == (self.rank is None):
            raise UserError(f"give one of rho and rank, got rho={self.rho}, rank={self.rank}")
        if self.rho is not None and not 0 < self.rho <= 1:
            raise UserError(f"rho must be in (0, 1], got {self.rho}")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank must be 1 or more, got {self.rank}")
        if self.blocks < 1:
            raise UserError(f"blocks must be 1 or more, got {self.blocks}")
        one_of("method", self.method, tuple(METHODS))
        check_seed(self.seed)
        object.__setattr__(self, "matrices", check_roles(self.matrices, MATRICES))

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> list[Job]:
        check_exist(self.matrices, spec)
        return [
            Job(Site((layer,), (role,), "matrix"), self)
            for layer in layers
            for name in self.matrices
            for role in spec.geometry(layer).members(name) or (name,)
        ]

    @classmethod
    def search_space(cls, spec: ModelSpec, settings: Mapping[str, Any]) -> dict[str, Dimension]:
        """`rho`; `matrices`: each FFN matrix, or any if there is no FFN; `blocks` on request."""
        out = {}
        if not {"rho", "rank"} & settings.keys():
            out["rho"] = Dimension(RHOS, (0, 1))
        if "matrices" not in settings:
            ffn = tuple(role for role in spec.roles if role in FEED_FORWARD)
            out["matrices"] = Dimension(ffn or spec.roles, names=spec.roles)
        if "blocks" not in settings:
            out["blocks"] = Dimension((1,), (1, MOST_BLOCKS), optional=True)
        return out

    @classmethod
    def settings_at(cls, spec: ModelSpec, point: Mapping[str, Value]) -> dict[str, Any] | None:
        out: dict[str, Any] = {}
        if "rho" in point:
            out["rho"] = float(f"{point['rho']:.6g}")  # samplers give all sixteen digits
        if "matrices" in point:
            out["matrices"] = str(point["matrices"]).split("+")
        if "blocks" in point:
            out["blocks"] = int(point["blocks"])
        return out

    @classmethod
    def budget_settings(cls, spec: ModelSpec, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"rank": 1, "matrices": spec.roles} | dict(settings)

    def check(self, shape: tuple[int, ...]) -> None:
        most = min(block_shape(shape, self.blocks))
        if self.rank is not None and self.rank > most:
            of = "" if self.blocks == 1 else f" of each of {self.blocks} blocks"
            raise UserError(f"rank{of} must be in 1..{most}, got {self.rank}")

    def stored_parameters(self, shape: tuple[int, ...]) -> int:
        own = block_shape(shape, self.blocks)
        return self.blocks * low_rank_parameters(own, self._rank(shape))

    def decompose(self, w: Tensor, statistics: Sequence[MatrixStatistics] | None = None) -> Factors:
        """Factors of a role matrix (I, D)."""
        self.check(tuple(w.shape))
        rank = self._rank(tuple(w.shape))
        found = [
            truncated_svd(block, rank, method=self.method, seed=self.seed)
            for block in row_blocks(w, self.blocks)
        ]
        return found[0] if self.blocks == 1 else BlockLowRank.of(found)

    def curve(
        self, site: Site, w: Tensor, statistics: Sequence[MatrixStatistics] | None = None
    ) -> ErrorCurve:
        rows, columns = w.shape
        each = rows + self.blocks * columns  # numbers per unit of rank
        energies = [matrix_energy(block).energy for block in row_blocks(w, self.blocks)]
        energy = Energy(tuple(w.shape), torch.stack(energies).sum(0))
        curve, sizes_NC = energy.curve(lambda ranks_NC: ranks_NC[:, 0] * each)
        return ErrorCurve(*curve, sizes_NC)

    def outline(self, shape: tuple[int, ...], size: Size) -> Factors:
        one = low_rank_outline(block_shape(shape, self.blocks), size[0])
        return one if self.blocks == 1 else BlockLowRank.of([one] * self.blocks)

    def at_size(self, site: Site, size: Size) -> "LaserSVD":
        return replace(self, rho=None, rank=size[0], matrices=site.roles)

    def covering(self, others: Sequence[Leaf], shape: tuple[int, ...]) -> "LaserSVD | None":
        """The leaf of the largest rank: an exact SVD contains those of all smaller ranks."""
        same = [self, *(leaf for leaf in others if isinstance(leaf, LaserSVD))]
        if len(same) <= len(others) or any(leaf.method != "exact" for leaf in same):
            return None
        if any(leaf.blocks != self.blocks for leaf in same):
            return None
        return replace(self, rho=None, rank=max(leaf._rank(shape) for leaf in same))

    def sliced(self, covering: Factors, shape: tuple[int, ...]) -> Factors:
        """The leading columns and rows."""
        rank, largest = self._rank(shape), covering.tensors()
        u, v = largest["u"][..., :rank], largest["v"][..., :rank, :]
        return type(covering).from_tensors({"u": u, "v": v})

    def _rank(self, shape: tuple[int, ...]) -> int:
        if self.rank is not None:
            return self.rank
        assert self.rho is not None
        return laser_rank(self.rho, block_shape(shape, self.blocks))
