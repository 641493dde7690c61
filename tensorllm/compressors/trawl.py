"""TRAWL: CP or Tucker decomposition of whole matrices stacked along a third mode.

Shapes: I inner width, D model width, M stacked matrices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

from torch import Tensor

from tensorllm.compressors.base import COMPRESSORS, Job, Leaf
from tensorllm.compressors.checks import check_roles, check_seed
from tensorllm.compressors.layer import MatrixStatistics, Site
from tensorllm.errors import UserError
from tensorllm.models.spec import ModelSpec
from tensorllm.registry import one_of
from tensorllm.tensors.cp import cp
from tensorllm.tensors.factors import Factors
from tensorllm.tensors.ranks import check_ranks, tucker_parameters
from tensorllm.tensors.stacking import MATRICES
from tensorllm.tensors.tucker import tucker

# tensorly's defaults for `tucker`, which TRAWL's code uses
SWEEPS = 100
TOLERANCE = 1e-4


@COMPRESSORS.register("trawl")
@dataclass(frozen=True, kw_only=True)
class Trawl(Leaf):
    """Decompose (I, D, M): a layer's QKVO or FFN matrices, or the same matrices of all layers.

    Source: TRAWL, arXiv 2406.17261, section 3 (one layer, segments of layers, or all layers).

    Attributes:
        rank: of the CP decomposition.
        ranks: (R1, R2, R3) of the Tucker decomposition, instead.
        matrices: what is stacked; all must have one shape.
        across_layers: stack the matrices of all the layers into one tensor.
        method: `cp` (alternating least squares, seeded) or `tucker`, both by tensorly.
        seed: of the CP initialisation.
    """

    rank: int | None = None
    ranks: tuple[int, ...] | None = None
    matrices: tuple[str, ...] = ("in", "out")
    across_layers: bool = False
    method: Literal["cp", "tucker"] = "cp"
    seed: int = 0

    source: ClassVar[str] = "https://arxiv.org/abs/2406.17261"

    def __post_init__(self) -> None:
        one_of("method", self.method, ("cp", "tucker"))
        check_seed(self.seed)
        wanted, other = ("rank", "ranks") if self.method == "cp" else ("ranks", "rank")
        if getattr(self, wanted) is None or getattr(self, other) is not None:
            given = {name: getattr(self, name) for name in (wanted, other)}
            got = ", ".join(f"{k} {v}" for k, v in given.items() if v is not None) or "none"
            raise UserError(f"method {self.method!r} needs {wanted}, and no {other}; got {got}")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank must be 1 or more, got {self.rank}")
        object.__setattr__(self, "matrices", check_roles(self.matrices, MATRICES))

    def jobs(self, spec: ModelSpec, layers: Sequence[int]) -> list[Job]:
        groups = [tuple(layers)] if self.across_layers else [(layer,) for layer in layers]
        return [Job(Site(group, self.matrices, "matrices"), self) for group in groups]

    def check(self, shape: tuple[int, ...]) -> None:
        if self.ranks is not None:
            check_ranks(self.ranks, shape)
        # the CP rank of a tensor (I, D, M) is at most the product of its two smaller sizes
        most = prod(sorted(shape)[:2])
        if self.rank is not None and self.rank > most:
            raise UserError(f"rank must be in 1..{most}, got {self.rank}")

    def stored_parameters(self, shape: tuple[int, ...]) -> int:
        if self.ranks is not None:
            return tucker_parameters(shape, dict(enumerate(self.ranks)))
        assert self.rank is not None
        return self.rank * (sum(shape) + 1)

    def decompose(self, w: Tensor, statistics: Sequence[MatrixStatistics] | None = None) -> Factors:
        """Factors of a stack (I, D, M)."""
        self.check(tuple(w.shape))
        if self.ranks is not None:
            ranks = dict(enumerate(self.ranks))
            return tucker(w, ranks, method="tensorly", sweeps=SWEEPS, tol=TOLERANCE)
        assert self.rank is not None
        return cp(w, self.rank, seed=self.seed)
